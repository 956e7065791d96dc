"""Adapters on another base than their own: on one that was made of the same float weights, and on no other."""

import json

import jax
import numpy as np
import pytest

from jaxcrystal.config import LoraConfig, MeshConfig, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.fingerprint import fingerprint
from jaxcrystal.weights.saved import (
    MODEL_FILE,
    describe,
    load_model,
    read_description,
    record_checksum,
    save_weights,
)

LORA = LoraConfig(rank=2, targets=("v_proj", "down_proj"))


@pytest.fixture
def source(checkpoint):
    return checkpoint(intermediate_size=64)[1]


@pytest.fixture
def run(source, tmp_path):
    """Adapters on the float base `float`, beside which lies `int8`, of the same source."""
    for weights in ("float", "int8"):
        config = convert(source, tmp_path / weights, weights=weights)
    run = tmp_path / "runs" / "run"
    base = tmp_path / "float"
    config = read_description(base).model
    describe(run, config, LORA, TextFormat(), load_tokenizer(base / "tokenizer.model"), base)
    save_weights(run, initialize(Llama(config, LORA), jax.random.key(1), make_mesh(MeshConfig(1, 1, 1)), ["lora"]))
    record_checksum(run, read_description(base).float_checksum)
    return run


def forget_checksum(directory):
    """As earlier versions wrote it."""
    path = directory / MODEL_FILE
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "float_checksum"}))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_base_is_named_by_the_float_weights_that_it_was_made_of(run, source, tmp_path):
    converted = load_model(tmp_path / "float")
    assert read_description(tmp_path / "int8").float_checksum == fingerprint(converted.params)
    assert read_description(tmp_path / "float").float_checksum == fingerprint(converted.params)
    convert(source, tmp_path / "sharded", make_mesh(MeshConfig(1, 4, 2)), weights="int8")
    assert read_description(tmp_path / "sharded").float_checksum == fingerprint(converted.params)


def test_adapters_lie_on_the_base_that_is_given(run, tmp_path):
    own, other, stored = load_model(run), load_model(run, base=tmp_path / "int8"), load_model(tmp_path / "int8")
    assert_equal(own.params, load_model(tmp_path / "float").params)
    assert_equal(other.params, stored.params)
    assert_equal(other.adapters, own.adapters)
    assert (own.config.weights, other.config.weights, other.lora) == ("float", "int8", LORA)
    tokens = np.arange(5)[None]
    ours, theirs = (m.module.apply(m.variables, tokens, tokens)[0][..., :97] for m in (own, other))
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(ours).max()
    moved = (tmp_path / "float").rename(tmp_path / "moved")  # its own base, at another place
    assert_equal(load_model(run, base=moved).variables, own.variables)


def test_a_base_of_other_weights_is_refused(run, checkpoint, tmp_path):
    theirs = convert(checkpoint(seed=1, intermediate_size=64)[1], tmp_path / "theirs", weights="int8")
    assert theirs.weights == "int8"
    ours, other = (read_description(path).float_checksum for path in (run, tmp_path / "theirs"))
    with pytest.raises(
        UserError, match=rf"run was trained on the float weights {ours}, and the base .*theirs was made of {other}"
    ):
        load_model(run, base=tmp_path / "theirs")
    with pytest.raises(UserError, match=r"float has no adapters on a base.*leave the base .*int8 out"):
        load_model(tmp_path / "float", base=tmp_path / "int8")
    with pytest.raises(UserError, match=r"base .*run has adapters of its own; give .* `jaxcrystal convert` wrote"):
        load_model(run, base=run)


def test_what_earlier_versions_wrote_is_read_without_a_base_and_refused_with_one(run, tmp_path):
    forget_checksum(tmp_path / "int8")
    with pytest.raises(UserError, match=r"int8.model.json does not say .* make the base again with `jaxcrystal conv"):
        load_model(run, base=tmp_path / "int8")
    forget_checksum(run)
    assert load_model(run).float_checksum is None
    with pytest.raises(UserError, match=r"run.model.json was written by an earlier version.* convert the adapters ag"):
        load_model(run, base=tmp_path / "float")
    (run / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"lacks the float_checksum.*; `jaxcrystal train .*run/recipe.yaml` adds it"):
        load_model(run, base=tmp_path / "float")
