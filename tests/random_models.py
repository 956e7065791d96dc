"""Model directories with random weights, for tests of what is done with any model."""

from pathlib import Path

import jax
import yaml

from jaxcrystal.config import Augment, LlamaConfig, MeshConfig, Recipe, TextFormat, to_dict
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import describe, save_weights


def model_of(form: str, tokenizer: str, directory: Path) -> Path:
    """The smallest there is; what it was trained on is not known."""
    pieces = load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=pieces.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    describe(directory, config, None, TextFormat(form=form), pieces)
    save_weights(directory, initialize(Llama(config), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1))))
    return directory


def without_infilling(directory: Path) -> Path:
    """A model of the symmetry form whose recipe says that it never infilled."""
    recipe = Recipe(augment=Augment(translate=False, infill=0.0), text=TextFormat(form="symmetry"))
    model_of("symmetry", "compact-symmetry", directory)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    return directory
