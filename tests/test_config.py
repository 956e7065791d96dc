"""Recipes: defaults, then the file, then the command line; what is wrong is named, with what would be right."""

import dataclasses
import math
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrystal.config import Bounds, LlamaConfig, LoraConfig, OptimizerConfig, Recipe, from_dict, load, to_dict
from jaxcrystal.config import type_hints as hints
from jaxcrystal.errors import UserError
from jaxcrystal.improvement.recipe import Improvement

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
KINDS = {path: Improvement if path.name.startswith("improve_") else Recipe for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_recipe_loads(path):
    recipe = load(KINDS[path], path)
    assert from_dict(KINDS[path], to_dict(recipe)) == recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_recipe_is_found_by_its_name_wherever_we_are(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(KINDS[path], path.stem, ["seed=7"]) == load(KINDS[path], path, ["seed=7"])


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match=r"there is no recipe 'tiny'; .* llama2_7b_mp20, .*, tiny_cpu"):
        load(Recipe, "tiny")
    with pytest.raises(UserError, match=r"cannot read .*/tiny.yaml: No such file .*llama2_7b_mp20, .*, tiny_cpu"):
        load(Recipe, "configs/tiny.yaml")


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "tiny_cpu").write_text("seed: 11")
    monkeypatch.chdir(tmp_path)
    assert load(Recipe, "tiny_cpu").seed == 11


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
        ("step: 5", "step is no key of Recipe; did you mean 'steps'?"),
        (
            "optimizer: {learning_rat: 1}",
            "optimizer.learning_rat is no key of OptimizerConfig; did you mean 'learning_rate'?",
        ),
        ("steps: many", "steps is 'many'; it must be a whole number"),
        ("steps: 1.5", "steps is 1.5; it must be a whole number"),
        ("steps: true", "steps is True; it must be a whole number"),
        ("out: 5", "out is 5; it must be text"),
        ("augment: {permute: 1}", "augment.permute is 1; it must be true or false"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate is 'fast'; it must be a number"),
        ("optimizer: {learning_rate: true}", "optimizer.learning_rate is True; it must be a number"),
        ("optimizer: {learning_rate: null}", "optimizer.learning_rate is None; it must be a number"),
        ("optimizer: fast", "optimizer is 'fast'; it must hold keys of OptimizerConfig"),
        ("augment: {loss_on: prompt}", "augment.loss_on is 'prompt'; it must be one of 'all', 'response'"),
        ("augment: {attributes: [colour]}", "'colour': it must be one of 'pretty_formula', "),
        ("augment: {attributes: [band_gap, elements, band_gap]}", "'band_gap' is there twice"),
        ("augment: {infill: 2}", "augment.infill is 2.0; it must lie between 0 and 1"),
        ("lora: {targets: q_proj}", "lora.targets is 'q_proj'; it must be a list"),
        ("lora: {targets: [q_proj, query]}", "'query': it must be one of 'q_proj', 'k_proj', "),
        ("lora: {targets: [q_proj, q_proj]}", "lora.targets is ('q_proj', 'q_proj'); 'q_proj' is there twice"),
        ("lora: {targets: []}", "lora.targets is empty; kernels that can be adapted are q_proj, "),
        (
            "model: {num_attention_heads: 4, num_key_value_heads: 3}",
            "model.num_attention_heads is 4; it must be a multiple of num_key_value_heads, 3",
        ),
        ("model: {head_dim: 7}", "model.head_dim is 7; rotary positions turn pairs, so it must be even"),
        (
            "model: {rope_scaling: {rope_type: llama3, low_freq_factor: 4, high_freq_factor: 4}}",
            "model.rope_scaling.high_freq_factor is 4.0; it must be above low_freq_factor, 4.0",
        ),
        ("mesh: {data: 0}", "mesh.data is 0; it must be -1 or lie between 1 and 1048576"),
        ("mesh: {data: -1}", "mesh.data is -1, fsdp -1, tensor 1; one may be -1, not two"),
        # What trained to the end and had learnt nothing.
        ("optimizer: {clip_norm: 0}", "optimizer.clip_norm is 0.0; it must lie between 0.001 and 1000000.0"),
        ("lora: {dropout: 1.5}", "lora.dropout is 1.5; it must lie between 0 and 0.9"),
        ("optimizer: {warmup_steps: -3}", "optimizer.warmup_steps is -3; it must lie between 0 and 2147483647"),
        ("seed: -1", "seed is -1; it must lie between 0 and 4294967295"),
        ("epochs: .inf", "epochs is inf; it must lie between 1e-06 and 1000000.0"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate is nan; it must lie between 1e-09 and 10"),
        ("optimizer: {learning_rate: nan}", "optimizer.learning_rate is nan; it must lie between 1e-09 and 10"),
        (f"optimizer: {{learning_rate: {10**400}}}", "it must lie between 1e-09 and 10"),
        ("model: {rope_scaling: {factor: 0}}", "model.rope_scaling.factor is 0.0; it must lie between 1 and "),
        ("- a", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
        ("steps: 5\nseed: 1\nsteps: 50", "is not valid YAML: key 'steps' is there twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(Recipe, path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_names_the_override_that_made_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lora: {rank: 0}\nseed: -1\n")
    for overrides, message in (
        ([], f"{path}: lora.rank is 0; "),
        (["lora.rank=-2"], "--set lora.rank=-2: lora.rank is -2; it must lie between 1 and 65536"),
        (["lora={rank: -2}", "optimizer.beta2=.9"], "--set lora={rank: -2}: lora.rank is -2; "),
        (["lora.rank=2"], f"{path}: seed is -1; "),
        (["lora.rank=2", "seed=-2", "seed=-3"], "--set seed=-3: seed is -3; "),
        (["lora.rang=2"], "--set lora.rang=2: lora.rang is no key of LoraConfig; did you mean 'rank'?"),
    ):
        with pytest.raises(UserError) as caught:
            load(Recipe, path, overrides)
        assert str(caught.value).startswith(message)


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(UserError, match="cannot read the configuration"):
        load(Recipe, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="write key=value"):
        load(Recipe, None, ["steps"])


def test_plain_data_and_back():
    config = LlamaConfig(hidden_size=64)
    assert from_dict(LlamaConfig, to_dict(config)) == config


def inner(hint):
    """A type without `| None`, and what of a tuple."""
    parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
    origin = typing.get_origin(hint)
    return inner(parts[0]) if origin in (tuple, typing.Union, type(int | None)) else hint


def fields(cls, prefix=""):
    """Every setting below `cls`: dotted key, type."""
    for name, hint in hints(cls).items():
        listed, hint = typing.get_origin(hint) is tuple, inner(hint)
        if dataclasses.is_dataclass(hint) and listed:  # a list of them has no dotted keys (test_properties)
            continue
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


#: What is no number has no bounds, so a new setting is a number with bounds, one of some words, text or a switch.
NUMBERS = {key: typing.get_args(hint) for key, hint in fields(Recipe) if typing.get_origin(hint) is typing.Annotated}


def test_every_number_has_bounds():
    others = {hint for key, hint in fields(Recipe) if key not in NUMBERS}
    assert {hint for hint in others if typing.get_origin(hint) is not typing.Literal} == {str, bool}
    assert len(NUMBERS) > 40
    for key, (kind, bounds) in NUMBERS.items():
        assert kind in (int, float) and isinstance(bounds, Bounds), key
        assert -math.inf < bounds.low < bounds.high < math.inf, key


def outside(bounds):
    low = st.floats(max_value=bounds.low, exclude_max=True, allow_infinity=True)
    high = st.floats(min_value=bounds.high, exclude_min=True, allow_infinity=True)
    return st.one_of(low, high, st.just(math.nan), st.sampled_from([math.inf, -math.inf]))


@given(st.data())
def test_no_number_outside_its_bounds_passes(data):
    """From the command line, in YAML's notation, and as a value in Python."""
    key = data.draw(st.sampled_from(sorted(NUMBERS)))
    kind, bounds = NUMBERS[key]
    value = data.draw(outside(bounds))
    if kind is int and math.isfinite(value):
        value = math.floor(value) if value < bounds.low else math.ceil(value)
        value += 2 * (value == bounds.also)
        value -= (bounds.low <= value <= bounds.high) * 10
    written = repr(value) if math.isfinite(value) else {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[str(value)]
    with pytest.raises(UserError) as caught:
        load(Recipe, None, [f"{key}={written}"])
    wrong = "it must be a whole number" if kind is int and not math.isfinite(value) else "lie between"
    assert str(caught.value).startswith(f"--set {key}={written}: {key} is ") and wrong in str(caught.value)
    cls, *path = Recipe, *key.split(".")
    for name in path[:-1]:
        cls = inner(hints(cls)[name])
    with pytest.raises(UserError, match=f"^{path[-1]} is "):
        cls(**{path[-1]: value})


@given(st.data())
def test_every_number_within_its_bounds_is_taken(data):
    key = data.draw(st.sampled_from(sorted(NUMBERS)))
    kind, bounds = NUMBERS[key]
    numbers = st.integers if kind is int else st.floats
    value = data.draw(st.one_of(numbers(bounds.low, bounds.high), st.sampled_from([bounds.low, bounds.high])))
    recipe = {"model": {"num_key_value_heads": 1}}  # which every number of heads is a multiple of
    if key in ("model.num_key_value_heads", "model.head_dim", "model.rope_scaling.low_freq_factor"):
        return  # other settings must fit it
    if key == "model.rope_scaling.high_freq_factor":
        recipe["model"]["rope_scaling"] = {"low_freq_factor": 1e-3}
        value = max(value, 2e-3)
    *parents, last = key.split(".")
    node = recipe
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    found = from_dict(Recipe, recipe)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_settings_made_in_python_are_checked_as_well():
    with pytest.raises(UserError, match="clip_norm is 0; it must lie between"):
        OptimizerConfig(clip_norm=0)
    with pytest.raises(UserError, match="lora is 8; it must hold keys of LoraConfig"):
        Recipe(lora=8)
    with pytest.raises(UserError, match=r"rank is 0; it must lie between"):
        dataclasses.replace(LoraConfig(), rank=0)
