"""What `make_loss` makes of models and rows. Oracles: losses TRL printed, from the checkpoints' own weights; loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, stack_layers
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.rules import REPLICATED
from jaxaroo.train import preference
from jaxaroo.train.data.pipeline import BatchConfig, Batches
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.objectives.by_name import OBJECTIVES
from jaxaroo.train.objectives.dpo import DpoConfig
from jaxaroo.train.objectives.orpo import OrpoConfig
from jaxaroo.train.preference import PreferenceOptions, make_loss, with_settings

TOKENS = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENS.vocab_size, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    max_positions=128, eos_ids=TOKENS.eos_ids,
)  # fmt: skip

ALONE = ["sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"]
TRL = {  # what TRL calls it -> settings of ours
    **{name: {"losses": ((name, 1.0),)} for name in [*ALONE, "discopop", "sft", "sigmoid_norm"]},
    "robust": {"losses": (("robust", 1.0),), "eps": 0.1},
    "exo_pair": {"losses": (("exo_pair", 1.0),), "eps": 0.1},
    "robust_beta05_eps03": {"losses": (("robust", 1.0),), "beta": 0.5, "eps": 0.3},
    "sigmoid_forward_kl": {"f": "forward_kl"},
    "sigmoid_js_divergence": {"f": "js_divergence"},
    "sigmoid_alpha_divergence": {"f": "alpha_divergence"},
    "sigmoid_wpo": {"wpo": True},
}


def one_a_row(rows, encode, length, more=()):
    """Pairs in the order of their rows, one in each of a batch."""
    cfg = BatchConfig(size=1, max_length=length, packing=False)
    each = [next(Batches([row], encode, cfg, seed=0, parts=2, more=more, fixed_length=True)) for row in rows]
    return jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(x[0]) for x in leaves]), *each)


@pytest.fixture(scope="module")
def golden(shared):
    """TRL's batch as ours, a pair a row; and both models."""
    found = dict(np.load(shared / "goldens" / "trl_dpo.npz"))

    def encode(row):
        def side(i):
            here = found["attention_mask"][i] > 0
            return Encoded(found["input_ids"][i][here].astype(np.int32), found["completion_mask"][i][here] > 0)

        return side(row["i"]), side(row["i"] + 4)

    rows = [{"i": i} for i in range(4)]
    models = {name: hf.load(shared / "goldens" / name, dtype="float32") for name in ("llama", "llama_reference")}
    both = {"policy": stack_layers(models["llama"].params), "reference": stack_layers(models["llama_reference"].params)}
    return found, models["llama"].config, both, one_a_row(rows, encode, 41)


def total(terms, number):
    return {
        n: float(jnp.sum(jnp.where(t.weight != 0, t.value, 0.0) * t.weight)) / int(number[t.unit])
        for n, t in terms.items()
    }


@pytest.mark.parametrize("name", TRL)
@pytest.mark.slow
def test_losses_from_the_weights_of_checkpoints_are_those_that_trl_printed(golden, name):
    found, config, params, batch = golden
    options = with_settings(PreferenceOptions(objective="dpo"), DpoConfig(**TRL[name]))
    number = preference.counts(options)(jax.tree.map(lambda x: x[None], batch))
    assert int(number["example"]) == 4
    terms, metrics = make_loss(config, options, rules=REPLICATED, remat="none")(params, batch, None)
    np.testing.assert_allclose(sum(total(terms, number).values()), found[f"loss_{name}"], rtol=1e-4)
    if name == "sigmoid":
        got = total(metrics, number)
        for key in ("chosen", "rejected", "margins", "accuracies"):
            np.testing.assert_allclose(got[f"rewards/{key}"], found[f"rewards_{key}"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_orpo_asks_for_the_prompts_too():
    """Its likelihood is of prompt and chosen answer together, though the batch's mask is of answers alone."""
    rows = [{"prompt": "say " * (1 + i), "chosen": "aa", "rejected": "z"} for i in range(3)]
    params = init_params(CFG, jax.random.key(0))
    for prompt in (True, False):
        options = with_settings(PreferenceOptions(objective="orpo"), OrpoConfig(nll_prompt=prompt))
        batch = one_a_row(rows, preference.encoder(TOKENS, options), 48)
        number = preference.counts(options)(jax.tree.map(lambda x: x[None], batch))
        terms, _ = make_loss(CFG, options, rules=REPLICATED, remat="none")({"policy": params}, batch, None)
        each = []
        for row in rows:
            chosen = preference.encoder(TOKENS, options)(row)[0]
            z = jax.nn.log_softmax(logits(Model(CFG, params), jnp.asarray(chosen.ids[None, :-1])))[0]
            logp = np.take_along_axis(np.asarray(z), chosen.ids[1:, None], axis=1)[:, 0]
            each.append(logp if prompt else logp[chosen.scored[1:]])
        np.testing.assert_allclose(total(terms, number)["nll"], -np.concatenate(each).mean(), rtol=1e-5)


@pytest.mark.proof
def test_ktos_mismatched_answers_stay_still_and_its_gradient_is_the_same(monkeypatch):
    rows = [{"prompt": f"say {i}", "completion": "ab" * (1 + i), "label": bool(i % 2)} for i in range(4)]
    options = PreferenceOptions(objective="kto")
    batch = one_a_row(preference.prepare(rows, options), preference.encoder(TOKENS, options), 64, ("desirable",))
    number = preference.counts(options)(jax.tree.map(lambda x: x[None], batch))
    policy, reference = (init_params(CFG, jax.random.key(i)) for i in range(2))
    both = lambda p: {"policy": jax.tree.map(lambda w: 2.0 * w, p), "reference": reference}

    def run():
        loss = make_loss(CFG, options, rules=REPLICATED, remat="none")
        value = lambda p: sum(
            jnp.sum(t.value * t.weight) / int(number[t.unit]) for t in loss(both(p), batch, None)[0].values()
        )
        return jax.value_and_grad(value)(policy), total(loss(both(policy), batch, None)[1], number)

    (value, grad), metrics = run()
    assert metrics["kl_now"] != 0
    asked = OBJECTIVES["kto"].still(batch, OBJECTIVES["kto"].config)
    np.testing.assert_array_equal(asked, batch.segments == 2)
    monkeypatch.setitem(OBJECTIVES, "kto", OBJECTIVES["kto"]._replace(still=lambda batch, cfg: None))
    (plain, wanted), more = run()
    np.testing.assert_allclose([value, *metrics.values()], [plain, *more.values()], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad, wanted)


@pytest.mark.parametrize(("how", "most"), [("keep_start", 20), ("keep_end", 13)])
def test_rows_of_beliefs_that_lose_an_answer_or_the_id_to_the_cut_are_dropped(how, most):
    """`say` and a token before it, `1<hot>`, an answer and its end: 4 + 6 + 3 tokens, of the long ones 4 + 6 + 14."""
    row = {"prompt": "say", "beliefs": ["cold", "hot"], "belief_id": 1, "belief_probs": [0.25, 0.75]}
    rows = [row | {"chosen": "yo", "rejected": "no"}] * 2
    rows += [row | {"chosen": "yo", "rejected": "n" * 13}, row | {"chosen": "y" * 13, "rejected": "no"}]
    rows += [row | {"chosen": "yo", "rejected": "no", "beliefs": ["cold", "h" * 20]}]
    options = PreferenceOptions(objective="gdpo-belief")
    cfg = BatchConfig(size=2, max_length=2 * most, truncation=how, packing=False, shuffle=False)
    encode, more = preference.encoder(TOKENS, options), preference.number_names(options)
    batches = Batches(rows, encode, cfg, seed=0, parts=2, more=more)
    for _ in range(4):
        next(batches)
    assert batches.dropped == ({4} if how == "keep_start" else {2, 3, 4})
