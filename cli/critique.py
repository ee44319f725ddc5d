"""`--reward critique` of `jaxaroo train rl`: a critic judges attempts, and an actor refines them with its help."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .label import joiner_of, read_solutions, solution_text
from .rounds import answered

Row = dict[str, Any]


def read_attempts(
    data: str, arithmetic: Any, cfg: Any, seed: int, split: Any = "train"
) -> tuple[int | None, Callable[[int], Row]]:
    """How many attempts there are, None for no end, and how to read one as a problem for a critic.

    A problem has id, prompt (what the critic is asked), question (the prompt of the attempt itself), attempt, correct,
    and where it is known answer.

    Args:
      data: rows of `label sample`, or others with prompt, `steps` or `completion`, and `outcome` or `answer`; or
        builtin:arithmetic, half of whose solutions have a slip in them.
      arithmetic: how hard the embedded task's problems are.
      cfg: `train.rewards.critique.CritiqueConfig`.
      seed: of the slips.
      split: of the embedded task.

    Raises:
      ValueError: for a row of which nobody knows whether it is right; in stage 2 for one without an answer.
    """
    from ..infer.evaluate import final_answer, known_answer, same_answer
    from ..train.rewards.critique import ask_critic

    def problem(i: int, question: Any, attempt: str, correct: bool, answer: str | None) -> Row:
        row = {"id": str(i), "prompt": ask_critic(question, attempt, cfg), "question": question, "attempt": attempt}
        return row | {"correct": correct} | ({} if answer is None else {"answer": answer})

    if data == "builtin:arithmetic":
        from ..train.labels.truth import ArithmeticSolutions, SolutionsConfig

        made = ArithmeticSolutions(SolutionsConfig(problems=arithmetic, seed=seed), split)

        def of(i: int) -> Row:
            row = made[i]
            return problem(i, row["prompt"], "\n".join(row["steps"]), bool(row["outcome"]), row["answer"])

        return None, of
    rows, problems = read_solutions(Path(data), instead="completion"), []
    between = joiner_of(rows, None)
    for i, row in enumerate(rows):
        prompt, attempt = row["prompt"], solution_text(row, between)
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise ValueError(
                f"{data}: row {i} has the prompt {prompt!r:.60}; expected a text, or messages with `content`."
            )
        answer, outcome = row.get("answer"), row.get("outcome")
        if isinstance(answer, str) and known_answer(answer) is None and (outcome is None or cfg.stage == 2):
            found = f"row {i} has the `answer` {answer!r:.60}"
            raise ValueError(f"{data}: {found}; expected a number or words, or no answer would ever be right.")
        if outcome is None and isinstance(answer, str):
            outcome = same_answer(final_answer(attempt), known_answer(answer))
        if outcome not in (0, 1) or (cfg.stage == 2 and not isinstance(answer, str)):
            wanted = "an `answer` in text" if cfg.stage == 2 else "`outcome`, 0 or 1, or else an `answer` in text"
            raise ValueError(f"{data}: row {i} has columns {sorted(row)}; expected {wanted}, for --reward critique.")
        problems.append(problem(i, prompt, attempt, bool(outcome), answer))
    return len(problems), problems.__getitem__


def make_reward(settings: Any, cfg: Any) -> Callable[[Sequence[Row], Sequence[Sequence[Any]]], Any]:
    """The rewards of critiques; in stage 2 the actor is read when it is first asked.

    An answer that could not be asked for, because critique and question together are too long for the actor, is not
    right; `critique/too_long` says how many there are.

    Args:
      settings: `train.rl.RlConfig`.
      cfg: `train.rewards.critique.CritiqueConfig`.
    """
    from ..infer.sampling import Sampling
    from ..train.rewards.critique import ask_actor, critique, read_verdict
    from ..train.rl import Rewarded

    engines: list[Any] = []

    def actor() -> Any:
        from ..infer.engine import Engine
        from ..models.hf import load
        from ..models.tokenizer import load_tokenizer

        if not engines:
            model = load(cfg.actor, dtype=settings.dtype)
            engines.append(Engine(model, load_tokenizer(Path(cfg.actor)), max_seqs=settings.max_seqs))
        return engines[0]

    def refined(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> tuple[list[bool], int]:
        """Which answers are right after their critiques, and how many could not be asked for."""
        if not pairs:
            return [], 0
        asked = [ask_actor(p["question"], p["attempt"], text, cfg) for p, text in pairs]
        results = actor().generate(asked, Sampling(temperature=0.0, max_tokens=cfg.refine_tokens))
        right = []
        for (p, _), result in zip(pairs, results, strict=True):
            texts, reasons = [[getattr(o, name) or "" for o in result.outputs] for name in ("text", "finish_reason")]
            right.append(any(answered({"answer": p["answer"]}, texts, reasons)["outcomes"]))
        return right, sum(result.error is not None for result in results)

    def reward(problems: Sequence[Row], answers: Sequence[Sequence[Any]]) -> Rewarded:
        pairs = [(p, a) for p, each in zip(problems, answers, strict=True) for a in each]
        verdicts = [read_verdict(a.text, cfg) if a.ended else None for _, a in pairs]
        malformed, better, metrics = [v is None for v in verdicts], None, {}
        if cfg.stage == 2:
            whole = [i for i, bad in enumerate(malformed) if not bad]
            right, long = refined([(pairs[i][0], pairs[i][1].text) for i in whole])
            better = [False] * len(pairs)
            for i, ok in zip(whole, right, strict=True):
                better[i] = ok
            metrics["too_long"] = long / len(pairs)
        values, told = critique([bool(v) for v in verdicts], [p["correct"] for p, _ in pairs], malformed, better, cfg)
        flat, metrics = iter(values.tolist()), told | metrics
        return Rewarded(
            [[next(flat) for _ in each] for each in answers], {f"critique/{k}": v for k, v in metrics.items()}
        )

    return reward


# ----------------------------------------------------------------------------------------------------------- private
def _is_chat(prompt: Any) -> bool:
    """Messages, the last of which has words."""
    return bool(isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and "content" in prompt[-1])
