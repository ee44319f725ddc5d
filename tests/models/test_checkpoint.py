"""What is written comes back to the bit, whole or not at all; every fault of a folder has its row."""

import dataclasses
import json
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.checkpoint import CheckpointError, check_params, fingerprint, load, load_for, rebuild_config, save
from jaxaroo.models.decoder import DecoderConfig
from jaxaroo.models.safetensors import SINGLE, write

TARGET = DecoderConfig(
    vocab_size=9, embed_dim=8, ffn_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, rope_theta=500.0
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A field of every type that a configuration may have."""

    target: DecoderConfig
    width: int = 4
    bias: bool = True
    scale: float = 0.5
    rank: int | None = None
    at: tuple[int, ...] = (1, 2)
    form: Literal["one", "two"] = "one"

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"HeadConfig.width: found {self.width}; expected at least 1.")


CFG = HeadConfig(target=TARGET, width=3, scale=2, rank=7, at=(2, 0, 5), form="two")


def config_of(mapping, target):
    return rebuild_config(HeadConfig, "head", mapping, target)


def shapes(cfg):
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"proj": {"w": f32(cfg.width, 8), "bias": f32(cfg.width)}, "gain": f32()}


def weights():
    bits = np.random.default_rng(0).integers(0, 2**16, (3, 8), np.uint16)
    narrow = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)  # NaNs and all
    return {"proj": {"w": narrow, "bias": jnp.asarray([0.5, -1.0, jnp.inf])}, "gain": jnp.float32(3.0)}


def edited(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "net", "head", CFG, weights())
    return tmp_path / "net"


def test_everything_comes_back_to_the_bit(folder):
    cfg, params = load_for(folder, TARGET, config_of, shapes)
    assert cfg == CFG
    assert type(cfg.at) is tuple
    kind, config, again = load(folder)
    assert (kind, config["model_type"], config["target"]) == ("head", "jaxaroo-head", fingerprint(TARGET))
    assert config["target"]["vocab_size"] == 9
    for got in (params, again):
        assert jax.tree.structure(got) == jax.tree.structure(weights())
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(weights()), strict=True):
            assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())
    assert sorted(p.name for p in folder.parent.iterdir()) == ["net"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", SINGLE]


def test_a_folder_is_replaced_on_request_only_and_whole(folder):
    before = (folder / SINGLE).read_bytes()
    other = jax.tree.map(jnp.zeros_like, weights())
    with pytest.raises(FileExistsError, match="Pass overwrite"):
        save(folder, "head", CFG, other)
    assert (folder / SINGLE).read_bytes() == before
    save(folder, "head", dataclasses.replace(CFG, width=1), other, overwrite=True)
    assert load(folder).config["width"] == 1
    assert not load(folder).params["proj"]["bias"].any()
    assert [p.name for p in folder.parent.iterdir()] == ["net"]


def test_a_failure_half_way_leaves_what_was_there(folder, monkeypatch):
    class Broken:
        """Passes for an array until its bytes are wanted."""

        shape, dtype = (3,), np.dtype("f4")

        def __array__(self, *_, **__):
            raise OSError("no more memory")

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    bad: Any = weights() | {"proj": {"w": weights()["proj"]["w"], "bias": Broken()}}
    with pytest.raises(OSError, match="no more memory"):
        save(folder, "head", dataclasses.replace(CFG, width=1), bad, overwrite=True)

    # The last step, then: the old folder has been moved aside, and the new one does not come.
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if str(target) == str(folder.resolve()) and str(source).endswith(".partial"):
            raise OSError("no room")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no room"):
        save(folder, "head", dataclasses.replace(CFG, width=1), weights(), overwrite=True)
    assert calls
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["net"]


@pytest.mark.parametrize("name", fingerprint(TARGET))
def test_another_target_is_refused_by_name(folder, name):
    other = dataclasses.replace(TARGET, **{name: 2 * getattr(TARGET, name)})
    with pytest.raises(CheckpointError, match=rf"made for a target of \{{'{name}'.*expected \{{'{name}'"):
        load_for(folder, other, config_of, shapes)
    alike = dataclasses.replace(TARGET, dtype="bfloat16", eos_ids=(3,), max_positions=9)
    assert load_for(folder, alike, config_of, shapes)[0].target == alike


def without(*names):
    return lambda config: {k: v for k, v in config.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c | {"model_type": "jaxaroo-eagle"}, "found model_type 'jaxaroo-eagle'; expected 'jaxaroo-head'"),
        (lambda c: c | {"model_type": "llama"}, "model_type 'llama'.*expected 'jaxaroo-...'"),
        (lambda c: c | {"model_type": 3}, "model_type '3'"),
        (without("target"), "target None; expected"),
        (lambda c: c | {"target": {}}, "made for a target of"),
        (lambda c: c | {"target": c["target"] | {"colour": 1}}, "'colour': 1"),
        (without("width", "bias"), "missing bias; missing width"),
        (lambda c: c | {"heigth": 2}, "unknown 'heigth'"),
        (lambda c: c | {"width": True}, "width=True"),
        (lambda c: c | {"width": 3.0}, "width=3.0"),
        (lambda c: c | {"bias": 1}, "bias=1"),
        (lambda c: c | {"scale": "0.5"}, "scale=0.5"),
        (lambda c: c | {"rank": "7"}, "rank=7"),
        (lambda c: c | {"at": [1, None]}, r"at=\(1, None\)"),
        (lambda c: c | {"at": 1}, "at=1"),
        (lambda c: c | {"form": "three"}, "form=three"),
        (lambda c: c | {"width": 0}, "HeadConfig.width: found 0"),
        (lambda c: c | {"width": 4}, r"proj.w is bfloat16 \[3, 8\], expected float32 \[4, 8\]"),
    ],
)
def test_a_wrong_configuration_is_refused(folder, change, match):
    edited(folder, change)
    with pytest.raises(CheckpointError, match=match):
        load_for(folder, TARGET, config_of, shapes)


def test_files_that_are_cut_short_or_missing_are_refused(folder):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])
    for read in (load, lambda f: load_for(f, TARGET, config_of, shapes)):
        with pytest.raises(CheckpointError, match="expected"):
            read(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=SINGLE):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected plain JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")
    with pytest.raises(CheckpointError, match="expected a file inside the folder"):
        load(folder)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"gain": np.ones((), "f8")}, "'gain' is float64; expected 32 bits"),
        ({"a": np.ones(1, "f4"), "a.b": np.ones(1, "f4")}, "stands inside another tensor"),
        ({"a.b": np.ones(1, "f4"), "a": np.ones(1, "f4")}, "stands inside another tensor"),
    ],
)
def test_tensors_that_make_no_tree_are_refused(folder, arrays, match):
    (folder / SINGLE).unlink()
    write(folder, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.__getitem__)
    with pytest.raises(CheckpointError, match=match):
        load(folder)


def test_all_that_is_wrong_with_parameters_is_said_at_once():
    found = {"proj": {"w": jnp.zeros((3, 8), jnp.int32), "more": jnp.zeros(1)}, "gain": jnp.zeros((), jnp.float16)}
    want = (
        "^net: missing proj.bias; unexpected 'proj.more'; proj.w is int32 [3, 8], expected float32 [3, 8]. The weights"
    )
    with pytest.raises(CheckpointError, match=want.replace("[", r"\[").replace("]", r"\]")):
        check_params("net", found, shapes(CFG))
    check_params("net", weights(), shapes(CFG))


@pytest.mark.parametrize(
    ("params", "config", "match"),
    [
        ({"a": (jnp.ones(1), jnp.ones(1))}, CFG, "a is tuple; expected nested dicts of arrays"),
        ({"a": jnp.ones(1)}, dataclasses.replace(CFG, scale=float("nan")), "not JSON compliant"),
    ],
)
def test_what_would_not_come_back_is_not_written(tmp_path, params, config, match):
    with pytest.raises(ValueError, match=match):
        save(tmp_path / "net", "head", config, params)
    assert not [*tmp_path.iterdir()]
