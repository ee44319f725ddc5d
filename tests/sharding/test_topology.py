"""Kernels whose traffic can be counted by hand; and the compiler of a chip that is not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxaroo.sharding.topology import CHIPS, compile_for, devices_of, kernel_traffic


def matmul(x, w):
    """Tiles of 128 x 128, over K last: x is read once for each column of tiles, w once for each row."""

    def kernel(x, w, y, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)
        y[...] = total[...]

    (M, K), N = x.shape, w.shape[1]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(M, 128), pl.cdiv(N, 128), pl.cdiv(K, 128)),
        in_specs=[
            pl.BlockSpec((128, 128), lambda i, j, k: (i, k)),
            pl.BlockSpec((128, 128), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((128, 128), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
        name="matmul",
    )(x, w)


def test_a_block_counts_when_it_is_another_one_and_only_what_is_inside():
    x, w = jax.ShapeDtypeStruct((256, 640), jnp.bfloat16), jax.ShapeDtypeStruct((640, 300), jnp.bfloat16)
    [found] = kernel_traffic(jax.jit(lambda x, w: matmul(x, w) * 2), x, w)
    assert found.name == "matmul"
    assert found.moved == 2 * 3 * 256 * 640 + 2 * 2 * 640 * 300 + 4 * 256 * 300  # x for 3 columns, w for 2 rows, y
    tile = 128 * 128
    assert found.held == 2 * tile * 2 + 2 * tile * 2 + 2 * tile * 4 + tile * 4


def test_one_block_of_everything_is_fetched_once_and_held_once():
    def copy(x, y):
        y[...] = x[...]

    def whole(x):
        return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="copy")(x)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    assert kernel_traffic(whole, x) == [("copy", 2 * 4 * 64 * 128, 2 * 4 * 64 * 128)]
    assert kernel_traffic(lambda x: x + 1, x) == []
    assert [t.name for t in kernel_traffic(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: whole(x), x), x)] == ["copy"]


def test_places_that_depend_on_data_are_counted_for_the_data_that_are_given():
    def copy(at, x, y):
        y[...] = x[...]

    def gather(at, x):
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i, at: (jnp.minimum(at[i], 5), 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, at: (i, 0)),
        )
        return pl.pallas_call(copy, grid_spec=spec, out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32))(at, x)

    shapes = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
    block = 4 * 8 * 128
    for places, fetched in (([0, 1, 2, 3], 4), ([3, 3, 3, 1], 2), ([5, 6, 7, 0], 2)):
        assert kernel_traffic(gather, *shapes, scalars=[np.int32(places)])[0].moved == (fetched + 4) * block
    with pytest.raises(ValueError, match="places of blocks depend on data; expected it as `scalars`"):
        kernel_traffic(gather, *shapes)


@pytest.mark.aot
@pytest.mark.parametrize("chip", CHIPS)
def test_programs_are_compiled_for_chips_that_are_not_here(chip, libtpu):
    x, w = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 384), jnp.bfloat16)
    compiled = compile_for(chip, matmul, x, w)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * (256 * 512 + 512 * 384)
    assert memory.output_size_in_bytes == 4 * 256 * 384
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.errors
def test_chips_and_topologies_that_nobody_knows_are_refused(libtpu):
    with pytest.raises(ValueError, match="compile_for: chip 'v3'; expected one of v5e, v5p, v6e, tpu7x"):
        compile_for("v3", lambda x: x, jnp.zeros(1))
    with pytest.raises(ValueError, match="devices_of: 'v5e:3x5' is not known"):
        devices_of("v5e:3x5")
