"""What is read is what was written, to the bit, or it is not used."""

import gc
import itertools
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models.decoder import DecoderConfig, init_params, param_axes
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP
from jaxaroo.train import checkpoint
from jaxaroo.train.checkpoint import CheckpointConfig, DamagedCheckpointError, open_checkpoints, restore
from jaxaroo.train.state import init_state

CFG = DecoderConfig(
    vocab_size=64, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, tie_embeddings=True
)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
DATA = {"0": {"next_index": 5}}


def make_state(step, **settings):
    params = jax.tree.map(lambda p: p * (1 + step / 7), init_params(CFG, jax.random.key(0)))
    return init_state(params, TX, seed=3, ema=True, **settings)._replace(step=jnp.int32(step))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def saved(folder, *steps, cfg=CheckpointConfig()):
    with open_checkpoints(folder, cfg) as manager:
        for step in steps:
            checkpoint.save(manager, make_state(step), DATA | {"step": step})


def read(folder, like=None, cfg=CheckpointConfig()):
    with open_checkpoints(folder, cfg) as manager:
        return restore(manager, make_state(0) if like is None else like)


@pytest.mark.optimizer
@pytest.mark.slow
def test_the_state_and_the_position_come_back(tmp_path):
    assert read(tmp_path / "c") is None
    saved(tmp_path / "c", 3, 9)
    found = read(tmp_path / "c")
    assert (found.step, found.data) == (9, DATA | {"step": 9})
    assert bits(found.state) == bits(make_state(9))
    assert jax.tree.structure(found.state) == jax.tree.structure(make_state(9))


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_save_is_made_once_and_the_old_ones_go(tmp_path):
    cfg = CheckpointConfig(keep=2, keep_every=4)
    saved(tmp_path / "c", 3, 4, 5, 5, 6, 7, cfg=cfg)
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [4, 6, 7]


@pytest.mark.optimizer
@pytest.mark.slow
def test_frozen_parameters_are_not_written_but_vouched_for(tmp_path):
    base = {"w": jnp.arange(100_000, dtype=jnp.float32)}
    state = make_state(2, frozen=base)
    with open_checkpoints(tmp_path / "c", CheckpointConfig()) as manager:
        checkpoint.save(manager, state, DATA)
    assert sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file()) < 200_000
    found = read(tmp_path / "c", make_state(0, frozen=base))
    assert bits(found.state) == bits(state)
    other = {"w": base["w"].at[77].add(1)}
    with pytest.raises(DamagedCheckpointError, match=r"bits of \.frozen\['w'\] are not those that were saved"):
        read(tmp_path / "c", make_state(0, frozen=other))
    with pytest.raises(DamagedCheckpointError, match=r"bits of \.frozen\['w'\] are not those that were saved"):
        read(tmp_path / "c")
    saved(tmp_path / "none", 2)
    with pytest.raises(DamagedCheckpointError, match=r"bits of \.frozen\['w'\] are not those that were saved"):
        read(tmp_path / "none", make_state(0, frozen=base))


@pytest.mark.optimizer
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.slow
def test_another_mesh_reads_the_same_bits(tmp_path, sizes):
    saved(tmp_path / "c", 4)  # on one device
    mesh = make_mesh(MeshConfig(**sizes))
    state = make_state(0)
    placed = FSDP_TP.shardings(mesh, param_axes(CFG), state.params)
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.device_put(jax.tree.map(lambda x: x, state), one)._replace(params=jax.device_put(state.params, placed))
    found = read(tmp_path / "c", like)
    assert bits(found.state) == bits(make_state(4))
    assert all(x.sharding == s for x, s in zip(*map(jax.tree.leaves, (found.state.params, placed)), strict=True))
    with open_checkpoints(tmp_path / "d", CheckpointConfig()) as manager:
        checkpoint.save(manager, found.state, DATA)  # and back
    assert bits(read(tmp_path / "d").state) == bits(make_state(4))


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGE = {
    "a bit of the largest file": lambda c: flip(max(_files(c), key=lambda f: f.stat().st_size)),
    "half of the largest file": lambda c: _cut(max(_files(c), key=lambda f: f.stat().st_size)),
    "every file cut": lambda c: [_cut(f) for f in _files(c)],
    "the arrays are gone": lambda c: shutil.rmtree(c / "state"),
    "the description is gone": lambda c: shutil.rmtree(c / "meta"),
    "a bit of a name in the description": lambda c: _replace(
        c / "meta" / "metadata", b'"fingerprint"', b'"fingerprinu"'
    ),
    "another place in the data": lambda c: _replace(c / "meta" / "metadata", b'_index": 5', b'_index": 6'),
    "a description of nothing": lambda c: (c / "meta" / "metadata").write_text("null"),
    "the manifest is gone": lambda c: (c / "state" / "manifest.ocdbt").unlink(),
    "an empty folder": lambda c: [shutil.rmtree(c), c.mkdir()],
    "another step's arrays": lambda c: [
        shutil.rmtree(c / "state"),
        shutil.copytree(c.parent / "1" / "state", c / "state"),
    ],
    "another step altogether": lambda c: [shutil.rmtree(c), shutil.copytree(c.parent / "1", c)],
}


def _files(folder):
    return [f for f in folder.rglob("*") if f.is_file()]


def _replace(file, old, new):
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new))


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.optimizer
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog, damage):
    saved(tmp_path / "c", 1, 2, 3)
    DAMAGE[damage](tmp_path / "c" / "3")
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path / "c")
    assert found.step == 2
    assert bits(found.state) == bits(make_state(2))
    if damage != "an empty folder":  # which is what a killed save leaves: no checkpoint at all
        assert "checkpoint 3 is damaged" in caplog.text
        assert (tmp_path / "damaged" / "3.0").is_dir()
    saved(tmp_path / "c", 3)  # the run comes by again
    found = read(tmp_path / "c")
    assert found.step == 3
    assert bits(found.state) == bits(make_state(3))
    gc.collect()


@pytest.mark.optimizer
@pytest.mark.slow
def test_what_was_set_aside_before_stays_and_the_step_can_be_saved_again_at_once(tmp_path):
    for _ in range(2):
        saved(tmp_path / "c", 1, 3)
        flip(max(_files(tmp_path / "c" / "3"), key=lambda f: f.stat().st_size))
        with open_checkpoints(tmp_path / "c", CheckpointConfig()) as manager:
            assert restore(manager, make_state(0)).step == 1
            checkpoint.save(manager, make_state(3), DATA)
        assert read(tmp_path / "c").step == 3
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["3.0", "3.1"]


@pytest.mark.optimizer
def test_what_a_killed_save_left_is_cleared_away_and_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Path("c"), 2)
    shutil.copytree("c/2", "c/5.orbax-checkpoint-tmp")
    assert read(Path("c")).step == 2
    assert [p.name for p in Path("c").iterdir()] == ["2"]


@pytest.mark.optimizer
def test_if_all_are_damaged_it_says_what_is_wrong_with_each(tmp_path):
    saved(tmp_path / "c", 1, 2)
    for step in "12":
        flip(max(_files(tmp_path / "c" / step), key=lambda f: f.stat().st_size))
    with pytest.raises(DamagedCheckpointError, match=r"no checkpoint under .*\(2: .* 1: .*\); expected at least one"):
        read(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2"]  # nothing is moved away for nothing
    gc.collect()


@pytest.mark.optimizer
def test_a_fingerprint_needs_no_more_room_than_the_largest_leaf():
    """On a CPU; the compiler's own account. On a TPU, which mixes while it sums, none."""
    compiled = checkpoint._print_of.lower(jax.ShapeDtypeStruct((512, 516), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 4 * 512 * 516


@pytest.mark.optimizer
def test_one_leaf_of_a_fingerprint_is_waited_for_before_the_next(monkeypatch):
    """Else room adds up, and jax 0.10 aborts once sums over CPU devices wait for each other."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("d"))
    tree = {f"w{i}": jax.device_put(np.arange(8.0, dtype=np.float32) + i, spread) for i in range(24)}
    whole, found = checkpoint._print_of, []

    def one(leaf):
        assert all(x.is_ready() for x in found)
        found.append(whole(leaf))
        return found[-1]

    monkeypatch.setattr(checkpoint, "_print_of", one)
    prints = checkpoint._fingerprint(tree)
    assert len(found) == 24
    assert prints == checkpoint._fingerprint(jax.device_get(tree))


@pytest.mark.optimizer
def test_weights_and_their_moments_share_the_programs_of_a_fingerprint():
    tree = lambda: {name: {f"w{i}": jnp.ones((3, 4 + i)) for i in range(2)} for name in ("params", "mu", "nu")}
    before = checkpoint._print_of._cache_size()
    checkpoint._fingerprint(tree())
    checkpoint._fingerprint(tree())
    assert checkpoint._print_of._cache_size() - before == 2


def test_any_bit_of_any_leaf_changes_the_fingerprint():
    tree = {
        "f": jnp.arange(6.0).reshape(2, 3),
        "h": jnp.ones(3, jnp.bfloat16),
        "i": jnp.int32(4),
        "b": jnp.ones(2, bool),
    }
    want = checkpoint._fingerprint(tree)
    for name, leaf in tree.items():
        raw = np.asarray(leaf)
        for bit in range(8 * raw.nbytes if raw.dtype != bool else 0):
            data = bytearray(raw.tobytes())
            data[bit // 8] ^= 1 << bit % 8
            changed = jnp.asarray(np.frombuffer(bytes(data), raw.dtype).reshape(raw.shape))
            got = checkpoint._fingerprint(tree | {name: changed})
            assert [n for n in want if got[n] != want[n]] == [f"['{name}']"]
    values = np.random.default_rng(0).normal(size=6).astype(np.float32)
    orders = [np.arange(6), *(_swapped(i, j) for i, j in itertools.combinations(range(6), 2))]
    prints = [checkpoint._fingerprint({"f": jnp.asarray(values[o].reshape(2, 3))})["['f']"] for o in orders]
    assert len({*prints}) == 16  # no two places count the same
    assert checkpoint._fingerprint(tree | {"b": jnp.asarray([True, False])})["['b']"] != want["['b']"]


def _swapped(i, j):
    order = np.arange(6)
    order[[i, j]] = j, i
    return order


@pytest.mark.parametrize("settings", [{"every": 0}, {"keep": 0}, {"keep_every": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="expected at least 1"):
        CheckpointConfig(**settings)
    json.dumps(settings)
