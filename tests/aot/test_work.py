"""What a program's text says is what the program does: products, messages, traffic, each as often as its loops run."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxcrystal.aot.hlo import Program
from jaxcrystal.aot.work import Collective, Work, first_group
from jaxcrystal.config import MeshConfig
from jaxcrystal.mesh import make_mesh


def work_of(function, *arguments, **most_trips) -> Work:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return Work.of(Program.parse(text), most_trips)


def floats(*dims) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_products_are_counted_as_often_as_their_loops_run():
    def layers(x, kernels, mixing):
        def layer(x, kernel):
            y = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ kernel), x)
            return jnp.einsum("btd,bsd->bts", y, y) @ mixing, None

        return jax.lax.scan(layer, x, kernels)[0]

    work = work_of(layers, floats(2, 16, 24), floats(5, 24, 24), floats(16, 24))
    each = 3 * 2 * (2 * 16 * 24 * 24) + 2 * (2 * 16 * 16 * 24) + 2 * (2 * 16 * 16 * 24)
    assert work.flops == 5 * each
    assert not work.loops and not work.collectives


def test_loops_that_depend_on_data_are_counted_as_often_as_is_said_of_each():
    def until_small(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x @ kernel, x)

    def nested(x, kernel):
        def step(x):
            with jax.named_scope("inner"):
                x = until_small(x + 3, kernel)
            return x @ kernel

        with jax.named_scope("outer"):
            return jax.lax.while_loop(lambda x: jnp.abs(x).min() > 1, step, x)

    once = 2 * 4 * 8 * 8
    sizes = floats(4, 8), floats(8, 8)
    work = work_of(nested, *sizes, outer=5, inner=3)
    assert work.flops == 5 * (3 + 1) * once and work.loops == {"outer": 5, "inner": 3}
    work = work_of(nested, *sizes, outer=5)
    ((name, trips),) = (pair for pair in work.loops.items() if pair[0] != "outer")
    assert work.flops == 5 * (1 + 1) * once and name.startswith("while") and trips is None


@pytest.mark.parametrize(
    ("kind", "send", "whole"),
    [
        ("all-gather", partial(jax.lax.all_gather, axis_name="fsdp", tiled=True), 4 * 6 * 10 * 4),
        ("all-reduce", partial(jax.lax.psum, axis_name="fsdp"), 6 * 10 * 4),
        ("reduce-scatter", partial(jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=0), 4 * 10 * 4),
        ("all-to-all", partial(jax.lax.all_to_all, axis_name="fsdp", split_axis=0, concat_axis=0), 4 * 10 * 4),
        ("collective-permute", partial(jax.lax.ppermute, axis_name="fsdp", perm=[(0, 1), (1, 2)]), 6 * 10 * 4),
    ],
)
def test_a_collective_in_a_loop_is_found_with_its_size_group_and_count(kind, send, whole):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    rows = 4 if kind in ("reduce-scatter", "all-to-all") else 6

    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def send_often(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.cos(x) * jnp.sin(send(x * i)).sum(), x)

    ((found, times),) = work_of(send_often, floats(rows, 10)).collectives.items()
    assert (found.kind, found.bytes, times) == (kind, whole, 7)
    # Partitions count along tensor first: a group of fsdp takes every second one.
    assert found.group == ((0, 2) if kind == "collective-permute" else (0, 2, 4, 6))
    factor = {"all-reduce": 2 * 3 / 4, "collective-permute": 1}.get(kind, 3 / 4)
    assert found.received == whole * factor


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=1,'c'=4] {'c'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=1,'c'=4] {'a','b'}", (0, 4)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
    ],
)
def test_groups_are_read_in_every_notation(text, group):
    assert first_group(text) == group


def test_a_notation_of_groups_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="not known here"):
        first_group("mesh['a'=4] {'a':(1)2}")


# ruff: noqa: E501 (a program's lines are as long as they are)
#: In TPU's dialect: loops that do not state their trips, products as convolutions, collectives hidden in fusions.
TPU = """HloModule step, is_scheduled=true

%start (p.0: bf16[8,64]) -> (bf16[8,64], bf16[64,64]) {
  %p.0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.0 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %begin = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p.7: bf16[8,64], p.8: bf16[64,64], p.9: bf16[4,16,32]) -> (bf16[8,64], bf16[64,64], bf16[64,64], bf16[4,16,32]) {
  %p.7 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p.8 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p.7), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  %p.9 = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(2)
  %minus = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} negate(%p.9)
  ROOT %both = (bf16[8,64]{1,0}, bf16[64,64]{1,0}, bf16[64,64]{1,0}, bf16[4,16,32]{2,1,0}) tuple(%p.7, %p.8, %gather.2, %minus)
}

%end (p.1: bf16[8,64], p.2: bf16[64,64]) -> bf16[64,64] {
  %p.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %finish = bf16[64,64]{1,0} custom-call(%p.1, %p.2, %gather.1), custom_call_target="AsyncCollectiveDone"
}

%slice_of_layer (p.3: bf16[12,8,64], p.4: s32[]) -> bf16[8,64] {
  %p.3 = bf16[12,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.4 = s32[]{:T(128)} parameter(1)
  ROOT %layer = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%p.3, %p.4), kind=kLoop, calls=%slice_inside
}

%other_layout (p.12: bf16[12,8,64]) -> bf16[12,8,64] {
  %p.12 = bf16[12,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copied = bf16[12,8,64]{2,1,0:T(16,128)(2,1)} copy(%p.12)
}

%slice_inside (p.10: bf16[12,8,64], p.11: s32[]) -> bf16[8,64] {
  %p.10 = bf16[12,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.11 = s32[]{:T(128)} parameter(1)
  %relaid = bf16[12,8,64]{2,1,0:T(16,128)(2,1)} fusion(%p.10), kind=kLoop, calls=%other_layout
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,8,64]{2,1,0:T(8,128)(2,1)} dynamic-slice(%relaid, %p.11, %zero, %zero), dynamic_slice_sizes={1,8,64}
  ROOT %layer.1 = bf16[8,64]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%scores (p.5: bf16[4,16,32], p.6: bf16[4,16,32]) -> f32[4,16,16] {
  %p.5 = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.6 = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %batched = f32[4,16,16]{2,1,0:T(8,128)} convolution(%p.5, %p.6), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}

%body (state: (s32[], bf16[12,8,64], s32[], bf16[8,64])) -> (s32[], bf16[12,8,64], s32[], bf16[8,64]) {
  %state = (s32[]{:T(128)}, bf16[12,8,64]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}, /*index=3*/bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack = bf16[12,8,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %two = s32[]{:T(128)} get-tuple-element(%state), index=2
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=3
  %next = s32[]{:T(128)} add(%i, %two)
  %taken = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%slice_of_layer
  %y = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %taken), dim_labels=bf_oi->bf, metadata={op_name="layers/(x)"}
  %sent = (bf16[8,8]{1,0:S(1)}, bf16[8,8]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%y), channel_id=9, source_target_pairs={{0,0},{1,2},{2,1}}
  %got = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%sent)
  %flash.3 = bf16[8,8]{1,0:S(1)} custom-call(%got), custom_call_target="tpu_custom_call", frontend_attributes={about={
"block":"8"
}}, metadata={op_name="layers/attention"}
  %told = bf16[8,8]{1,0:S(1)} custom-call(%got), custom_call_target="tpu_custom_call", backend_config={"flops":"1000"}
  ROOT %result = (s32[], bf16[12,8,64]{2,1,0}, s32[], bf16[8,64]{1,0:S(1)}) tuple(%next, %stack, %two, %x)
}

%condition (state.1: (s32[], bf16[12,8,64], s32[], bf16[8,64])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[12,8,64]{2,1,0}, s32[]{:T(128)}, bf16[8,64]{1,0:S(1)}) parameter(0)
  %twelve = s32[]{:T(128)} constant(12)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %twelve), direction=LT
}

ENTRY %main (a: bf16[12,8,64], b: bf16[8,64], c: bf16[4,16,32]) -> f32[4,16,16] {
  %a = bf16[12,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %step = s32[]{:T(128)} constant(2)
  %begun = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) fusion(%b), kind=kCustom, calls=%start
  %begun.0 = bf16[64,64]{1,0} get-tuple-element(%begun), index=1
  %going = (bf16[8,64]{1,0}, bf16[64,64]{1,0}, bf16[64,64]{1,0}, bf16[4,16,32]{2,1,0}) fusion(%b, %begun.0, %c), kind=kOutput, calls=%meanwhile
  %going.0 = bf16[64,64]{1,0} get-tuple-element(%going), index=1
  %whole = bf16[64,64]{1,0} fusion(%b, %going.0), kind=kCustom, calls=%end
  %carry = (s32[], bf16[12,8,64]{2,1,0}, s32[], bf16[8,64]{1,0:S(1)}) tuple(%first, %a, %step, %b)
  %loop = (s32[], bf16[12,8,64]{2,1,0}, s32[], bf16[8,64]{1,0:S(1)}) while(%carry), condition=%condition, body=%body
  ROOT %out = f32[4,16,16]{2,1,0:T(8,128)} fusion(%c, %c), kind=kOutput, calls=%scores
}
"""


def test_the_dialect_of_tpu_is_read():
    program = Program.parse(TPU)
    loop = program.computations["main"]["loop"]
    assert program.trip_count("main", loop) == 6  # 1, 3, 5, 7, 9, 11
    work = Work.of(program)
    # A batched product: of the 4 x 4 pairs that the window visits, those on the diagonal are real.
    assert work.flops == 6 * (2 * 8 * 8 * 64 + 1000) + 2 * 4 * 16 * 16 * 32
    assert work.kernels == ("flash",)
    assert work.collectives == {
        Collective("all-gather", "bf16[64,64]", 64 * 64 * 2, tuple(range(8))): 1,  # not once for each fusion
        Collective("collective-permute", "bf16[8,8]", 8 * 8 * 2, (1, 2)): 6,
    }
    # Of the stack, a layer is read and written as often as it is taken, in whichever fusion that is and however it is
    # laid out for it; what lies in vector memory is no traffic. A collective is written once, not by whoever hides it.
    taken, used = 2 * 8 * 64 * 2 + 4, 8 * 64 * 2
    counters = 3 * 4 + 2 * 4  # i + 2; the copy of 1
    gathered, negated, scores = 64 * 64 * 2, 2 * 4 * 16 * 32 * 2, 2 * 4 * 16 * 32 * 2 + 4 * 16 * 16 * 4
    assert work.hbm_bytes == 6 * (taken + used + 3 * 4) + 2 * 4 + gathered + negated + scores, counters
