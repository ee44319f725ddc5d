"""`jaxaroo train rl`: a policy answers, its answers are rewarded, and it learns from them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..infer.speculative.settings import SpeculationConfig
from . import critique
from .output import UsageError
from .rounds import REWARDS, answered, need_answers, need_reward, read_problems, score_answers

CHECKED = 10_000  # problems of the embedded task whose length is looked at before a run: seconds
SUMMARIES = {"rl": "Train a policy on rewards of its own answers (GRPO, PPO, RLOO, TEMPO ...)."}


def rl_command(args: list[str]) -> Callable[..., int]:
    """The command with all its settings, those of `--config` as defaults; made when needed, since it imports JAX.

    Args:
      args: the command line behind its name.
    """
    from ..train.algorithms import RlOptions
    from ..train.config import build, read_settings
    from ..train.rl import RlConfig
    from .train import value_of

    config = value_of("--config", args)
    needed: dict[str, Any] = dict.fromkeys(("model", "data", "out"), tyro.MISSING)
    default = build(RlConfig, needed | (read_settings(RlConfig, Path(config)) if config else {}))

    def command(
        *,
        settings: Annotated[RlConfig, tyro.conf.arg(name="")] = default,
        options: Annotated[RlOptions, tyro.conf.arg(name="")] = RlOptions(),
        speculation: Annotated[SpeculationConfig, tyro.conf.arg(name="")] = SpeculationConfig(),
        speculate: Literal["auto", "on", "off"] = "auto",
        config: Path | None = None,
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> int:
        """Train.

        Args:
          settings: of the run.
          options: the algorithm and its rewards.
          speculation: draft answers, and let the policy judge them: by the rule `coupled`, under which they are the
            same. So this may differ from stop to stop.
          speculate: whether to draft; auto does so while it is faster than plain decoding.
          config: YAML file of settings of the run; what is given here as well wins.
          coordinator: HOST:PORT of process 0, when a run of several processes is not started by SLURM or on a TPU pod.
          num_processes: how many take part.
          process_id: which of them this is.
        """
        from ..sharding.mesh import start_processes

        start_processes(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
        return _go(settings, options, speculation, speculate)

    command.__doc__ = (command.__doc__ or "").replace("Train.", SUMMARIES["rl"], 1)
    return command


def train_rl() -> int:
    """Train a policy on rewards of its own answers (GRPO, PPO, RLOO, TEMPO ...)."""
    raise AssertionError("`main` puts what `rl_command` makes in this place")


def make_online(settings: Any, options: Any, speculation: Any = None, speculate: Any = "auto") -> Any:
    """Problems, the decode engine as sampler, rewards and evaluation, for `train.rl.run_rl`.

    The engine is made at the first call and takes new weights at every further one. Each problem of a step has a seed
    of its own, made of the run's, the step and the problem; its answers are that seed's samples.

    Args:
      settings: `train.rl.RlConfig`.
      options: `train.algorithms.RlOptions`; each of its rewards becomes a function.
      speculation: `SpeculationConfig`; answers are drafted if it names a drafter.
      speculate: as for the engine.
    """
    from ..infer.engine import Engine
    from ..infer.sampling import Sampling
    from ..infer.speculative.load import load_speculation
    from ..train.labels.monte_carlo import step_seed
    from ..train.rl import Online, read_origin

    origin = read_origin(settings)
    tokenizer = origin.tokenizer
    drafting = None if speculation is None else load_speculation(speculation, origin.config, tokenizer)
    if drafting is not None and drafting.verifier.name != "coupled":
        raise ValueError(
            f"train rl: verifier {drafting.verifier.name}; expected coupled, under which drafts change no answer."
        )
    size, read = _problems_of(settings, options, settings.data)
    tests = _tests(settings, options)
    if any(name in ("outcome", "truthrl") for name in options.reward) and size is not None:
        need_answers(settings.data, [read(i) for i in range(size)])
    # Now, for a run that ends at step 300 could not be gone on with; of problems without end those that it will ask.
    asked = min(settings.steps * settings.groups, CHECKED) if size is None else size
    _check_lengths(settings, tokenizer, settings.data, [read(i) for i in range(asked)])
    _check_lengths(settings, tokenizer, settings.test or settings.data, tests)
    engines: list[Engine] = []

    def serve(policy: Any) -> Engine:
        if engines:
            engines[0].update_weights(policy.params)
        else:
            sizes: Any = dict(max_len=settings.max_length, max_seqs=settings.max_seqs)
            how: Any = dict(logprobs_mode="processed", speculation=drafting, speculate=speculate)
            engines.append(Engine(policy, tokenizer, **how, **sizes))
        return engines[0]

    def sample(policy: Any, problems: Sequence[Mapping[str, Any]], step: int, first: int) -> list[list[Any]]:
        ask: Any = dict(n=settings.samples, temperature=settings.temperature, max_tokens=settings.max_new_tokens)
        seeds = [step_seed(settings.seed, f"{i}:{problem['id']}", step) for i, problem in enumerate(problems, first)]
        each = [Sampling(**ask, seed=seed, logprobs=0) for seed in seeds]
        results = serve(policy).generate([p["prompt"] for p in problems], each, raise_on_error=True)
        return [[_sampled(result, o) for o in result.outputs] for result in results]

    def measure(policy: Any) -> dict[str, float]:
        greedy = Sampling(temperature=0.0, max_tokens=settings.max_new_tokens)
        results = serve(policy).generate([t["prompt"] for t in tests], greedy, raise_on_error=True)
        if options.reward == ("critique",):
            answers = [[_sampled(result, o) for o in result.outputs] for result in results]
            return {name.removeprefix("critique/"): value for name, value in rewards[0](tests, answers).metrics.items()}
        rows = [
            answered(test, [o.text or "" for o in result.outputs], [o.finish_reason for o in result.outputs])
            for test, result in zip(tests, results, strict=True)
        ]
        return {"greedy_accuracy": sum(row["outcomes"][0] for row in rows) / len(rows)}

    rewards: list[Any] = [make_reward(name, settings, options) for name in options.reward]
    return Online(size, read, sample, rewards, measure if tests else None)


def make_reward(name: str, settings: Any, options: Any) -> Callable[..., Any]:
    """A reward by its name: `outcome`, `truthrl`, `critique`, or the folder of a reward model.

    What a reward model is not asked about, an answer that was cut or has no final answer, is worth 0; what is too long
    for it has no reward.
    """
    if name == "outcome":
        return lambda problems, answers: [
            [float(outcome or 0) for outcome in row["outcomes"]] for row in _judged(problems, answers)
        ]
    if name == "truthrl":
        return lambda problems, answers: _truthrl(problems, answers, options.abstention)
    if name == "critique":
        return critique.make_reward(settings, options.critique)
    need_reward("rl", name)
    return _Scores(Path(name), settings.dtype, options.aggregate, options.score_batch)


# ----------------------------------------------------------------------------------------------------------- private
class _Scores:
    """Rewards by a reward model, which is read when it is first asked."""

    def __init__(self, folder: Path, dtype: Any, aggregate: str, batch: int):
        self.folder, self.dtype, self.aggregate, self.batch = folder, dtype, aggregate, batch
        self.loaded: Any = None

    def __call__(self, problems: Sequence[Any], answers: Sequence[Any]) -> list[list[float | None]]:
        from ..models.reward import load
        from ..models.tokenizer import load_tokenizer

        if self.loaded is None:
            self.loaded = load(self.folder, dtype=self.dtype), load_tokenizer(self.folder)
        (model, tokenizer), rows = self.loaded, _judged(problems, answers)
        found = score_answers(model, tokenizer, rows, self.aggregate, batch=self.batch)
        worth = lambda value, whole: value if whole or value is None else 0.0
        return [[*map(worth, each, row["whole"])] for each, row in zip(found, rows, strict=True)]


def _judged(problems: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Which answers are whole, and which right."""
    reasons = lambda each: ["stop" if a.ended else "length" for a in each]
    return [
        answered(dict(problem), [a.text for a in each], reasons(each))
        for problem, each in zip(problems, answers, strict=True)
    ]


def _truthrl(problems: Any, answers: Any, abstention: str) -> list[list[float | None]]:
    """An answer that says it does not know is neither right nor wrong, whatever else it says."""
    from ..train.rewards.truthrl import truthrl

    found, said = [], abstention.strip().casefold()
    for row, each in zip(_judged(problems, answers), answers, strict=True):
        verdicts = []
        for answer, right in zip(each, row["outcomes"], strict=True):
            lines = answer.text.strip().casefold().splitlines()
            abstained = answer.ended and bool(lines) and said in lines[-1]
            verdicts.append("abstained" if abstained else "right" if right else "wrong")
        found.append(truthrl(verdicts).tolist())
    return found


def _problems_of(settings: Any, options: Any, data: str, split: Any = "train") -> tuple[int | None, Any]:
    """What there is to answer: problems, or attempts to criticise."""
    if options.reward == ("critique",):
        return critique.read_attempts(data, settings.arithmetic, options.critique, settings.seed, split)
    return read_problems(data, settings.arithmetic, split)


def _sampled(result: Any, output: Any) -> Any:
    from ..train.rollouts import Sampled

    said = [token.logprob for token in output.logprobs or ()]
    return Sampled(result.prompt_token_ids, output.token_ids, output.finish_reason == "stop", output.text or "", said)


def _tests(settings: Any, options: Any) -> list[dict[str, Any]]:
    """Problems of evaluations; none if there are to be none."""
    if not settings.evaluate_every or not settings.tested:
        return []
    if settings.test is None and settings.data != "builtin:arithmetic":
        raise UsageError("train rl: --evaluate-every without --test; expected a file of problems to measure by.")
    size, read = _problems_of(settings, options, settings.test or settings.data, "test")
    rows = [read(i) for i in range(settings.tested if size is None else min(settings.tested, size))]
    if options.reward != ("critique",):
        need_answers(settings.test or settings.data, rows)
    return rows


def _check_lengths(settings: Any, tokenizer: Any, data: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """That a prompt and its answer fit."""
    most = settings.max_length - settings.max_new_tokens
    for i, row in enumerate(rows):
        prompt = row["prompt"]
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
        if len(ids) > most:
            raise ValueError(
                f"train rl: row {i} of {data} has a prompt of {len(ids)} tokens; expected at most {most}, to leave "
                f"{settings.max_new_tokens} for an answer. Raise --max-length, lower --max-new-tokens, or leave it out."
            )


def _go(settings: Any, options: Any, speculation: Any, speculate: Any) -> int:
    import dataclasses

    from ..train.rl import resolve, run_rl

    absolute = lambda name: name if name in REWARDS["rl"] else str(Path(name).absolute())
    settings = resolve(settings)
    options = dataclasses.replace(options, reward=tuple(map(absolute, options.reward)))
    if actor := options.critique.actor:
        named = dataclasses.replace(options.critique, actor=str(Path(actor).absolute()))
        options = dataclasses.replace(options, critique=named)
    outcome = run_rl(settings, options, make_online(settings, options, speculation, speculate), progress=True)
    if outcome.finished:
        print(
            f"step {outcome.step}: wrote {settings.out / 'model'}, curve in {settings.out / 'reward.png'}",
            file=sys.stderr,
        )
        return 0
    same = f"jaxaroo train rl ... --out {settings.out}"
    print(f"stopped at step {outcome.step}; go on with the same command, {same}", file=sys.stderr)
    return 128 + (outcome.signal or 15)
