"""What is reported of a compiled program follows from it: a chip's roofline, messages by axis, a compiler's refusal."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxcrystal.aot import chips, report
from jaxcrystal.aot.command import main
from jaxcrystal.aot.work import Collective, Work
from jaxcrystal.errors import UserError
from jaxcrystal.training import speed

ROOT = Path(__file__).parents[2]


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
    work = Work(197e12 * 2, 819e9 * 3, {along_one: 2, along_two: 1}, {}, ())
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
    assert speed.peak_flops(SimpleNamespace(device_kind=kind), "bfloat16")[0] == chips.CHIPS[chip].peak


def test_collectives_are_told_once_for_a_shape_and_axis_and_by_size():
    ring = [Collective("collective-permute", "bf16[8]", 16, pair) for pair in ((0, 4), (0, 12))]
    work = Work(1e12, 1e9, {ring[0]: 3, ring[1]: 5, Collective("all-reduce", "f32[99]", 396, (0, 1, 2, 3)): 2}, {}, ())
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
