"""Does each method do what its paper says it does, where the right outcome is known?

Small policies, of a table or a linear function, trained with the library's own losses and advantages; three seeds.

    ipo          the margin of pairs that always go one way: IPO stops at 1 / (2 beta), DPO goes on
    rdpo         30 % of labels flipped: DPO learns margins that are too small, rDPO the true ones
    gdpo_belief  beliefs held by .5, .3, .2 of people: how far the policy's are from that, with and without calibration
    sparsepo     answers that differ in one decisive token: is its mask larger than that of others?
    tempo        a tree of choices with one right leaf: reward after so many updates, TEMPO beside GRPO
    constrained  two rewards in conflict, one to be held at a threshold

    python -m benchmarks.preference_effects
"""

import argparse
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import record
from jaxaroo.train.advantages.constrained import ConstrainedConfig, constrained, init_multipliers, step_multipliers
from jaxaroo.train.advantages.gae import whiten
from jaxaroo.train.advantages.grpo import grpo
from jaxaroo.train.advantages.tempo import tempo
from jaxaroo.train.objectives.dpo import LOSSES, DpoConfig
from jaxaroo.train.objectives.gdpo_belief import GdpoBeliefConfig, calibration, conditional
from jaxaroo.train.objectives.preference import Sums
from jaxaroo.train.objectives.sparsepo import SparsepoConfig, init_masks, masks_of, sparsepo


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--seeds", type=int, default=3)
    opts = args.parse_args()
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    result: dict[str, Any] = {"benchmark": "preference_effects", "environment": record.environment()}
    for effect in (ipo, rdpo, gdpo_belief, sparsepo_mask, tempo_tree, constrained_threshold):
        found = [effect(seed) for seed in range(opts.seeds)]
        rows = {name: [f[name] for f in found] for name in found[0]}
        result[effect.__name__] = {name: {"mean": statistics.fmean(x), "each": x} for name, x in rows.items()}
        print(effect.__name__, json.dumps({n: [round(v, 4) for v in x] for n, x in rows.items()}), flush=True)
    record.save("preference-effects", result)


def descend(loss: Any, params: Any, steps: int, rate: float, data: Any = None, momentum: Any = optax.adam) -> Any:
    """`steps` updates on the whole of the data, or on the batches that `data` holds."""
    tx = momentum(rate)

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), data, length=steps)[0][0])
    return run(params, tx.init(params))


def single(r: jax.Array) -> Sums:
    """Answers of one token under a reference of 0."""
    return Sums(r, jnp.zeros_like(r), jnp.ones_like(r))


def ipo(seed: int) -> dict[str, float]:
    """Margins of 16 pairs after 3,000 and after 6,000 steps; beta 0.1, so IPO's is to be 5."""
    start = 0.1 * jax.random.normal(jax.random.key(seed), (16, 2))
    found = {}
    for name in ("ipo", "sigmoid"):
        cfg = DpoConfig(losses=((name, 1.0),))
        loss = lambda r, _: jnp.mean(LOSSES[name](single(r[:, 0]), single(r[:, 1]), cfg))  # noqa: B023
        for steps in (3000, 6000):
            r = descend(loss, start, steps, 3e-2)
            found[f"{name}_margin_{steps}"] = float(jnp.mean(r[:, 0] - r[:, 1]))
    return found | {"known": 5.0}


def rdpo(seed: int) -> dict[str, float]:
    """Margins that a linear policy implies, against those that made 20,000 labels, of which 30 % were flipped."""
    beta, flips = 0.5, 0.3
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, 6)
    x = rng.normal(0, 1, (20_000, 6))  # features of the first answer less those of the second
    margin = x @ truth  # of rewards; Bradley and Terry
    first = rng.random(len(x)) < 1 / (1 + np.exp(-margin))
    first ^= rng.random(len(x)) < flips
    signed = jnp.asarray(np.where(first, 1.0, -1.0)[:, None] * x, jnp.float32)
    found = {}
    for name in ("sigmoid", "cdpo", "robust"):
        cfg = DpoConfig(losses=((name, 1.0),), beta=beta, eps=0.0 if name == "sigmoid" else flips)

        def loss(w, _, name=name, cfg=cfg):
            r = signed @ w / 2
            return jnp.mean(LOSSES[name](single(r), single(-r), cfg))

        w = np.asarray(descend(loss, jnp.zeros(6), 1500, 3e-2))
        found[f"{name}_share_of_true_margin"] = float(beta * (w @ truth) / (truth @ truth))
        found[f"{name}_relative_error"] = float(np.linalg.norm(beta * w - truth) / np.linalg.norm(truth))
    return found


def gdpo_belief(seed: int) -> dict[str, float]:
    """Logits of 3 ids and 7 other tokens, and of two answers behind each id; pairs come as beliefs are held."""
    held = np.array([0.5, 0.3, 0.2])
    rng = np.random.default_rng(seed)
    accepted = jnp.asarray(rng.choice(3, 4000, p=held))
    begin = {"id": jnp.asarray(rng.normal(0, 1, 10)), "answer": jnp.asarray(rng.normal(0, 0.3, (3, 2)))}
    reference = jax.tree.map(lambda x: x + 0, begin)
    every = jnp.tile(jnp.asarray(held, jnp.float32)[None], (4000, 1))

    def logps(table):
        ids = jax.nn.log_softmax(table["id"])[:3]
        answers = jax.nn.log_softmax(table["answer"], axis=-1)
        return ids, answers

    def loss(table, _, calibrate, whole):
        (ids, answers), (ref_ids, ref_answers) = logps(table), logps(reference)
        extra = lambda a: a[accepted] if whole else 0.0  # plain DPO scores the id as a part of the chosen response,
        other = (accepted + 1) % 3  # and holds another belief's response against it
        ones = jnp.ones(4000)
        chosen = Sums(answers[accepted, 0] + extra(ids), ref_answers[accepted, 0] + extra(ref_ids), ones)
        if whole:
            rejected = Sums(answers[other, 1] + ids[other], ref_answers[other, 1] + ref_ids[other], ones)
        else:
            rejected = Sums(answers[accepted, 1], ref_answers[accepted, 1], ones)
        value = jnp.mean(conditional(chosen, rejected, GdpoBeliefConfig(beta=0.5)))
        return value + (jnp.mean(calibration(every, jnp.tile(ids[None], (4000, 1)))) if calibrate else 0.0)

    found = {}
    for name, calibrate, whole in (("gdpo", True, False), ("dpo", False, True)):
        table = descend(lambda t, d, c=calibrate, w=whole: loss(t, d, c, w), begin, 1500, 2e-2)
        p = np.exp(np.asarray(logps(table)[0]))
        found[f"{name}_belief_gap"] = float(np.abs(p - held).mean())
        found[f"{name}_answer_margin"] = float(np.mean(table["answer"][:, 0] - table["answer"][:, 1]))
    return found


def sparsepo_mask(seed: int) -> dict[str, float]:
    """Answers of 8 tokens that agree but for one; states of the reference show which. Masks learn with the policy."""
    rng = np.random.default_rng(seed)
    n, T, D, L = 64, 8, 16, 3
    decisive = rng.integers(0, T, n)
    direction = rng.normal(0, 1, (L, D))
    states = rng.normal(0, 1, (L, 2 * n, T, D))
    at = np.zeros((2 * n, T), bool)
    at[np.arange(2 * n), np.repeat(decisive, 2)] = True
    states += at[None, :, :, None] * direction[:, None, None] * 1.5
    cfg = SparsepoConfig(beta=0.5, l1_u=1e-2, l1_d=1e-2)
    nets = init_masks(L, D, jax.random.key(seed), cfg)
    nets = jax.tree.map(lambda x: x, nets) | {"u": nets["u"] | {"mixer": jnp.abs(nets["u"]["mixer"])}}
    ones = jnp.ones((2 * n, T), bool)
    segments = jnp.ones((2 * n, T), jnp.int32)
    batch: Any = type("Answers", (), {"mask": ones, "segments": segments, "tokens": segments})
    layers = tuple(jnp.asarray(x, jnp.float32) for x in states)
    # A policy may move three things: the decisive token of either side, and what all others share.
    same, differ = jnp.asarray(~at, jnp.float32), jnp.asarray(at, jnp.float32)
    sign = jnp.asarray(np.tile([1.0, -1.0], n)[:, None], jnp.float32)
    noise = jnp.asarray(rng.normal(0, 0.3, (2 * n, T)), jnp.float32)

    def loss(params, _):
        m_u, m_d = masks_of(layers, batch, params["nets"], cfg)
        ratio = differ * sign * params["move"] + same * (params["shared"] + noise * params["noise"])
        of = lambda x: jnp.sum(x, axis=1).reshape(n, 2)
        kl = 0.05 * (differ + same)
        return jnp.mean(sparsepo(of(m_u * ratio), of(m_d * kl), of(m_u), of(m_d), cfg)) + 0.05 * params["move"] ** 2

    begin = {"nets": nets, "move": jnp.float32(0.5), "shared": jnp.float32(0.1), "noise": jnp.float32(1.0)}
    trained = descend(loss, begin, 1500, 5e-3)
    mask = np.asarray(masks_of(layers, batch, trained["nets"], cfg)[0])
    before = np.asarray(masks_of(layers, batch, nets, cfg)[0])
    return {
        "before_decisive": float(before[at].mean()),
        "before_other": float(before[~at].mean()),
        "after_decisive": float(mask[at].mean()),
        "after_other": float(mask[~at].mean()),
        "sparsity": float((mask == 0).mean()),
        "ranked_first": float((mask.argmax(1) == np.repeat(decisive, 2)).mean()),
    }


DEPTH, WIDTH, GROUP = 4, 3, 8


def tempo_tree(seed: int) -> dict[str, float]:
    """Three choices, four times; a right one behind right ones is worth a quarter. Reward about updates 30, 70, 150.

    TEMPO's advantages are larger where members part, so GRPO runs at twice the learning rate as well.
    """
    right = jnp.asarray(np.random.default_rng(seed).integers(0, WIDTH, DEPTH))
    nodes = sum(WIDTH**d for d in range(DEPTH))  # the policy has logits of its own at every node

    def walk(logits, key):
        def go(carry, k):
            node, first, width = carry
            choice = jax.random.categorical(k, logits[first + node])
            return (node * WIDTH + choice, first + width, width * WIDTH), (first + node, choice)

        steps, carry = [], (jnp.int32(0), 0, 1)
        for k in jax.random.split(key, DEPTH):
            carry, seen = go(carry, k)
            steps.append(seen)
        return jnp.stack([s[0] for s in steps]), jnp.stack([s[1] for s in steps])

    def run(method: str) -> list[float]:
        def update(logits, key):
            keys = jax.random.split(key, GROUP)
            places, tokens = jax.vmap(lambda k: walk(logits, k))(keys)
            reward = jnp.sum(jnp.cumprod((tokens == right[None]).astype(jnp.float32), axis=1), axis=1) / DEPTH
            if method == "tempo":
                advantage = tempo(tokens[None], jnp.ones((1, GROUP, DEPTH), bool), reward[None])[0][0]
            else:
                advantage = jnp.tile(grpo(reward[None])[0][0][:, None], (1, DEPTH))

            def loss(logits):
                logp = jax.nn.log_softmax(logits, axis=-1)[places, tokens]
                return -jnp.mean(advantage * logp)

            rate = 1.0 if method == "grpo_twice" else 0.5
            return logits - rate * jax.grad(loss)(logits), jnp.mean(reward)

        keys = jax.random.split(jax.random.key(100 + seed), 160)
        rewards = np.asarray(jax.jit(lambda begin: jax.lax.scan(update, begin, keys)[1])(jnp.zeros((nodes, WIDTH))))
        return [float(rewards[a : a + 20].mean()) for a in (20, 60, 140)]

    names = ("30", "70", "150")
    each = {method: run(method) for method in ("grpo", "grpo_twice", "tempo")}
    return {f"{m}_reward_at_{at}": value for m, values in each.items() for at, value in zip(names, values, strict=True)}


def constrained_threshold(seed: int) -> dict[str, float]:
    """Ten arms; the first reward grows with the arm, the second falls. The first is to be held at 0.6."""
    rng = np.random.default_rng(seed)
    first = jnp.asarray(np.linspace(0, 1, 10) + rng.normal(0, 0.02, 10), jnp.float32)
    second = 1 - first
    cfg = ConstrainedConfig(thresholds=(0.6,), kind="equality")
    reference = jax.nn.log_softmax(3.0 * second)  # begins where the first reward is low

    def update(carry, key):
        logits, state = carry
        logp = jax.nn.log_softmax(logits)
        arm = jax.random.categorical(key, logits, shape=(64,))
        reward, here = first[arm], jnp.ones((1, 64), bool)
        near = whiten(-(logp - reference)[arm][None], here)
        advantage = constrained(near, whiten(reward[None], here)[None], state, cfg)[0]

        def loss(logits):
            return -jnp.mean(advantage * jax.nn.log_softmax(logits)[arm])

        state, metrics = step_multipliers(jnp.mean(reward)[None], state, cfg)
        return (logits - 0.3 * jax.grad(loss)(logits), state), (jnp.mean(reward), metrics["lambda_0"])

    keys = jax.random.split(jax.random.key(seed), 8000)
    go = jax.jit(lambda c: jax.lax.scan(update, c, keys))
    _, (rewards, lambdas) = go((reference, init_multipliers(cfg)))
    rewards = np.asarray(rewards)
    return {
        "threshold": 0.6,
        "first_50": float(rewards[:50].mean()),
        "last_2000": float(rewards[-2000:].mean()),
        "lambda_last": float(np.asarray(lambdas)[-2000:].mean()),
    }


if __name__ == "__main__":
    main()
