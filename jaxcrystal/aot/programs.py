"""The real programs of a recipe, compiled for chips that are not there: nothing is computed, no weights are made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxcrystal import box
from jaxcrystal.config import ATTRIBUTES, LlamaConfig, Recipe
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.mesh import batch_sharding
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.sampling.engine import Engine
from jaxcrystal.sampling.sampler import SamplerSettings
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer
from jaxcrystal.texts.writer import Writer
from jaxcrystal.training.loop import computed_as
from jaxcrystal.training.packing import Feed
from jaxcrystal.training.step import Trainer, make_optimizer
from jaxcrystal.weights import saved

MAX_ATOMS = 20  #: of the crystals that stand in for a data set that is not here; MP-20's limit
STEPS = 1000  #: of the learning rate's schedule: a constant of the program that changes nothing else


def shape(recipe: Recipe) -> tuple[LlamaConfig, Tokenizer, str]:
    """Model and tokenizer that training would use, and where they were found.

    A base that is not on this machine has the shape that the recipe's `model` states, and the compact tokenizer
    stands in for its own: it decides how many crystals a row has room for, and nothing that is large.
    """
    if recipe.base is None:
        tokenizer = load_tokenizer(recipe.tokenizer)
        return replace(recipe.model, vocab_size=tokenizer.vocab_size), tokenizer, "the recipe's model"
    directory = saved.model_directory(recipe.base)
    if not (directory / saved.MODEL_FILE).exists():
        return recipe.model, load_tokenizer("compact"), f"the recipe's model; {directory} is not here"
    description = saved.read_description(directory)
    return computed_as(description.model, recipe.model), description.tokenizer(directory), str(directory)


def compile_train(recipe: Recipe, config: LlamaConfig, tokenizer: Tokenizer, mesh: Mesh) -> Compiled:
    """The step that `jaxcrystal train` runs, for one batch of the recipe."""
    writer = Writer.of(tokenizer, recipe.text, recipe.augment)
    data = recipe.data
    crystals = dataset.load(data.train) if Path(data.train).exists() or box.crystals(data.train) else stand_in()
    feed = Feed.of(crystals, tokenizer, writer, data.tokens_per_row, data.rows_per_batch, recipe.seed)
    model = Llama(config, recipe.lora)
    trainer = Trainer(
        model,
        writer,
        make_optimizer(recipe.optimizer, STEPS),
        mesh,
        data.tokens_per_row,
        data.loss_block,
        data.accumulate,
    )
    rows = batch_sharding(mesh)
    examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), feed.nothing())
    return trainer.compile_train(trainer.abstract_start(variables(model, mesh)), examples)


def engine(
    recipe: Recipe,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    slots: int,
    max_new_tokens: int,
) -> Engine:
    """As `jaxcrystal sample` makes it by default, of arrays that are not there: `compile_decode` is its loop."""
    model = Llama(config, recipe.lora)
    whole = variables(model, mesh)
    form = form_of(recipe.text)
    description = saved.SavedModel(
        config, recipe.lora, recipe.text, whole["params"], whole.get("lora"), tokenizer, step=0
    )
    return Engine(
        description,
        end_id=tokenizer.eos_id,
        methods=SamplerSettings().methods,
        grammar=form.grammar(form.tables(tokenizer), max_new_tokens),
        slots=slots,
        max_new_tokens=max_new_tokens,
        mesh=mesh,
    )


def variables(model: Llama, mesh: Mesh) -> dict[str, Any]:
    """Shapes and places of all variables; a frozen model's floats take the two bytes in which LLaMA-2 is published."""
    abstract = abstract_variables(model, mesh)
    if model.lora is None:
        return abstract

    def stored(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        scale = names.endswith("kernel/scale")  # of a quantized kernel
        dtype = jnp.bfloat16 if x.dtype == jnp.float32 and not scale else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return abstract | {"params": jax.tree_util.tree_map_with_path(stored, abstract["params"])}


def stand_in() -> dataset.CrystalSet:
    """A smallest and a largest crystal, with every label: they bound the shapes of a batch, as a data set would."""
    crystals = [
        Crystal(np.full(3, 5.0), np.full(3, 90.0), 3 + np.arange(atoms) % 5, np.zeros((atoms, 3)))
        for atoms in (1, MAX_ATOMS)
    ]
    labels = [
        {name: 1.0 for name in ATTRIBUTES}
        | {"pretty_formula": "".join(c.symbols[:5]), "elements": list(c.symbols[:5]), "spacegroup.number": 1}
        for c in crystals
    ]
    return dataset.CrystalSet.from_crystals(["smallest", "largest"], crystals, labels)
