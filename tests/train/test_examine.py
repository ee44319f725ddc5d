"""What is said of a run before it is made, against the run's own state and rows counted by hand."""

import json

import jax
import pytest

from jaxaroo.models.presets import preset
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.train import run
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.examine import examine
from jaxaroo.train.preference import PreferenceOptions
from jaxaroo.train.recipe import RECIPES, EarlyExitOptions, SftOptions

pytestmark = pytest.mark.optimizer


def settings(folder, **changes):
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "a" * 30, "completion": "b" * 40}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = dict(model="preset:tiny", data=str(folder / "rows.jsonl"), out=folder / "run", steps=7)
    return run.RunConfig(**given | dict(batch=BatchConfig(size=8, max_length=64)) | changes)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)])
@pytest.mark.slow
def test_a_device_holds_what_is_said(mesh, tmp_path):
    cfg = settings(tmp_path, mesh=mesh, ema=0.9)
    found = examine("sft", cfg, SftOptions())
    origin, devices = run.origin_of(cfg), make_mesh(mesh)
    what = RECIPES["sft"].trainable(origin, SftOptions(), None)
    tx = RECIPES["sft"].optimizer(origin, SftOptions(), cfg.optimizer, cfg.steps)
    with jax.set_mesh(devices):
        _, make = run.begin_state(cfg, origin, what, tx, devices)
        state = make()
    data = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    arrays = [data(x) for x in jax.tree.leaves(state)]
    held = [sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == d) for d in jax.devices()]
    assert found["state_bytes_a_device"] == max(held)
    assert found["trained_parameters"] == sum(x.size for x in jax.tree.leaves(state.params))


def test_rows_are_counted(tmp_path):
    found = examine("sft", settings(tmp_path), SftOptions())
    end = len(byte_tokenizer().eos_ids) > 0
    assert (found["rows"], found["updates"], found["rows_an_update"]) == (2, 7, 8)
    assert found["longer_than_max_length"] == 1
    assert found["learned_tokens_a_row"] == (3 + end + 40 + end) / 2
    assert found["tokens_a_row"] >= found["learned_tokens_a_row"] + (2 + 30) / 2


def test_beside_a_target_the_target_is_frozen(tmp_path):
    found = examine("early-exit", settings(tmp_path), EarlyExitOptions(exit_layer=1))
    cfg = preset("tiny", vocab_size=byte_tokenizer().vocab_size)
    target = sum(x.size for x in jax.tree.leaves(run.param_shapes(cfg)) if hasattr(x, "size"))
    assert found["frozen_parameters"] == target
    assert 0 < found["trained_parameters"] < target


def test_sums_that_the_run_would_write_down_are_not_asked_of_the_rows(tmp_path):
    cfg = settings(tmp_path)
    pair = {"prompt": "ab", "chosen": "cde", "rejected": "f"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair) + "\n")
    assert examine("preference", cfg, PreferenceOptions(reference="precomputed"))["rows"] == 1
    with pytest.raises(ValueError, match="expected 'ref_chosen_logps' too"):
        examine("preference", cfg, PreferenceOptions(reference="columns"))
    with pytest.raises(ValueError, match="expected 'score_chosen' too"):
        examine("preference", cfg, PreferenceOptions(objective="mm-dpo", reference="precomputed"))


def test_what_the_run_would_refuse_is_refused_and_nothing_is_written(tmp_path):
    cfg = settings(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl.*completion"):
        examine("sft", cfg, SftOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
