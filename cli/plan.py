"""`jaxaroo plan`: does it fit, and how fast could it be, on chips that nobody has rented yet?"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .output import UsageError, dumps

What = Literal[
    "sft", "drafter", "early-exit", "judge", "prm", "orm", "value", "qat", "preference", "rl", "decode"
]  # what `train.plan.KINDS` has, updates from sampled answers, and decoding
GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """All that a plan depends on.

    Attributes:
      what: kind of training (`jaxaroo train ...`), or a step of decoding.
      model: preset:NAME, or folder of a checkpoint, of which only config.json is read.
      topology: kind and layout of the chips: v5e:4x4, v5p:2x2x1, v6e:8x8, tpu7x:2x2x1.
      mesh: devices along data, fsdp, tensor and sequence, such as fsdp=16,tensor=4; -1 is what is left.
      batch: rows of a step, over all devices; of decoding, sequences at once.
      seq: tokens of a row; of decoding, rows of the cache.
      micro_batches: parts that a step works through one after the other.
      remat: what the backward pass computes again.
      adapters: train all weights, or low-rank adapters to them.
      objective: of `plan preference`.
      algorithm: of `plan rl`.
      bits: of the weights, of `plan decode`: 16, or 8, 6, 4, 3, 2.
      nodes: of `plan decode`: tokens a row reads in a step, as many as a tree of guesses has.
      drafter: of `plan decode`: a whole step of speculative decoding, with drafts of this kind.
    """

    what: tyro.conf.Positional[What]
    model: str
    topology: str
    mesh: str = "fsdp=-1"
    batch: int = 8
    seq: int = 2048
    micro_batches: int = 1
    remat: Literal["none", "dots", "full"] = "none"
    adapters: Literal["none", "lora"] = "none"
    objective: str = "dpo"
    algorithm: str = "grpo"
    bits: int = 16
    nodes: int = 1
    drafter: Literal["lookup", "eagle", "jakiro", "kangaroo"] | None = None


def plan(
    request: Annotated[Request, tyro.conf.arg(name="")],
    *,
    search: bool = False,
    tries: int = 8,
    fresh: bool = False,
    json: bool = False,
) -> int:
    """Compile a step for TPUs that are not here, from shapes alone: does it fit, and what bounds its time?

    Needs the TPU's compiler (pip install "jaxaroo[aot]"), no TPU. A plan is remembered, and answers at once when it is
    asked for again. Exit status 0 if the step fits, or another that is found does; 1 if none does.

    Args:
      request: the step, its model and its chips.
      search: try other meshes too, and rank them.
      tries: how many other settings to compile at most, by a search or for advice.
      fresh: compile again what is remembered.
      json: write JSON.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    import jax

    jax.config.update("jax_platforms", "cpu")  # of what is here, nothing else is used
    found = [(request, answer(request, fresh))]
    if search:
        found += _others(found[0], other_meshes(request), tries, fresh)
        found.sort(key=lambda pair: (not pair[1]["fits"], pair[1].get("seconds") or 0.0))
    elif not found[0][1]["fits"]:
        for other, one in _others(found[0], smaller(request), tries, fresh):
            found.append((other, one))
            if one["fits"]:
                break
    if json:
        print(dumps([{"request": dataclasses.asdict(r)} | one for r, one in found]))
    elif search:
        print(_table(found))
    else:
        print(_words(*found[0]))
        if len(found) > 1:
            print(_advice(found))
    return 0 if any(one["fits"] for _, one in found) else 1


def answer(request: Request, fresh: bool = False) -> dict[str, Any]:
    """The plan of a request as plain numbers, from where it is remembered or from the compiler.

    Args:
      request: all that it depends on.
      fresh: compile anyway.

    Raises:
      UsageError: for a mesh or settings that cannot be read.
      ValueError: for settings that do not go together.
    """
    from ..sharding.plan import keep, read_kept

    config = _model(request.model)
    path = _remembered(request, config)
    if not fresh and (found := read_kept(path)) is not None:
        return found | {"remembered": True}
    found = _compile(request, None if fresh else path.parent / "compiled")
    keep(path, found)
    return found | {"remembered": False}


def smaller(request: Request) -> Iterator[Request]:
    """Settings that ask for less memory, the smallest change first: recomputation, micro-batches, another mesh."""
    if request.what == "decode":
        yield from other_meshes(request)
        return
    levels = ("none", "dots", "full")
    for remat in levels[levels.index(request.remat) + 1 :]:
        yield dataclasses.replace(request, remat=remat)  # type: ignore[arg-type]
    least = dataclasses.replace(request, remat="full")
    yield from (dataclasses.replace(least, micro_batches=n) for n in _micro_batches(least))
    for other in other_meshes(least):
        yield dataclasses.replace(other, micro_batches=max([request.micro_batches, *_micro_batches(other)]))


def other_meshes(request: Request) -> Iterator[Request]:
    """Ways to share the devices out over fsdp, tensor (which divides the heads) and, of rows that are learned from,
    sequence (which divides their tokens); those that cut rows last, the fewest pieces first."""
    from ..sharding.topology import devices_of

    devices, heads = len(devices_of(request.topology)), _model(request.model).num_kv_heads
    asked = _sizes(request.mesh, devices)
    pieces = [1] if request.what == "decode" else [n for n in range(1, devices + 1) if request.seq % n == 0]
    for sequence in pieces:
        for tensor in (n for n in range(heads, 0, -1) if heads % n == 0 and devices % (n * sequence) == 0):
            mesh = f"fsdp={devices // (tensor * sequence)},tensor={tensor}"
            mesh += f",sequence={sequence}" if sequence > 1 else ""
            if _sizes(mesh, devices) != asked:
                yield dataclasses.replace(request, mesh=mesh)


def apart() -> None:
    """Answer the request on standard input in one line on standard output, and end before machine code is written.

    What `answer` starts: a compiler that is at work cannot be told to stop, only its process can.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    given = json.loads(sys.stdin.read())
    request, kept = Request(**given["request"]), given["kept"]
    try:
        found = _planned(request, None if kept is None else Path(kept), Path(given["scratch"]))
    except (UsageError, ValueError) as e:
        found = {"error": str(e), "usage": isinstance(e, UsageError)}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


# ----------------------------------------------------------------------------------------------------------- private
def _compile(request: Request, kept: Path | None) -> dict[str, Any]:
    _mesh(request)  # what cannot be is said here
    given = {"request": dataclasses.asdict(request), "kept": None if kept is None else str(kept)}
    code, settings = f"from {__name__} import apart; apart()", {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    with tempfile.TemporaryDirectory(prefix="jaxaroo-plan-") as scratch:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(given | {"scratch": scratch}),
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
            check=False,
        )
    try:
        found = json.loads("".join(done.stdout.splitlines()[-1:]))  # its libraries may write before
    except ValueError as e:
        raise ValueError(
            f"plan: the process that compiles ended with status {done.returncode} and without an answer"
            + (": killed, perhaps for want of memory here." if done.returncode < 0 else ", see above.")
        ) from e
    if "error" in found:
        raise (UsageError if found["usage"] else ValueError)(found["error"])
    return found


def _mesh(request: Request) -> Any:
    from ..sharding.mesh import MeshConfig, make_mesh
    from ..sharding.topology import CHIPS, devices_of

    if request.topology.partition(":")[0] not in CHIPS:
        raise UsageError(f"plan: topology {request.topology!r}; expected one such as v5e:4x4, of {', '.join(CHIPS)}.")
    try:
        devices = devices_of(request.topology)
    except ModuleNotFoundError as e:
        raise UsageError(str(e)) from e
    return make_mesh(MeshConfig(**({"fsdp": 1} | _sizes(request.mesh))), devices)


def _planned(request: Request, kept: Path | None, scratch: Path) -> dict[str, Any]:
    from ..sharding.plan import Compiling

    logging.getLogger("jaxaroo.sharding.rules").setLevel(logging.ERROR)
    mesh, config, chip = _mesh(request), _model(request.model), request.topology.partition(":")[0]
    how = Compiling(kept, scratch)
    if request.what == "decode":
        from ..infer.plan import plan_decoding, plan_speculation

        sizes: Any = dict(rows=request.batch, capacity=request.seq, how=how)
        if request.drafter is None:
            found = plan_decoding(config, mesh, chip, nodes=request.nodes, bits=request.bits, **sizes)
        elif (request.nodes, request.bits) != (1, 16):
            raise UsageError("plan decode: --drafter with --nodes or --bits; expected one of them.")
        else:
            found = plan_speculation(config, mesh, chip, drafter=request.drafter, **sizes)
        tokens = request.batch * request.nodes
    else:
        from ..train.algorithms import RlOptions
        from ..train.plan import plan_training, plan_updates, run_config
        from ..train.preference import PreferenceOptions
        from ..train.recipe import RECIPES

        kind = request.what
        cfg = run_config(
            request.batch,
            request.seq,
            micro_batches=request.micro_batches,
            remat=request.remat,
            adapters=request.adapters,
        )
        if kind == "rl":
            found = plan_updates(cfg, RlOptions(algorithm=request.algorithm), config, mesh, chip, how)
        else:
            chosen = PreferenceOptions(objective=request.objective) if kind == "preference" else None
            found = plan_training(kind, cfg, chosen or RECIPES[kind].options(), config, mesh, chip, how)
        tokens = request.batch * request.seq
    row = found._asdict() | {"devices": mesh.size, "tokens": tokens, "bounds": None}
    if found.bounds is not None:
        row |= {"bounds": found.bounds._asdict(), "seconds": found.bounds.seconds}
    return row


def _others(first: tuple[Request, Any], requests: Iterator[Request], tries: int, fresh: bool):
    """Answers to other requests; those that cannot be are left out."""
    for number, request in enumerate(requests):
        if number == tries:
            return
        print(f"trying {_difference(first[0], request)}", file=sys.stderr)
        try:
            yield request, answer(request, fresh)
        except ValueError as e:
            print(f"  no: {e}", file=sys.stderr)


def _model(name: str) -> Any:
    from ..models.hf import read_config
    from ..models.presets import preset

    return preset(name.removeprefix("preset:")) if name.startswith("preset:") else read_config(Path(name))


def _micro_batches(request: Request) -> list[int]:
    """More parts of a step than there are, as long as every device keeps a row of each."""
    from ..sharding.topology import devices_of

    sizes = _sizes(request.mesh, len(devices_of(request.topology)))
    ways = sizes.get("data", 1) * sizes.get("fsdp", 1)
    most = request.batch // ways
    return [n for n in range(request.micro_batches + 1, most + 1) if most % n == 0 and request.batch % (n * ways) == 0]


def _sizes(mesh: str, devices: int | None = None) -> dict[str, int]:
    """`fsdp=16,tensor=4` by axis, sizes of 1 left out; -1 becomes what is left of the devices, if they are given."""
    try:
        pairs = [part.split("=") for part in mesh.split(",")]
        sizes = {name: int(size) for name, size in pairs}
    except ValueError as e:
        raise UsageError(f"--mesh {mesh}: expected sizes by axis, such as fsdp=16,tensor=4.") from e
    if unknown := sizes.keys() - {"data", "fsdp", "tensor", "sequence"}:
        raise UsageError(f"--mesh {mesh}: no axis {', '.join(unknown)}; expected data, fsdp, tensor or sequence.")
    if devices is not None:
        rest = devices // math.prod(max(1, size) for size in sizes.values())
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    return {name: size for name, size in sizes.items() if size != 1} or {"fsdp": 1}


def _remembered(request: Request, config: Any) -> Path:
    """Where its plan is, or would be: named by the request, the model, the compiler and our own code."""
    import importlib.metadata

    import jax

    try:
        compiler = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        compiler = ""
    code = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for folder in ("sharding", "jaxlib_ext", "models", "train", "infer"):
        for file in sorted((package / folder).rglob("*.py")):
            code.update(file.read_bytes())
    parts = [dataclasses.asdict(request), dataclasses.asdict(config), jax.__version__, compiler, code.hexdigest()]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jaxaroo" / "plans" / f"{name}.json"


def _difference(one: Request, other: Request) -> str:
    """The options that make another request of one."""
    was, now = dataclasses.asdict(one), dataclasses.asdict(other)
    changed = {name: now[name] for name in now if was[name] != now[name]}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())


def _words(request: Request, found: dict[str, Any]) -> str:
    detail = {"preference": request.objective, "rl": request.algorithm, "decode": request.drafter}.get(request.what)
    what = request.what + (f" ({detail})" if detail else "")
    lines = [f"{what} of {request.model} on {request.topology}, {found['devices']} devices, {request.mesh}"]
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    total, room = found["total"] / GIB, found["available"] / GIB
    lines.append(f"{fits}: {total:.2f} of {room:.2f} GiB a device")
    parts = found["arguments"] | {"temporaries": found["temporaries"]}
    lines += [f"  {name:12}{size / GIB:9.3f} GiB" for name, size in parts.items() if size]
    lines.append(f"a step: {found['flops']:.3g} FLOPs of matrix products on all devices")
    if found["open_loops"]:
        lines.append(f"  {found['open_loops']} loops run as long as the data say, and are counted once")
    if found["bounds"] is None:
        return "\n".join(lines)
    limits = found["bounds"]
    lines.append(f"  products     at least {limits['products']:.4g} s")
    lines.append(f"  memory       at least {limits['memory']:.4g} s")
    for names, seconds in limits["links"].items():
        sent = sum(found["collectives"][names].values()) / GIB
        lines.append(f"  links        at least {seconds:.4g} s along {names}: {sent:.3f} GiB a device")
    rate = found["tokens"] / limits["seconds"]
    lines.append(
        f"at best {limits['seconds']:.4g} s a step, by {limits['bound_by']}: {rate:,.0f} tokens a second, "
        f"{100 * limits['most_utilisation']:.0f} % of the published FLOPs (no measurement: rates as published)"
    )
    known = ", remembered" if found["remembered"] else ""
    lines.append(f"compiled in {found['seconds_to_compile']:.0f} s{known}")
    return "\n".join(lines)


def _advice(found: list[tuple[Request, dict[str, Any]]]) -> str:
    first, (last, one) = found[0][0], found[-1]
    tried = len(found) - 1
    if one["fits"]:
        best = one["bounds"]["seconds"]
        return (
            f"it fits with {_difference(first, last)}: {one['total'] / GIB:.2f} of {one['available'] / GIB:.2f} GiB, "
            f"at best {best:.4g} s a step"
        )
    least = min(found, key=lambda pair: pair[1]["total"])
    return (
        f"none of {tried} other settings fits; the least is {least[1]['total'] / GIB:.2f} GiB with "
        f"{_difference(first, least[0]) or 'these'}. Take more chips, chips with more memory, or a smaller --seq."
    )


def _table(found: list[tuple[Request, dict[str, Any]]]) -> str:
    lines = [f"{'mesh':28}{'GiB':>9}{'':6}{'s a step':>12}  bound by"]
    for request, one in found:
        limits = one["bounds"]
        best = f"{limits['seconds']:12.4g}  {limits['bound_by']}" if limits else ""
        lines.append(f"{request.mesh:28}{one['total'] / GIB:9.2f}{'' if one['fits'] else '  no':6}{best}")
    return "\n".join(lines)
