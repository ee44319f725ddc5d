"""Every kind of folder becomes the drafter it says it is, with a rule that suits it; what does not fit is refused."""

import dataclasses

import jax
import pytest

from jaxaroo.infer.speculative.load import load_speculation
from jaxaroo.infer.speculative.settings import SpeculationConfig
from jaxaroo.models import checkpoint, eagle, hf, jakiro, kangaroo
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.safetensors import CheckpointError

CFG = DecoderConfig(
    vocab_size=32, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64
)
NETWORKS = {
    "eagle": (eagle, eagle.EagleConfig(target=CFG)),
    "jakiro": (jakiro, jakiro.JakiroConfig(target=CFG)),
    "kangaroo": (kangaroo, kangaroo.KangarooConfig(target=CFG, exit_layer=1)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("drafters")
    for name, (network, cfg) in NETWORKS.items():
        checkpoint.save(base / name, network.KIND, cfg, network.init_params(cfg, jax.random.key(0)))
    hf.save(base / "small", Model(CFG, init_params(CFG, jax.random.key(1))))
    return base


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
    ],
)
def test_a_folder_becomes_its_drafter(folders, name, settings, drafter, rule):
    found = load_speculation(SpeculationConfig(drafter=str(folders / name), **settings), CFG)
    assert (found.drafter.name, found.verifier.name) == (drafter, rule)
    again = load_speculation(SpeculationConfig(drafter=str(folders / name), **settings), CFG)
    assert (found.drafter, found.verifier) == (again.drafter, again.verifier)  # so that nothing compiles twice


def test_lookup_needs_no_folder():
    found = load_speculation(SpeculationConfig(drafter="lookup", drafts=4), CFG)
    assert (found.drafter.name, found.drafter.nodes) == ("lookup", 5)
    assert load_speculation(SpeculationConfig(), CFG) is None


@pytest.mark.errors
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("eagle", {"shape": "chain"}, "shape='chain' with eagle"),
        ("eagle", {"stop_rule": "confidence"}, "Kangaroo has stop rules"),
        ("eagle", {"draw": "without_replacement", "shape": "dynamic"}, "would bias the output"),
        ("jakiro", {"verifier": "rejection"}, "would bias the output"),
        ("eagle", {"verifier": "k-seq"}, "expected"),
        ("kangaroo", {"shape": "static"}, "shape='static' with kangaroo"),
        ("small", {"chains": 2}, "would be one chain"),
    ],
)
def test_what_does_not_go_together_is_refused(folders, name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_speculation(SpeculationConfig(drafter=str(folders / name), **settings), CFG)


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
