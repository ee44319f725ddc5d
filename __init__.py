"""jaxaroo trains and runs the models that make reasoning cheap and checkable, in JAX.

Process reward models, speculative drafters, multi-precision networks and preference objectives, for TPU pods, one GPU
host or a CPU. The public face is four names, imported when first touched, so that `import jaxaroo` stays instant and
never starts a JAX backend:

  load      read a Hugging Face checkpoint folder (`models/hf.py`)
  logits    the logits of whole sequences (`models/decoder.py`)
  Engine    generate text (`infer/engine.py`)
  Sampling  how to choose the next token (`infer/sampling.py`)

Everything else is imported from its file: `from jaxaroo.models.decoder import DecoderConfig`. Imports point down only:
`sharding <- jaxlib_ext <- models <- {train, infer} <- cli` (`tests/test_architecture.py` holds it).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .infer.engine import Engine
    from .infer.sampling import Sampling
    from .models.decoder import logits
    from .models.hf import load

__version__ = "0.1.0"
__all__ = ["Engine", "Sampling", "load", "logits"]

_HOME = {"Engine": ".infer.engine", "Sampling": ".infer.sampling", "load": ".models.hf", "logits": ".models.decoder"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
