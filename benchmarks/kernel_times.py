"""What operations take on the GPU that is here: the form chosen, XLA's form, the least that is possible, and peers.

Each program does an operation on several operands, more than fit in the chip's cache, and is called many times before
anything is waited for; sides run in turns in one process, and times are medians for one operation, what XLA puts around
it included. A loop within the program would be fairer to small operations, but XLA takes what does not change out of
it, barriers or not: times came out below the floor.

The floor is the larger of bytes, each operand and result once, at the rate at which a large array is read here, and
products at the rate of a large bfloat16 product.

Peers, where PyTorch is installed: `scaled_dot_product_attention`, `F.linear` in bfloat16 and `cross_entropy` on whole
logits; the first two replayed from a CUDA graph.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import record
from jaxaroo.jaxlib_ext import token_kl, token_stats
from jaxaroo.jaxlib_ext.expert_pair import Expert, expert_pair
from jaxaroo.jaxlib_ext.qmm import pack, qmm
from jaxaroo.jaxlib_ext.sampling import cut
from jaxaroo.jaxlib_ext.tree_attention import tree_attention
from jaxaroo.models.cache import Int4Rows, Int8Rows

_CACHE = 300 << 20  # bytes that no chip's cache holds
_TIMES = 20  # that a program is called before it is waited for
Side = Callable[[], Any]


class Timed(NamedTuple):
    """An operation at a shape."""

    name: str
    operands: Callable[[jax.Array], tuple[Any, ...]]  # of a key
    forms: dict[str, Callable[..., Any]]
    flops: float
    least: int  # bytes
    peers: dict[str, Callable[..., Any]]  # take how many copies, give what runs all of them


def main(runs: int) -> Iterator[dict[str, Any]]:
    """All that is known so far, on the device that JAX uses first, after each thing that is measured."""
    read, rate = read_rate(), product_rate()
    found: dict[str, Any] = {"bytes_per_second": read, "bfloat16_flops_per_second": rate, "losses": {}}
    print(found, flush=True)
    for name in ("token_stats", "token_kl"):
        found["losses"][name] = loss_on_logits(name, rate)
        yield found
    found["operations"] = {}
    for case in cases():
        found["operations"][case.name] = measured(case, runs, read, rate)
        yield found


def measured(case: Timed, runs: int, read: float, rate: float) -> dict[str, Any]:
    """All forms by turns; and how far the chosen form is from XLA's, of the norm."""
    copies = max(6, -(-_CACHE // case.least))
    made = [jax.jit(case.operands)(jax.random.key(i)) for i in range(copies)]
    programs = {
        name: jax.jit(lambda made, form=form: [form(*given) for given in made]) for name, form in case.forms.items()
    }
    sides: dict[str, Side] = {name: functools.partial(program, made) for name, program in programs.items()}
    failed = {}
    for name, peer in case.peers.items():
        try:
            sides[name] = peer(copies)
        except (ImportError, RuntimeError) as e:
            failed[name] = str(e)[:200]
    seconds = by_turns(sides, runs, copies, _TIMES)
    floor = max(case.least / read, case.flops / rate)
    result: dict[str, Any] = {"least_bytes": case.least, "flops": case.flops, "floor_seconds": floor, "seconds": {}}
    result["seconds"] = {name: record.spread(s) for name, s in seconds.items()}
    median = {name: s["median"] for name, s in result["seconds"].items()}
    result |= {"failed": failed} if failed else {}
    result["share_of_roofline"] = floor / median["auto"]
    result["times_as_fast_as"] = {name: s / median["auto"] for name, s in median.items() if name != "auto"}
    if "xla" in programs:
        result["error"] = difference(*(jax.jit(case.forms[name])(*made[0]) for name in ("auto", "xla")))
    print(
        f"{case.name}: {median['auto'] * 1e6:.1f} us, {result['share_of_roofline']:.0%} of the roofline,",
        {name: round(x, 2) for name, x in result["times_as_fast_as"].items()},
        flush=True,
    )
    return result


def by_turns(sides: dict[str, Side], runs: int, operations: int, times: int = 1) -> dict[str, list[float]]:
    """Seconds an operation, of which a call does several; of `times` calls only the last is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(runs + 1):
        for name, side in sides.items():
            start, result = time.perf_counter(), None
            for _ in range(times):
                result = side()
            wait(result)
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - start) / times / operations)
    return seconds


def wait(result: Any) -> None:
    """For JAX's arrays, or for what PyTorch has sent out."""
    if result is not None:
        jax.block_until_ready(result)
    else:
        import torch

        torch.cuda.synchronize()


def difference(got: Any, want: Any) -> float:
    """Norm of the difference, of that of `want`.

    Raises:
      ArithmeticError: if it is more than rounding to bfloat16 explains.
    """
    flat = lambda tree: [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    norm = lambda leaves: math.sqrt(sum(float(jnp.sum(x**2)) for x in leaves))
    error = norm([a - b for a, b in zip(flat(got), flat(want), strict=True)]) / norm(flat(want))
    if not error < 0.01:
        raise ArithmeticError(f"The chosen form and XLA's differ by {error:.3g} of the result; expected rounding.")
    return error


# -------------------------------------------------------------------------------------------------------------- cases
def cases() -> list[Timed]:
    """Decode and verify steps of 8B and 70B models."""
    shapes = [(B, 4096, 14336, 0, 4) for B in (1, 16, 64)] + [(1, 4096, 14336, 0, bits) for bits in (8, 3, 2)]
    shapes += [(16, 4096, 14336, 0, 8), (16, 14336, 4096, 0, 4)] + [(B, 4096, 14336, 128, 4) for B in (1, 16)]
    found = [product(*shape) for shape in shapes + [(B, 8192, 28672, 0, 4) for B in (1, 16, 64)]]
    found += [
        attention(*shape)
        for shape in (
            (1, 1, 32768, 16), (1, 8, 32768, 16), (1, 64, 32768, 16), (16, 1, 4096, 16), (8, 1, 32768, 16),
            (1, 1, 32768, 8), (1, 8, 32768, 8), (1, 1, 32768, 4), (1, 8, 32768, 4),
        )
    ]  # fmt: skip
    return found + [experts(R) for R in (1, 64)] + [cuts(B) for B in (1, 32)]


def product(B: int, K: int, N: int, group: int, bits: int) -> Timed:
    M = K // group if group else 1

    def operands(key):
        keys = jax.random.split(key, 3)
        codes = jax.random.randint(keys[0], (N, K), -(2 ** (bits - 1)), 2 ** (bits - 1)).astype(jnp.int8)
        scale = jax.random.uniform(keys[2], (N, M)).astype(jnp.bfloat16)
        return jax.random.normal(keys[1], (B, K), jnp.bfloat16), pack(codes, bits), scale

    def form(impl):
        return lambda x, planes, scale: qmm(x, planes, scale, bits=bits, dtype=jnp.float32, impl=impl)

    shapes = jax.eval_shape(operands, jax.random.key(0))
    least = nbytes(shapes) + 4 * B * N
    peers = {"torch_bfloat16": functools.partial(torch_linear, B, K, N)}
    name = f"qmm {bits} bits, {B} x {K} -> {N}" + (f", groups of {group}" if group else "")
    return Timed(name, operands, {"auto": form("auto"), "xla": form("xla")}, 2.0 * B * K * N, least, peers)


def attention(B: int, T: int, S: int, bits: int) -> Timed:
    def operands(key):
        keys = jax.random.split(key, 3)
        if bits == 16:
            rows = [jax.random.normal(k, (B, S, 8, 128), jnp.bfloat16) for k in keys[1:]]
        else:
            kind: Any = Int8Rows if bits == 8 else Int4Rows
            codes = [jax.random.randint(k, (B, S, 8, 16 * bits), 0, 256).astype(jnp.uint8) for k in keys[1:]]
            scale = jax.random.uniform(keys[0], (B, S, 8)).astype(jnp.bfloat16) / 2 ** (bits - 1)
            rows = [kind(c, scale, -scale) for c in codes]
        return jax.random.normal(keys[0], (B, T, 32, 128), jnp.bfloat16), *rows

    mask = lambda: jnp.arange(S)[None, None] <= S - T + jnp.arange(T)[None, :, None] + jnp.zeros((B, 1, 1), jnp.int32)
    forms: dict[str, Any] = {
        impl: lambda q, k, v, impl=impl: tree_attention(q, k, v, mask(), impl=impl) for impl in ("auto", "xla")
    }
    least = nbytes(jax.eval_shape(operands, jax.random.key(0))) + 2 * B * T * 32 * 128
    peers = {"torch": functools.partial(torch_attention, B, T, S)} if bits == 16 else {}
    name = f"tree attention, {B} x {T} nodes over {S} rows of {bits} bits"
    return Timed(name, operands, forms, 4.0 * B * T * S * 32 * 128, least, peers)


def experts(R: int, D: int = 4096) -> Timed:
    def operands(key):
        keys = jax.random.split(key, 9)
        draw = lambda k, *shape: jax.random.normal(k, shape, jnp.bfloat16)
        two = tuple(Expert(*(draw(keys[3 * i + j], D, D) for j in range(3))) for i in range(2))
        return draw(keys[6], R, D), draw(keys[7], R, D), draw(keys[8], 4, D), two

    least = nbytes(jax.eval_shape(operands, jax.random.key(0))) + 4 * R * D
    return Timed(f"expert pair, {R} rows", operands, {"auto": expert_pair}, 12.0 * R * D * D, least, {})


def cuts(B: int, V: int = 128_256) -> Timed:
    def operands(key):
        return 3 * jax.random.normal(key, (B, V)), jnp.full(B, 50), jnp.full(B, 0.9)

    forms: dict[str, Any] = {"auto": cut, "sort": functools.partial(cut, impl="sort")}
    return Timed(f"cut, {B} x {V}", operands, forms, 0.0, 4 * B * V, {})


def loss_on_logits(name: str, rate: float, N: int = 8192, V: int = 128_256, D: int = 4096) -> dict[str, Any]:
    """Forward and backward, by the chosen form, by the loops of other devices, and with all logits at once."""
    keys = jax.random.split(jax.random.key(0), 5)
    states = lambda key: jax.random.normal(key, (N, D), jnp.bfloat16)
    head = lambda key: (jax.random.normal(key, (V, D)) * D**-0.5).astype(jnp.bfloat16)
    given: tuple[Any, ...] = jax.jit(lambda: (states(keys[0]), head(keys[1])))()
    if name == "token_stats":
        rest = (jax.random.randint(keys[2], (N,), 0, V),)
        module, loss = token_stats, lambda form, h, w, y: form(h, w, y).logp.sum()
    else:
        rest = jax.jit(lambda: (states(keys[3]), head(keys[4])))()
        module, loss = token_kl, lambda form, *given: form(*given).sum()
    forms = {"auto": getattr(module, name), "xla": functools.partial(getattr(module, name), impl="xla")}
    forms["dense"] = module.reference
    found: dict[str, Any] = {"tokens": N, "vocabulary": V, "width": D, "forms": {}}
    sides: dict[str, Side] = {}
    for form, call in forms.items():
        step = jax.jit(jax.value_and_grad(functools.partial(loss, call), argnums=(0, 1)))
        memory = step.lower(*given, *rest).compile().memory_analysis()
        found["forms"][form] = {"temporary_bytes": memory.temp_size_in_bytes}
        sides[form] = functools.partial(step, *given, *rest)
    if name == "token_stats":
        with contextlib.suppress(ImportError):
            sides["torch_dense"] = torch_cross_entropy(N, V, D)
            found["forms"]["torch_dense"] = {}
    for form, seconds in by_turns(sides, 5, 1, 2).items():
        found["forms"][form]["seconds"] = record.spread(seconds)
    products = 3 if name == "token_stats" else 4
    found["floor_seconds"] = 2 * products * N * D * V / rate
    print(name, found, flush=True)
    return found


# -------------------------------------------------------------------------------------------------------------- peers
def replayed(copies: int, run: Callable[[int], Any]) -> Side:
    """A CUDA graph of `run` on every copy."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)

    def replay() -> None:
        graph.replay()
        assert run  # the operands live as long as the graph

    return replay


def torch_linear(B: int, K: int, N: int, copies: int) -> Side:
    import torch

    x = torch.randn(B, K, device="cuda", dtype=torch.bfloat16)
    ws = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(max(3, min(copies, 12)))]
    return replayed(copies, lambda i: torch.nn.functional.linear(x, ws[i % len(ws)]))


def torch_attention(B: int, T: int, S: int, copies: int) -> Side:
    import torch

    draw = lambda heads, rows: torch.randn(B, heads, rows, 128, device="cuda", dtype=torch.bfloat16)
    q, rows = draw(32, T), [(draw(8, S), draw(8, S)) for _ in range(copies)]
    mask = (torch.arange(S)[None] <= S - T + torch.arange(T)[:, None]).cuda() if T > 1 else None
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    return replayed(copies, lambda i: attend(q, *rows[i]))


def torch_cross_entropy(N: int, V: int, D: int) -> Side:
    import torch

    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    h, w, y = draw(N, D), draw(V, D), torch.randint(0, V, (N,), device="cuda")

    def run() -> None:
        h.grad = w.grad = None
        torch.nn.functional.cross_entropy((h @ w.T).float(), y, reduction="sum").backward()

    return run


# ----------------------------------------------------------------------------------------------------------- ceilings
def read_rate(size: int = 1 << 30) -> float:
    """Bytes a second, of reading a large bfloat16 array."""
    x = jax.random.normal(jax.random.key(0), (4096, size // 4096), jnp.bfloat16)
    largest = jax.jit(lambda x: jnp.max(x, axis=1))
    return x.nbytes / min(by_turns({"read": lambda: largest(x)}, 5, 1, 10)["read"])


def product_rate(size: int = 8192) -> float:
    """FLOPs a second, of a large bfloat16 product."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x.T)
    return 2 * size**3 / min(by_turns({"product": lambda: multiply(x)}, 5, 1, 10)["product"])


def nbytes(tree: Any) -> int:
    """Of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
