"""Train and run the models that make reasoning cheap and checkable.

Results go to standard output, progress and errors to standard error; the exit status is 0, 1 for a failure that the
message explains, 2 for a misused command, 130 after Ctrl-C. With --dry-run a command reads and checks its settings and
inputs, says what it would do, and writes nothing; with --json it prints its result as one JSON object.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import tyro

from . import (
    bench,
    bits,
    data,
    doctor,
    evaluate,
    files,
    flags,
    generate,
    label,
    membership,
    plan,
    quickstart,
    rl,
    rounds,
    shards,
    train,
    vision,
)
from .output import UsageError

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
COMMANDS: dict[str, Callable[..., int]] = {
    "generate": generate.generate,
    "convert": files.convert,
    "info": files.info,
    "quantise": files.quantise,
    "train sft": train.train_sft,
    "train drafter": train.train_drafter,
    "train early-exit": train.train_early_exit,
    "train acceptance": train.train_acceptance,
    "train judge": train.train_judge,
    "train prm": train.train_prm,
    "train orm": train.train_orm,
    "train value": train.train_value,
    "train qat": train.train_qat,
    "train preference": train.train_preference,
    "train curry": train.train_curry,
    "train unlearn": train.train_unlearn,
    "train rl": rl.train_rl,
    "train ranked": rounds.train_ranked,
    "train value-rounds": rounds.train_value_rounds,
    "train resnet20": vision.train_resnet20,
    "train ghostnet": vision.train_ghostnet,
    "train resume": train.train_resume,
    "data code-pairs": data.data_code_pairs,
    "data pairs": data.data_pairs,
    "data labelled": data.data_labelled,
    "data curry": data.data_curry,
    "data nauf": data.data_nauf,
    "data dualformer": data.data_dualformer,
    "data mix": data.data_mix,
    "label sample": label.label_sample,
    "label steps": label.label_steps,
    "label merge": shards.label_merge,
    "label agree": label.label_agree,
    "label feedback": label.label_feedback,
    "label split": label.label_split,
    "eval lm": evaluate.eval_lm,
    "eval answers": evaluate.eval_answers,
    "eval bits": bits.eval_bits,
    "eval membership": membership.eval_membership,
    "eval prm": evaluate.eval_prm,
    "eval best-of-n": evaluate.eval_best_of_n,
    "plan": plan.plan,
    "bench speculative": bench.bench_speculative,
    "doctor": doctor.doctor,
    "quickstart": quickstart.quickstart,
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    Where several processes run together, one that fails is gone at once: at an orderly end JAX waits for the others,
    which wait for this one.
    """
    try:
        status = _run(argv)
    except Exception:
        if not _has_company():
            raise
        traceback.print_exc()
        status = 1
    if status not in (0, 130, 143) and _has_company():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


# ----------------------------------------------------------------------------------------------------------- private
def _run(argv: list[str] | None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _use_compilation_cache()
    try:
        args = list(sys.argv[1:] if argv is None else argv)
        name, commands = " ".join(args[:2]), dict(COMMANDS)
        kind = name.removeprefix("train ")
        if name in commands and kind in train.SUMMARIES:
            commands[name] = train.train_command(kind, args[2:])
        elif name in commands and kind in rl.SUMMARIES:
            commands[name] = rl.rl_command(args[2:])
        elif name in commands and kind in rounds.SUMMARIES:
            commands[name] = rounds.rounds_command(kind)
        elif name in commands and kind in vision.SUMMARIES:
            commands[name] = vision.vision_command(kind)
        elif args[:1] == ["quickstart"]:
            commands["quickstart"] = quickstart.quickstart_command(_run)
        commands, args = flags.understood(commands, args)
        if name in commands:
            args = [" ".join(args[:2]), *args[2:]]
        elif any(name.startswith(f"{args[0]} ") for name in commands if args):  # `jaxaroo train`, and typos behind it
            commands, args = {name: f for name, f in commands.items() if name.startswith(args[0])}, args[1:]
        return tyro.extras.subcommand_cli_from_dict(commands, prog="jaxaroo", args=args, description=__doc__)
    except UsageError as e:
        print(f"jaxaroo: {e}", file=sys.stderr)
        return 2
    except (ValueError, OSError, MemoryError, ArithmeticError) as e:
        print(f"jaxaroo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\njaxaroo: interrupted", file=sys.stderr)
        return 130


def _has_company() -> bool:
    """Whether this process has joined others; without touching JAX if nobody has."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, unless the environment says where else, or nowhere (empty).

    Small models have many of a fraction of a second, so these are kept, too.
    """
    if CACHE_VARIABLE not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[CACHE_VARIABLE] = str(base / "jaxaroo" / "xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


if __name__ == "__main__":
    sys.exit(main())
