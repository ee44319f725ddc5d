"""Oracles: float64 loops over tokens and vocabulary; and the compiled program, for what devices send each other."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP, FSDP_TP_SEQ
from jaxaroo.train.objectives.agreement import compare, log_probs

B, T, D, V = 2, 7, 8, 13


def states(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 2, jnp.float32)


def by_hand(f, g, head):
    """Cross-entropy, overlap and whether the modes agree, of one position in float64."""
    z, w = (np.float64(head) @ np.float64(x) for x in (f, g))
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (z, w))
    cross = -sum(p[x] * np.log(q[x]) for x in range(len(p)))
    return cross, sum(min(p[x], q[x]) for x in range(len(p))), float(np.argmax(p) == np.argmax(q))


@pytest.mark.parametrize("tile", [1, 3 * B, 1024])
def test_it_is_that_of_loops_whatever_the_tile(tile):
    wanted, drafted, head = states(B, T, D), states(B, T, D, seed=1), states(V, D, seed=2) / 3
    drafted = drafted.at[0, :3].set(wanted[0, :3] + 0.1)  # where modes agree
    got = jax.jit(functools.partial(compare, tile=tile))(wanted, head, drafted)
    for b in range(B):
        for t in range(T):
            want = by_hand(wanted[b, t], drafted[b, t], head)
            np.testing.assert_allclose([x[b, t] for x in got], want, rtol=0, atol=2e-5)
    assert 0 < np.asarray(got.same_mode).mean() < 1


@pytest.mark.slow
def test_gradients_are_those_of_whole_logits_and_the_head_has_none():
    wanted, drafted, head, c = states(B, T, D), states(B, T, D, seed=1), states(V, D, seed=2) / 3, states(B, T, seed=3)

    def whole(wanted, head, drafted):
        p = jnp.exp(log_probs(wanted, head))
        return jnp.sum(c * -jnp.sum(p * log_probs(drafted, head), axis=-1))

    tiled = lambda *given: jnp.sum(c * compare(*given, tile=4).cross_entropy)
    got, want = (jax.grad(f, argnums=(0, 1, 2))(wanted, head, drafted) for f in (tiled, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert not got[1].any()
    assert all(np.abs(g).max() > 0.1 for g in (got[0], got[2]))


def test_no_logits_of_the_whole_batch_are_held():
    """At a tile of one position a row, nothing in the program, backward pass included, is as large as [B, T, V]."""
    final, head = jnp.zeros((B, 64, D)), jnp.zeros((V, D))
    total = lambda draft: compare(final, head, draft, tile=B).cross_entropy.sum()
    text = str(jax.make_jaxpr(jax.grad(total))(final))
    assert f"f32[{B},1,{V}]" in text
    assert f"{B},64,{V}]" not in text
    assert f"[64,{B},1,{V}]" not in text


def size_of(shape):
    return math.prod(int(n) for n in shape.split(","))


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}])
@pytest.mark.slow
def test_devices_compare_their_own_tokens_and_fetch_the_head_once(shape):
    """Numbers of one device; tiles are as large as asked for on each; nothing but sums is sent in a loop."""
    rows, length, vocab, tile = 8, 32, 24, 8
    given = states(rows, length, D), states(vocab, D, seed=2) / 3, states(rows, length, D, seed=1)
    c = states(rows, length, seed=3)
    rules = FSDP_TP_SEQ if "sequence" in shape else FSDP_TP

    def step(wanted, head, drafted, rules=rules):
        said = compare(wanted, head, drafted, tile=tile, rules=rules)
        return jnp.sum(c * said.cross_entropy), said

    want = jax.jit(jax.value_and_grad(functools.partial(step, rules=type(rules)()), argnums=2, has_aux=True))(*given)
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **shape}))
    with jax.set_mesh(mesh):
        at = lambda *axes: jax.sharding.NamedSharding(mesh, rules.spec(*axes))
        token = at("batch", "seq", None)
        placed = [jax.device_put(x, s) for x, s in zip(given, (token, at("vocab", "embed"), token), strict=True)]
        program = jax.jit(jax.value_and_grad(step, argnums=2, has_aux=True)).lower(*placed).compile()
        got = program(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5), got, want)
    text, tensor = program.as_text(), mesh.shape["tensor"]
    lines = [line for line in text.splitlines() if re.search(r" (all-gather|all-to-all|collective-permute)\(", line)]
    large = [line for line in lines if max(map(size_of, re.findall(r"f32\[([\d,]+)\]", line)), default=0) >= tile * D]
    assert [("while" in line, "all-gather" in line) for line in large] == [(False, True)]  # the head
    products = set(re.findall(rf"f32\[([\d,]+),{vocab // tensor}\]\S* dot\(", text))
    assert set(map(size_of, products)) == {tile}
