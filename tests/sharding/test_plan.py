"""Counts by hand: products of programs with loops, talk in compiled programs of eight devices, bounds from rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxaroo.sharding import plan as module
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.plan import bounds, bytes_of, collective_bytes, hbm_bytes, plan, work_of
from jaxaroo.sharding.topology import CHIPS, devices_of

like = jax.ShapeDtypeStruct
X, W = like((8, 16), jnp.float32), like((16, 16), jnp.float32)
ONE = 2 * 8 * 16 * 16  # a product of the two


def test_products_are_counted_as_often_as_loops_run_forward_backward_and_again():
    def chain(x, w, times=5):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=times)[0].sum()

    assert work_of(chain, X, W) == (5 * ONE, 0)
    assert work_of(jax.grad(chain, argnums=(0, 1)), X, W).flops == 3 * 5 * ONE
    again = lambda x, w: jax.lax.scan(jax.checkpoint(lambda x, _: (jnp.tanh(x @ w) @ w, None)), x, None, length=5)[
        0
    ].sum()
    assert work_of(jax.jit(jax.grad(again, argnums=(0, 1))), X, W).flops == (2 + 1 + 4) * 5 * ONE  # one product again
    assert work_of(lambda x, w: jnp.einsum("ab,cb->ac", x, w), X, W).flops == ONE
    image, kernel = like((2, 10, 10, 3), jnp.float32), like((3, 3, 3, 7), jnp.float32)
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert work_of(conv, image, kernel).flops == 2 * 2 * 8 * 8 * 7 * 27


def test_the_form_of_a_tpu_is_counted_each_device_does_its_part_and_open_loops_are_told():
    of = lambda x, w: jax.lax.platform_dependent(x, w, tpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w)
    assert work_of(of, X, W).flops == 2 * ONE
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        part = jax.shard_map(
            lambda x, w: x @ w, in_specs=(PartitionSpec("fsdp"), PartitionSpec()), out_specs=PartitionSpec("fsdp")
        )
        assert work_of(part, X, W).flops == 2 * ONE  # along tensor both do the same
    until = lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)
    assert work_of(until, X, W) == (ONE, 1)


def test_talk_is_read_off_a_compiled_program_by_axis_and_as_often_as_it_happens():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))

    def talk(x):  # [8, 16] whole, [2, 16] a device
        def body(x, _):
            return x + jax.lax.psum(x, "tensor"), jax.lax.all_gather(x, "fsdp")

        x, _ = jax.lax.scan(body, x, None, length=6)
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)

    with jax.set_mesh(mesh):
        f = jax.shard_map(talk, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False)
        text = jax.jit(lambda x: f(x)).lower(like((8, 16), jnp.float32)).compile().as_text()
    found = collective_bytes(text, mesh)
    mine = 4 * 2 * 16
    assert found["tensor"]["all-reduce"] == pytest.approx(6 * 2 * 1 / 2 * mine)
    # nobody reads what is gathered but the compiler may keep it; what is scattered is not to be missed
    assert found["fsdp"]["reduce-scatter"] == pytest.approx(3 / 4 * mine)
    assert found["fsdp"].get("all-gather", 0.0) in (0.0, pytest.approx(6 * 3 / 4 * 4 * mine))


HEAD = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %x = f32[8] get-tuple-element(%p), index=1
  %y = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=WHO, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %start = (s32[], f32[8]) tuple(%zero, %x)
  %w = (s32[], f32[8]) while(%start), condition=%cond, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    ("who", "axis", "n"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", "fsdp", 4),
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
        ("[2,4]<=[4,2]T(1,0)", "fsdp", 4),
        ("[4,2]<=[8]", "tensor", 2),
        ("mesh['data'=1,'fsdp'=4,'tensor'=2,'sequence'=1] {'fsdp'}", "fsdp", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "tensor", 2),
        ("[1,8]<=[8]", "fsdp+tensor", 8),
        ("{}", "fsdp+tensor", 8),
    ],
)
def test_groups_are_read_in_every_spelling_and_loops_end_where_their_condition_says(who, axis, n):
    """From 0 by 2 up to 7: four times."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    found = collective_bytes(HEAD.replace("WHO", who), mesh)
    assert found == {axis: {"all-reduce": pytest.approx(4 * 2 * (n - 1) / n * 32)}}


def test_a_counter_that_is_copied_to_another_memory_counts_all_the_same():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    moved = "  %moved = s32[] copy(%next)\n  %again = s32[]{:T(128)} copy(%moved)\n  ROOT %t"
    text = HEAD.replace("WHO", "{}").replace("  ROOT %t", moved).replace("tuple(%next", "tuple(%again")
    assert collective_bytes(text, mesh) == {"fsdp+tensor": {"all-reduce": pytest.approx(4 * 2 * 7 / 8 * 32)}}


def test_a_loop_as_long_as_the_data_say_counts_once():
    mesh, text = make_mesh(MeshConfig(fsdp=4, tensor=2)), HEAD.replace("WHO", "[1,8]<=[8]")
    open_loop = collective_bytes(text.replace("direction=LT", "direction=NE"), mesh, open_loops=1)
    assert open_loop == {"fsdp+tensor": {"all-reduce": pytest.approx(2 * 7 / 8 * 32)}}
    assert collective_bytes(text, mesh, open_loops=1) == {"fsdp+tensor": {"all-reduce": pytest.approx(4 * 56)}}


def test_what_is_begun_goes_on_in_a_loop_and_is_awaited_counts_once_and_a_permutation_is_what_is_sent():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    text = """
%begin (x: bf16[2,16]) -> bf16[8,16] {
  ROOT %a = bf16[8,16]{1,0} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
%await (x: bf16[2,16]) -> bf16[8,16] {
  ROOT %b = bf16[8,16]{1,0} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
ENTRY %main (x: bf16[2,16]) -> bf16[8,16] {
  %s = bf16[8,16] fusion(%x), kind=kCustom, calls=%begin
  %p = u8[100]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  %w = (s32[], f32[8]) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %d = bf16[8,16] fusion(%x), kind=kCustom, calls=%await
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %m = bf16[8,16] fusion(%x), kind=kCustom, calls=%await
}
"""
    assert collective_bytes(text, mesh) == {
        "fsdp": {"all-gather": pytest.approx(3 / 4 * 8 * 16 * 2), "collective-permute": 100.0}
    }


def test_a_sum_of_which_each_device_keeps_a_part_is_a_scatter():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    text = """
%all-reduce-scatter.3 (x: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} all-reduce(%x), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %b = f32[2,16]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={2,16}
}
ENTRY %main (x: f32[8,16]) -> f32[2,16] {
  ROOT %s = f32[2,16] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    assert collective_bytes(text, mesh) == {"fsdp": {"reduce-scatter": pytest.approx(3 / 4 * 8 * 16 * 4)}}


@pytest.mark.errors
def test_what_cannot_be_read_is_refused_and_not_guessed():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(ValueError, match="cannot read who talks to whom"):
        collective_bytes(HEAD.replace("WHO", "mesh['a'=8] {'a':(2)4}"), mesh)
    with pytest.raises(ValueError, match="a loop around collectives has no fixed length"):
        collective_bytes(HEAD.replace("WHO", "[1,8]<=[8]").replace("direction=LT", "direction=NE"), mesh)


def test_bounds_are_those_of_the_busiest_resource():
    chip = CHIPS["v5e"]
    talk = {"fsdp": {"all-gather": 1e9, "all-reduce": 3e9}, "tensor": {"all-reduce": 2e9}}
    found = bounds(chip, 4, flops=4 * 197e12, useful=2 * 197e12, moved=0.41e12, collectives=talk)
    assert (found.products, found.memory) == (1.0, pytest.approx(0.5))
    assert found.links == {"fsdp": pytest.approx(0.02), "tensor": pytest.approx(0.01)}
    assert (found.seconds, found.bound_by, found.most_utilisation) == (1.0, "products", 0.5)
    assert bounds(chip, 1, 0.0, 0.0, 0.82e12, {}).bound_by == "memory"
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    tree = [jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=place), jax.ShapeDtypeStruct((3,), jnp.float32)]
    assert bytes_of(tree) == 2 * 2 * 3 + 12


@pytest.mark.aot
def test_a_program_for_chips_that_are_not_here_is_accounted_for(libtpu):
    """x [1024, 512] along fsdp, w [512, 2048] along tensor, and their product summed: parts of each by hand."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices_of("v5e:2x2"))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=place("fsdp", None))
    w = jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16, sharding=place(None, "tensor"))
    step = jax.jit(lambda x, w: (x @ w).sum(axis=0), out_shardings=place("tensor"))
    found = plan(step, (x, w), {"rows": x, "weights": w}, mesh, "v5e")
    assert found.fits
    assert found.arguments == {"rows": 2 * 512 * 512, "weights": 2 * 512 * 1024}
    assert found.total >= sum(found.arguments.values())
    assert found.flops == 2 * 1024 * 512 * 2048
    assert found.collectives.keys() == {"fsdp"}  # the sum over rows
    assert found.bounds is not None
    assert found.bounds.products == pytest.approx(found.flops / 4 / 197e12)
    huge = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.bfloat16, sharding=place("fsdp", "tensor"))
    over = plan(jax.jit(lambda x: x + 1), (huge,), {"all": huge}, mesh, "v5e")
    assert not over.fits
    assert over.bounds is None
    assert over.arguments == {"all": 2 << 34}
    assert over.total == pytest.approx(2 * (2 << 34), rel=0.01)  # what is read and what is written, each once
    assert np.isclose(over.available, 15.75 * 2**30, rtol=0.02)


BUFFERS = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <385 add.1032 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 1024, page 0, parameter 30, shape |f32[256]| at ShapeIndex {}, maybe-live-out:
 value: <7844 param.79 @0> (size=1024,offset=0): f32[256]{0:T(256)}
allocation 2: size 4096, page 0, preallocated-temp:
allocation 3: size 64, page 0, constant:
allocation 4: size 2048, page 0, output shape is |f32[512]|, maybe-live-out:
allocation 5: size 8192, color 1, page 0, preallocated-temp:
allocation 6: size 512, color 6, page 0, thread-local:
"""


def test_large_memory_is_what_lies_in_no_other():
    assert hbm_bytes(BUFFERS) == (512 + 1024 + 64 + 2048, 4096)


def test_files_of_the_compiler_are_read_once_they_are_whole(tmp_path):
    program, buffers = (
        tmp_path / f"module_0000.jit_f.cl_1.after_optimizations{end}.txt" for end in ("", "-buffer-assignment")
    )
    whole = HEAD + "\n"
    assert module._laid_out(tmp_path) is None
    buffers.write_text(BUFFERS)
    program.write_text(whole[:-20])
    assert module._laid_out(tmp_path) is None
    program.write_text(whole)
    assert module._laid_out(tmp_path) == (3648, 4096, whole)
    buffers.unlink()
    assert module._laid_out(tmp_path) is None


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # of chips that are not here
@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_the_account_is_that_of_the_whole_compilation_and_room_is_what_the_compiler_says(
    libtpu, tmp_path, monkeypatch, chip
):
    """A loop that talks, on two devices: bytes and talk as they are known in the end. Of `memory_analysis`, what all
    allocations come to; its `temp_size_in_bytes` counts gaps twice, or is 0 (tpu7x)."""
    [one, other] = devices_of({"v5e": "v5e:2x2", "v6e": "v6e:2x2"}.get(chip, f"{chip}:2x2x1"))[:2]
    mesh = make_mesh(MeshConfig(fsdp=2), [one, other])
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=place("fsdp"))
    w = jax.ShapeDtypeStruct((6, 512, 512), jnp.float32, sharding=place(None, "fsdp"))
    loss = lambda w, x: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])
    step = jax.jit(jax.grad(loss), out_shardings=place(None, "fsdp"))
    early = plan(step, (w, x), {"all": (w, x)}, mesh, chip, how=module.Compiling(scratch=tmp_path))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = step.lower(w, x).compile()
    memory = compiled.memory_analysis()
    standing = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert early.total - early.temporaries == pytest.approx(standing, rel=0.05)  # and constants
    assert early.temporaries > 0
    if hasattr(memory, "total_allocation_bytes"):  # jax 0.10 does not tell
        assert early.total == memory.total_allocation_bytes
    assert early.collectives == collective_bytes(compiled.as_text(), mesh)
    assert early.collectives["fsdp"]["all-gather"] > 0
    monkeypatch.setattr(module, "_laid_out", lambda _: None)  # a compiler that writes no files
    whole = plan(step, (w, x), {"all": (w, x)}, mesh, chip)
    assert (whole.collectives, whole.fits) == (early.collectives, True)
    if hasattr(memory, "total_allocation_bytes"):
        assert whole.total == early.total
    huge = jax.ShapeDtypeStruct((CHIPS[chip].memory // 4,), jnp.float32, sharding=place())
    over = plan(jax.jit(lambda x: x + 1), (huge,), {"all": huge}, mesh, chip)
    assert not over.fits
    assert abs(over.available - CHIPS[chip].memory) < 0.011 * 2**30


@pytest.mark.aot
@pytest.mark.slow
def test_the_same_program_for_the_same_chips_is_compiled_once(libtpu, tmp_path, monkeypatch):
    """Whatever it is called, and whatever else has changed; another program, or other chips, are another matter."""

    def asked(scale, layout="v5e:1x1", of=1 << 10):
        mesh = make_mesh(MeshConfig(fsdp=1), devices_of(layout))
        x = jax.ShapeDtypeStruct((of, of), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        f = jax.jit(lambda x: scale * x @ x)
        return plan(f, (x,), {"all": x}, mesh, layout.partition(":")[0], how=module.Compiling(tmp_path))

    huge = 1 << 17
    first, refused = asked(2.0), asked(2.0, of=huge)
    assert (first.fits, refused.fits) == (True, False)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    with monkeypatch.context() as now:
        now.setattr(module, "_compile", lambda *_: pytest.fail("compiled again"))
        assert (asked(2.0), asked(2.0, of=huge)) == (first, refused)
    assert asked(3.0).total == first.total
    assert asked(2.0, "v5p:1x1x1").available != first.available
    assert len([*tmp_path.iterdir()]) == 4
    kept[0].write_text(kept[0].read_text()[:20])  # a process was killed
    kept[1].write_text(kept[1].read_text()[:20])
    again = asked(2.0)._replace(seconds_to_compile=first.seconds_to_compile)
    assert again == first


def test_where_a_kernel_stands_in_its_file_makes_no_other_program():
    mesh = make_mesh(MeshConfig(fsdp=8))
    program = r'backend_config = "{\22body\22: \22BODY\22, \22debug_locations\22: \22LINES\22, \22x\22: 1}"'
    assert module._name(program, mesh) == module._name(program.replace("LINES", "OTHER=="), mesh)
    assert module._name(program, mesh) != module._name(program.replace("BODY", "OTHER"), mesh)
    assert module._name(program, mesh) != module._name(program.replace("1", "2"), mesh)
