"""Ahead-of-time compilation: what a program's text says is what the program does, and what is told of it is right."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcrystal.aot import chips, programs, report
from jaxcrystal.aot.command import main
from jaxcrystal.aot.hlo import Collective, Program, Work, first_group
from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, Recipe
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama
from jaxcrystal.training import speed

ROOT = Path(__file__).parents[1]


def work_of(function, *arguments) -> Work:
    return Program.parse(jax.jit(function).lower(*arguments).compile().as_text()).work()


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
    assert not work.unknown_loops and not work.collectives


def test_a_loop_that_depends_on_its_data_is_counted_as_asked_and_told():
    def until_small(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x @ kernel, x)

    work = work_of(until_small, floats(4, 8), floats(8, 8))
    assert work.flops == 2 * 4 * 8 * 8 and len(work.unknown_loops) == 1
    program = jax.jit(until_small).lower(floats(4, 8), floats(8, 8)).compile()
    assert Program.parse(program.as_text()).work(unknown_trips=5).flops == 5 * work.flops


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
    work = program.work()
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


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program.parse("module @jit_step {}\n")


def pod(*shape):
    """A mesh (data 1, fsdp, tensor 4) over chips that lie on a torus of this shape, in the order of their places."""
    devices = [SimpleNamespace(coords=place) for place in np.ndindex(*shape)]
    numbers = np.empty(len(devices), object)
    numbers[:] = devices
    numbers = numbers.reshape(1, -1, 4)
    sizes = dict(zip(("data", "fsdp", "tensor"), numbers.shape, strict=True))
    return SimpleNamespace(devices=numbers, axis_names=tuple(sizes), shape=sizes)


def test_the_roofline_by_hand():
    chip, mesh = chips.CHIPS["v5e"], pod(4, 4, 1)
    along_one = Collective("all-gather", "", 8 * 10**9, (0, 1, 2, 3))
    along_two = Collective("all-gather", "", 16 * 10**9, tuple(range(16)))
    work = Work(197e12 * 2, 819e9 * 3, {along_one: 2, along_two: 1}, (), ())
    bound = chips.bound(chip, mesh, work)
    assert (bound.compute, bound.hbm) == (2, 3)
    # 6 GB twice over 2 links of 50 GB/s, and 15 GB over 4 of them.
    assert bound.interconnect == pytest.approx(2 * 6 / 100 + 15 / 200)
    assert (bound.seconds, bound.resource) == (3, "hbm")
    assert chips.mesh_axes(mesh, along_one.group) == "tensor 4"
    assert chips.mesh_axes(mesh, along_two.group) == "fsdp 4 x tensor 4"


@pytest.mark.parametrize(
    ("kind", "chip"), [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e")]
)
def test_a_device_by_its_compilers_name_has_the_peak_of_its_chip(kind, chip):
    assert speed.peak_flops(SimpleNamespace(device_kind=kind))[0] == chips.CHIPS[chip].peak


def test_collectives_are_told_once_for_a_shape_and_axis_and_by_size():
    ring = [Collective("collective-permute", "bf16[8]", 16, pair) for pair in ((0, 4), (0, 12))]
    work = Work(1e12, 1e9, {ring[0]: 3, ring[1]: 5, Collective("all-reduce", "f32[99]", 396, (0, 1, 2, 3)): 2}, (), ())
    memory = report.Memory(arguments=5 * 2**30, outputs=0, temporaries=2**30, program=2**28)
    mesh, chip = pod(4, 4, 1), chips.CHIPS["v5e"]
    told = report.Report(
        "train", mesh, chip, 1024, 1.0, memory, work, chips.bound(chip, mesh, work), COST, memory.total
    )
    assert [(m["kind"], m["axes"], m["times"], m["received_bytes"]) for m in told.data()["collectives"]] == [
        ("all-reduce", "tensor 4", 2, 2 * 396 * 2 * 3 / 4),
        ("collective-permute", "fsdp 4", 8, 8 * 16),
    ]
    lines = "\n".join(told.lines())
    assert "FITS: 6.25 GiB a chip" in lines and "9.50 GiB to spare" in lines
    assert "8 x collective-permute over fsdp 4" in lines
    seconds = told.data()["roofline"]["seconds"]
    assert seconds == 1e12 / 197e12 and f"at most {1024 / seconds:,.0f} tokens/s" in lines


COST = {"flops": 1e11, "bytes": 1e8}

REFUSAL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.

  1. Size: 4.00G
     Operator: op_name="jit(_train_step)/layers/self_attn/dot_general" source_file="x.py"
     Shape: f32[32,1,32,1024,1024]{3,4,1,2,0:T(8,128)}
"""


def test_a_program_that_the_compiler_refuses_is_told_by_how_much(capsys):
    def refuse():
        raise jax.errors.JaxRuntimeError(REFUSAL)

    told = report.Report.of("train", chips.CHIPS["v5e"], pod(4, 4, 1), 1024, refuse)
    assert not told.fits and told.spare == -4.75 * 2**30
    lines = "\n".join(told.lines())
    assert "DOES NOT FIT: at least 20.50 GiB a chip" in lines and "4.75 GiB too much" in lines
    assert "4.00G f32[32,1,32,1024,1024] jit(_train_step)/layers/self_attn/dot_general" in lines
    assert told.data()["fits"] is False and json.dumps(told.data())


def test_an_error_of_the_compiler_that_is_not_about_memory_is_not_hidden():
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        report.Report.of("train", chips.CHIPS["v5e"], pod(4, 4, 1), 1024, fail)


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v9:4x4", "4x4"])
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="write CHIP:SHAPE, CHIP one of v4, v5e, v5p, v6e"):
        chips.topology(name)


def test_a_machine_without_libtpu_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(ROOT / "configs/llama2_7b_mp20.yaml"), "--topology", "v5e:4x4"]) == 1
    assert 'pip install -c constraints.txt ".[tpu]"' in capsys.readouterr().err


SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    dtype="bfloat16",
)


def test_frozen_weights_are_two_bytes_and_adapters_four():
    mesh = make_mesh(MeshConfig(1, 2, 2))
    frozen = programs.variables(Llama(SMALL, LoraConfig()), mesh)
    assert {x.dtype for x in jax.tree.leaves(frozen["params"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(frozen["lora"])} == {jnp.dtype("float32")}
    trained = programs.variables(Llama(SMALL), mesh)
    assert {x.dtype for x in jax.tree.leaves(trained["params"])} == {jnp.dtype("float32")}


def test_the_shape_is_that_of_a_base_where_there_is_one(tmp_path):
    recipe = Recipe(base=str(tmp_path / "base"), lora=LoraConfig(), model=SMALL)
    config, _, origin = programs.shape(recipe)
    assert config == SMALL and "is not here" in origin
    tokenizer = programs.load_tokenizer("compact").path
    other = LlamaConfig(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    programs.saved.describe(tmp_path / "base", other, None, recipe.text, tokenizer)
    config, _, origin = programs.shape(recipe)
    assert config.hidden_size == 64 and config.dtype == "bfloat16" and origin == recipe.base


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")
def test_a_small_model_is_compiled_for_tpu(tmp_path):
    recipe = tmp_path / "small.yaml"
    fields = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__ if getattr(SMALL, name) is not None}
    recipe.write_text(
        json.dumps(
            {
                "base": "not here",
                "lora": {"rank": 8},
                "model": fields,
                "mesh": {"fsdp": 2, "tensor": 2},
                "data": {"train": "not here", "rows_per_batch": 4, "tokens_per_row": 512},
            }
        )
    )
    options = f"--topology v5e:2x2 --tensor 2 --slots 8 --json {tmp_path}/told.json".split()
    done = subprocess.run(
        [sys.executable, ROOT / "launch/aot_compile.py", recipe, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    train, decode = json.loads((tmp_path / "told.json").read_text())
    assert train["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2} and decode["mesh"] == {
        "data": 2,
        "fsdp": 1,
        "tensor": 2,
    }
    # Every chip holds a quarter of each kernel, half of each norm's neighbours; adapters thrice, with their moments.
    model = Llama(SMALL, LoraConfig())
    held = programs.variables(model, make_mesh(MeshConfig(1, 2, 2)))
    local = {
        name: sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for name, tree in held.items()
    }
    least = local["params"] + 3 * local["lora"]
    assert least < train["memory"]["arguments"] < 1.2 * least + 2**20
    tokens = train["tokens"]
    kernels = sum(x.size for x in jax.tree.leaves(held["params"])) - SMALL.vocab_size * SMALL.hidden_size
    assert 0.9 * 4 * kernels * tokens / 4 < train["flops"] < 2.0 * 4 * kernels * tokens / 4
    sent = {(c["kind"], c["axes"]) for c in train["collectives"]}
    assert ("all-reduce", "tensor 2") in sent and {axes for _, axes in sent} >= {"fsdp 2", "tensor 2"}
    # Forward sums what o and down give in each layer, backward what q, k, v and what gate and up give; and the embedding.
    reduced = [c for c in train["collectives"] if (c["kind"], c["axes"]) == ("all-reduce", "tensor 2")]
    inputs = [(re.search(r"(?:(\d+) × )?bf16\[2,512,256\]", c["shape"]), c["times"]) for c in reduced]
    assert sum(times * int(found[1] or 1) for found, times in inputs if found) == 4 * SMALL.num_hidden_layers + 1
    # Gradients of adapters.
    assert all(
        "bf16" not in c["shape"] for c in train["collectives"] if (c["kind"], c["axes"]) == ("all-reduce", "fsdp 2")
    )
    assert all(c["axes"] != "fsdp 2" for c in decode["collectives"])
    assert "FITS" in done.stdout and "at most" in done.stdout
