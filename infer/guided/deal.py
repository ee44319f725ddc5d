"""Decoding by a reward function of the user's, which looks ahead (DeAL, Huang et al., 2402.06147).

    score = log pi(answer so far) + weight * reward(prompt, answer so far and what greedy decoding would add to it)

Beam search over pieces of a few tokens. The reward is a plain Python function of two texts, called between pieces; it
may parse, count, compile or call another model. With weight 0 the likeliest answers are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..engine import Engine
from ..requests import prompt_ids
from ..sampling import Sampling
from .step_beam import Partial, search

Reward = Callable[[Any, str], float]


def deal(
    engine: Engine,
    prompts: Sequence[Any],
    reward: Reward,
    sampling: Sampling,
    *,
    weight: float = 1.0,
    look_ahead: int = 0,
    beams: int = 4,
    expand: int = 4,
    rounds: int = 16,
    progress: bool = False,
) -> list[list[Partial]]:
    """Answer prompts, keeping what the function rewards.

    Args:
      engine: the policy's, with its tokenizer.
      prompts: texts, messages or token ids.
      reward: (prompt, answer) -> a number, higher is better; the answer may be unfinished.
      sampling: of one piece; `max_tokens` is its length.
      weight: of the reward beside the log-probability, in nats.
      look_ahead: tokens that greedy decoding adds before the reward is asked; they are not kept.
      beams: as for `search`.
      expand: as for `search`.
      rounds: pieces of an answer at most.
      progress: show a bar.

    Returns:
      As `search`.
    """
    if look_ahead < 0 or sampling.max_tokens is None:
        raise ValueError(
            f"deal: look_ahead={look_ahead}, max_tokens={sampling.max_tokens}; expected 0 or more, and a length."
        )
    tokenizer: Any = engine.tokenizer
    ahead = Sampling(temperature=0.0, max_tokens=look_ahead or 1, stop=sampling.stop, ignore_eos=sampling.ignore_eos)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]

    def judge(grown: Sequence[tuple[int, Partial]]) -> list[float]:
        texts = [tokenizer.decode(p.token_ids) for _, p in grown]
        unfinished = [i for i, (_, p) in enumerate(grown) if look_ahead and not p.ended]
        asked = [[*ids[grown[i][0]], *grown[i][1].token_ids] for i in unfinished]
        for i, result in zip(unfinished, engine.generate(asked, ahead) if asked else [], strict=True):
            if result.error is None:
                texts[i] = tokenizer.decode([*grown[i][1].token_ids, *result.outputs[0].token_ids])
        return [p.logprob + weight * float(reward(prompts[q], t)) for (q, p), t in zip(grown, texts, strict=True)]

    return search(engine, prompts, sampling, judge, beams=beams, expand=expand, rounds=rounds, progress=progress)
