"""Oracle: each algorithm's loss by loops in float64, an answer at a time, from the logits of a whole sequence alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params, logits
from jaxaroo.models.lora import LoraConfig, apply_lora
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.train.advantages.constrained import ConstrainedConfig, Multipliers
from jaxaroo.train.advantages.gae import GAEConfig
from jaxaroo.train.algorithms import (
    ALGORITHMS,
    RlOptions,
    advantages,
    counts,
    make_loss,
    make_scores,
    policy_config,
    policy_scores,
    trainable,
)
from jaxaroo.train.objectives.policy_gradient import Rollout
from jaxaroo.train.objectives.ppo import ValueLossConfig
from jaxaroo.train.recipe import Origin
from jaxaroo.train.rollouts import Sampled, lay_out, split_rows, spread

CFG = DecoderConfig(
    vocab_size=12, embed_dim=8, ffn_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, tie_embeddings=True
)
LONGEST, TEMPERATURE, WEIGHT = 6, 1.3, 0.3
# Two problems, three answers each. Of the first group two answers share two tokens; the fourth answer has no reward.
PROMPTS = [[3, 4, 5], [7, 6]]
TEXTS = [[[8, 9, 1, 2], [8, 9, 2], [10, 2]], [[4, 2], [4, 4, 4, 4, 4, 4], [5, 2]]]
ANSWERS = [Sampled(p, a, a[-1] == 2) for p, group in zip(PROMPTS, TEXTS, strict=True) for a in group]
REWARDS = np.array([[[1.0, 0.0, 0.25], [np.nan, 0.0, 1.0]]], np.float32)
SECOND = np.array([[[0.5, 0.9, 0.1], [0.3, 0.2, 0.6]]], np.float32)
LIVE = [0, 1, 2, 4, 5]  # of the answers
MULTIPLIERS = Multipliers(jnp.asarray([0.4, -0.7]), jnp.zeros(2))


def moved(seed, scale):
    """Weights some way off the first ones."""
    start = init_params(CFG, jax.random.key(0))
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [w + scale * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


REFERENCE, OLD, NEW = moved(1, 0.0), moved(2, 0.05), moved(3, 0.06)


def heads(names, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {name: {"last": {"weight": draw(1, 8), "bias": draw(1)}} for name in names}


def padded(a):
    """A sequence alone, in a row of one length: attention is causal."""
    return np.array([[*a.prompt, *a.answer, *[0] * (10 - len(a.prompt) - len(a.answer))]], np.int32)


@jax.jit
def plain(params, ids):
    """Logits of a sequence, and the states that they are made of."""
    at = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return logits(Model(CFG, params), ids)[0], forward(CFG, params, ids, at).hidden[0]


@functools.cache
def logps(which):
    """log pi of every answer's tokens, from one sequence at a time."""
    params, found = {"old": OLD, "new": NEW, "reference": REFERENCE}[which], []
    for a in ANSWERS:
        z = np.asarray(plain(params, padded(a))[0], np.float64) / TEMPERATURE
        z = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        found.append([z[len(a.prompt) - 1 + t, token] for t, token in enumerate(a.answer)])
    return found


def values_of(params, head):
    """What a head foresees before each token of each answer."""
    found = []
    for a in ANSWERS:
        h = np.asarray(plain(params, padded(a))[1], np.float64)
        w, b = (np.asarray(head["last"][name], np.float64) for name in ("weight", "bias"))
        found.append([(h[len(a.prompt) - 1 + t] @ w.T + b)[0] for t in range(len(a.answer))])
    return found


def whitened(rows):
    flat = np.concatenate([rows[i] for i in LIVE])
    scale = 1 / np.sqrt(flat.var(ddof=1) + 1e-8)
    return [[(x - flat.mean()) * scale for x in row] if i in LIVE else None for i, row in enumerate(rows)]


def estimated(score, beta, values, cfg):
    """Advantages before whitening, and returns, by the definition."""
    found, returns = [], []
    for i in range(len(ANSWERS)):
        n, row, back = len(ANSWERS[i].answer), [], 0.0
        for t in reversed(range(n)):
            r = -beta * (logps("old")[i][t] - logps("reference")[i][t]) + (score[i] if t == n - 1 else 0.0)
            following = values[i][t + 1] if t + 1 < n else 0.0
            back = r + cfg.gamma * following - values[i][t] + cfg.gamma * cfg.lam * back
            row.insert(0, back)
        found.append(row)
        returns.append([a + v for a, v in zip(row, values[i], strict=True)])
    return found, returns


def tree(group, i):
    """What each token of member i was worth, beside the members that agree with it so far."""
    members = [(ANSWERS[3 * group + k].answer, REWARDS[0, group, k]) for k in range(3) if 3 * group + k in LIVE]
    mine, reward = ANSWERS[3 * group + i].answer, REWARDS[0, group, i]
    mean, std = np.mean([r for _, r in members]), np.std([r for _, r in members], ddof=1)
    value = lambda t: np.mean([r for tokens, r in members if list(tokens[:t]) == list(mine[:t]) and len(tokens) >= t])
    return [(reward - mean + value(t + 1) - value(t)) / (std + 1e-6) for t in range(len(mine))]


def worth(name, options, value_heads):
    """Advantages of all tokens in float64; and returns of every head."""
    out, returns = [None] * 6, {}
    if name == "ppo":
        values = values_of(OLD, value_heads["score"])
        found, returns["score"] = estimated(REWARDS.reshape(-1), WEIGHT, values, options.gae)
        return whitened(found), returns
    if name == "constrained":
        parts = {}
        for head, score in {"kl": np.zeros(6), "0": REWARDS.reshape(-1), "1": SECOND.reshape(-1)}.items():
            beta = WEIGHT if head == "kl" else 0.0
            found, returns[head] = estimated(score, beta, values_of(OLD, value_heads[head]), options.gae)
            parts[head] = whitened(found)
        s = np.tanh(np.asarray(MULTIPLIERS.raw, np.float64))
        for i in LIVE:
            rows = zip(parts["kl"][i], parts["0"][i], parts["1"][i], strict=True)
            out[i] = [(2 - s.sum()) * k + s[0] * a + s[1] * b for k, a, b in rows]
        return out, returns
    for i in LIVE:
        group = [REWARDS[0, i // 3, k] for k in range(3) if 3 * (i // 3) + k in LIVE]
        others = [REWARDS[0, i // 3, k] for k in range(3) if 3 * (i // 3) + k in LIVE and k != i % 3]
        reward = REWARDS[0, i // 3, i % 3]
        each = {
            "dr-grpo": lambda g=group, r=reward: r - np.mean(g),
            "rloo": lambda o=others, r=reward: r - np.mean(o),
        }.get(name, lambda g=group, r=reward: (r - np.mean(g)) / (np.std(g, ddof=1) + 1e-6))()
        out[i] = tree(i // 3, i % 3) if name == "tempo" else [each] * len(ANSWERS[i].answer)
    return out, returns


def oracle(name, options, value_heads, new_heads):
    """The whole loss."""
    adv, returns = worth(name, options, value_heads)
    clip = {"dapo": (0.2, 0.28), "tempo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(name, (0.2, 0.2))
    tokens, total = sum(len(ANSWERS[i].answer) for i in LIVE), 0.0
    for i in LIVE:
        n = len(ANSWERS[i].answer)
        d = [a - b for a, b in zip(logps("new")[i], logps("old")[i], strict=True)]
        for t in range(n):
            rho = np.exp(np.mean(d)) if name == "gspo" else np.exp(d[t])
            if name == "cispo":
                value = -min(rho, 5.0) * adv[i][t] * logps("new")[i][t]
            else:
                value = -min(rho * adv[i][t], np.clip(rho, 1 - clip[0], 1 + clip[1]) * adv[i][t])
            if name not in ("ppo", "constrained"):
                e = logps("new")[i][t] - logps("reference")[i][t]
                value += WEIGHT * np.exp(d[t]) * (np.exp(-e) - 1 + e)
            if name in ("grpo", "gspo"):
                total += value / n / len(LIVE)
            elif name in ("dr-grpo", "rloo"):
                total += value / LONGEST / len(LIVE)
            else:
                total += value / tokens
        for head, old_head in value_heads.items():
            before, now = values_of(OLD, old_head)[i], values_of(NEW, new_heads[head])[i]
            for t in range(n):
                cut = np.clip(now[t], before[t] - 0.2, before[t] + 0.2)
                square = max((now[t] - returns[head][i][t]) ** 2, (cut - returns[head][i][t]) ** 2)
                total += 0.5 * 0.4 * square / tokens
    return total


def options_of(name):
    thresholds = ConstrainedConfig(thresholds=(0.5, 0.4))
    return RlOptions(
        algorithm=name,
        kl_weight=WEIGHT,
        gae=GAEConfig(gamma=0.9, lam=0.8),
        value=ValueLossConfig(coefficient=0.4),
        constrained=thresholds,
    )


def learned(name, packing, micro=1):
    """What the loop does with a step's answers, up to the loss of the first window."""
    options = options_of(name)
    rewards = np.concatenate([REWARDS, SECOND]) if name == "constrained" else REWARDS
    kept = np.isfinite(rewards).all(axis=0).reshape(-1)
    placed = lay_out(ANSWERS, kept, max_length=10, multiple=2, packing=packing)
    what = trainable(Origin(CFG, byte_tokenizer(), None), options, None)
    names = ALGORITHMS[name].heads(options)
    before, after = heads(names, 5), heads(names, 6)
    trained = lambda policy, value: {"policy": policy} | ({"value": value} if names else {})
    rows = np.arange(len(placed.batch.mask))
    batch = split_rows(placed.batch, rows, 1, micro)[0]
    scores = make_scores(CFG, what, temperature=TEMPERATURE)
    said = scores(trained(OLD, before), REFERENCE, batch, reference=True)
    said = {key: np.asarray(x).reshape(placed.batch.mask.shape) for key, x in said.items()}
    found = advantages(options, ANSWERS, rewards, placed, said, MULTIPLIERS, LONGEST)
    more = dict(found.more) | {"sampled": spread(logps("old"), ANSWERS, placed)}
    junk = np.where(placed.batch.mask, 0, np.nan).astype(np.float32)  # outside the mask nothing is read
    whole = Rollout(
        placed.batch._replace(more={key: x + junk for key, x in more.items()}),
        found.advantages + junk,
        said["logp"] + junk,
        said["reference"] + junk,
    )
    window = jax.tree.map(jnp.asarray, split_rows(whole, rows, 1, micro)[0])
    units = {key: float(n) for key, n in counts(window).items()}
    loss = make_loss(CFG, policy_config(options, LONGEST), options, temperature=TEMPERATURE)

    @jax.jit
    def of_part(params, part):
        terms, metrics = loss(params, part, None)
        add = lambda term: jnp.sum(jnp.where(term.weight != 0, term.value, 0.0) * term.weight) / units[term.unit]
        return sum(map(add, terms.values())), {key: add(term) for key, term in metrics.items()}

    parts = [of_part(trained(NEW, after), jax.tree.map(lambda x, m=m: x[m], window)) for m in range(micro)]
    measured = {key: sum(float(metrics[key]) for _, metrics in parts) for key in parts[0][1]}
    return sum(float(total) for total, _ in parts), measured, found.metrics, (before, after)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.slow
def test_the_loss_is_that_of_the_oracle(name):
    total, measured, told, (before, after) = learned(name, packing=False)
    wanted = oracle(name, options_of(name), before, after)
    np.testing.assert_allclose(total, wanted, rtol=2e-4)
    assert 0.01 < measured["ratio_max"] - 1 < 3  # the clip has something to do
    mean = np.nanmean(np.stack([REWARDS, SECOND]).mean(axis=0)) if name == "constrained" else np.nanmean(REWARDS)
    np.testing.assert_allclose(told["reward"], mean, rtol=1e-6)
    np.testing.assert_allclose(told["frac_rewarded"], 5 / 6)
    tokens = sum(len(ANSWERS[i].answer) for i in LIVE)
    gap = sum(abs(np.array(logps("new")[i]) - logps("old")[i]).sum() for i in LIVE) / tokens
    np.testing.assert_allclose(measured["sampler_gap"], gap, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "packing", "micro"), [("grpo", True, 1), ("tempo", True, 2), ("gspo", True, 1), ("ppo", False, 2)]
)
@pytest.mark.slow
def test_neither_packing_nor_micro_batches_change_the_loss(name, packing, micro):
    total, _, _, (before, after) = learned(name, packing, micro)
    np.testing.assert_allclose(total, oracle(name, options_of(name), before, after), rtol=2e-4)


def test_explained_variance_is_told():
    *_, told, (before, _) = learned("ppo", packing=False)
    values = values_of(OLD, before["score"])
    returns = estimated(REWARDS.reshape(-1), WEIGHT, values, options_of("ppo").gae)[1]
    g, v = (np.concatenate([x[i] for i in LIVE]) for x in (returns, values))
    np.testing.assert_allclose(told["explained_variance"], 1 - np.var(g - v) / np.var(g), rtol=1e-4)


@pytest.mark.slow
def test_prompts_and_padding_get_no_gradient():
    """Their targets may be any token."""
    placed = lay_out(ANSWERS, [True] * 6, max_length=10, packing=True)
    options = RlOptions(algorithm="dapo")
    loss = make_loss(CFG, policy_config(options, LONGEST), options, temperature=1.0)

    def total(params, targets):
        batch = placed.batch._replace(targets=jnp.asarray(targets))
        worth = spread([1.0, -1, 0.5, 2, -2, 1], ANSWERS, placed)
        terms, _ = loss({"policy": params}, Rollout(batch, jnp.asarray(worth)), None)
        return sum(jnp.sum(t.value * t.weight) for t in terms.values())

    other = np.where(placed.batch.mask, placed.batch.targets, 11)
    gradient = jax.jit(jax.grad(total))
    a, b = gradient(NEW, placed.batch.targets), gradient(NEW, other)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a)) > 1e-3
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_temperature_is_that_of_the_distribution_sampled_from():
    batch = jax.tree.map(jnp.asarray, lay_out(ANSWERS, [True] * 6, max_length=10).batch)
    said = jax.jit(lambda params: policy_scores(CFG, params, batch, TEMPERATURE))(NEW)
    np.testing.assert_allclose(said.logp[0, 2:6], logps("new")[0], rtol=1e-4)


@pytest.mark.slow
def test_under_adapters_the_reference_is_the_model_without_them(key):
    lora = LoraConfig(rank=2)
    what = trainable(Origin(CFG, byte_tokenizer(), None), RlOptions(kl_weight=0.1), lora)
    trained = jax.tree.map(lambda w: w + 0.1, what.init(REFERENCE, key))
    assert what.beside
    adapted = apply_lora(lora, REFERENCE, trained["policy"])
    jax.tree.map(np.testing.assert_array_equal, what.result(trained, REFERENCE), adapted)
    batch = jax.tree.map(jnp.asarray, lay_out(ANSWERS, [True] * 6, max_length=10).batch)
    window = jax.tree.map(lambda x: x[None], batch)
    said = make_scores(CFG, what, temperature=1.0)(trained, REFERENCE, window, reference=True)
    alone = jax.jit(lambda params: policy_scores(CFG, params, batch, 1.0).logp)
    score = lambda params: np.where(batch.mask, alone(params), 0)
    kept = lambda name: np.where(batch.mask, said[name][0], 0)
    np.testing.assert_allclose(kept("logp"), score(adapted), atol=1e-5)
    np.testing.assert_allclose(kept("reference"), score(REFERENCE), atol=1e-5)
    assert np.abs(kept("logp") - kept("reference")).max() > 0.01


def test_what_is_trained(key):
    origin = Origin(CFG, byte_tokenizer(), None)
    plain = trainable(origin, RlOptions(), None)
    assert (plain.beside, plain.carry) == (False, None)
    assert plain.init(REFERENCE, key)["policy"] is REFERENCE
    held = trainable(origin, RlOptions(kl_weight=0.1), None)
    copy = held.init(REFERENCE, key)["policy"]
    assert held.beside
    assert all(a is not b for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(REFERENCE), strict=True))
    many = trainable(origin, options_of("constrained"), None)
    assert {*many.init(REFERENCE, key)["value"]} == {"kl", "0", "1"} == {*many.axes["value"]}
    assert all(not np.any(x) for x in jax.tree.leaves(many.init(REFERENCE, key)["value"]))
    assert many.carry.init(REFERENCE).raw.shape == (2,)


def test_published_settings_and_what_is_given_instead():
    policies = {name: policy_config(RlOptions(algorithm=name, kl_weight=0.2), 7) for name in ALGORITHMS}
    assert (policies["dapo"].clip_high, policies["gspo"].ratio) == (0.28, "sequence")
    assert policies["cispo"].surrogate == "cispo"
    assert {n: p.kl_weight for n, p in policies.items()} == dict.fromkeys(ALGORITHMS, 0.2) | {
        "ppo": 0,
        "constrained": 0,
    }
    assert {p.max_length for p in policies.values()} == {7}
    given = RlOptions(clip_low=0.1, clip_high=0.5, dual_clip=3.0, cap=2.0, aggregation="bnpo", kl="k2")
    fields = dataclasses.asdict(policy_config(given, 7))
    wanted = dict(clip_low=0.1, clip_high=0.5, dual_clip=3.0, cap=2.0, aggregation="bnpo", kl="k2")
    assert {name: fields[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(algorithm="grpp"), r"algorithm: found 'grpp'; expected one of grpo, dr-grpo, .* Is 'grpo' meant\?"),
        (dict(reward=()), r"reward=\(\).*; expected a reward, a text, and at least 1"),
        (dict(abstention=" "), "abstention=' '"),
        (dict(algorithm="constrained"), "constrained with kl_weight=0; expected above 0"),
        (dict(kl_weight=0.1, kl="k1"), "found k1 with a weight"),
        (dict(clip_low=2.0), "clip_low=2.0"),
        (dict(eps=0.0), "eps: found 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RlOptions(**given)


def test_a_penalty_in_the_reward_may_have_any_estimator():
    assert policy_config(RlOptions(algorithm="ppo", kl_weight=0.1, kl="k1"), 4).kl_weight == 0
