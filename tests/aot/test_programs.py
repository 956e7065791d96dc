"""What is compiled ahead of time is what `train` and `sample` run, and its bounds are bounds."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrystal.aot import programs
from jaxcrystal.aot.hlo import Program
from jaxcrystal.aot.work import Work
from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, Recipe
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama

ROOT = Path(__file__).parents[2]

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
    tokenizer = programs.load_tokenizer("compact")
    other = LlamaConfig(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    programs.saved.describe(tmp_path / "base", other, None, recipe.text, tokenizer)
    config, _, origin = programs.shape(recipe)
    assert config.hidden_size == 64 and config.dtype == "bfloat16" and origin == recipe.base


def test_every_loop_of_decode_that_depends_on_data_has_its_most_trips():
    recipe = Recipe(base="not here", lora=LoraConfig(), model=SMALL)
    config, tokenizer, _ = programs.shape(recipe)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    engine = programs.engine(recipe, config, tokenizer, mesh, slots=8, max_new_tokens=300)
    found = Work.of(Program.parse(engine.compile_decode(130).as_text()), engine.most_trips(130))
    assert found.loops == {"steps": 64, "prompt_blocks": 3, "tail_blocks": 4, "begun_blocks": 2}
    assert engine.tokens_per_call == 64 * 8 * 2  # a token that is drawn, and one that must follow


def compiled_for_tpu(folder, options, **recipe) -> tuple[list[dict], str]:
    """What `launch/aot_compile.py` writes of SMALL on four chips, and what it prints."""
    fields = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__ if getattr(SMALL, name) is not None}
    data = {"train": "not here", "rows_per_batch": 4, "tokens_per_row": 512, "loss_block": 128}
    (folder / "small.yaml").write_text(json.dumps({"base": "not here", "model": fields, "data": data} | recipe))
    options = f"--topology v5e:2x2 --json {folder}/told.json {options}".split()
    done = subprocess.run(
        [sys.executable, ROOT / "launch/aot_compile.py", folder / "small.yaml", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "told.json").read_text()), done.stdout


for_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")


@pytest.mark.slow
@for_tpu
def test_a_small_model_is_compiled_for_tpu(tmp_path):
    (train, decode), printed = compiled_for_tpu(
        tmp_path, "--tensor 2 --slots 8", lora={"rank": 8}, mesh={"fsdp": 2, "tensor": 2}
    )
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
    # Forward sums what o and down give in each layer, backward what q, k, v and gate, up give; and the embedding.
    reduced = [c for c in train["collectives"] if (c["kind"], c["axes"]) == ("all-reduce", "tensor 2")]
    inputs = [(re.search(r"(?:(\d+) × )?bf16\[2,512,256\]", c["shape"]), c["times"]) for c in reduced]
    assert sum(times * int(found[1] or 1) for found, times in inputs if found) == 4 * SMALL.num_hidden_layers + 1
    # Gradients of adapters.
    assert all(
        "bf16" not in c["shape"] for c in train["collectives"] if (c["kind"], c["axes"]) == ("all-reduce", "fsdp 2")
    )
    assert all(c["axes"] != "fsdp 2" for c in decode["collectives"])
    assert decode["data_loops"] == {"steps": 64, "prompt_blocks": 2, "tail_blocks": 7, "begun_blocks": 2}
    assert train["data_loops"] == {}
    assert "FITS" in printed and "at most" in printed


@pytest.mark.slow
@for_tpu
def test_no_gradient_is_summed_whole_on_tpu(tmp_path):
    """Those of kernels and the head are reduce-scattered, once each and in float32; that of the embedding is added up
    where it belongs, of the gradients of all rows that were looked up."""
    (train,), _ = compiled_for_tpu(tmp_path, "--step train", lora=None, mesh={"fsdp": 4, "tensor": 1})
    weights = jax.tree.leaves(programs.variables(Llama(SMALL), make_mesh(MeshConfig(1, 4, 1))))
    scattered = [c for c in train["collectives"] if c["kind"] == "reduce-scatter"]
    large = 4 * sum(x.size for x in weights if x.size > SMALL.num_hidden_layers * SMALL.hidden_size)
    embedding = 4 * SMALL.vocab_size * SMALL.hidden_size
    assert sum(c["bytes"] * c["times"] for c in scattered) == large - embedding
    (looked_up,) = (c for c in train["collectives"] if c["kind"] == "all-to-all")
    assert looked_up["bytes"] == 4 * 512 * SMALL.hidden_size
    assert all("bf16" not in c["shape"] for c in scattered)
    whole = [c["bytes"] for c in train["collectives"] if c["kind"] == "all-reduce"]
    assert max(whole) <= 2 * 4 * SMALL.num_hidden_layers * SMALL.hidden_size  # the scales of norms


#: Prints the bytes on a chip as the engine counts them, and as the compiler does.
COUNTED = """
import math, os
import jax
from jaxcrystal.aot import chips, programs
from jaxcrystal.aot.report import Memory
from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, Recipe
from jaxcrystal.mesh import make_mesh

model = LlamaConfig(
    vocab_size=512, hidden_size=4096, intermediate_size=2 * 2752, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=16, head_dim=128, dtype="bfloat16",
)
recipe = Recipe(base="not here", lora=LoraConfig(), model=model)
mesh = make_mesh(MeshConfig(2, 1, 2), chips.topology("v5e:2x2")[1])
engine = programs.engine(recipe, *programs.shape(recipe)[:2], mesh, slots=128, max_new_tokens=64)
weights = jax.tree.leaves(programs.variables(engine._decoder.model.module, mesh))
held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in weights)
print(held + engine.memory(64), Memory.of(engine.compile_decode(64)).total)
"""


@pytest.mark.slow
@for_tpu
def test_what_tpus_compiler_copies_counts_as_memory():
    """A third of the weights, here: kernels of queries and keys, and those of 2,752 outputs a chip."""
    names = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    names |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted, needed = map(int, done.stdout.split())
    assert 0.95 < counted / needed < 1.05
