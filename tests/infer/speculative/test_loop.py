"""Oracle: the joint law of the next tokens, enumerated from the target's own logits; and plain decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer import decode as plain
from jaxaroo.infer.decode import Rows
from jaxaroo.infer.sampling import Sampling, choose, pack_sampling
from jaxaroo.infer.speculative import loop
from jaxaroo.infer.speculative.drafters import eagle, lookup, small_model
from jaxaroo.infer.speculative.loop import Weights, check
from jaxaroo.infer.speculative.verify import coupled, judge, k_seq, rejection
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, unstack_layers
from jaxaroo.models.eagle import EagleConfig
from jaxaroo.models.eagle import init_params as init_eagle

# ------------------------------------------------------------------------------------------------------- law of texts
V, NEW, S = 8, 4, 16
LAW_ROWS = 1 << 13
CONFIG = DecoderConfig(
    vocab_size=V, embed_dim=16, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64
)
PROMPT = [3, 1, 4]
LLAMA = DecoderConfig(  # that of `bench`
    vocab_size=32, embed_dim=32, ffn_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128
)
TEMPERATURE = 0.8


@functools.cache
def tiny(seed):
    return unstack_layers(init_params(CONFIG, jax.random.key(seed)))


@functools.cache
def joint_law():
    """Of the first NEW tokens behind the prompt, float64 [V] * NEW."""
    every = np.indices((V,) * (NEW - 1)).reshape(NEW - 1, -1).T
    ids = np.concatenate([np.broadcast_to(np.array(PROMPT), (len(every), len(PROMPT))), every], axis=1)
    z = np.asarray(logits(Model(CONFIG, tiny(0)), ids), np.float64)[:, len(PROMPT) - 1 :] / TEMPERATURE
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    law = np.ones(())
    for n in range(NEW):  # p at place n depends on the n tokens before it alone
        law = law[..., None] * p[:, n].reshape((V,) * NEW)[(slice(None),) * n + (0,) * (NEW - 1 - n)]
    return law


def p_value(count, law):
    """Of Pearson's chi-square; cells expected to hold fewer than 10 are merged."""
    count, expected = count.ravel(), law.ravel() * count.sum()
    small = expected < 10
    count, expected = (np.append(d[~small], d[small].sum()) for d in (count, expected))
    count, expected = count[expected > 0], expected[expected > 0]
    statistic = ((count - expected) ** 2 / expected).sum()
    return float(jax.scipy.special.gammaincc((len(count) - 1) / 2, statistic / 2))


@functools.cache
def law_rows():
    """The same prompt many times, each row with a seed of its own."""
    tokens = np.zeros((LAW_ROWS, S), np.int32)
    tokens[:, : len(PROMPT)] = PROMPT
    settings = Sampling(temperature=TEMPERATURE)
    arrays = pack_sampling([(settings, seed // 2, seed % 2) for seed in range(LAW_ROWS)], 0, V)
    length = np.full(LAW_ROWS, len(PROMPT), np.int32)
    return tokens, Rows(arrays, length, length + NEW, np.full((LAW_ROWS, 1), -1, np.int32))


def speculate(drafter, verifier):
    tokens, rows = law_rows()
    weights = Weights(tiny(0), {"model": tiny(1), "stop": ()}, None)
    state = loop.prefill(CONFIG, weights, drafter, tokens, rows, chunk=S)
    halt = np.zeros(LAW_ROWS, bool)
    state = jax.device_get(
        loop.decode(CONFIG, weights, drafter, verifier, state, rows, halt, np.int32(100))._replace(drafter=None)
    )
    assert (state.rows.filled == len(PROMPT) + NEW).all()
    return state.rows.tokens[:, len(PROMPT) : len(PROMPT) + NEW], state.tally


def p_values(tokens):
    """Of the first three tokens together, and of the three after the first, which all were speculated."""
    count = np.zeros((V,) * NEW)
    np.add.at(count, tuple(tokens.T), 1)
    return [p_value(count.sum(axis), joint_law().sum(axis)) for axis in (NEW - 1, 0)]


CHAIN = small_model.make_drafter(CONFIG, 2, "independent")
CHAINS = small_model.make_drafter(CONFIG, 2, "independent", 3)
SHARED = small_model.make_drafter(CONFIG, 2, "shared")
LOSSLESS = {
    "a chain, rejection": (CHAIN, rejection(1, "independent")),
    "three chains, rejection": (CHAINS, rejection(3, "independent")),
    "three chains, k-seq": (CHAINS, k_seq(3)),
    "shared noise, rejection": (SHARED, rejection(1, "chosen")),
    "shared noise, coupled": (SHARED, coupled()),
    "three chains, coupled": (CHAINS, coupled()),
}


IN_THE_SUITE = ("a chain, rejection", "three chains, k-seq")  # the rest with `make proof`: each compiles for long


@pytest.mark.parametrize(
    "name", [name if name in IN_THE_SUITE else pytest.param(name, marks=pytest.mark.proof) for name in LOSSLESS]
)
@pytest.mark.slow
def test_texts_have_the_law_of_the_target(name):
    drafter, verifier = LOSSLESS[name]
    check(drafter, verifier)
    tokens, tally = speculate(drafter, verifier)
    assert min(p_values(tokens)) > 1e-3
    assert tally.emitted[:, 2:].sum() > 0.1 * LAW_ROWS  # drafts were taken, and
    assert tally.emitted[:, 1].sum() > 0.1 * LAW_ROWS  # drafts were refused
    if verifier.name == "coupled":
        given, rows = law_rows()
        state = plain.prefill(CONFIG, tiny(0), given, rows, chunk=S)
        state = plain.decode(CONFIG, tiny(0), state, rows, np.zeros(LAW_ROWS, bool), np.int32(100))
        want = np.asarray(state.tokens)[:, len(PROMPT) : len(PROMPT) + NEW]
        # Near ties may fall otherwise where rows are computed together; in float32, hardly ever.
        assert (tokens != want).any(axis=1).sum() <= 1


def wrong_q(params, node):
    """As if drafts had been drawn at twice the temperature."""
    q = jax.nn.softmax(jnp.log(node.tree.q) / 2, axis=-1)
    return rejection(1, "independent").choose_next(params, node._replace(tree=node.tree._replace(q=q)))


def wrong_rest(params, node):
    """What follows a refusal comes from the target itself."""
    choice = rejection(1, "independent").choose_next(params, node)
    fresh = choose(node.warped, node.sampling, node.position)
    return choice._replace(token=jnp.where(choice.child < 0, fresh, choice.token))


@pytest.mark.parametrize("wrong", [wrong_q, pytest.param(wrong_rest, marks=pytest.mark.proof)])
@pytest.mark.slow
def test_a_biased_rule_is_seen(wrong):
    """The negative control: without it, the test above might be too weak to see anything."""
    biased = rejection(1, "independent")._replace(choose_next=wrong)
    assert max(p_values(speculate(CHAIN, biased)[0])) < 1e-6


# --------------------------------------------------------------------------------------------- caches of 8 and 4 bits
@functools.cache
def drafting(name):
    """Lookup, which runs no network, a small model with a cache of its own, or a tree."""
    if name == "lookup":
        return lookup.make_drafter(), ()
    if name == "small model":
        cfg = dataclasses.replace(LLAMA, num_layers=1)
        params = unstack_layers(init_params(cfg, jax.random.key(0)))
        return small_model.make_drafter(cfg, 3), {"model": params, "stop": ()}
    cfg = EagleConfig(target=LLAMA)
    return eagle.make_drafter(cfg, nodes=8, beam=3, levels=3, draw="shared"), init_eagle(cfg, jax.random.key(3))


@functools.cache
def plainly(dtype, pack, weights):
    tokens, rows = pack()
    state = plain.prefill(LLAMA, weights("llama"), tokens, rows, chunk=16, cache_dtype=dtype)
    return plain.decode(LLAMA, weights("llama"), state, rows, np.zeros(len(tokens), bool), np.int32(1000))


proof = pytest.mark.proof  # the rest: each compiles for long


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lookup", "int4"),
        pytest.param("lookup", "int8", marks=proof),
        pytest.param("small model", "int8", marks=proof),
        pytest.param("small model", "int4", marks=proof),
        pytest.param("tree", "int4", marks=proof),
        pytest.param("tree", "int8", marks=proof),
    ],
)
@pytest.mark.proof
def test_texts_are_those_of_plain_decoding_with_a_cache_of_codes(name, dtype, bench):
    """A node of a tree reads the rows of its path as later steps will, when codes have moved with their scales."""
    drafter, params = drafting(name)
    tokens, rows = bench.pack()
    weights, halt = Weights(bench.weights("llama"), params, ()), np.zeros(len(tokens), bool)
    state = loop.prefill(LLAMA, weights, drafter, tokens, rows, chunk=16, cache_dtype=dtype)
    state = loop.decode(LLAMA, weights, drafter, coupled(), state, rows, halt, np.int32(1000))
    want = plainly(dtype, bench.pack, bench.weights)
    np.testing.assert_array_equal(state.rows.tokens, want.tokens)
    np.testing.assert_array_equal(state.rows.filled, want.filled)
    assert state.tally.emitted[:, 2:].sum() > 0
    off = np.abs(state.rows.scores.chosen - want.scores.chosen)
    rounding = np.abs(want.scores.chosen - bench.plain().scores.chosen)[0, : rows.prompt_length[0] + 10].max()
    assert rounding > 1e-4  # a cache of floats gives others
    # Rows that are computed together differ by some 1e-7, and rarely that takes a number to the next code: a few
    # log-probabilities then move by a small part of what rounding does, where others stay as they are.
    assert (off > 1e-5).mean() < 0.05
    assert off.max() < 0.1 * rounding


def test_a_drafter_that_catches_up_reads_through_the_same_cache(bench):
    """Otherwise its features, and the memory they take, would be those of floats."""
    drafter, params = drafting("tree")
    tokens, rows = bench.pack()
    weights = Weights(bench.weights("llama"), params, ())
    begin = functools.partial(loop.prefill, LLAMA, drafter=drafter, chunk=16, cache_dtype="int4")
    state = jax.eval_shape(lambda w, t, r: begin(w, tokens=t, rows=r), weights, tokens, rows)
    program = functools.partial(loop.catch_up, LLAMA, drafter=drafter, chunk=16)
    text = str(jax.make_jaxpr(lambda w, s, r: program(w, state=s, rows=r))(weights, state, rows))
    B, S = tokens.shape
    kept = f"f32[{B},{S},{LLAMA.num_kv_heads},{LLAMA.head_dim}] = broadcast_in_dim"
    assert text.count(kept) <= 2  # keys and values of the drafter's own layer


# ------------------------------------------------------------------------------------------------------ refused pairs
CHOSEN, TREE = lookup.make_drafter(), CHAINS._replace(name="a tree", chains=False)
PRUNED = CHAIN._replace(name="a pruned one", pruned=True)
REFUSED = [
    (CHOSEN, rejection(1, "independent"), r"rejection with drafter lookup: its drafts are chosen; expected \['indep"),
    (CHOSEN, k_seq(1), r"k-seq with drafter lookup: its drafts are chosen; expected \['independent'\]. The rule would"),
    (CHAIN, rejection(1, "chosen"), r"its drafts are independent; expected \['chosen'\]. The rule would divide by"),
    (
        CHAIN._replace(proposal="without_replacement"),
        rejection(1, "independent"),
        r"its drafts are without replacement; expected \['independent'\]",
    ),
    (CHAIN._replace(proposal="without_replacement"), k_seq(1), r"without replacement; expected \['independent'\]"),
    (PRUNED, rejection(1, "independent"), "found a sampled tree that is pruned by its own scores; expected one of fix"),
    (PRUNED, k_seq(1), "k-seq with drafter a pruned one: found a sampled tree that is pruned"),
    (TREE, k_seq(3), "k-seq with drafter a tree: found a tree; expected independent chains"),
    (CHAINS, k_seq(2), "a node may have 3 children; the rule looks at 2"),
    (CHAINS, rejection(2, "independent"), "a node may have 3 children; the rule looks at 2"),
    (CHAINS, judge(coupled(), 2), "judge over coupled with .*: a node may have 3 children; the rule looks at 2"),
    (CHOSEN, judge(rejection(1, "independent"), 1), "judge over rejection with drafter lookup: its drafts are chosen"),
]


@pytest.mark.errors
@pytest.mark.parametrize(("drafter", "verifier", "message"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_pairs_that_would_bias_the_output_are_refused(drafter, verifier, message):
    with pytest.raises(ValueError, match=message):
        check(drafter, verifier)


def test_pairs_that_hold_are_not_refused():
    for verifier in (coupled(), rejection(1, "chosen"), judge(coupled(), 1)):
        check(CHOSEN, verifier)
        check(CHOSEN._replace(pruned=True), verifier)  # by scores, of tokens that nobody drew
    for verifier in (coupled(), rejection(3, "independent"), k_seq(3), k_seq(4)):
        check(CHAINS, verifier)
    check(PRUNED, coupled())
