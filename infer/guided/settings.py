"""What a user says about guides; no JAX, so that help is quick."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """How a reward model steers decoding, token by token; what comes out is another distribution than the model's.

    Attributes:
      guide: folder of a reward model with the same tokenizer; none decodes without a guide.
      guided_by: `ivo` weighs the likeliest tokens by what a value model expects of them (`train value`, `train
        value-rounds`); `tvd` asks a process reward model where the policy is unsure (`train prm`).
      guide_beta: of ivo, how much a score weighs.
      guide_threshold: of tvd, the model's confidence below which the guide is asked.
      guide_width: likeliest tokens that are judged.
    """

    guide: str | None = None
    guided_by: Literal["ivo", "tvd"] = "ivo"
    guide_beta: float = 4.0
    guide_threshold: float = 0.6
    guide_width: int = 4
