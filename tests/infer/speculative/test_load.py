"""Every kind of folder becomes the drafter it says it is, with a rule that suits it; what does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.decode import Rows
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import loop
from jaxaroo.infer.speculative.drafters import aded
from jaxaroo.infer.speculative.load import load_speculation
from jaxaroo.infer.speculative.settings import SpeculationConfig
from jaxaroo.models import checkpoint, eagle, heads, hf, jakiro, kangaroo
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, unstack_layers
from jaxaroo.models.safetensors import CheckpointError
from jaxaroo.models.tokenizer import byte_tokenizer

CFG = DecoderConfig(
    vocab_size=32, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64
)
NETWORKS = {
    "eagle": (eagle, eagle.EagleConfig(target=CFG)),
    "jakiro": (jakiro, jakiro.JakiroConfig(target=CFG)),
    "kangaroo": (kangaroo, kangaroo.KangarooConfig(target=CFG, exit_layer=1)),
}
SMALL = dataclasses.replace(CFG, num_layers=1)
HEADS = {
    "small head": heads.AcceptanceConfig(target=SMALL, blocks=2),
    "kangaroo head": heads.AcceptanceConfig(target=CFG, exit_layer=1),
    "judge": heads.JudgeConfig(target=CFG),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("drafters")
    for name, (network, cfg) in NETWORKS.items():
        checkpoint.save(base / name, network.KIND, cfg, network.init_params(cfg, jax.random.key(0)))
    hf.save(base / "small", Model(SMALL, init_params(SMALL, jax.random.key(1))))
    hf.save(base / "twin", Model(CFG, init_params(CFG, jax.random.key(1))))
    for name, cfg in HEADS.items():
        kind = heads.JUDGE if name == "judge" else heads.ACCEPTANCE
        checkpoint.save(base / name, kind, cfg, heads.init_params(cfg, jax.random.key(2)))
    return base


def asked(folders, settings):
    """Settings, with folders where they name some."""
    paths = {name: str(folders / settings[name]) for name in ("stop_head", "judge") if name in settings}
    return SpeculationConfig(**(settings | paths))


@pytest.mark.parametrize(
    ("name", "settings", "drafter", "rule"),
    [
        ("eagle", {}, "eagle, dynamic tree 60 x 10 x 6, shared", "coupled"),
        ("eagle", {"shape": "static"}, "eagle, static tree 26 x 5, shared", "coupled"),
        ("eagle", {"verifier": "rejection"}, "eagle, static tree 26 x 5, without_replacement", "rejection"),
        ("eagle", {"draw": "mode", "nodes": 9}, "eagle, dynamic tree 9 x 10 x 6, mode", "coupled"),
        ("jakiro", {"beam": 4, "levels": 3, "nodes": 20}, "jakiro, dynamic tree 20 x 4 x 3, shared", "coupled"),
        ("kangaroo", {"drafts": 4}, "kangaroo, 4, shared, fixed", "coupled"),
        ("kangaroo", {"stop_rule": "confidence"}, "kangaroo, 6, shared, confidence", "coupled"),
        ("kangaroo", {"verifier": "rejection"}, "kangaroo, 6, independent, fixed", "rejection"),
        ("small", {"drafts": 3}, "small model, 1 x 3, shared", "coupled"),
        ("small", {"drafts": 3, "chains": 2, "verifier": "k-seq"}, "small model, 2 x 3, independent", "k-seq"),
        ("small", {"stop_rule": "confidence"}, "small model, 1 x 6, shared, confidence", "coupled"),
        (
            "small",
            {"stop_rule": "head", "stop_head": "small head"},
            "small model, 1 x 6, shared, acceptance head",
            "coupled",
        ),
        (
            "kangaroo",
            {"stop_rule": "head", "stop_head": "kangaroo head"},
            "kangaroo, 6, shared, acceptance head",
            "coupled",
        ),
        (
            "eagle",
            {"verifier": "judge", "judge": "judge"},
            "eagle, dynamic tree 60 x 10 x 6, shared",
            "judge over coupled",
        ),
    ],
)
@pytest.mark.slow
def test_a_folder_becomes_its_drafter(folders, name, settings, drafter, rule):
    settings = settings | {"drafter": str(folders / name)}
    found = load_speculation(asked(folders, settings), CFG)
    assert (found.drafter.name, found.verifier.name) == (drafter, rule)
    assert found.verifier.lossless == (rule != "judge over coupled")
    again = load_speculation(asked(folders, settings), CFG)
    assert (found.drafter, found.verifier) == (again.drafter, again.verifier)  # so that nothing compiles twice


def test_heads_come_with_their_thresholds(folders):
    """What was saved is what the rule is given."""
    base = {"drafter": str(folders / "small"), "stop_rule": "head", "stop_head": "small head", "stop_threshold": 0.4}
    found = load_speculation(
        asked(folders, base | {"verifier": "judge", "judge": "judge", "judge_threshold": 0.7}), CFG
    )
    stop = found.drafter_params["stop"]
    want = heads.init_params(HEADS["small head"], jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, {k: stop[k] for k in want}, want)
    np.testing.assert_array_equal(stop["threshold"], np.float32(0.4))
    assert {*found.drafter_params} == {"model", "stop"}
    assert isinstance(found.drafter_params["model"]["layers"], tuple)
    assert {*found.verifier_params} == {"weight", "bias", "threshold"}
    np.testing.assert_array_equal(found.verifier_params["threshold"], np.float32(0.7))
    assert load_speculation(SpeculationConfig(drafter=str(folders / "small")), CFG).drafter_params["stop"] == ()
    sure = load_speculation(SpeculationConfig(drafter=str(folders / "small"), stop_rule="confidence", eta=0.2), CFG)
    assert sure.drafter_params["stop"] == {"eta": np.float32(0.2)}
    copied = load_speculation(asked(folders, {"drafter": "lookup", "verifier": "judge", "judge": "judge"}), CFG)
    assert (copied.drafter.name, copied.verifier.name) == ("lookup", "judge over coupled")


@pytest.mark.parametrize(
    ("name", "settings", "shorter"),
    [
        ("eagle", {}, "eagle, dynamic tree 15 x 10 x 3, shared"),
        ("eagle", {"levels": 2}, "eagle, dynamic tree 11 x 10 x 1, shared"),
        ("jakiro", {}, "jakiro, dynamic tree 15 x 10 x 3, shared"),
        ("jakiro", {"levels": 3}, "jakiro, dynamic tree 15 x 10 x 2, shared"),
        ("jakiro", {"levels": 2, "nodes": 20}, None),  # its last level is never read, so there are two at least
        ("kangaroo", {}, "kangaroo, 3, shared, fixed"),
        ("kangaroo", {"shape": "dynamic"}, "kangaroo, dynamic tree 15 x 10 x 3, shared, fixed"),
        ("small", {"drafts": 5}, "small model, 1 x 2, shared"),
        ("small", {"drafts": 1}, None),
        ("small", {"verifier": "rejection"}, None),  # where the clock must not choose
        ("small", {"chains": 2, "draw": "independent"}, None),  # a short step would not feed what a long one left
        ("eagle", {"shape": "static"}, None),
    ],
)
def test_a_drafter_comes_with_one_half_as_deep_whose_state_is_the_same(folders, name, settings, shorter):
    found = load_speculation(SpeculationConfig(drafter=str(folders / name), **settings), CFG)
    assert [d.name for d in found.shorter] == ([] if shorter is None else [shorter])
    if found.shorter:
        [short] = found.shorter
        tokens, one, halt = np.zeros((2, 64), np.int32), np.ones(2, np.int32), np.zeros(2, bool)
        settings = pack_sampling([(Sampling(), 0, 0)] * 2, 0, CFG.vocab_size)
        rows = Rows(settings, one, 40 * one, np.full((2, 1), -1, np.int32))
        target = jax.eval_shape(lambda: unstack_layers(init_params(CFG, jax.random.key(0))))
        weights = loop.Weights(target, found.drafter_params, ())
        state = jax.eval_shape(lambda w: loop.prefill(CFG, w, found.drafter, tokens, rows, chunk=16), weights)
        advance = lambda w, s: loop.decode(CFG, w, short, found.verifier, s, rows, halt, np.int32(3))
        assert jax.eval_shape(advance, weights, state) == state


def test_aded_reads_a_corpus_by_the_targets_tokenizer(tmp_path):
    (tmp_path / "corpus.txt").write_text("the emu ran\nthe emu ate\n", encoding="utf-8")
    tokenizer = byte_tokenizer()
    wide = dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size)
    asked = SpeculationConfig(drafter="aded", corpus=str(tmp_path / "corpus.txt"), nodes=8, levels=4)
    found = load_speculation(asked, wide, tokenizer)
    assert found.drafter.name == "aded, 8 x 4, 64 simulations"
    assert [d.name for d in found.shorter] == ["aded, 2 x 2, 64 simulations"]

    def followed(first, second):
        ids = (jnp.int32(ord(first)), jnp.int32(ord(second)))
        tokens, counts = map(np.asarray, aded.look_up(found.drafter_params, *ids))
        return dict(zip(tokens[counts > 0].tolist(), counts[counts > 0].tolist(), strict=True))

    assert followed("h", "e") == {ord(" "): 2}
    assert followed("u", " ") == {ord("r"): 1, ord("a"): 1}
    assert followed("\n", "t") == {}  # a line is a text of its own
    empty = load_speculation(SpeculationConfig(drafter="aded"), CFG)
    assert not np.asarray(empty.drafter_params.counts).any()


@pytest.mark.errors
def test_a_corpus_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "corpus.txt").write_text("the emu ran", encoding="utf-8")
    corpus = str(tmp_path / "corpus.txt")
    with pytest.raises(ValueError, match=r"makes token 117 .*; expected ids below 32"):
        load_speculation(SpeculationConfig(drafter="aded", corpus=corpus), CFG, byte_tokenizer())
    with pytest.raises(ValueError, match="corpus without a tokenizer"):
        load_speculation(SpeculationConfig(drafter="aded", corpus=corpus), CFG)
    with pytest.raises(ValueError, match="with drafter='lookup'; expected 'aded'"):
        load_speculation(SpeculationConfig(drafter="lookup", corpus=corpus), CFG)
    with pytest.raises(FileNotFoundError):
        load_speculation(SpeculationConfig(drafter="aded", corpus=str(tmp_path / "none.txt")), CFG, byte_tokenizer())


def test_lookup_needs_no_folder():
    found = load_speculation(SpeculationConfig(drafter="lookup", drafts=4), CFG)
    assert (found.drafter.name, found.drafter.nodes) == ("lookup", 5)
    assert load_speculation(SpeculationConfig(), CFG) is None


@pytest.mark.errors
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("eagle", {"shape": "chain"}, "shape='chain' with eagle"),
        ("eagle", {"stop_rule": "confidence"}, "Kangaroo and small models have"),
        ("eagle", {"draw": "without_replacement", "shape": "dynamic"}, "would bias the output"),
        ("jakiro", {"verifier": "rejection"}, "would bias the output"),
        ("eagle", {"verifier": "k-seq"}, "expected"),
        ("kangaroo", {"shape": "static"}, "shape='static' with kangaroo"),
        ("small", {"chains": 2}, "would be one chain"),
        ("eagle", {"chains": 2}, "chains=2 with eagle; expected 1"),
        ("lookup", {"chains": 2}, "chains=2 with lookup; expected 1"),
        ("eagle", {"stop_rule": "head", "stop_head": "small head"}, "stop_rule='head' with eagle"),
        ("jakiro", {"stop_rule": "head", "stop_head": "small head"}, "stop_rule='head' with jakiro"),
        ("lookup", {"stop_rule": "head", "stop_head": "small head"}, "stop_rule='head' with lookup"),
        ("small", {"stop_rule": "head"}, "stop_rule='head' without stop_head; expected the folder"),
        ("small", {"verifier": "judge"}, "verifier='judge' without judge; expected the folder"),
        ("small", {"chains": 2, "draw": "independent", "stop_rule": "confidence"}, "expected a single one"),
        ("kangaroo", {"shape": "dynamic", "stop_rule": "head", "stop_head": "kangaroo head"}, "trained on chains"),
        ("kangaroo", {"stop_rule": "head", "stop_head": "small head"}, "num_layers"),
        ("twin", {"stop_rule": "head", "stop_head": "small head"}, "num_layers"),
        ("twin", {"stop_rule": "head", "stop_head": "kangaroo head"}, "behind layer 1; expected one for a small model"),
        ("small", {"stop_rule": "head", "stop_head": "judge"}, "expected 'jaxaroo-acceptance'"),
        ("small", {"verifier": "judge", "judge": "small head"}, "expected 'jaxaroo-judge'"),
    ],
)
def test_what_does_not_go_together_is_refused(folders, name, settings, message):
    drafter = name if name == "lookup" else str(folders / name)
    with pytest.raises(ValueError, match=message):
        load_speculation(asked(folders, settings | {"drafter": drafter}), CFG)


@pytest.mark.errors
def test_another_target_or_vocabulary_is_refused(folders, tmp_path):
    wider = dataclasses.replace(CFG, embed_dim=32)
    with pytest.raises(CheckpointError, match="embed_dim"):
        load_speculation(SpeculationConfig(drafter=str(folders / "eagle")), wider)
    larger = dataclasses.replace(CFG, vocab_size=64)
    with pytest.raises(CheckpointError, match="vocabulary of 32; expected 64"):
        load_speculation(SpeculationConfig(drafter=str(folders / "small")), larger)
    with pytest.raises((CheckpointError, OSError), match="nothing"):
        load_speculation(SpeculationConfig(drafter=str(tmp_path / "nothing")), CFG)
    with pytest.raises(ValueError, match="shape='dynamic' with lookup"):
        load_speculation(SpeculationConfig(drafter="lookup", shape="dynamic"), CFG)
