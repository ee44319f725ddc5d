"""`jaxaroo train resnet20` and `train ghostnet`: the vision models of the compact-model papers, on CIFAR-10."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

SUMMARIES = {
    "resnet20": "Train ResNet-20 on CIFAR-10 at several bit widths at once, from a float network.",
    "ghostnet": "Train GhostNetV3 on CIFAR-10, taught by a ResNet if there is one, and fold its branches.",
}


def vision_command(kind: str) -> Callable[..., int]:
    """The command with all its settings; made when needed, since it imports JAX.

    Args:
      kind: a key of `SUMMARIES`.
    """
    from ..train.vision import GhostOptions, ResNetOptions, VisionConfig

    of_kind: Any = {"resnet20": ResNetOptions, "ghostnet": GhostOptions}[kind]

    def command(
        *,
        settings: Annotated[VisionConfig, tyro.conf.arg(name="")],
        options: Annotated[of_kind, tyro.conf.arg(name="")] = of_kind(),  # type: ignore[valid-type]
    ) -> int:
        """Train.

        Args:
          settings: of the run.
          options: of this kind of network.
        """
        return _go(kind, settings, options)

    command.__doc__ = (command.__doc__ or "").replace("Train.", SUMMARIES[kind], 1)
    return command


def train_resnet20() -> int:
    """Train ResNet-20 on CIFAR-10 at several bit widths at once, from a float network."""
    raise AssertionError("`main` puts what `vision_command` makes in this place")


def train_ghostnet() -> int:
    """Train GhostNetV3 on CIFAR-10, taught by a ResNet if there is one, and fold its branches."""
    raise AssertionError("`main` puts what `vision_command` makes in this place")


# ----------------------------------------------------------------------------------------------------------- private
def _go(kind: str, settings: Any, options: Any) -> int:
    """Train, and say where the run stands; the exit status of one that was stopped is that of its signal."""
    from ..train.metrics import read_records
    from ..train.vision import run

    outcome = run(kind, settings, options, progress=True)  # type: ignore[arg-type]
    if not outcome.finished:
        again = f"jaxaroo train {kind} ... --out {settings.out}"
        print(f"stopped at step {outcome.step}; go on with the same command, {again}", file=sys.stderr)
        return 128 + (outcome.signal or 15)
    for folder in (settings.out / name for name in ("float", "joint", "ghost")):
        if found := read_records(folder / "evaluation.jsonl"):
            shares = [f"{name.replace('top1_', '')} {value:.4f}" for name, value in found[-1].items() if name != "step"]
            print(f"{folder.name}: right of the test images: {', '.join(shares)}")
            print(f"wrote {folder / 'model'}, curves in {folder / 'curves.png'}", file=sys.stderr)
    return 0
