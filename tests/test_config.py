"""Recipes: defaults, then the file, then the command line; what is wrong is named, with the nearest that is right."""

import re
from pathlib import Path

import pytest

from jaxcrystal.config import LlamaConfig, LoraConfig, Recipe, from_dict, load, to_dict
from jaxcrystal.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_recipe_loads(path):
    recipe = load(Recipe, path)
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_the_command_line_wins(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 5\nlora: {rank: 4, targets: [q_proj]}\noptimizer: {learning_rate: 1e-3}\n")
    recipe = load(Recipe, path, ["optimizer.learning_rate=5e-4", "model.rope_scaling.factor=2", "lora.alpha=16"])
    assert recipe.steps == 5 and recipe.optimizer.learning_rate == 5e-4 and recipe.optimizer.warmup_steps == 100
    assert recipe.lora == LoraConfig(rank=4, alpha=16.0, targets=("q_proj",))
    assert recipe.model.rope_scaling.factor == 2.0
    assert load(Recipe, path, ["lora=null"]).lora is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 5", "unknown key 'step' in Recipe; did you mean 'steps'"),
        ("optimizer: {learning_rat: 1}", "unknown key 'learning_rat' in OptimizerConfig; did you mean 'learning_rate'"),
        ("steps: many", "steps is 'many'; it must be of type int"),
        ("optimizer: {learning_rate: fast}", "learning_rate is 'fast'; it must be a number"),
        ("optimizer: fast", "it must hold keys of OptimizerConfig"),
        ("augment: {loss_on: prompt}", "must be one of 'all', 'response'"),
        ("augment: {attributes: [colour]}", "names 'colour'; known are"),
        ("augment: {infill: 2}", "between 0 and 1"),
        ("lora: {targets: q_proj}", "must be a list"),
        ("model: {num_attention_heads: 4, num_key_value_heads: 3}", "must be a multiple of num_key_value_heads, 3"),
        ("model: {head_dim: 7}", "it must be even"),
        ("- a", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(Recipe, path)
    assert "recipe.yaml" in str(caught.value) or re.match(r"(augment|model)\.", str(caught.value))


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(UserError, match="cannot read the configuration"):
        load(Recipe, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="write key=value"):
        load(Recipe, None, ["steps"])


def test_plain_data_and_back():
    config = LlamaConfig(hidden_size=64)
    assert from_dict(LlamaConfig, to_dict(config)) == config
