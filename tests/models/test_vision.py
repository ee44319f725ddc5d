"""Oracles: convolution and batch norm by loops in float64; then folders that are not what they should be."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.safetensors import CheckpointError
from jaxaroo.models.vision import batch_norm, conv, he_normal, load_folder, save_folder


def conv_oracle(x, kernel, stride=1, groups=1):
    (B, Y, X, C), (O, Ky, Kx, I) = x.shape, kernel.shape
    padded = np.zeros((B, Y + 2 * (Ky // 2), X + 2 * (Kx // 2), C))
    padded[:, Ky // 2 : Ky // 2 + Y, Kx // 2 : Kx // 2 + X] = x
    out = np.zeros((B, (Y - 1) // stride + 1, (X - 1) // stride + 1, O))
    for b, y, x_, o in np.ndindex(out.shape):
        first = (o * groups // O) * I
        for ky, kx, i in np.ndindex(Ky, Kx, I):
            out[b, y, x_, o] += padded[b, y * stride + ky, x_ * stride + kx, first + i] * kernel[o, ky, kx, i]
    return out


@pytest.mark.parametrize(
    ("shape", "stride", "groups"),
    [((4, 3, 3, 3), 1, 1), ((4, 3, 3, 3), 2, 1), ((6, 1, 5, 1), 1, 3), ((3, 5, 5, 1), 2, 3), ((2, 1, 1, 3), 2, 1)],
)
def test_convolution_is_that_of_loops(shape, stride, groups):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 5, 3)), rng.normal(size=shape)
    found = conv(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), stride, groups)
    np.testing.assert_allclose(found, conv_oracle(x, kernel, stride, groups), rtol=1e-5, atol=1e-5)


def test_batch_norm_and_its_running_statistics():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (4, 3, 2, 5))
    gain, bias, mean, var = rng.normal(size=5), rng.normal(size=5), rng.normal(size=5), rng.uniform(0.5, 2, 5)
    f32 = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]
    flat = x.reshape(-1, 5)
    m = sum(flat) / 24
    v = sum((row - m) ** 2 for row in flat) / 24
    for train, (a, b) in {True: (m, v), False: (mean, var)}.items():
        y, new = batch_norm(*f32(x, gain, bias, mean, var), train=train)
        np.testing.assert_allclose(y, gain * (x - a) / np.sqrt(b + 1e-5) + bias, rtol=1e-4, atol=1e-5)
        moved = (0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * 24 / 23) if train else (mean, var)
        np.testing.assert_allclose(new["mean"], moved[0], rtol=1e-5)
        np.testing.assert_allclose(new["var"], moved[1], rtol=1e-5)
    gradient = jax.grad(
        lambda x: sum(s.sum() for s in batch_norm(x, *f32(gain, bias, mean, var), train=True)[1].values())
    )
    np.testing.assert_array_equal(gradient(*f32(x)), np.zeros_like(x))


def test_kernels_have_the_variance_that_a_relu_wants():
    from flax import nnx

    kernel = he_normal(nnx.Rngs(params=jax.random.key(0)), (64, 3, 3, 16))
    assert float(jnp.var(kernel)) == pytest.approx(2 / (9 * 16), rel=0.05)


# ------------------------------------------------------------------------------------------------------------- folders
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    rows: tuple[tuple[int, ...], ...] = ((2, 3),)
    kind: str = "a"

    def __post_init__(self):
        if self.kind not in ("a", "b"):
            raise ValueError(f"Sizes.kind: found {self.kind!r}")


def shapes(cfg):
    return {"x": {"w": jax.ShapeDtypeStruct(cfg.rows[0], jnp.float32)}, "c": jax.ShapeDtypeStruct((2,), jnp.int8)}


TREE = {"x": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.asarray([-128, 127], np.int8)}


def test_a_folder_comes_back_as_it_was(tmp_path):
    cfg = Sizes(kind="b")
    save_folder(tmp_path / "m", "thing", cfg, TREE)
    found, tree = load_folder(tmp_path / "m", "thing", Sizes, shapes)
    assert found == cfg
    assert isinstance(found.rows[0], tuple)
    np.testing.assert_array_equal(tree["x"]["w"], TREE["x"]["w"])
    np.testing.assert_array_equal(tree["c"], TREE["c"])
    assert tree["c"].dtype == jnp.int8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    with pytest.raises(FileExistsError, match="Pass overwrite"):
        save_folder(tmp_path / "m", "thing", cfg, TREE)
    save_folder(tmp_path / "m", "thing", Sizes(), TREE, overwrite=True)
    assert load_folder(tmp_path / "m", "thing", Sizes, shapes)[0] == Sizes()


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "jaxaroo-other"}, "model_type 'jaxaroo-other'; expected 'jaxaroo-thing'"),
        ({"more": 1}, r"missing or unknown \['more'\]"),
        ({"kind": "c"}, "Sizes.kind: found 'c'"),
        ({"rows": [[3, 2]]}, r"x.w is float32 \[2, 3\], expected float32 \[3, 2\]"),
    ],
)
def test_a_folder_that_is_not_what_it_should_be_is_refused(tmp_path, change, message):
    save_folder(tmp_path / "m", "thing", Sizes(), TREE)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_folder(tmp_path / "m", "thing", Sizes, shapes)


@pytest.mark.errors
def test_a_setting_that_is_missing_is_not_made_up(tmp_path):
    save_folder(tmp_path / "m", "thing", Sizes(), TREE)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({"model_type": "jaxaroo-thing", "rows": [[2, 3]]}))
    with pytest.raises(CheckpointError, match=r"missing or unknown \['kind'\]"):
        load_folder(tmp_path / "m", "thing", Sizes, shapes)
