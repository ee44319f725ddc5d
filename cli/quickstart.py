"""`jaxaroo quickstart`: every pillar at work on models trained meanwhile, and a page that shows what came of it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .output import UsageError, write_rows, write_whole

Name = Literal["policies", "rewards", "improve", "bits", "drafts"]
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # programs that run a few times


def quickstart_command(call: Callable[[list[str]], int]) -> Callable[..., int]:
    """The command, which runs others.

    Args:
      call: a command line without its first word -> its status.
    """

    def command(*, out: Path = Path("quickstart-out"), only: tuple[Name, ...] = (), smoke: bool = False) -> int:
        """Train small models from nothing, judge their steps, improve, shrink and speed them up.

        All of it is done by commands that can be repeated by hand, on the embedded task of word problems, without a
        download; report.html shows what came of it. What was stopped goes on with the same command.

        Args:
          out: folder for models, data and the page; what was left there is gone on with.
          only: these stages alone; they need what those before them left.
          smoke: as little as can be, to see that everything runs.
        """
        return _quickstart(out, only, smoke, call)

    return command


def quickstart() -> int:
    """Train small models from nothing, judge their steps, improve, shrink and speed them up."""
    raise AssertionError("`main` puts what `quickstart_command` makes in this place")


# ----------------------------------------------------------------------------------------------------------- private
def _quickstart(out: Path, only: tuple[str, ...], smoke: bool, call: Callable[[list[str]], int]) -> int:
    from . import report, stages

    settings = out / "quickstart.json"
    if out.exists() and not settings.exists() and any(out.iterdir()):
        raise FileExistsError(f"quickstart: {out} holds other files; expected a new folder. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if settings.exists() and (then := json.loads(settings.read_text(encoding="utf-8"))["smoke"]) != smoke:
        raise UsageError(f"quickstart: {out} was begun {'with' if then else 'without'} --smoke; go on in the same way.")
    write_whole(settings, json.dumps({"smoke": smoke}) + "\n")
    sizes = stages.SMOKE if smoke else stages.Sizes()
    flags = os.environ.get("XLA_FLAGS", "")
    if smoke and "optimization_level" not in flags:  # before any of its commands starts JAX
        os.environ["XLA_FLAGS"] = f"{flags} {CHEAP}".strip()
    _questions(out / "questions.jsonl", sizes.drafted)
    every = stages.stages(out, sizes)
    again = f"the same command goes on: jaxaroo quickstart --out {out}{' --smoke' if smoke else ''}"
    try:
        status = stages.run([stage for stage in every if not only or stage.name in only], out, call)
    except KeyboardInterrupt:
        status = 130
    if status:
        print(f"\nquickstart: stopped; {again}", file=sys.stderr)
        return status
    print(f"\nwrote {report.write(out, every)}: open it in a browser", file=sys.stderr)
    return 0


def _questions(path: Path, number: int) -> None:
    """Test problems as `bench speculative` reads them."""
    from ..train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
    from .stages import TASK

    if not path.exists():
        examples = ArithmeticExamples(ArithmeticConfig(**TASK), "test", number)
        write_rows(path, ({"prompt": examples[i]["prompt"]} for i in range(len(examples))))
