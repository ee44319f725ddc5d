"""What do the steps of large models hold on pods, and what bounds their time? Compiled for chips that are not here.

Each line is a `jaxaroo plan`: memory is the compiler's account, times are bounds from published rates and no
measurement. Needs libtpu (extra `aot`); a step of an 8B model for 64 chips compiles in one to three minutes on two
cores, so the whole list takes an hour or more. Plans are remembered: a run that was stopped goes on where it was.

    python -m benchmarks.plans
    python -m benchmarks.plans --only sft preference
"""

import argparse
import dataclasses
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks import record
from jaxaroo.cli.plan import Request, answer

KINDS = ("sft", "preference", "prm", "qat", "drafter", "early-exit")
LARGE: dict[str, Any] = dict(seq=4096, remat="full")
SMALL, BIG = (f"preset:llama3-{size}" for size in ("8b", "70b"))
REQUESTS = [
    *(Request(what=k, model=SMALL, topology="v5e:8x8", mesh="fsdp=16,tensor=4", batch=64, **LARGE) for k in KINDS),
    *(
        Request(what=k, model=SMALL, topology=t, mesh="fsdp=-1", batch=128, **LARGE)
        for k in ("sft", "preference")
        for t in ("v5p:4x4x4", "v6e:8x8", "tpu7x:4x4x4")
    ),
    Request(
        **LARGE,
        what="sft",
        model=BIG,
        topology="v5e:16x16",
        mesh="fsdp=32,tensor=8",
        batch=256,
        micro_batches=8,
    ),
    *(
        Request(what="decode", model=SMALL, topology="v5e:2x2", mesh="tensor=4", batch=8, seq=8192, nodes=n)
        for n in (1, 8)
    ),
    Request(what="decode", model=BIG, topology="v5e:4x4", mesh="fsdp=2,tensor=8", batch=16, seq=8192),
]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--only", nargs="+", help="kinds of steps")
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "plans", "environment": record.environment(), "plans": []}
    for request in REQUESTS:
        if opts.only and request.what not in opts.only:
            continue
        try:
            found = answer(request)
        except ValueError as e:
            found = {"fits": False, "said": str(e)}
        result["plans"].append({"request": dataclasses.asdict(request)} | found)
        limits = found.get("bounds") or {}
        held = f"{found.get('total', 0) / 2**30:.2f} GiB" + ("" if found["fits"] else ", does not fit")
        best = f", at best {limits['seconds']:.3g} s by {limits['bound_by']}" if limits else ""
        print(
            f"{request.what} {request.model} {request.topology} {request.mesh}: {held}{best}",
            file=sys.stderr,
            flush=True,
        )
    record.save("plans", result)


if __name__ == "__main__":
    main()
