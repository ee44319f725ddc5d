"""What do the steps of large models hold on pods, and what bounds their time? Compiled for chips that are not here.

Every kind of step of an 8B model on 64 chips, of a 70B model on 256, and of decoding on a few, for every kind of chip
that the compiler knows. Each line is a `jaxaroo plan`: memory is the compiler's account, times are bounds from
published rates and no measurement. Needs libtpu (extra `aot`); the whole list takes an hour on two cores. What was
compiled is remembered: a run that was stopped goes on where it was, and one after a change compiles the programs that
the change has changed. The results file grows by a row at a time; each row names the commit that it was compiled at.

    python -m benchmarks.plans
    python -m benchmarks.plans --only sft preference --size 8b
    python -m benchmarks.plans --missing
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks import record
from jaxaroo.cli.plan import Request, answer

KINDS = ("sft", "preference", "prm", "qat", "drafter", "early-exit", "rl")
PODS = {  # a model: chips, their mesh, rows of a step and its parts
    "8b": {
        "v5e:8x8": ("fsdp=16,tensor=4", 64, 1),
        "v5p:4x4x4": ("fsdp=-1", 128, 1),
        "v6e:8x8": ("fsdp=-1", 128, 1),
        "tpu7x:4x4x4": ("fsdp=-1", 128, 1),
    },
    "70b": {
        "v5e:16x16": ("fsdp=32,tensor=8", 256, 8),
        "v5p:4x8x8": ("fsdp=-1", 512, 1),
        "v6e:16x16": ("fsdp=-1", 512, 1),
        "tpu7x:4x8x8": ("fsdp=-1", 512, 1),
    },
}
SERVERS = {  # a model: chips, devices along tensor, sequences at once
    "8b": (("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"), 4, 8),
    "70b": (("v5e:4x4", "v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x4"), 8, 16),
}
DRAFTERS = (None, "eagle", "jakiro", "kangaroo")


def requests(size: str) -> list[Request]:
    """All that is asked about a model."""
    model = f"preset:llama3-{size}"
    chips, tensor, rows = SERVERS[size]
    return [
        *(
            Request(what=k, model=model, topology=t, mesh=m, batch=n, micro_batches=parts, seq=4096, remat="full")
            for t, (m, n, parts) in PODS[size].items()
            for k in KINDS
        ),
        *(
            Request(
                what="decode", model=model, topology=t, mesh=f"fsdp=-1,tensor={tensor}", batch=rows, seq=8192, drafter=d
            )
            for t in chips
            for d in DRAFTERS
        ),
    ]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--only", nargs="+", help="kinds of steps")
    args.add_argument("--size", choices=[*PODS], help="of the model")
    args.add_argument("--missing", action="store_true", help="leave out what the results have already")
    opts = args.parse_args()
    environment, everything = record.environment(), [request for size in PODS for request in requests(size)]
    asked = [r for r in everything if opts.size in (None, r.model.rpartition("-")[2])]
    asked = [r for r in asked if not opts.only or r.what in opts.only]
    failed = 0
    for request in asked:
        wanted = dataclasses.asdict(request)
        if opts.missing and _name(wanted) in _rows():
            continue
        try:
            found = answer(request)
        except ValueError as e:
            print(f"{request}: {e}", file=sys.stderr, flush=True)
            failed += 1
            continue
        # rows of other runs stay, also of one that goes on at the same time, each with the commit it was compiled at
        rows = _rows() | {_name(wanted): {"request": wanted, "commit": environment["commit"]} | found}
        plans = [rows[name] for r in everything if (name := _name(dataclasses.asdict(r))) in rows]
        record.write("plans", {"benchmark": "plans", "environment": environment, "plans": plans})
        limits = found.get("bounds") or {}
        held = f"{found.get('total', 0) / 2**30:.2f} GiB" + ("" if found["fits"] else ", does not fit")
        best = f", at best {limits['seconds']:.3g} s by {limits['bound_by']}" if limits else ""
        print(
            f"{request.what} {request.drafter or ''} {request.model} {request.topology} {request.mesh}: {held}{best}",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(failed > 0)


def _rows() -> dict[str, Any]:
    """What is known, by what was asked."""
    return {_name(row["request"]): row for row in record.read("plans").get("plans", [])}


def _name(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)


if __name__ == "__main__":
    main()
