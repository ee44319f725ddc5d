"""Oracles: pairs, thresholds and labellings counted one by one, float64 loops, single texts without padding. Learning:
a model that memorised texts gives them away, and a probe finds what was planted and nothing else."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer import membership
from jaxaroo.infer.membership import (
    AFTER,
    BEFORE,
    ProbeConfig,
    bag_of_words,
    chance_error,
    choose_layer,
    fit_probe,
    last_activations,
    mean_logp,
    min_k,
    probe_scores,
    split_texts,
    standardise,
    token_logps,
    tpr_at_fpr,
    wrap,
    wrap_within,
)
from jaxaroo.infer.step_metrics import auroc
from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params, lm_head, unstack_layers
from jaxaroo.models.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=128,
)
TIED = dataclasses.replace(CFG, tie_embeddings=True)
TEXTS = ["ab", "a text that is a good deal longer than the others", "x y z", "ab", "0123456789"]


@functools.cache
def model(cfg=CFG):
    return Model(cfg, unstack_layers(init_params(cfg, jax.random.key(0))))


@functools.cache
def alone(text, cfg=CFG):
    """One text without padding, layer by layer: its tokens, and its states behind each."""
    ids = np.asarray([TOKENIZER.encode(text)], np.int32)
    at, states = np.arange(ids.shape[1], dtype=np.int32)[None], [jnp.asarray(ids)]
    for layer in range(cfg.num_layers):
        one = functools.partial(forward, cfg, start_layer=layer, stop_layer=layer + 1)
        states.append(jax.jit(one)(model(cfg).params, states[-1], at).hidden)
    return ids, states[1:]


# ------------------------------------------------------------------------------------------------- how good scores are
@given(
    st.lists(st.integers(0, 5), min_size=14, max_size=14), st.integers(1, 2**14 - 2), st.sampled_from([0, 0.05, 0.3])
)
def test_rates_and_auc_are_those_of_every_threshold_and_pair(scores, bits, most):
    labels = [bits >> i & 1 for i in range(14)]
    members, others = ([s for s, y in zip(scores, labels, strict=True) if y == kind] for kind in (1, 0))
    best = 0.0
    for threshold in (*scores, math.inf):
        rate = lambda part, t=threshold: sum(s >= t for s in part) / len(part)
        if rate(others) <= most:
            best = max(best, rate(members))
    assert tpr_at_fpr(scores, labels, most) == best
    wins = sum((m > o) + (m == o) / 2 for m in members for o in others)
    assert auroc(scores, labels) == wins / (len(members) * len(others))


def test_exactly_one_in_twenty_may_be_accused():
    others, labels = [9, *range(-19, 0)], [0] * 20 + [1] * 4
    assert tpr_at_fpr([*others, 8, 7, 0, -20], labels) == 0.75
    assert tpr_at_fpr([*others, 8, 7, 0, -20], labels, 0.04) == 0
    assert tpr_at_fpr([9.0, *others[1:], 9.0, 7, 0, -20], labels, 0.04) == 0  # a tie accuses both
    assert tpr_at_fpr([1, 2], [1, 1]) is tpr_at_fpr([1, 2], [0, 0]) is tpr_at_fpr([], []) is None


def test_the_error_of_chance_is_that_of_all_labellings():
    for n, members in ((5, 2), (7, 3)):
        found = [
            auroc(list(range(n)), [int(i in chosen) for i in range(n)])
            for chosen in itertools.combinations(range(n), members)
        ]
        assert chance_error([1] * members + [0] * (n - members)) == pytest.approx(np.std(found), rel=1e-12)


# --------------------------------------------------------------------------------------------------------- the probe
def test_standardised_features_are_a_loop_and_what_never_changes_is_zero():
    x = (np.random.default_rng(0).normal(size=(7, 2, 3)) * 5 + 3).astype(np.float32)
    x[:, 1, 2] = 0.1
    found = standardise(x)
    for layer, feature in itertools.product(range(2), range(3)):
        values = [float(v) for v in x[:, layer, feature]]
        mean = math.fsum(values) / 7
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / 6)
        wanted = [0.0] * 7 if (layer, feature) == (1, 2) else [(v - mean) / deviation for v in values]
        np.testing.assert_allclose(found[:, layer, feature], wanted, rtol=1e-6, atol=0)
    assert found.dtype == np.float32


def adamw(x, y, cfg):
    """One layer, float64: the moments, their corrections, and decay apart from the gradient."""
    w = m = v = np.zeros(x.shape[1])
    for t in range(1, cfg.epochs + 1):
        g = x.T.astype(np.float64) @ (1 / (1 + np.exp(-x @ w)) - y) / len(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - cfg.learning_rate * cfg.weight_decay * w - cfg.learning_rate * step
    return w


@pytest.mark.optimizer
def test_probes_take_the_steps_of_a_float64_loop_each_layer_by_itself():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, 3, 5)).astype(np.float32) * np.array([1, 5, 0.2], np.float32)[:, None]
    y = (rng.random(12) < 0.5).astype(np.int64)
    cfg = ProbeConfig(learning_rate=0.05, weight_decay=0.4, epochs=40)
    found = fit_probe(x, y, cfg)
    for layer in range(3):
        np.testing.assert_allclose(found[layer], adamw(x[:, layer], y, cfg), rtol=2e-4, atol=1e-5)
    assert np.abs(found).max() > 0.3
    scores = probe_scores(x, found)
    assert scores[4, 2] == pytest.approx(sum(float(a) * float(b) for a, b in zip(x[4, 2], found[2], strict=True)))


def splits(rng, planted):
    """Labels and activations of three splits; in layer 2 of 4 members are `planted` away in a fixed direction."""
    direction = rng.normal(size=8)
    for n in (60, 40, 400):
        labels = np.arange(n) % 2
        x = rng.normal(size=(n, 4, 8)) * 3 + 7
        x[:, 2] += planted * labels[:, None] * direction / np.linalg.norm(direction)
        yield standardise(x.astype(np.float32)), labels


@pytest.mark.optimizer
def test_what_was_planted_in_one_layer_is_found_there_and_nothing_elsewhere():
    (train, y), (dev, y_dev), (test, y_test) = splits(np.random.default_rng(2), 12.0)
    probe = fit_probe(train, y)
    layer, by_layer = choose_layer(probe_scores(dev, probe), y_dev)
    assert (layer, len(by_layer)) == (2, 4)
    scores = probe_scores(test, probe)
    assert auroc(scores[:, layer], y_test) > 0.95  # members are the high ones
    assert tpr_at_fpr(scores[:, layer], y_test) > 0.8
    for other in (0, 1, 3):
        assert abs(auroc(scores[:, other], y_test) - 0.5) < 3.5 * chance_error(y_test)


@pytest.mark.optimizer
def test_where_nothing_was_planted_nothing_is_found():
    (train, y), (dev, y_dev), (test, y_test) = splits(np.random.default_rng(3), 0.0)
    probe = fit_probe(train, y)
    layer, _ = choose_layer(probe_scores(dev, probe), y_dev)
    assert auroc(probe_scores(train, probe)[:, layer], y) > 0.5 + 2 * chance_error(y)  # though it learned its own texts
    assert abs(auroc(probe_scores(test, probe)[:, layer], y_test) - 0.5) < 3.5 * chance_error(y_test)


def test_of_layers_that_rank_alike_the_first_is_chosen():
    y = [0, 1, 0, 1]
    layers = np.array([[4, 3, 2, 1], [1, 3, 2, 4], [0, 9, 5, 9], [1, 2, 1.5, 4]], float)
    assert choose_layer(layers.T, y) == (1, [0.25, 1.0, 1.0, 1.0])


# -------------------------------------------------------------------------------------------------- what a model says
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.slow
def test_activations_are_those_of_a_single_text_run_layer_by_layer(stacked):
    used = Model(CFG, init_params(CFG, jax.random.key(0))) if stacked else model()
    found = last_activations(used, TOKENIZER, TEXTS, batch=2)
    assert found.dtype == np.float32
    for i, text in enumerate(TEXTS[:3]):
        for layer, state in enumerate(alone(text)[1]):
            np.testing.assert_allclose(found[i, layer], state[0, -1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], found[3], rtol=1e-5, atol=1e-6)
    some = last_activations(used, TOKENIZER, TEXTS, batch=2, layers=(3, 1))
    np.testing.assert_allclose(some, found[:, [2, 0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["head", "tied"])
@pytest.mark.slow
def test_log_probabilities_are_those_of_a_single_text(cfg):
    found = token_logps(model(cfg), TOKENIZER, TEXTS, batch=2)
    for text, logps in zip(TEXTS[:3], found, strict=False):
        ids, states = alone(text, cfg)
        head = model(cfg).params["embed" if cfg.tie_embeddings else "head"]
        z = np.asarray(states[-1][0], np.float64) @ np.asarray(head, np.float64).T
        wanted = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        wanted = [wanted[t, ids[0, t + 1]] for t in range(ids.shape[1] - 1)]
        np.testing.assert_allclose(logps, wanted, rtol=1e-5, atol=1e-5)
    cut = token_logps(model(cfg), TOKENIZER, TEXTS, batch=2, max_length=5)
    assert [len(logps) for logps in cut] == [2, 4, 4, 2, 4]
    np.testing.assert_allclose(cut[1], found[1][:4], rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(-30, 0, width=32), min_size=11, max_size=11), st.sampled_from([5, 20, 50, 100]))
def test_mean_and_least_log_probabilities(values, percent):
    logps = np.array(values, np.float32)
    least = sorted(values)[: {5: 1, 20: 2, 50: 5, 100: 11}[percent]]
    assert min_k(logps, percent) == pytest.approx(sum(least) / len(least))
    assert mean_logp(logps) == pytest.approx(sum(values) / 11)


def test_texts_come_in_few_lengths(monkeypatch):
    seen = set()
    monkeypatch.setattr(
        membership,
        "_at_last",
        lambda cfg, p, tokens, last, kept: seen.add(tokens.shape) or np.zeros((len(tokens), len(kept), 16)),
    )
    short = model()._replace(config=dataclasses.replace(CFG, max_positions=100))
    for n in (1, 20, 31, 32, 60, 63, 64, 99):
        last_activations(short, TOKENIZER, ["a" * n], batch=3)
    assert seen == {(3, 32), (3, 64), (3, 100)}


# ------------------------------------------------------------------------------------------------------------- texts
def test_texts_are_dealt_in_equal_shares_of_members_and_others():
    labels = [1] * 30 + [0] * 50
    dealt = split_texts(labels, seed=3)
    count = lambda name, label: sum(d == name and y == label for d, y in zip(dealt, labels, strict=True))
    found = {name: (count(name, 1), count(name, 0)) for name in membership.SPLITS}
    assert found == {"probe_train": (3, 5), "dev": (6, 10), "test": (21, 35)}
    assert dealt == split_texts(np.array(labels), seed=3) != split_texts(labels, seed=4)
    assert sorted(split_texts([0, 1] * 2, shares=(0.5, 0.5))) == ["dev", "dev", "probe_train", "probe_train"]


def test_a_text_is_cut_so_that_the_question_stays_whole():
    text = "".join(chr(97 + i % 26) for i in range(100))
    assert wrap_within(TOKENIZER, text, 1000) == (BEFORE + text + AFTER, False)
    frame = len(TOKENIZER.encode(wrap("")))
    for room in (1, 37, 99):
        cut, short = wrap_within(TOKENIZER, text, frame + room)
        assert (cut, short) == (BEFORE + text[:room] + AFTER, True)
    assert wrap_within(TOKENIZER, text, frame + 100) == (wrap(text), False)


# ------------------------------------------------------------------------------------------------------------- words
def newton(train, labels, texts):
    """Ridge logistic regression on dense float64 counts, to its optimum."""
    words = sorted({w for t in train for w in t.lower().split()})
    dense = lambda rows: np.array([[1.0] + [math.log(1 + t.lower().split().count(w)) for w in words] for t in rows])
    x, y, w = dense(train), np.asarray(labels, float), np.zeros(len(words) + 1)
    pull = np.diag([0.0] + [1.0] * len(words))
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + pull
        w = w - np.linalg.solve(hessian, x.T @ (p - y) + pull @ w)
    return dense(texts) @ w


def sentences(rng, n, share):
    """Of eight words; members say `new` and others `old` in a share of the texts."""
    labels, texts = np.arange(n) % 2, []
    for label in labels:
        words = rng.choice(["the", "cat", "sat", "On", "a", "mat", "and", "slept"], size=12).tolist()
        texts.append(" ".join(words + ([("new" if label else "Old")] if rng.random() < share else [])))
    return texts, labels


def test_words_are_weighed_as_newton_weighs_them():
    (train, y), (test, _) = (sentences(np.random.default_rng(seed), 30, 0.5) for seed in (0, 1))
    test[0] += " unheard NEW"
    np.testing.assert_allclose(bag_of_words(train, y, test), newton(train, y, test), atol=1e-4)


def test_words_give_away_a_shift_and_nothing_without_one():
    for share, low, high in ((0.9, 0.85, 1.0), (0.0, 0.36, 0.64)):
        (train, y), (test, y_test) = (sentences(np.random.default_rng(seed), 100, share) for seed in (2, 3))
        assert low < auroc(bag_of_words(train, y, test), y_test) <= high


# ---------------------------------------------------------------------------------------------------------- learning
@pytest.mark.optimizer
@pytest.mark.slow
def test_a_model_gives_away_the_texts_it_memorised():
    rng = np.random.default_rng(4)
    texts = ["".join(rng.choice(list("abcdefgh"), size=30)) for _ in range(32)]
    labels = np.arange(32) % 2
    rows = jnp.asarray([TOKENIZER.encode(text) for text, label in zip(texts, labels, strict=True) if label])
    tx, at = optax.adam(1e-2), jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32)[None], rows.shape)

    def loss(params):
        logits = lm_head(CFG, params, forward(CFG, params, rows, at).hidden)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    fresh = init_params(CFG, jax.random.key(5))
    train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=100)[0][0])
    said = {}
    for name, params in (("fresh", fresh), ("trained", train(fresh))):
        logps = token_logps(Model(CFG, params), TOKENIZER, texts)
        said[name] = [auroc([how(each) for each in logps], labels) for how in (mean_logp, min_k)]
    assert min(said["trained"]) > 0.9
    assert max(abs(value - 0.5) for value in said["fresh"]) < 3 * chance_error(labels)


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: last_activations(model(), TOKENIZER, ["a", "b" * 150]), r"text 1 has 151 tokens; .* model's 128 pos"),
        (lambda: token_logps(model(), TOKENIZER, ["ab", ""]), "text 1 has 1 tokens; expected 2 at least"),
        (lambda: last_activations(model(), TOKENIZER, ["a"], batch=0), "batch=0; expected at least 1"),
        (lambda: wrap_within(TOKENIZER, "a" * 99, 60), r"max_length=60; expected more than \d\d, the tokens of the qu"),
        (lambda: standardise(np.zeros((1, 2, 3), np.float32)), "found 1 texts; expected 2 at least"),
        (lambda: fit_probe(np.zeros((3, 2, 2), np.float32), [1, 0]), "found 2 labels; expected 3"),
        (lambda: choose_layer(np.zeros((2, 3)), [1, 1]), "labels of one kind; expected members and others"),
        (lambda: tpr_at_fpr([math.nan, 1.0], [0, 1]), "expected as many, and numbers"),
        (lambda: tpr_at_fpr([1.0, 2.0, 3.0], [0, 1]), "found 3 scores, 2 labels"),
        (lambda: chance_error([1, 1]), "found 2 members and 0 others"),
        (lambda: min_k(np.zeros(3), 0), "percent=0; expected above 0"),
        (lambda: split_texts([0, 1], shares=(0.5, 0.6)), "expected two shares of 1"),
        (lambda: ProbeConfig(learning_rate=0.0), r"ProbeConfig.learning_rate: found 0.0; expected a number above 0"),
        (lambda: ProbeConfig(weight_decay=-0.1), r"ProbeConfig.weight_decay: found -0.1; expected a number 0 or more"),
        (lambda: ProbeConfig(epochs=0), r"ProbeConfig.epochs: found 0; expected at least 1"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.errors
def test_a_broken_model_is_named():
    broken = model()._replace(params=model().params | {"norm": jnp.full(16, jnp.nan)})
    with pytest.raises(ArithmeticError, match=r"text 0 leads to numbers that are not finite; .* learning rate"):
        last_activations(broken, TOKENIZER, TEXTS)
