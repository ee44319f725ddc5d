"""From settings to a guide: a reward model's folder, and how it steers."""

from pathlib import Path

from ...models import hf, reward
from .settings import GuideConfig
from .value_guided import Guidance, ivo, tvd


def load_guidance(cfg: GuideConfig, dtype: hf.DType | None = None) -> Guidance | None:
    """Read the guide; None where no folder is named.

    Args:
      cfg: what the user asks for.
      dtype: of its weights; as for `hf.load`.

    Raises:
      CheckpointError: for a folder that holds no reward model.
      ValueError: for settings out of range, or a reward model that cannot judge tokens.
    """
    if cfg.guide is None:
        return None
    model = reward.load(Path(cfg.guide), dtype=dtype)
    if cfg.guided_by == "ivo":
        return ivo(model, beta=cfg.guide_beta, width=cfg.guide_width)
    return tvd(model, threshold=cfg.guide_threshold, width=cfg.guide_width)
