"""What a program asks of the chips it is compiled for: memory, multiplications, talk, and so its best time.

Memory is the compiler's own account. Multiplications are counted where every loop still says how often it runs, in the
traced program; collectives in the compiled one, where the compiler has put them, with the trip counts that it writes
beside its loops. What comes out are bounds from published rates: no step can be faster, and a real one is slower.

All of it is known before a line of machine code is written, which takes a TPU's compiler ten times as long as
everything before: 106 s of compiling were 6 s and 100 s. So its account is taken from the files that it writes on its
way, and a process that wants nothing else may end there.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from .topology import CHIPS, Chip, is_program

_log = logging.getLogger(__name__)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TALK = rf"= (.*?) ({'|'.join(KINDS)})(-start)?\("


class Bounds(NamedTuple):
    """The least seconds that each resource of a device is busy, and how much of its products the slowest allows."""

    products: float
    memory: float  # arguments read and results written once, temporaries both
    links: Mapping[str, float]  # by mesh axes; all links of a device at once
    seconds: float  # the largest, if all of it overlaps
    bound_by: str
    most_utilisation: float  # of the published FLOPs, counting useful ones alone


class Compiling(NamedTuple):
    """How far a program is compiled."""

    kept: Path | None = None  # a folder of what compilers said before: no program is compiled twice for the same chips
    scratch: Path | None = None  # for the compiler's files: machine code is left to a thread that goes on writing them,
    # for a process that ends then and another that removes them; None waits for all of it, in a folder of its own


class Plan(NamedTuple):
    """What one device has to hold and to do."""

    fits: bool
    said: str  # by the compiler, if it does not
    available: int  # bytes of a device
    total: int  # bytes that a step holds at most
    arguments: Mapping[str, int]  # of them, what stands between steps, by what it is
    temporaries: int  # activations, gradients and room to work
    open_loops: int  # loops whose length the data decide; their products are counted once
    flops: float  # of all devices together
    bounds: Bounds | None  # None if it does not fit: nothing was compiled
    collectives: Mapping[str, Mapping[str, float]]  # bytes a device sends, by mesh axes and kind
    seconds_to_compile: float


def plan(
    step: Any,
    given: tuple[Any, ...],
    parts: Mapping[str, Any],
    mesh: Mesh,
    chip: str,
    useful: Any = None,
    how: Compiling = Compiling(),
) -> Plan:
    """Compile a jitted step for a mesh of chips that need not be here.

    Args:
      step: of `jax.jit`.
      given: its arguments, trees of `ShapeDtypeStruct` with shardings on the mesh.
      parts: the same arrays, by what they are.
      mesh: of devices of `topology.devices_of`.
      chip: a key of `topology.CHIPS`.
      useful: a step that does the same without computing anything twice; this one if not given.
      how: whether the compiler is asked again what it said before, and for machine code.
    """
    rates, arguments = CHIPS[chip], {name: bytes_of(tree) for name, tree in parts.items()}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():  # nothing runs on it
        warnings.filterwarnings("ignore", message=".*persistent compilation cache")
        work = work_of(step, *given)
        needed = work if useful is None else work_of(useful, *given)
        lowered = step.trace(*given).lower(lowering_platforms=("tpu",))
        path = None if how.kept is None else how.kept / f"{_name(lowered.as_text(), mesh)}.json"
        heard = read_kept(path)
        if heard is None:
            heard = _compile(lowered, mesh, work.open_loops, rates.memory, how.scratch)
            if path is not None:
                keep(path, heard)
    said, took, collectives = heard["said"], heard["seconds"], heard["collectives"]
    if said:
        total, available = _wanted(said, rates)
        found = (False, said[:400], available, total, arguments, max(0, total - sum(arguments.values())))
        return Plan(*found, work.open_loops, work.flops, None, {}, took)
    held, temporaries = heard["held"], heard["temporaries"]
    total, moved = held + temporaries, held + 2 * temporaries  # what is updated in place, at least once
    limits = bounds(rates, mesh.devices.size, work.flops, needed.flops, moved, collectives)
    found = (total <= rates.memory, "", rates.memory, total, arguments, temporaries)
    return Plan(*found, work.open_loops, work.flops, limits, collectives, took)


def _compile(lowered: Any, mesh: Mesh, open_loops: int, room: int, scratch: Path | None) -> dict[str, Any]:
    """What the compiler says of a program: what it refuses, or bytes of a device and talk."""
    start, ends = time.perf_counter(), []
    own = tempfile.TemporaryDirectory(prefix="jaxaroo-plan-") if scratch is None else contextlib.nullcontext(scratch)
    with own as name:
        folder = Path(name)
        options = {"xla_dump_to": str(name), "xla_dump_hlo_as_text": True, "xla_dump_compact_gte": False}

        def work():
            try:
                ends.append(lowered.compile(options))
            except Exception as e:
                ends.append(e)

        compiler = threading.Thread(target=work, daemon=True)
        compiler.start()
        compiler.join(None if scratch is None else 0.0)
        while compiler.is_alive():
            compiler.join(0.2)
            laid_out = _laid_out(folder)
            if laid_out is not None and sum(laid_out[:2]) <= room:  # of more, the compiler is about to say so itself
                break
        laid_out = _laid_out(folder)
    took = time.perf_counter() - start
    if ends and isinstance(ends[0], Exception):
        if "RESOURCE_EXHAUSTED" not in str(ends[0]):
            raise ends[0]
        return {"said": str(ends[0])[:4000], "seconds": took, "collectives": {}}
    if laid_out is None:  # a compiler that writes no files, or a full disk
        memory, program = ends[0].memory_analysis(), ends[0].as_text()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = getattr(memory, "total_allocation_bytes", held + memory.temp_size_in_bytes)  # jax 0.10 lacks it
        laid_out = held, total - held, program
    held, temporaries, program = laid_out
    found = {"said": "", "seconds": took, "held": held, "temporaries": temporaries}
    return found | {"collectives": collective_bytes(program, mesh, open_loops)}


def _laid_out(folder: Path) -> tuple[int, int, str] | None:
    """From files that a compiler writes on its way: bytes that stand through a step, bytes that it needs meanwhile, and
    the program; None as long as they are not there to their ends."""
    for path in folder.glob("*.after_optimizations.txt"):  # the last of them
        program = path.read_text(encoding="utf-8")
        buffers = path.with_name(path.stem + "-buffer-assignment.txt")
        if program.rstrip().endswith("}") and buffers.exists():
            return *hbm_bytes(buffers.read_text(encoding="utf-8")), program
    return None


def hbm_bytes(text: str) -> tuple[int, int]:
    """Bytes of a device's large memory that stand through a step, and that it needs meanwhile.

    Args:
      text: the compiler's `...buffer-assignment.txt`. Allocations of a color lie in other memories: 1 is VMEM.
    """
    rows = re.findall(r"^allocation \d+: size (\d+), (?!color)(.*)", text, re.MULTILINE)
    temporaries = sum(int(size) for size, what in rows if "preallocated-temp" in what)
    return sum(int(size) for size, _ in rows) - temporaries, temporaries


# ------------------------------------------------------------------------------------------------------------ memory
def read_kept(path: Path | None) -> Any:
    """Plain numbers that were kept; None if there are none, or half a file of a process that was killed."""
    try:
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(path: Path, found: Any) -> None:
    """Write plain numbers, whole or not at all; what cannot be kept, of a full disk or a home of others, is said."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found), encoding="utf-8")
        os.replace(part, path)
    except OSError as e:  # what was compiled is worth more
        _log.warning("plan: not remembered: %s", e)


def _name(program: str, mesh: Mesh) -> str:
    """Of a program for devices, by all that its compiler sees, and by how it is read here.

    Where in our files a kernel's lines stand changes with every edit above them, and nothing that is compiled.
    """
    program = re.sub(r"debug_locations\\22: \\22[^\\]*", "", program)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        program += importlib.metadata.version("libtpu")
    places = [(d.device_kind, getattr(d, "coords", d.id)) for d in mesh.devices.flat]
    own = Path(__file__).read_text(encoding="utf-8")
    parts = repr([jax.__version__, mesh.axis_names, mesh.devices.shape, places, own])
    return hashlib.sha256((parts + program).encode()).hexdigest()[:32]


def _wanted(said: str, chip: Chip) -> tuple[int, int]:
    """Bytes that the compiler asked for in vain, arguments and results among them whatever it calls them, 0 if it did
    not say; and those that there are."""
    number = r"\(?([\d.]+)([KMG])\)?"
    found = re.search(rf"{number} exceeds available HBM {number}", said) or re.search(
        rf"Used {number} of {number}", said
    )
    size = lambda n, unit: int(float(n) * 1024.0 ** ("KMG".index(unit) + 1))
    return (size(*found.groups()[:2]), size(*found.groups()[2:])) if found else (0, chip.memory)


# ------------------------------------------------------------------------------------------------------ multiplications
class Work(NamedTuple):
    """Of all devices together."""

    flops: float  # of matrix products, 2 for a multiplication and its addition
    open_loops: int  # loops whose length the data decide, counted as running once


def work_of(f: Callable[..., Any], *shapes: Any) -> Work:
    """Count the matrix products of a program as a TPU runs it, loops and recomputation included.

    Args:
      f: a function of arrays.
      shapes: trees of arrays or `jax.ShapeDtypeStruct`.
    """
    return _work(jax.make_jaxpr(f)(*shapes).jaxpr)


def _work(program: Any) -> Work:
    flops, loops = 0.0, 0
    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            over = params["dimension_numbers"][0][0]
            summed = math.prod(equation.invars[0].aval.shape[i] for i in over)
            flops += 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
            continue
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = params["dimension_numbers"].rhs_spec[0]
            flops += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
            continue
        times, inside = 1.0, [x for x in jax.tree.leaves([*params.values()], is_leaf=is_program) if is_program(x)]
        if name == "scan":
            times = params["length"]
        elif name == "while":
            loops += 1
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        elif name == "shard_map":
            times = params["mesh"].size  # each device does what stands inside
        elif name == "cond":
            inside = _branch(params, inside)
        for one in inside:
            found = _work(getattr(one, "jaxpr", one))
            flops, loops = flops + times * found.flops, loops + found.open_loops
    return Work(flops, loops)


def _branch(params: Mapping[str, Any], branches: list[Any]) -> list[Any]:
    """Of what depends on the platform, that of a TPU; of other choices the one with most to do."""
    platforms = params.get("branches_platforms")
    if platforms is not None:
        return [next(b for b, on in zip(branches, platforms, strict=True) if on is None or "tpu" in on)]
    return [max(branches, key=lambda b: _work(getattr(b, "jaxpr", b)).flops)]


# ---------------------------------------------------------------------------------------------------------- collectives
def collective_bytes(text: str, mesh: Mesh, open_loops: int = 0) -> dict[str, dict[str, float]]:
    """Bytes that one device sends, by the mesh axes that talk ("fsdp", "data+fsdp") and by the kind of talk.

    Of n devices in a ring: a gather or a scatter of B bytes in all sends (n - 1) / n B, a sum twice that.

    Args:
      text: compiled HLO, `compiled.as_text()`.
      mesh: that the program was compiled for.

    """
    bodies, entry = _computations(text)
    found: dict[str, dict[str, float]] = {}
    for line, times, cut in _talk(bodies, entry, open_loops > 0):
        shape, kind, started = re.search(_TALK, line).groups()  # type: ignore[union-attr]
        sizes = [_bytes(piece) for piece in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
        if started and kind != "all-reduce":  # a pair of what goes in and what comes out, and perhaps counters
            sizes = [max(sizes) if kind in ("all-gather", "collective-permute") else sum(sizes[1:2])]
        groups = _groups(line, kind, mesh.devices.size)
        n, names = len(groups[0]), "+".join(_axes(groups, mesh))
        if n < 2:
            continue
        whole = sum(sizes) * (n if kind == "reduce-scatter" else 1)
        kind = "reduce-scatter" if cut else kind
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        row = found.setdefault(names, {})
        row[kind] = row.get(kind, 0.0) + times * share * whole
    return found


def _talk(bodies: Mapping[str, list[str]], entry: str, open_loops: bool) -> Iterator[tuple[str, float, bool]]:
    """Collectives, how often each happens, and whether it is a sum of which every device keeps a part alone.

    One that is begun in a fusion, goes on in others while a loop runs, and is awaited in a last one stands in all of
    them under one channel: it happens as often as the rarest. A sum in a computation `all-reduce-scatter` is cut to a
    part there, which a TPU does as a scatter.
    """
    pieces: dict[tuple[str, str], list[tuple[str, float, bool]]] = {}
    for line, times, within in _run(bodies, entry, 1.0, open_loops):
        match, channel = re.search(_TALK, line), re.search(r"channel_id=(\d+)", line)
        found = line, times, within.startswith("all-reduce-scatter")
        if match and channel and within:
            pieces.setdefault((channel[1], match[2]), []).append(found)
        elif match:
            yield found
    yield from (min(found, key=lambda one: one[1]) for found in pieces.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name; and which one is run."""
    bodies, entry, here = {}, "", None
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start and not line.startswith(" "):
            here = bodies.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            here = None
        elif here is not None:
            here.append(line)
    return bodies, entry


def _run(bodies: Mapping[str, list[str]], name: str, times: float, open_loops: bool, within: str = ""):
    """Every line that runs, how often, and within which fusion. A computation runs once a call, a loop's as often as
    it says."""
    for line in bodies.get(name, []):
        yield line, times, within
        called = [x for x in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line) if x in bodies]
        several = re.search(r"branch_computations=\{([^}]*)\}", line)
        called += [x.strip().lstrip("%") for x in several[1].split(",")] if several else []
        if " while(" in line:
            trips, inner = _trips(bodies, line), [*_run(bodies, called[0], 1.0, open_loops)] if called else []
            if trips is None and not open_loops and any(re.search(_TALK, x) for x, _, _ in inner):
                raise ValueError(f"collective_bytes: a loop around collectives has no fixed length: {line[:200]}")
            yield from ((x, times * (trips or 1) * n, within or fused) for x, n, fused in inner)
        else:
            for one in called:
                yield from _run(bodies, one, times, open_loops, within or (one if " fusion(" in line else ""))


def _trips(bodies: Mapping[str, list[str]], line: str) -> float | None:
    """How often a loop runs: as is written beside it, or from 0 by equal steps to the constant of its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return float(known[1])
    names = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    condition, body = (dict(map(_named, bodies.get(name, []))) for name in (names.groups() if names else ("", "")))
    ends = [re.search(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", x) for x in condition.values()]
    for end in filter(None, ends):
        place = re.search(r"get-tuple-element\(.*?\), index=(\d+)", condition.get(end[1], ""))
        last = re.search(r" constant\((\d+)\)", condition.get(end[2], ""))
        if place and last:
            root = next((x for x in body.values() if " tuple(" in x and "ROOT" in x), "")
            new = re.sub(r"/\*index=\d+\*/", "", root.partition(" tuple(")[2].partition(")")[0]).split(", ")
            line = body.get(new[int(place[1])].lstrip("%"), "")
            while moved := re.search(r" copy\(%?([\w.\-]+)\)", line):  # of the counter, to another memory
                line = body.get(moved[1], "")
            step = re.search(r" add\((.*?)\)", line)
            given = step[1].split(",") if step else []
            by = [re.search(r" constant\((\d+)\)", body.get(x.strip().lstrip("%"), "")) for x in given]
            found = [int(x[1]) for x in by if x]
            return float(-(-int(last[1]) // found[0])) if found else None
    return None


def _named(line: str) -> tuple[str, str]:
    """An instruction by its name."""
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    return (match[1] if match else "", line)


def _bytes(piece: tuple[str, str]) -> float:
    width = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}.get(piece[0])
    width = int(re.sub(r"\D*(\d+).*", r"\1", piece[0])) if width is None else width
    return width / 8 * math.prod(int(n) for n in piece[1].split(",") if n)


def _groups(line: str, kind: str, devices: int) -> list[list[int]]:
    """Which devices talk to each other, by their places in the mesh."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        return [[int(n) for n in re.findall(r"\d+", pair)] for pair in (pairs[1] if pairs else "").split("},{")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        dims = [int(n) for n in iota[3].split(",")]
        order = np.arange(math.prod(dims)).reshape(dims)
        order = order.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else order
        return order.reshape(int(iota[1]), int(iota[2])).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        if ":" not in named[2]:
            order = np.arange(devices).reshape([*sizes.values()])
            order = np.moveaxis(order, [[*sizes].index(name) for name in along], range(-len(along), 0))
            return order.reshape(-1, math.prod(sizes[name] for name in along)).tolist()
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    if listed:
        return [[int(n) for n in group.split(",")] for group in listed[1].split("},{")]
    if "replica_groups={}" in line:
        return [list(range(devices))]
    raise ValueError(f"collective_bytes: cannot read who talks to whom: {line.strip()[:300]}")


def _axes(groups: list[list[int]], mesh: Mesh) -> list[str]:
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.asarray(groups), mesh.devices.shape), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return [name for name, apart in zip(mesh.axis_names, differ, strict=True) if apart]


# --------------------------------------------------------------------------------------------------------------- bounds
def bounds(
    chip: Chip,
    devices: int,
    flops: float,
    useful: float,
    moved: float,
    collectives: Mapping[str, Mapping[str, float]],
) -> Bounds:
    """What published rates allow.

    Args:
      chip: of a device.
      devices: how many take part.
      flops: of all of them.
      useful: of those, without what is computed again.
      moved: bytes between a device's large memory and its units, at least.
      collectives: of `collective_bytes`.
    """
    products, memory = flops / devices / chip.bfloat16, moved / chip.read
    links = {names: sum(kinds.values()) / chip.links for names, kinds in collectives.items()}
    parts = {"products": products, "memory": memory, "links": sum(links.values())}
    by = max(parts, key=lambda name: parts[name])
    most = useful / devices / chip.bfloat16 / parts[by] if parts[by] else 0.0
    return Bounds(products, memory, links, parts[by], by, most)


def bytes_of(tree: Any) -> int:
    """What the arrays of a tree take on one device, by their shardings."""
    shard = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
