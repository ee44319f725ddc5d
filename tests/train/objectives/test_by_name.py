"""What the names put around the papers' losses. Oracles: float64 loops over examples, each with its own tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.by_name import OBJECTIVES
from jaxaroo.train.objectives.dpo import LOSSES, DpoConfig, ld_sum
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.sequences import View
from jaxaroo.train.preference import PreferenceOptions, counts, with_settings

T, N = 64, 8
sp = lambda u: np.logaddexp(0, u)
S = lambda u: np.exp(-np.logaddexp(0, -u))
LN2 = np.log(2)


def example(i, parts):
    """Sequences as (log p, log reference, log sum p^2, scored) of their targets; lengths and numbers of their own."""
    rng = np.random.default_rng([i, parts])
    found = []
    for _ in range(parts):
        prompt, answer = rng.integers(0, 4), rng.integers(1, 5)  # targets: none is the prompt's if that is one token
        length = prompt + answer
        logp, reference = -rng.exponential(1.5, (2, length)) - 0.05
        found.append((logp, reference, -rng.exponential(1, length), np.arange(length) >= prompt))
    return found


def weight(i):
    return 1.0 + (i % 3) / 4


def numbers(i, parts):
    """What examples bring: a label, a gap, a judge's odds; the reference's sums are those of its tokens."""
    return {"desirable": float(i % 3 != 0), "gap": i - 2.5, "win": 0.3 + i / 20}


def window(parts, per_row, examples=range(N), precomputed=False):
    """[rows, T] with so many examples in each, and where each example's tokens are."""
    rows = -(-len(examples) // per_row)
    out = {n: np.zeros((rows, T)) for n in (*Batch._fields[:6], "logp", "reference", "square")}
    more = {n: np.zeros((rows, T)) for n in (*numbers(0, 1), *(["reference"] if precomputed else []))}
    places = []
    for k, i in enumerate(examples):
        row, begin = k // per_row, (out["segments"][k // per_row] > 0).sum()
        for g, (logp, reference, square, scored) in enumerate(example(i, parts)):
            at = np.s_[row, begin : begin + len(logp)]
            for name, x in dict(logp=logp, reference=reference, square=square, mask=scored).items():
                out[name][at] = x
            out["segments"][at] = (k % per_row) * parts + g + 1
            out["weights"][at] = scored * weight(i)
            for name, x in numbers(i, parts).items():
                more[name][at] = x
            if precomputed:
                more["reference"][at] = np.float32(reference[scored].sum())
            places.append(at)
            begin += len(logp)
    ints = {n: jnp.asarray(out[n], jnp.int32) for n in Batch._fields[:4]}
    floats = {n: jnp.asarray(out[n], jnp.float32) for n in ("weights", "logp", "reference", "square")}
    batch = Batch(
        **ints,
        mask=jnp.asarray(out["mask"] > 0),
        weights=floats["weights"],
        more={n: jnp.asarray(x, jnp.float32) for n, x in more.items()},
    )
    return batch, floats, places


def count(name, cfg, batch):
    """Units of a window of one micro-batch."""
    return counts(with_settings(PreferenceOptions(objective=name), cfg))(jax.tree.map(lambda x: x[None], batch))


def evaluate(name, batch, arrays, cfg, carry=None):
    """The loss of a window of one micro-batch, its metrics, and its slope in every log-probability."""
    (value, metrics), slope = _evaluate(name, batch, arrays, cfg, carry)
    return float(value), {n: float(x) for n, x in metrics.items()}, np.asarray(slope)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _evaluate(name, batch, arrays, cfg, carry):
    objective = OBJECTIVES[name]
    parts = objective.parts(cfg)
    number = {unit: n.astype(jnp.float32) for unit, n in count(name, cfg, batch).items()}
    live = "reference" not in batch.more

    def loss(logp):
        zeros = jnp.zeros((*logp.shape, 1))
        near = dict(greedy=_likely(arrays["square"]), mean_logit=3.0 * arrays["square"])
        policy = Scores(logp, -logp, zeros, arrays["square"], **near)
        reference = Scores(arrays["reference"], zeros[..., 0], zeros) if live else None
        extra = {} if carry is None else {"carry": carry}
        if objective.reads(cfg) == "kl":
            extra["kl"] = (logp - arrays["reference"]) ** 2
        terms, metrics = objective.terms(View(batch, parts, policy, reference), cfg, **extra)
        total = lambda t: jnp.sum(jnp.where(t.weight != 0, t.value, 0.0) * t.weight) / number[t.unit]
        return sum(map(total, terms.values())), {n: total(t) for n, t in (terms | metrics).items()}

    return jax.value_and_grad(loss, has_aux=True)(arrays["logp"])


def _likely(square):
    return (square > -0.7).astype(np.float32)


def carry_of(name, cfg):
    own = OBJECTIVES[name].carry(cfg)
    return None if own is None else own[0]


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("sparsepo", "gdpo-belief")])  # files of their own
@pytest.mark.slow
def test_packing_changes_nothing_and_prompts_and_padding_do_not_count(name):
    cfg = OBJECTIVES[name].config
    parts, carry = OBJECTIVES[name].parts(cfg), carry_of(name, cfg)
    per_row = {1: 4, 2: 4}.get(parts, 1)
    alone, arrays, at = window(parts, 1)
    packed, packed_arrays, packed_at = window(parts, per_row)
    value, metrics, slope = evaluate(name, alone, arrays, cfg, carry)
    other, other_metrics, other_slope = evaluate(name, packed, packed_arrays, cfg, carry)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for key in metrics:
        np.testing.assert_allclose(other_metrics[key], metrics[key], rtol=2e-5, atol=1e-6, err_msg=key)
    for a, b in zip(at, packed_at, strict=True):
        np.testing.assert_allclose(other_slope[b], slope[a], rtol=1e-4, atol=1e-6)
    assert not slope[np.asarray(alone.segments) == 0].any()
    if name != "orpo":  # whose likelihood is that of prompts too
        assert not slope[~np.asarray(alone.mask)].any()
    assert np.abs(slope).max() > 1e-6
    # What stands at prompts and padding may be anything.
    trash = {n: jnp.where(alone.mask | (name == "orpo"), x, -77.0) for n, x in arrays.items()}
    np.testing.assert_allclose(evaluate(name, alone, trash, cfg, carry)[0], value, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "bco", "d2o", "simpo", "wpo", "ld-dpo", "dft", "asft", "fsft"])
@pytest.mark.slow
def test_parts_of_a_window_add_up(name):
    """So micro-batches change nothing; but where examples know of each other, as aot's and kto's do."""
    cfg = OBJECTIVES[name].config
    parts, carry = OBJECTIVES[name].parts(cfg), carry_of(name, cfg)
    unit = "token" if OBJECTIVES[name].layout == "sft" else "example"
    made = [window(parts, 1, ids) for ids in (range(N), range(3), range(3, N))]
    whole, *halves = (evaluate(name, batch, arrays, cfg, carry)[2] for batch, arrays, _ in made)
    number, *of_halves = (int(count(name, cfg, batch)[unit]) for batch, _, _ in made)
    shares = [n / number for n in of_halves]
    assert sum(of_halves) == number
    together = np.concatenate([half * share for half, share in zip(halves, shares, strict=True)])
    np.testing.assert_allclose(together, whole, rtol=2e-4, atol=1e-7)


def totals(i, parts):
    """P, F and n of every sequence of an example, in float64."""
    return [(p[m].sum(), f[m].sum(), m.sum()) for p, f, _, m in example(i, parts)]


def mean(values):
    """Weighted by rows, divided by how many there are."""
    return sum(weight(i) * v for i, v in enumerate(values)) / N


def test_dpo_and_its_metrics_are_those_of_a_loop():
    value, metrics, _ = evaluate("dpo", *window(2, 4)[:2], DpoConfig(beta=0.3))
    pairs = [totals(i, 2) for i in range(N)]
    margins = [0.3 * ((w[0] - w[1]) - (l[0] - l[1])) for w, l in pairs]
    np.testing.assert_allclose(value, mean(sp(-np.array(margins))), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], np.mean(margins), rtol=1e-4)
    assert metrics["rewards/accuracies"] == np.mean(np.array(margins) > 0)
    np.testing.assert_allclose(metrics["logps/rejected"], np.mean([l[0] for _, l in pairs]), rtol=1e-5)
    assert metrics["length/chosen"] == np.mean([w[2] for w, _ in pairs])
    # Of tokens, not of pairs: logits of either side, and of both what the model would have written itself.
    squares = [np.concatenate([example(i, 2)[g][2][example(i, 2)[g][3]] for i in range(N)]) for g in (0, 1)]
    for side, of in zip(("chosen", "rejected"), squares, strict=True):
        np.testing.assert_allclose(metrics[f"logits/{side}"], 3 * of.mean(), rtol=1e-5)
    right = _likely(np.concatenate(squares)).mean()
    assert 0.2 < right < 0.8
    np.testing.assert_allclose(metrics["mean_token_accuracy"], right, rtol=1e-5)


def test_a_mixture_divides_each_loss_by_its_own_unit():
    cfg = DpoConfig(losses=(("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 0.5)))
    value, metrics, _ = evaluate("mpo", *window(2, 2)[:2], cfg)
    pairs = [totals(i, 2) for i in range(N)]
    r = np.array([[p - f for p, f, _ in pair] for pair in pairs])
    sft = sum(-weight(i) * w[0] for i, (w, _) in enumerate(pairs)) / sum(w[2] for w, _ in pairs)
    wanted = 0.8 * mean(sp(-0.1 * (r[:, 0] - r[:, 1]))) + 0.2 * mean(sp(-0.1 * r[:, 0]) + sp(0.1 * r[:, 1]))
    np.testing.assert_allclose(metrics["sft"], 0.5 * sft, rtol=1e-5)
    np.testing.assert_allclose(value, wanted + 0.5 * sft, rtol=1e-5)


def test_wpo_weighs_pairs_by_the_likelihood_of_both():
    value, _, _ = evaluate("wpo", *window(2, 2)[:2], DpoConfig(wpo=True))
    each = []
    for i in range(N):
        w = [np.exp(np.mean(p[m] - q[m])) for p, _, q, m in example(i, 2)]
        (pw, fw, _), (pl, fl, _) = totals(i, 2)
        each.append(w[0] * w[1] * sp(-0.1 * (pw - fw - pl + fl)))
    np.testing.assert_allclose(value, mean(each), rtol=1e-5)


@pytest.mark.slow
def test_ld_dpo_counts_what_lies_behind_the_shorter_answer_less():
    cfg = DpoConfig(ld_alpha=0.25)
    value, _, _ = evaluate("ld-dpo", *window(2, 3)[:2], cfg)
    each = []
    for i in range(N):
        answers = [(p[m], f[m]) for p, f, _, m in example(i, 2)]
        n = [len(p) for p, _ in answers]
        ours = [[x[: min(n)].sum() + 0.25 * x[min(n) :].sum() for x in pair] for pair in answers]
        each.append(sp(-0.1 * (ours[0][0] - ours[0][1] - ours[1][0] + ours[1][1])))
        padded = jnp.asarray(np.pad(answers[0][0], (0, 9 - n[0]))[None], jnp.float32)
        of_paper = ld_sum(padded, jnp.asarray(n[:1]), jnp.asarray(n[1:]), 0.25)
        np.testing.assert_allclose(of_paper[0], ours[0][0], rtol=1e-5)
    assert len({tuple(len(p) for p, *_ in example(i, 2)) for i in range(N)}) > 3
    # The likelihood of chosen answers, and what is logged of them, know nothing of it.
    both = dataclasses.replace(cfg, losses=(("sigmoid", 1.0), ("sft", 0.5)))
    _, metrics, _ = evaluate("ld-dpo", *window(2, 3)[:2], both)
    pairs = [totals(i, 2) for i in range(N)]
    sft = sum(-weight(i) * w[0] for i, (w, _) in enumerate(pairs)) / sum(w[2] for w, _ in pairs)
    np.testing.assert_allclose(metrics["sft"], 0.5 * sft, rtol=1e-5)
    np.testing.assert_allclose(metrics["logps/chosen"], np.mean([w[0] for w, _ in pairs]), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl/k1_chosen"], np.mean([w[0] - w[1] for w, _ in pairs]), rtol=1e-4)
    np.testing.assert_allclose(value, mean(each), rtol=1e-5)


def test_sppo_soft_and_mm_dpo_read_what_rows_bring():
    value, _, _ = evaluate("sppo", *window(2, 2)[:2], DpoConfig(losses=(("sppo_soft", 1.0),)))
    r = np.array([[p - f for p, f, _ in totals(i, 2)] for i in range(N)])
    target = (np.array([0.3 + i / 20 for i in range(N)]) - 0.5) / 0.1
    np.testing.assert_allclose(value, mean((r[:, 0] - target) ** 2 + (r[:, 1] + target) ** 2), rtol=1e-5)
    cfg = OBJECTIVES["mm-dpo"].config
    value, metrics, _ = evaluate("mm-dpo", *window(2, 2)[:2], cfg)
    gap = np.array([i - 2.5 for i in range(N)])
    beta = np.maximum(0.1 * (1 + 0.1 * (1 - np.exp(-0.5 * gap))), 1e-3)
    pairs = [totals(i, 2) for i in range(N)]
    nll = 0.25 * sum(-weight(i) * w[0] for i, (w, _) in enumerate(pairs)) / sum(w[2] for w, _ in pairs)
    np.testing.assert_allclose(value, mean(sp(-beta * (r[:, 0] - r[:, 1]))) + nll, rtol=1e-5)
    np.testing.assert_allclose([metrics["beta/mean"], metrics["score_gap"]], [beta.mean(), gap.mean()], rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], np.mean(beta * r[:, 0]), rtol=1e-4)


@pytest.mark.parametrize("prompt", [True, False])
def test_orpo_adds_the_likelihood_of_prompt_and_answer(prompt):
    cfg = dataclasses.replace(OBJECTIVES["orpo"].config, nll_prompt=prompt)
    value, metrics, _ = evaluate("orpo", *window(2, 2)[:2], cfg)
    each, nll, tokens = [], 0.0, 0
    for i in range(N):
        a = [p[m].mean() for p, _, _, m in example(i, 2)]
        odds = (a[0] - a[1]) - (np.log1p(-np.exp(a[0])) - np.log1p(-np.exp(a[1])))
        each.append(0.1 * sp(-odds))
        p, _, _, m = example(i, 2)[0]
        kept = p if prompt else p[m]
        nll, tokens = nll - weight(i) * kept.sum(), tokens + len(kept)
    np.testing.assert_allclose(metrics["nll"], nll / tokens, rtol=1e-5)
    np.testing.assert_allclose(value, mean(each) + nll / tokens, rtol=1e-5)
    first = np.mean([example(i, 2)[0][0][example(i, 2)[0][3]].mean() for i in range(N)])
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.1 * first, rtol=1e-4)


def test_simpo_and_cpo_count_the_likelihood_of_chosen_answers_by_their_tokens():
    pairs = [totals(i, 2) for i in range(N)]
    P, n = (np.array([[side[k] for side in pair] for pair in pairs]) for k in (0, 2))
    nll = sum(-weight(i) * P[i, 0] for i in range(N)) / n[:, 0].sum()
    cfg = dataclasses.replace(OBJECTIVES["simpo"].config, beta=3.0, nll=0.7)
    value, metrics, _ = evaluate("simpo", *window(2, 2)[:2], cfg)
    a = P / n
    np.testing.assert_allclose(value, mean(sp(-3.0 * (a[:, 0] - a[:, 1] - 0.5))) + 0.7 * nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], 3.0 * a[:, 1].mean(), rtol=1e-4)
    cfg = dataclasses.replace(OBJECTIVES["cpo"].config, beta=0.2, alpha=0.6)
    value, metrics, _ = evaluate("cpo", *window(2, 2)[:2], cfg)
    np.testing.assert_allclose(value, mean(sp(-0.2 * (P[:, 0] - P[:, 1]))) + 0.6 * nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], 0.2 * P[:, 1].mean(), rtol=1e-4)


def test_kto_holds_rows_against_answers_to_other_prompts():
    cfg = OBJECTIVES["kto"].config
    value, metrics, _ = evaluate("kto", *window(2, 2)[:2], cfg)
    r = np.array([[p - f for p, f, _ in totals(i, 2)] for i in range(N)])
    good = np.array([i % 3 != 0 for i in range(N)])
    z = max(0.0, r[:, 1].mean())
    wanted = np.where(good, 1 - S(0.1 * (r[:, 0] - z)), 1 - S(0.1 * (z - r[:, 0])))
    np.testing.assert_allclose(value, mean(wanted), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_now"], r[:, 1].mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.1 * r[good, 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/rejected"], 0.1 * r[~good, 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], z, rtol=1e-4, atol=1e-6)
    own = [example(i, 2)[0] for i in range(N)]  # answers to other prompts are not what the policy is asked for
    logits = np.array([3 * square[m].mean() for _, _, square, m in own])
    np.testing.assert_allclose(metrics["logits/rejected"], logits[~good].mean(), rtol=1e-5)
    right = _likely(np.concatenate([square[m] for _, _, square, m in own])).mean()
    np.testing.assert_allclose(metrics["mean_token_accuracy"], right, rtol=1e-5)
    batch, arrays, _ = window(2, 2)
    swapped = arrays | {"logp": arrays["reference"], "reference": arrays["logp"]}
    other = evaluate("kto", batch, swapped, cfg)[1]  # of the two estimates one is negative
    found = [(m["kl_now"], m["kl"]) for m in (metrics, other)]
    assert min(found)[0] < 0 == min(found)[1] < max(found)[1]
    kept = dataclasses.replace(cfg, kl_decay=0.75)
    begin, advance = OBJECTIVES["kto"].carry(kept)
    assert float(begin) == 0.0
    z = max(0.0, 0.75 * 3.0 + 0.25 * r[:, 1].mean())
    value, metrics, _ = evaluate("kto", *window(2, 2)[:2], kept, jnp.float32(3.0))
    wanted = np.where(good, 1 - S(0.1 * (r[:, 0] - z)), 1 - S(0.1 * (z - r[:, 0])))
    np.testing.assert_allclose(value, mean(wanted), rtol=1e-5)
    moved = advance(jnp.float32(3.0), None, {"kl_now": jnp.float32(metrics["kl_now"])}, 0)
    np.testing.assert_allclose(moved, 0.75 * 3.0 + 0.25 * r[:, 1].mean(), rtol=1e-5)


def test_kto_takes_no_gradient_from_mismatched_answers():
    batch, arrays, places = window(2, 1)
    slope = evaluate("kto", batch, arrays, OBJECTIVES["kto"].config)[2]
    assert not any(slope[at].any() for at in places[1::2])
    assert all(slope[at].any() for at in places[::2])


@pytest.mark.slow
def test_bco_shifts_by_the_mean_of_all_rows_before():
    cfg = dataclasses.replace(OBJECTIVES["bco"].config, beta=0.2)
    begin, advance = OBJECTIVES["bco"].carry(cfg)
    carry, seen = begin, []
    good = np.array([i % 3 != 0 for i in range(N)])
    for ids in (range(5), range(5, N)):
        batch, arrays, _ = window(1, 1, ids)
        shift = np.mean(seen) if seen else 0.0
        value, metrics, _ = evaluate("bco", batch, arrays, cfg, carry)
        b = np.array([0.2 * (totals(i, 1)[0][0] - totals(i, 1)[0][1]) for i in ids])
        each = sp(np.where(good[list(ids)], -(b - shift), b - shift))
        wanted = sum(weight(i) * v for i, v in zip(ids, each, strict=True)) / len(ids)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        np.testing.assert_allclose(metrics["delta"], shift, rtol=1e-5, atol=1e-7)
        stepped = {"rewards": jnp.float32(metrics["rewards"]), "examples": jnp.int32(len(ids))}
        carry, seen = advance(carry, None, stepped, 0), [*seen, *b]
    np.testing.assert_allclose(carry.mean, np.mean(seen), rtol=1e-5)
    assert int(carry.rows) == N


def test_d2o_holds_its_own_samples_against_the_bad_answer():
    cfg = dataclasses.replace(OBJECTIVES["d2o"].config, samples=2, alpha=0.3)
    value, metrics, _ = evaluate("d2o", *window(3, 1)[:2], cfg)
    r = np.array([[p - f for p, f, _ in totals(i, 3)] for i in range(N)])
    u = 0.1 * r[:, :2].mean(1) - 0.3 * r[:, 2]
    np.testing.assert_allclose(value, mean(sp(-u)), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], 0.3 * r[:, 2].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/k1_own"], r[:, :2].mean(), rtol=1e-4, atol=1e-6)
    one = dataclasses.replace(cfg, samples=1, alpha=0.1)
    as_dpo = evaluate("dpo", *window(2, 1)[:2], DpoConfig())
    np.testing.assert_allclose(evaluate("d2o", *window(2, 1)[:2], one)[0], as_dpo[0], rtol=1e-6)


def test_losses_of_tokens_are_means_over_tokens():
    tokens = [(p[m], f[m], weight(i)) for i in range(N) for p, f, _, m in example(i, 1)]
    number = sum(len(p) for p, _, _ in tokens)
    of = lambda f: sum(w * f(p, r).sum() for p, r, w in tokens) / number
    arrays = window(1, 2)[:2]
    np.testing.assert_allclose(
        evaluate("dft", *arrays, OBJECTIVES["dft"].config)[0], of(lambda p, r: -np.exp(p) * p), rtol=1e-5
    )
    cfg = OBJECTIVES["asft"].config
    wanted = of(lambda p, r: -np.exp(p) * p + cfg.lam * (p - r) ** 2)  # the divergence that `evaluate` makes up
    value, metrics, _ = evaluate("asft", *arrays, cfg)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    plain = lambda f: sum(f(p, r).sum() for p, r, _ in tokens) / number  # metrics know no weights
    np.testing.assert_allclose(metrics["kl"], plain(lambda p, r: (p - r) ** 2), rtol=1e-5)
    np.testing.assert_allclose([metrics["nll"], metrics["entropy"]], [plain(lambda p, r: -p)] * 2, rtol=1e-5)
    cfg = dataclasses.replace(OBJECTIVES["fsft"].config, f="hellinger")
    np.testing.assert_allclose(
        evaluate("fsft", *arrays, cfg)[0], of(lambda p, r: -(1 - 1 / (1 + 0.1 * (p - r)))), rtol=1e-4
    )
    cfg = dataclasses.replace(cfg, level="answer")
    u = np.array([0.1 * (totals(i, 1)[0][0] - totals(i, 1)[0][1]) for i in range(N)])
    np.testing.assert_allclose(evaluate("fsft", *arrays, cfg)[0], mean(-(1 - 1 / (1 + u))), rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto", "d2o", "ipo", "mm-dpo"])
def test_sums_that_were_written_down_serve_as_well(name):
    cfg = OBJECTIVES[name].config
    parts = OBJECTIVES[name].parts(cfg)
    live = evaluate(name, *window(parts, 1)[:2], cfg)
    stored = evaluate(name, *window(parts, 1, precomputed=True)[:2], cfg)
    np.testing.assert_allclose(stored[0], live[0], rtol=1e-5)
    np.testing.assert_allclose(stored[2], live[2], rtol=1e-4, atol=1e-7)


AT_START = {  # section 4 of the specification: what each loss is where policy and reference are one
    **dict.fromkeys(("dpo", "cdpo", "rdpo", "dpo-norm", "ld-dpo", "aot"), lambda c: LN2),
    "hinge": lambda c: 1.0,
    "ipo": lambda c: 1 / (4 * c.beta**2),
    "exo": lambda c: -LN2 - np.log((1 - c.eps) * c.eps) / 2,
    "nca": lambda c: 2 * LN2,
    "bco-pair": lambda c: 2 * LN2,
    "sppo": lambda c: 1 / (2 * c.beta**2),
    "apo": lambda c: 1.0,
    "discopop": lambda c: (LN2 + 1) / 2,
    "d2o": lambda c: LN2,
    "kto": lambda c: 0.5,
    "bco": lambda c: LN2,
}


@pytest.mark.parametrize("name", AT_START)
def test_where_the_policy_is_the_reference_the_loss_is_known(name):
    cfg = OBJECTIVES[name].config
    batch, arrays, _ = window(OBJECTIVES[name].parts(cfg), 1)
    same = arrays | {"reference": arrays["logp"]}
    unweighted = batch._replace(weights=batch.mask.astype(jnp.float32))
    value, metrics, _ = evaluate(name, unweighted, same, cfg, carry_of(name, cfg))
    np.testing.assert_allclose(value, AT_START[name](cfg), rtol=1e-5)
    if "rewards/margins" in metrics:
        assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0.0  # a tie is no win


def test_every_loss_of_dpo_has_a_name_or_a_setting():
    named = {loss for o in OBJECTIVES.values() if isinstance(o.config, DpoConfig) for loss, _ in o.config.losses}
    assert {"ipo_sum", "sppo_soft", "apo_down", "aot_unpaired", "sigmoid_norm"} - named == {
        "ipo_sum", "sppo_soft", "apo_down", "aot_unpaired",
    }  # fmt: skip
    assert {*LOSSES} - named == {"ipo_sum", "apo_down", "aot_unpaired"}  # by --losses


@pytest.mark.slow
def test_reference_free_objectives_do_not_look_at_one():
    for name in ("orpo", "simpo", "cpo", "dft"):
        cfg = OBJECTIVES[name].config
        batch, arrays, _ = window(OBJECTIVES[name].parts(cfg), 2)
        other = arrays | {"reference": arrays["reference"] - 5}
        assert evaluate(name, batch, arrays, cfg)[0] == evaluate(name, batch, other, cfg)[0]
