"""Oracles: plain decoding, and everything that the drafter keeps computed again from the text alone.

Weights come at three distances: `same` (what lies behind the exit does nothing, so drafts are the target's own tokens),
`near`, which is right often, and `far`, random. They are traced, and compile nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxaroo.infer import decode as plain
from jaxaroo.infer.decode import FULL, RUNNING, STOPPED, Rows
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import loop
from jaxaroo.infer.speculative.drafters.kangaroo import make_drafter, make_tree_drafter
from jaxaroo.infer.speculative.loop import Weights
from jaxaroo.infer.speculative.stop import acceptance, acceptance_head, confidence
from jaxaroo.infer.speculative.verify import coupled, rejection
from jaxaroo.models import kangaroo
from jaxaroo.models.cache import KVCache
from jaxaroo.models.decoder import DecoderConfig, forward, init_params, lm_head, stack_layers, unstack_layers
from jaxaroo.models.kangaroo import KangarooConfig
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.kangaroo import run as train_forward

TARGET = DecoderConfig(
    vocab_size=24,
    embed_dim=16,
    ffn_dim=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=500.0,
    window=2,  # less than trees are deep: keys of drafts fall out of sight, too
    window_layers=(False, True, False),
)
CFG = KangarooConfig(target=TARGET, exit_layer=2)
S, DRAFTS = 64, 4
NODES = 18  # root included: of 3 + 9 + 9 guesses a tree keeps some of every level, and leaves some out
PROMPTS = [[5, 9, 13], [1], list(range(2, 22))]
LAST = S - 20 - NODES  # tokens that leave the longest prompt just the slots that a step needs
GREEDY = [Sampling(temperature=0.0, max_tokens=n) for n in (30, 12, LAST)]
MIXED = [
    Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.3, max_tokens=30),
    Sampling(temperature=0.0, frequency_penalty=0.5, max_tokens=12),
    Sampling(temperature=0.7, top_k=7, max_tokens=LAST),
]
SAMPLED = [Sampling(temperature=1.0, max_tokens=n) for n in (30, 12, LAST)]
KINDS = {
    "mode": make_drafter(CFG, DRAFTS, "mode", confidence()),
    "shared": make_drafter(CFG, DRAFTS, "shared", acceptance_head()),
    "independent": make_drafter(CFG, DRAFTS, "independent", confidence()),
    "tree": make_tree_drafter(CFG, nodes=NODES, beam=3, levels=3, stop=confidence()),
    "shared tree": make_tree_drafter(CFG, nodes=9, beam=3, levels=2, draw="shared", stop=confidence()),
}


@functools.cache
def weights(distance, seed=0):
    """Target, its layers as a tuple, and adapter."""
    return build(seed, *{"same": (0.0, 0.0, 0.0), "near": (0.5, 0.2, 0.2), "far": (1.0, 1.0, 1.0)}[distance])


@jax.jit
def build(seed, deep, adapted, noise):
    """Scale what the layers behind the exit do, what the adapter's attention does, and how far the last norms are."""
    key, key_a, key_b, key_n = jax.random.split(jax.random.key(seed), 4)
    target = init_params(TARGET, key)
    behind = jnp.where(jnp.arange(TARGET.num_layers) < CFG.exit_layer, 1.0, deep)
    layers = target["layers"]
    layers["attn"]["o"] *= behind[:, None, None, None]
    layers["mlp"]["down"] *= behind[:, None, None]
    target["norm"] += 0.1 * jax.random.normal(key_n, target["norm"].shape)
    adapter = kangaroo.init_params(CFG, key_a)
    adapter["attn"]["o"] *= adapted
    adapter["norm_out"] = target["norm"] * (1 + noise * jax.random.normal(key_b, target["norm"].shape))
    return unstack_layers(target), adapter


@functools.cache
def head(threshold=0.3):
    k = jax.random.split(jax.random.key(9), 2)
    D = TARGET.embed_dim
    blocks = {"weight": 0.2 * jax.random.normal(k[0], (2, D, D)), "bias": jnp.zeros((2, D))}
    last = {"weight": 0.2 * jax.random.normal(k[1], (2, D)), "bias": jnp.array([-0.5, 1.0])}
    return {"blocks": blocks, "head": last, "threshold": jnp.float32(threshold)}


def pack(samplings, prompts=PROMPTS, seeds=(3, 0, 77), stop_ids=()):
    tokens = np.zeros((len(prompts), S), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    length = np.array([len(p) for p in prompts], np.int32)
    stops = np.full((len(prompts), 2), -1, np.int32)
    stops[:, : len(stop_ids)] = stop_ids
    arrays = pack_sampling([(s, seed, 0) for s, seed in zip(samplings, seeds, strict=True)], 0, TARGET.vocab_size)
    return tokens, Rows(arrays, length, length + np.array([s.max_tokens for s in samplings], np.int32), stops)


def bundle(kind, distance, threshold=None, seed=0):
    """Weights of loop, with the parameters of the kind's stop rule; by default it never stops."""
    target, adapter = weights(distance, seed)
    if kind == "shared":
        stop = head(1.0 if threshold is None else threshold)
    else:
        stop = {"eta": jnp.float32(-1.0 if threshold is None else threshold)}
    return Weights(target, {"adapter": adapter, "stop": stop}, ())


def rule(kind):
    return rejection(1, "independent") if kind == "independent" else coupled()


def begin(kind, w, tokens, rows):
    return loop.prefill(TARGET, w, KINDS[kind], tokens, rows, chunk=16)


def advance(kind, w, state, rows, steps=1000):
    halt = np.zeros(len(state.rows.tokens), bool)
    return loop.decode(TARGET, w, KINDS[kind], rule(kind), state, rows, halt, np.int32(steps))


def speculate(kind, w, tokens, rows):
    return jax.device_get(advance(kind, w, begin(kind, w, tokens, rows), rows))


def plainly(target, tokens, rows):
    state = plain.prefill(TARGET, target, tokens, rows, chunk=16)
    halt = np.zeros(len(tokens), bool)
    return jax.device_get(plain.decode(TARGET, target, state, rows, halt, np.int32(1000)))


def lines(state):
    return [row[:n].tolist() for row, n in zip(state.tokens, state.filled, strict=True)]


def tau(tally):
    """Tokens a step, of all rows."""
    return (tally.emitted * np.arange(tally.emitted.shape[1])).sum() / tally.emitted.sum()


# ------------------------------------------------------------------------------------------------- the same output
CASES = [("mode", None), ("mode", 0.2), ("shared", None), ("shared", 0.5), ("tree", None), ("tree", 0.1)]


@pytest.mark.parametrize("samplings", [GREEDY, SAMPLED, MIXED], ids=["greedy", "sampled", "mixed"])
@pytest.mark.parametrize(("kind", "threshold"), CASES)
@pytest.mark.slow
def test_output_is_that_of_plain_decoding(kind, threshold, samplings):
    tokens, rows = pack(samplings)
    for distance in ("same", "near", "far"):
        w = bundle(kind, distance, threshold)
        want, got = plainly(w.target, tokens, rows), speculate(kind, w, tokens, rows)
        assert lines(got.rows) == lines(want)
        assert got.rows.status.tolist() == want.status.tolist() == [FULL] * 3
        for row, n in enumerate(want.filled):
            answer = slice(len(PROMPTS[row]), n)
            np.testing.assert_allclose(
                got.rows.scores.chosen[row, answer], want.scores.chosen[row, answer], rtol=0, atol=2e-4
            )
        emitted = (got.tally.emitted * np.arange(got.tally.emitted.shape[1])[None]).sum(1)
        np.testing.assert_array_equal(emitted, want.filled - rows.prompt_length - 1)


@pytest.mark.parametrize("kind", ["mode", "shared", "tree"])
@pytest.mark.slow
def test_a_stop_token_ends_its_row_in_the_middle_of_a_path(kind):
    w = bundle(kind, "same")
    tokens, rows = pack(SAMPLED)
    free = lines(plainly(w.target, tokens, rows))
    stops = [free[0][len(PROMPTS[0]) + 7], free[2][len(PROMPTS[2]) + 20]]
    tokens, rows = pack(SAMPLED, stop_ids=stops)
    want, got = plainly(w.target, tokens, rows), speculate(kind, w, tokens, rows)
    assert lines(got.rows) == lines(want)
    assert got.rows.status.tolist() == want.status.tolist()
    assert STOPPED in want.status


# -------------------------------------------------------------------------------------------- what is kept, recomputed
@jax.jit
def recompute(target, adapter, tokens, length):
    """The target's cache, exit states and the adapter's cache of committed text, from nothing."""
    cache, _, (exits,) = plain.read_prompt(TARGET, target, tokens, length, chunk=S, collect=(CFG.exit_layer,))
    positions = jnp.broadcast_to(jnp.arange(S)[None], tokens.shape)
    empty = kangaroo.new_cache(CFG, len(tokens), S)
    return cache, exits, kangaroo.forward(CFG, adapter, exits, positions, cache=empty).cache


def assert_rows_equal(got, want, row, n):
    """The first n slots of one row of two caches."""
    for g, w in zip(jax.tree.leaves(got.layers), jax.tree.leaves(want.layers), strict=True):
        np.testing.assert_allclose(g[row, :n], w[row, :n], rtol=0, atol=5e-5)


def check_caches(w, state):
    """Rows that run have every committed row of the target; a chain all of the adapter's but the last, and the last
    exit state; a tree all of the adapter's."""
    length = state.rows.filled - 1
    cache, exits, adapter = jax.device_get(recompute(w.target, w.drafter["adapter"], state.rows.tokens, length))
    state = jax.device_get(state)
    np.testing.assert_array_equal(state.rows.cache.length, length)
    for row in np.flatnonzero(state.rows.status == RUNNING):
        n = length[row]
        assert_rows_equal(state.rows.cache, cache, row, n)
        if isinstance(state.drafter, KVCache):
            assert state.drafter.length[row] == n
            assert_rows_equal(state.drafter, adapter, row, n)
        else:
            assert_rows_equal(state.drafter.cache, adapter, row, n - 1)
            np.testing.assert_allclose(state.drafter.exit[row], exits[row, n - 1], rtol=0, atol=5e-5)


@pytest.mark.slow
def test_caches_are_those_of_the_text_whatever_was_accepted():
    """Every number of drafts accepted, of a full chain and of chains that stopped early; after every step."""
    seen, want = set(), {(n, a) for n in range(1, DRAFTS + 1) for a in range(n + 1)}
    for seed in range(30):
        eta = (-1.0, 0.2, 0.3, 0.15)[seed % 4]
        tokens, rows = pack([Sampling(temperature=t, max_tokens=LAST) for t in (0.2, 0.6, 0.0)], seeds=(seed, 1, 2))
        w = bundle("mode", "near", eta, seed)
        state = begin("mode", w, tokens, rows)
        check_caches(w, state)
        for _ in range(12):
            before = jax.device_get((state.tally, state.rows.status))
            state = advance("mode", w, state, rows, 1)
            check_caches(w, state)
            running = (before[1] == RUNNING) & (np.asarray(state.rows.status) == RUNNING)
            drafted = np.asarray(state.tally.drafted) - before[0].drafted
            accepted = np.argmax(state.tally.emitted - before[0].emitted, axis=1) - 1
            seen |= {(int(drafted[b]), int(accepted[b])) for b in np.flatnonzero(running)}
        if seen == want:
            return
    pytest.fail(f"never met (drafted, accepted): {sorted(want - seen)}")


@pytest.mark.slow
def test_caches_of_a_tree_drafter_are_those_of_the_text():
    seen = set()
    for seed in range(4):
        w = bundle("tree", "near", (-1.0, 0.1)[seed % 2], seed)
        tokens, rows = pack([Sampling(temperature=t, max_tokens=LAST) for t in (0.2, 0.6, 0.0)], seeds=(seed, 1, 2))
        state = begin("tree", w, tokens, rows)
        check_caches(w, state)
        for _ in range(8):
            before = jax.device_get(state.tally.emitted)
            state = advance("tree", w, state, rows, 1)
            check_caches(w, state)
            seen |= {
                *np.argmax(state.tally.emitted - before, axis=1)[np.asarray(state.rows.status) == RUNNING].tolist()
            }
    assert seen == {1, 2, 3, 4}


def test_early_layers_then_late_ones_are_the_whole_target():
    target, _ = weights("far")
    tokens = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20))
    whole = jax.jit(functools.partial(forward, TARGET))(target, tokens, positions)
    early = jax.jit(functools.partial(forward, TARGET, stop_layer=2))(target, tokens, positions)
    late = jax.jit(functools.partial(forward, TARGET, start_layer=2))(target, early.hidden, positions)
    np.testing.assert_allclose(late.hidden, whole.hidden, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- what is drafted, and q
@functools.partial(jax.jit, static_argnames="kind")
def propose(kind, w, state, rows):
    """The next tree of every row, without judging it."""
    context = loop._context(state.rows, rows)
    return KINDS[kind].propose(w.target, w.drafter, state.drafter, context)[0]


@jax.jit
def train_states(target, adapter, tokens):
    """y at every position, as the objective computes it, and its logits."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    whole = jnp.ones((B, T))
    batch = Batch(tokens, tokens, positions, jnp.ones_like(positions), whole > 0, whole)
    target = stack_layers(target)
    y = train_forward(CFG, adapter, target, batch)[1]
    return y, lm_head(TARGET, target, y)


def drafted(kind, w, samplings, steps):
    """A tree after some steps, and what training would see at the positions it was drafted from."""
    tokens, rows = pack(samplings)
    state = begin(kind, w, tokens, rows)
    if steps:
        state = advance(kind, w, state, rows, steps)
    tree, state = jax.device_get((propose(kind, w, state, rows), state))
    text = state.rows.tokens.copy()
    for row, n in enumerate(state.rows.filled):
        text[row, n : n + DRAFTS] = tree.tokens[row, 1:]
    y, z = jax.device_get(train_states(w.target, w.drafter["adapter"], text))
    at = (state.rows.filled - 1)[:, None] + np.arange(DRAFTS)[None]
    pick = lambda all_: np.take_along_axis(all_, at[..., None], axis=1)  # [B, n, ...]
    return tree, pick(y), pick(z), state, rows


def warp_by_hand(z, s, seen, count):
    """float64 probabilities of one position; the options that MIXED uses."""
    z = z.astype(np.float64)
    z = np.where(seen, np.where(z > 0, z / s.repetition_penalty, z * s.repetition_penalty), z)
    z = z - s.presence_penalty * np.minimum(count, 1) - s.frequency_penalty * count
    z = z / (s.temperature or 1.0)
    if s.temperature and s.top_k:
        z[z < np.sort(z)[-s.top_k]] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    if s.temperature and s.top_p < 1:
        down = np.sort(p)[::-1]
        p[p < down[np.flatnonzero(np.cumsum(down) - down < s.top_p)[-1]]] = 0
    return p / p.sum()


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.slow
def test_q_is_what_training_saw_at_those_positions_warped(steps):
    """The cached chain against one uncached pass over the text, and every processor by hand."""
    tree, _, z, state, _ = drafted("independent", bundle("independent", "far"), MIXED, steps)
    assert tree.valid.all()
    for row, s in enumerate(MIXED):
        answer = state.rows.tokens[row, len(PROMPTS[row]) : state.rows.filled[row]]
        count = np.bincount(answer, minlength=TARGET.vocab_size)
        seen = (count > 0) | np.isin(np.arange(TARGET.vocab_size), PROMPTS[row])
        for i in range(DRAFTS):
            want = warp_by_hand(z[row, i], s, seen, count)
            np.testing.assert_allclose(tree.q[row, tree.q_row[row, i]], want, rtol=0, atol=2e-5)
            assert want[tree.tokens[row, i + 1]] > 0
            if s.temperature == 0:
                assert tree.tokens[row, i + 1] == np.argmax(want)


def test_confidence_ends_a_chain_behind_the_first_unsure_token():
    """And that token is kept."""
    found = set()
    for seed in range(4):
        _, _, z, *_ = drafted("mode", bundle("mode", "far", seed=seed), SAMPLED, 0)
        top1 = 1 / np.exp(z - z.max(-1, keepdims=True)).sum(-1)
        for eta in (0.0, *np.sort(top1.reshape(-1))[[1, 3, 5, 7]] + 1e-4, 1.0):
            tree, *_ = drafted("mode", bundle("mode", "far", eta, seed), SAMPLED, 0)
            want = [next((i + 1 for i in range(DRAFTS) if row[i] <= eta), DRAFTS) for row in top1]
            np.testing.assert_array_equal(tree.valid.sum(1) - 1, want)
            found |= set(want)
    assert found == set(range(1, DRAFTS + 1))


@pytest.mark.slow
def test_the_acceptance_head_sees_the_state_that_each_draft_came_from():
    _, y, *_ = drafted("shared", bundle("shared", "far"), SAMPLED, 0)
    found = set()
    for threshold in (0.0, 0.3, 0.5, 0.6, 1.0):
        tree, *_ = drafted("shared", bundle("shared", "far", threshold), SAMPLED, 0)
        for row in range(3):
            product, want = 1.0, 1
            while want < DRAFTS and not (want > 1 and 1 - product > threshold):
                product *= float(acceptance(head(), jnp.asarray(y[row, want : want + 1]))[0])
                want += 1
            assert tree.valid[row].sum() - 1 == want, (row, threshold, product)
            found.add(want)
    assert found == {2, 3, 4}


def test_a_row_drafts_as_if_alone():
    """Its neighbours stop elsewhere, end elsewhere, and say something else."""
    w = bundle("mode", "near", 0.25)
    tokens, rows = pack(SAMPLED)
    first = speculate("mode", w, tokens, rows)
    others = [PROMPTS[0], [4, 4, 4, 4], [7]]
    tokens, rows = pack([SAMPLED[0], GREEDY[0], SAMPLED[1]], others, seeds=(3, 8, 9))
    again = speculate("mode", w, tokens, rows)
    assert lines(again.rows)[0] == lines(first.rows)[0]
    np.testing.assert_array_equal(again.tally.emitted[0], first.tally.emitted[0])
    assert again.tally.drafted[0] == first.tally.drafted[0]
    assert first.tally.drafted[0] < DRAFTS * first.tally.emitted[0].sum()  # it did stop early


def tree_by_hand(w, text, n, eta, nodes=NODES, beam=3, levels=3):
    """Paths of the best guesses behind the first n tokens, and how deep the tree went; one whole pass a path."""
    adapter = w.drafter["adapter"]

    def logp(paths):
        full = np.tile(text, (3, 1))
        for i, path in enumerate(paths):
            full[i, n : n + len(path)] = path
        z = np.asarray(train_states(w.target, adapter, full)[1][:, n - 1 + len(paths[0])], np.float64)
        return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))

    pool, front, depth = {}, {(): 0.0}, 0
    while depth < levels and (not depth or np.exp(max(front.values())) > eta):
        depth += 1
        paths = list(front)
        grown = {}
        for path, row in zip(paths, logp(paths), strict=False):
            for token in np.argsort(-row)[:beam]:
                grown[*path, int(token)] = front[path] + row[token]
        pool |= grown
        front = dict(sorted(grown.items(), key=lambda item: -item[1])[:beam])
    return {path for path, _ in sorted(pool.items(), key=lambda item: -item[1])[: nodes - 1]}, depth


def paths_of(tree, row):
    """Of every valid node but the root, as tokens."""
    paths = {0: ()}
    for node in range(1, tree.tokens.shape[1]):
        parent = int(tree.parent[row, node])
        if tree.valid[row, node]:
            assert tree.depth[row, node] == tree.depth[row, parent] + 1
            paths[node] = (*paths[parent], int(tree.tokens[row, node]))
    assert len({*paths.values()}) == len(paths)
    return {path for path in paths.values() if path}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.slow
def test_a_tree_holds_the_best_guesses_and_stops_behind_an_unsure_level(steps):
    depths = set()
    for eta in (-1.0, 0.03, 0.1, 0.9):
        w = bundle("tree", "far", eta)
        tokens, rows = pack(SAMPLED)
        state = begin("tree", w, tokens, rows)
        if steps:
            state = advance("tree", w, state, rows, steps)
        tree, state = jax.device_get((propose("tree", w, state, rows), state))
        for row, n in enumerate(state.rows.filled):
            want, depth = tree_by_hand(w, state.rows.tokens[row], n, eta)
            assert paths_of(tree, row) == want
            depths.add(depth)
    assert depths == {1, 2, 3}


# ------------------------------------------------------------------------------------------------------- how many, how
@pytest.mark.parametrize(("kind", "samplings"), [("mode", GREEDY), ("shared", SAMPLED), ("independent", SAMPLED)])
def test_an_adapter_that_knows_the_target_has_all_drafts_accepted(kind, samplings):
    """q = p: no coin can refuse. The last step may be cut short by the row's limit."""
    wide = [Sampling(temperature=s.temperature, max_tokens=1 + n) for s, n in zip(samplings, (30, 10, 35), strict=True)]
    tokens, rows = pack(wide)
    got = speculate(kind, bundle(kind, "same"), tokens, rows)
    want = np.zeros((3, DRAFTS + 2), int)
    want[:, DRAFTS + 1] = (6, 2, 7)
    np.testing.assert_array_equal(got.tally.emitted, want)
    assert tau(got.tally) == DRAFTS + 1
    np.testing.assert_array_equal(got.tally.drafted, DRAFTS * want.sum(1))


@pytest.mark.slow
def test_a_tree_under_the_targets_noise_holds_what_the_target_will_draw():
    """Its first level always, and every level where it goes deeper; a wrong position would be another noise."""
    tokens, rows = pack([Sampling(temperature=1.0, max_tokens=n) for n in (30, 12, 35)])
    w = bundle("shared tree", "same")
    got = speculate("shared tree", w, tokens, rows)
    assert lines(got.rows) == lines(plainly(w.target, tokens, rows))
    assert got.tally.emitted[:, :2].sum() <= 3  # at most the last step of each row, cut short by its limit
    assert tau(got.tally) > 2.5


@pytest.mark.slow
def test_warped_drafts_of_an_adapter_that_knows_the_target_are_all_accepted():
    """Not so if q were recorded before temperature and cuts."""
    sharp = [Sampling(temperature=0.5, max_tokens=31), Sampling(temperature=1.5, top_k=3, max_tokens=11)]
    tokens, rows = pack([*sharp, Sampling(temperature=0.8, top_p=0.7, max_tokens=36)])
    got = speculate("independent", bundle("independent", "same"), tokens, rows)
    assert tau(got.tally) == DRAFTS + 1


@pytest.mark.parametrize(("kind", "samplings"), [("mode", GREEDY), ("independent", SAMPLED)])
def test_the_draft_that_ends_a_chain_is_verified(kind, samplings):
    """Never sure: one draft a step, and if it is right, two tokens a step."""
    tokens, rows = pack([Sampling(temperature=s.temperature, max_tokens=21) for s in samplings])
    got = speculate(kind, bundle(kind, "same", 1.0), tokens, rows)
    assert tau(got.tally) == 2
    np.testing.assert_array_equal(got.tally.drafted, [10, 10, 10])


def test_independent_drafts_of_a_near_adapter_are_often_accepted():
    tokens, rows = pack(SAMPLED)
    near, far = (speculate("independent", bundle("independent", d), tokens, rows).tally for d in ("near", "far"))
    assert 1 < tau(far) < tau(near) < DRAFTS + 1


@jax.jit
def whole_logits(target, text, positions):
    return lm_head(TARGET, target, forward(TARGET, target, text, positions).hidden)


@pytest.mark.proof
def test_independent_drafts_leave_the_targets_law():
    """Second and third token of 4096 samples, drafted by chains that stop early, against all sequences of three."""
    number, capacity, V = 4096, 16, TARGET.vocab_size
    w = bundle("independent", "near", 0.15)
    length = np.ones(number, np.int32)
    sampling = pack_sampling([(Sampling(temperature=1.0), seed, 0) for seed in range(number)], 0, V)
    rows = Rows(sampling, length, length + 3, np.full((number, 2), -1, np.int32))
    tokens = np.zeros((number, capacity), np.int32)
    tokens[:, 0] = 5
    state = loop.prefill(TARGET, w, KINDS["independent"], tokens, rows, chunk=16)
    got = jax.device_get(advance("independent", w, state, rows))
    count = np.zeros((V, V))
    np.add.at(count, (got.rows.tokens[:, 2], got.rows.tokens[:, 3]), 1)
    assert got.tally.drafted.min() < got.tally.drafted.max()

    pairs = np.stack(np.meshgrid(np.arange(V), np.arange(V), indexing="ij"), axis=-1).reshape(-1, 2)
    text = np.concatenate([np.full((V * V, 1), 5), pairs], axis=1).astype(np.int32)
    positions = np.broadcast_to(np.arange(3, dtype=np.int32), text.shape)
    z = np.asarray(whole_logits(w.target, text, positions), np.float64)

    def p_value(temperature):
        p = np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True)  # [V V, 3, V]
        first = p[np.arange(V) * V, 0][0]
        second = p[np.arange(V) * V, 1]
        third = p[:, 2].reshape(V, V, V)
        want = number * np.einsum("a,ab,abc->bc", first, second, third).reshape(-1)
        seen, rare = count.reshape(-1), want < 10
        want = np.append(want[~rare], want[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
        return chi2.sf(((seen - want) ** 2 / want).sum(), len(want) - 1)

    assert p_value(1.0) > 1e-3
    assert p_value(1.3) < 1e-3  # the test can tell laws apart


def test_settings_and_thresholds_compile_nothing():
    tokens, rows = pack(SAMPLED)
    speculate("mode", bundle("mode", "near"), tokens, rows)
    before = loop.decode._cache_size(), loop.prefill._cache_size()
    for eta, samplings in [(0.1, MIXED), (0.9, GREEDY)]:
        speculate("mode", bundle("mode", "far", eta), *pack(samplings))
    assert (loop.decode._cache_size(), loop.prefill._cache_size()) == before
    assert make_drafter(CFG, DRAFTS, "mode", confidence()) is KINDS["mode"]


@pytest.mark.errors
def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="kangaroo: drafts=0; expected at least 1"):
        make_drafter(CFG, 0)
    with pytest.raises(ValueError, match="draw='without_replacement'; expected 'mode', 'shared' or 'independent'"):
        make_drafter(CFG, 2, "without_replacement")
    with pytest.raises(ValueError, match="draw='independent' in a dynamic tree; expected 'mode' or 'shared'"):
        make_tree_drafter(CFG, draw="independent")
    with pytest.raises(ValueError, match=r"nodes=9, beam=2, levels=2; .* 2 to 7 nodes"):
        make_tree_drafter(CFG, nodes=9, beam=2, levels=2)
    with pytest.raises(ValueError, match="drafts are independent"):
        loop.check(KINDS["independent"], rejection(1, "chosen"))
