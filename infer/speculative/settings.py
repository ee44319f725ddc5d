"""What a user may ask of speculative decoding; imports no JAX, so that commands can show it at once."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """How to decode several tokens a step.

    Attributes:
      drafter: `lookup`, `aded`, `self` for the model's own master at fewer bits, or the folder of a drafter or of a
        smaller model with the same tokenizer; none decodes plainly.
      draft_bits: the width that drafts, for `drafter self`.
      corpus: text file whose tri-grams ADED knows from the beginning.
      verifier: which drafts are taken. `coupled` gives the very tokens of plain decoding; `rejection` and `k-seq` keep
        its distribution; `judge` takes more drafts than it, and what comes out is another distribution. `auto` is
        `coupled`.
      judge: folder of a trained judge, for `verifier judge`.
      judge_threshold: a draft is taken if the judge finds it good with more than this probability.
      draw: how drafts are drawn (`draw.py`); `auto` is what suits the verifier.
      shape: of the drafts. `auto` is a growing tree for EAGLE, Jakiro and ADED and a chain for the others.
      drafts: tokens of a chain.
      chains: of a small model, side by side.
      nodes: of a growing tree, the root included.
      beam: nodes that are read at a level.
      levels: of a growing tree.
      stop_rule: end a draft early, `confidence` when the drafter is not sure, `head` when a trained head expects a
        refusal; for Kangaroo and small models.
      eta: the probability below which it is not sure.
      stop_head: folder of a trained acceptance head, for `stop_rule head`.
      stop_threshold: end when some draft is refused with more than this probability.
    """

    drafter: str | None = None
    draft_bits: int | None = None
    corpus: str | None = None
    verifier: Literal["auto", "coupled", "rejection", "k-seq", "judge"] = "auto"
    judge: str | None = None
    judge_threshold: float = 0.5
    draw: Literal["auto", "mode", "shared", "independent", "without_replacement"] = "auto"
    shape: Literal["auto", "chain", "dynamic", "static"] = "auto"
    drafts: int = 6
    chains: int = 1
    nodes: int = 60
    beam: int = 10
    levels: int = 6
    stop_rule: Literal["none", "confidence", "head"] = "none"
    eta: float = 0.6
    stop_head: str | None = None
    stop_threshold: float = 0.3

    def __post_init__(self):
        for name in ("drafts", "chains", "beam", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"speculation: {name}={getattr(self, name)}; expected at least 1.")
        if self.nodes < 2:
            raise ValueError(f"speculation: nodes={self.nodes}; expected at least 2, the root and a guess.")
        for name in ("eta", "stop_threshold", "judge_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"speculation: {name}={getattr(self, name)}; expected a probability.")
        if (self.drafter == "self") != (self.draft_bits is not None):
            raise ValueError(
                f"speculation: drafter={self.drafter!r}, draft_bits={self.draft_bits}; expected both 'self' and the "
                "width that drafts, or neither."
            )
        for folder, name, wanted in (("stop_head", "stop_rule", "head"), ("judge", "verifier", "judge")):
            if getattr(self, folder) is not None and getattr(self, name) != wanted:
                raise ValueError(
                    f"speculation: {folder}={getattr(self, folder)!r} with {name}={getattr(self, name)!r}; expected "
                    f"{wanted!r}, or nobody would ask it."
                )
