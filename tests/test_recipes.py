"""The recipes: for LLaMA-2 the paper's setting, the published shapes, and meshes that divide them; SmolLM2's twin."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from byte_pair_tokenizers import smollm2_file
from jax.sharding import AbstractMesh

from jaxcrystal.config import EXECUTION, LoraConfig, Recipe, load
from jaxcrystal.mesh import AXES
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.gguf_files import open_gguf

CONFIGS = Path(__file__).parents[1] / "configs"

#: Chips of the pod that the recipe is for, and parameters that the Hugging Face checkpoint has.
PODS = {"7b": ("v5e:4x4", 6_738_415_616), "13b": ("v5e:4x8", 13_015_864_320), "70b": ("v5e:16x16", 68_976_648_192)}


@pytest.fixture(params=PODS)
def size(request) -> str:
    return request.param


@pytest.fixture
def recipe(size) -> Recipe:
    return load(Recipe, CONFIGS / f"llama2_{size}_mp20.yaml")


def mesh_of(recipe: Recipe, chips: int) -> AbstractMesh:
    sizes = [getattr(recipe.mesh, axis) for axis in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = chips // -math.prod(sizes)  # their product is negative
    return AbstractMesh(tuple(sizes), AXES)


def test_the_setting_is_the_papers(recipe):
    assert recipe.lora == LoraConfig(rank=8, alpha=32.0, dropout=0.05, targets=("q_proj", "v_proj"))
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.final_fraction) == (1e-4, 100, 0.0)
    assert optimizer.weight_decay == 0.0
    assert recipe.epochs == 10 and recipe.steps is None
    assert recipe.augment.loss_on == "all" and recipe.augment.infill == 0.34 and recipe.augment.translate


def test_the_shape_is_the_published_one(recipe, size):
    one = AbstractMesh((1, 1, 1), AXES)
    published = replace(recipe.model, vocab_size=32000, vocab_multiple=1)
    variables = abstract_variables(Llama(published, recipe.lora), one)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == PODS[size][1]


def test_the_vocabulary_is_what_convert_makes_of_the_published_one(recipe):
    defaults = {name: p.default for name, p in inspect.signature(convert).parameters.items()}
    assert recipe.model.vocab_size == 32000 + defaults["pad_token"]
    assert recipe.model.vocab_multiple == defaults["vocab_multiple"]


def test_the_mesh_takes_the_pod_and_divides_the_model_and_the_batch(recipe, size):
    topology, _ = PODS[size]
    chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    mesh = mesh_of(recipe, chips)
    assert math.prod(mesh.shape.values()) == chips
    abstract_variables(Llama(recipe.model, recipe.lora), mesh)  # raises where it does not divide
    assert recipe.data.rows_per_batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    assert topology in (CONFIGS / f"llama2_{size}_mp20.yaml").read_text()


def test_the_twin_of_smollm2_differs_in_its_weights_and_their_rate_alone():
    pretrained, twin = (load(Recipe, f"smollm2_135m_{name}") for name in ("cpu", "random"))
    optimizer = replace(pretrained.optimizer, learning_rate=twin.optimizer.learning_rate)
    same = {"out": "", "base": None, "lora": None, "tokenizer": "", "model": twin.model, "optimizer": optimizer}
    assert replace(pretrained, **same) == replace(twin, **same)
    assert (twin.base, twin.lora, twin.tokenizer) == (None, None, pretrained.base)
    published = replace(twin.model, vocab_size=49152)
    variables = abstract_variables(Llama(published), AbstractMesh((1, 1, 1), AXES))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 134_515_008


def test_the_twin_of_smollm2_has_the_shape_that_convert_reads(tmp_path):
    found = open_gguf(smollm2_file(), tmp_path)[0].config
    twin = load(Recipe, "smollm2_135m_random").model
    assert found.rms_norm_eps == pytest.approx(twin.rms_norm_eps, rel=1e-6)  # float32 there
    names = ("vocab_size", "vocab_multiple", "rms_norm_eps", "dtype", *EXECUTION)
    left_open = {name: getattr(twin, name) for name in names}
    assert replace(found, **left_open) == twin
