"""A guide from settings is the guide made by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.guided.load import load_guidance
from jaxaroo.infer.guided.settings import GuideConfig
from jaxaroo.infer.guided.value_guided import ivo, tvd
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models import reward
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.safetensors import CheckpointError

SIZES = dict(vocab_size=40, embed_dim=16, ffn_dim=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
CFG = DecoderConfig(**SIZES, max_positions=32)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    cfg = reward.RewardConfig(target=CFG, separator=7)
    head = jax.tree.map(lambda x: 30 * x, reward.init_head(cfg, jax.random.key(1)))
    params = {"model": init_params(CFG, jax.random.key(2)), "head": head}
    reward.save(folder := tmp_path_factory.mktemp("guide") / "model", reward.RewardModel(cfg, params))
    return folder


def answers(guidance):
    policy = Model(CFG, init_params(CFG, jax.random.key(0)))
    with Engine(policy, max_seqs=2, guidance=guidance) as engine:
        results = engine.generate([[1, 2, 3], [4, 5]], Sampling(temperature=1.0, max_tokens=8, seed=3))
    return [result.outputs[0].token_ids for result in results]


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"guide_beta": 9.0, "guide_width": 6}, lambda model: ivo(model, beta=9.0, width=6)),
        pytest.param(
            {"guided_by": "tvd", "guide_threshold": 0.9},
            lambda model: tvd(model, threshold=0.9, width=4),
            marks=pytest.mark.proof,
        ),
    ],
)
@pytest.mark.proof
def test_a_guide_from_settings_is_the_one_by_hand(judge, settings, by_hand):
    found = answers(load_guidance(GuideConfig(guide=str(judge), **settings)))
    assert found == answers(by_hand(reward.load(judge)))
    assert found != answers(None)


def test_without_a_folder_there_is_none_and_a_wrong_one_is_refused(judge, tmp_path):
    assert load_guidance(GuideConfig()) is None
    with pytest.raises((CheckpointError, FileNotFoundError), match="nowhere"):
        load_guidance(GuideConfig(guide=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="beta=-1"):
        load_guidance(GuideConfig(guide=str(judge), guide_beta=-1.0))
    assert dataclasses.asdict(GuideConfig())["guided_by"] == "ivo"
    assert np.isclose(load_guidance(GuideConfig(guide=str(judge))).params["setting"]["beta"], 4.0)
