"""Checkpoints that load part by part, come back exactly, and those that are refused with every reason at once."""

import json
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxcrystal.config import LlamaConfig, MeshConfig, RopeScaling
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.weights.checkpoint_map import Checkpoint, load_hf, to_hf
from jaxcrystal.weights.config_map import read_hf
from jaxcrystal.weights.tensor_files import TensorFiles

ONE = MeshConfig(1, 1, 1)


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["single", "sharded"])
def test_there_and_back_is_exact(tied, shard, checkpoint):
    theirs, directory = checkpoint(shard=shard, tie_word_embeddings=tied)
    assert (len(list(directory.glob("*.safetensors"))) > 3) == (shard == "20KB")
    config, params = load_hf(directory, make_mesh(MeshConfig(2, 2, 2)))
    tensors = dict(to_hf(params, config.num_hidden_layers))
    expected = {name: value.numpy() for name, value in theirs.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_each_device_reads_its_own_part(checkpoint, monkeypatch):
    _, directory = checkpoint()
    reads, sizes = Counter(), {}
    read = TensorFiles.read

    def counted(files, name, index):
        part = read(files, name, index)
        reads[name] += 1
        sizes[name] = max(sizes.get(name, 0), part.size)
        return part

    monkeypatch.setattr(TensorFiles, "read", counted)
    load_hf(directory, make_mesh(MeshConfig(1, 8, 1)))
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert reads[name] == 8 and sizes[name] == 48 * 32 // 8
    reads.clear()
    load_hf(directory, make_mesh(MeshConfig(4, 2, 1)))
    assert reads[name] == 2  # what four devices share is read once


@pytest.mark.parametrize("dtype, expected", [(None, "float32"), (jnp.bfloat16, "bfloat16")])
def test_dtype_of_parameters(dtype, expected, checkpoint):
    _, directory = checkpoint()
    _, params = load_hf(directory, make_mesh(ONE), dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {expected}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_become_bfloat16(dtype, checkpoint):
    theirs, directory = checkpoint()
    theirs.to(getattr(torch, dtype)).save_pretrained(directory)
    config, params = load_hf(directory, make_mesh(ONE))
    assert config.dtype == "bfloat16"
    for name, value in to_hf(params, 3):
        stored = theirs.state_dict()[name].float().numpy()
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, stored.astype(jnp.bfloat16), err_msg=name)


def test_configs_from_before_transformers_5(checkpoint):
    _, directory = checkpoint()
    edit_config(directory, rope_parameters=..., rope_theta=777.0, rope_scaling={"type": "linear", "factor": 2.0})
    config = read_hf(directory)
    assert config.rope_theta == 777.0 and config.rope_scaling == RopeScaling("linear", 2.0)
    edit_config(directory, rope_scaling=None, dtype=..., torch_dtype="float16", head_dim=..., num_key_value_heads=...)
    edit_config(directory, rms_norm_eps=..., max_position_embeddings=...)
    config = read_hf(directory)
    assert config.rope_scaling is None and config.dtype == "bfloat16"
    assert (config.head_dim, config.num_key_value_heads) == (32 // 4, 4)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mixtral"), "model_type is 'mixtral'"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
        (
            dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            "rope_type is 'yarn'; supported are",
        ),
        (dict(rope_parameters={"rope_type": "linear"}), "'linear' needs factor"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type is 'yarn'; supported are"),  # beside it
        (dict(rope_scaling={"full_attention": {"rope_type": "default"}}), "only one rotation for all layers"),
        (dict(rope_scaling=["linear"]), "only one rotation for all layers"),
        (dict(model_type=["llama"]), "model_type is"),
        (dict(num_attention_heads="4", head_dim=...), "num_attention_heads is '4'; it must be a whole number above 0"),
        (dict(num_attention_heads=0, head_dim=...), "num_attention_heads is 0; it must be a whole number above 0"),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized .quantization_config: gptq"),
        (dict(quantization_config={"quant_method": "bitsandbytes"}), "quantized .quantization_config: bitsandbytes"),
        (dict(hidden_size=...), "hidden_size missing"),
        (dict(vocab_size="many"), "vocab_size is 'many'"),
    ],
)
def test_configs_that_cannot_be_run(changes, message, checkpoint):
    _, directory = checkpoint()
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        load_hf(directory, make_mesh(ONE))


def test_every_wrong_tensor_is_named_at_once(checkpoint):
    _, directory = checkpoint()
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_hf(directory, make_mesh(ONE))
    first, *problems = str(error.value).split("\n  ")
    assert str(directory) in first
    assert problems == [
        "model.layers.1.mlp.up_proj.weight: expected [48, 32], found [48, 31]",
        "model.layers.3.mlp.up_proj.weight: not expected, found [48, 32]",
        "model.norm.weight: expected [32], missing",
    ]


def test_a_tied_model_may_carry_its_head_again(checkpoint):
    _, directory = checkpoint(tie_word_embeddings=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, file)
    assert "lm_head" not in load_hf(directory, make_mesh(ONE))[1]


def test_a_missing_shard_is_named_with_what_it_held(checkpoint):
    _, directory = checkpoint(shard="20KB")
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    lost = weight_map["model.layers.1.mlp.up_proj.weight"]
    (directory / lost).unlink()
    with pytest.raises(UserError) as error:
        load_hf(directory, make_mesh(ONE))
    for name, file in weight_map.items():
        assert (f"{name}: expected" in str(error.value)) == (file == lost)
    assert f"[48, 32], missing ({lost} is not there)" in str(error.value)


def test_files_that_cannot_be_read(checkpoint, tmp_path):
    _, directory = checkpoint()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is not a readable safetensors file .*save it again"):
        load_hf(directory, make_mesh(ONE))
    file.unlink()
    with pytest.raises(UserError, match=r"holds neither model.safetensors, .* nor pytorch_model.bin"):
        load_hf(directory, make_mesh(ONE))
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load_hf(directory, make_mesh(ONE))
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        load_hf(directory, make_mesh(ONE))
    with pytest.raises(UserError, match=r"cannot read .*nowhere.*name a model directory of Hugging Face"):
        load_hf(tmp_path / "nowhere", make_mesh(ONE))


@pytest.mark.parametrize(
    ("stored", "exact"),
    [
        (["BF16"], {"bfloat16", "float32"}),
        (["F16"], {"float32"}),
        (["BF16", "F32"], {"float32"}),
        (["float16", "bfloat16"], {"float32"}),
        (["F32", "F64"], set()),
    ],
)
def test_what_rounds_no_number_of_a_checkpoint(stored, exact):
    tensors = SimpleNamespace(dtypes=dict(enumerate(stored)))
    checkpoint = Checkpoint(LlamaConfig(dtype="bfloat16"), tensors, "hf")
    assert {dtype for dtype in ("bfloat16", "float32") if checkpoint.exact_in(dtype)} == exact
    assert checkpoint.exact_in(None) == ("bfloat16" in exact)
