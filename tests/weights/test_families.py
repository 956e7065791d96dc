"""Models of today: transformers computes the same, and gets back what it gave."""

import json

import byte_pair_tokenizers
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from jaxcrystal.config import MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.weights.config_map import FAMILIES
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.export import export
from jaxcrystal.weights.saved import load_model

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    sliding_window=64,
)
KINDS = {"llama": "llama3", "mistral": "tekken", "qwen2": "qwen", "qwen3": "qwen"}


@pytest.fixture
def family(tmp_path):
    """Makes a model of random weights, norms and biases too, with more rows than tokens, and its directory."""

    def make(name: str, **changes):
        torch.manual_seed(0)
        directory = tmp_path / name
        byte_pair_tokenizers.write(directory, KINDS[name])
        rows = 300 + len(byte_pair_tokenizers.vocabulary(KINDS[name])[0])
        config = transformers.AutoConfig.for_model(name, vocab_size=rows, eos_token_id=1, **SIZES | changes)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                torch.nn.init.normal_(weight, mean=1.0 if "norm" in key else 0.0, std=0.2)
        model.save_pretrained(directory)
        return model, directory

    return make


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers_and_weights_come_back(name, tied, family, tmp_path):
    theirs, directory = family(name, tie_word_embeddings=tied)
    convert(directory, tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 50))
    positions = np.broadcast_to(np.arange(50), tokens.shape)
    found = np.asarray(jax.jit(model.module.apply)(model.variables, tokens, positions)[0])
    expected, pieces = logits(theirs, tokens), model.config.vocab_size
    assert np.abs(expected).max() > 1 and pieces == model.tokenizer.vocab_size == theirs.config.vocab_size - 300
    np.testing.assert_allclose(found[..., :pieces], expected[..., :pieces], rtol=0, atol=1e-4 * np.abs(expected).max())
    assert (found[..., pieces:] == -np.inf).all()

    export(tmp_path / "ours", tmp_path / "back", "hf")
    for key, tensor in load_file(directory / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "back/model.safetensors")[key], tensor, err_msg=key)
    assert load_model(tmp_path / "back").config.vocab_size == pieces
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    np.testing.assert_array_equal(logits(again, tokens), expected)  # rows without a token too: no more, no fewer
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "Below:\n5.2 5.20 120\nNa\n0.25 0.50 0.75"
    assert tokenizer(text).input_ids == [*model.tokenizer.begin, *model.tokenizer.encode(text)]
    assert tokenizer.eos_token_id == model.tokenizer.eos_id


def test_adapters_on_a_family_with_biases_come_back_merged(family, tmp_path):
    """A bias stands beside the kernel that adapters are merged into."""
    import peft

    theirs, directory = family("qwen2")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(tmp_path / "adapters")
    convert(directory, tmp_path / "base")
    convert(tmp_path / "adapters", tmp_path / "ours", base=tmp_path / "base")
    export(tmp_path / "ours", tmp_path / "back", "hf")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, 200, (2, 50))
    expected = logits(adapted.eval(), tokens)
    found = logits(merged, tokens)[..., : expected.shape[-1]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_context_ends_with_the_window(family):
    """Mistral's tokens attend to so many before them: within the window that is all, beyond it a model is another."""
    from jaxcrystal.weights.config_map import read_hf

    assert read_hf(family("mistral")[1]).max_position_embeddings == 64
    directory = family("qwen2")[1]
    assert read_hf(directory).max_position_embeddings == 128  # use_sliding_window is false
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (directory / "config.json").write_text(json.dumps(config | {"use_sliding_window": True, "sliding_window": 32}))
    assert read_hf(directory).max_position_embeddings == 32
    del config["sliding_window"]
    (directory / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
    assert read_hf(directory).max_position_embeddings == 4096  # what transformers takes


def test_weights_that_are_no_numbers_are_refused(family, tmp_path):
    theirs, directory = family("qwen3")
    with torch.no_grad():
        theirs.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    theirs.save_pretrained(directory)
    with pytest.raises(UserError, match="gives nan or infinite numbers for layers/mlp/up_proj/kernel"):
        convert(directory, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_scales_that_the_devices_do_not_divide_are_stored_by_fewer(family, tmp_path):
    """192 inputs have three scales; there are eight devices."""
    sizes = {"hidden_size": 192, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    convert(family("llama", **sizes)[1], tmp_path / "ours", weights="nf4")
    convert(tmp_path / "llama", tmp_path / "one", make_mesh(MeshConfig(1, 1, 1)), weights="nf4")
    jax.tree.map(np.testing.assert_array_equal, *(load_model(tmp_path / name).params for name in ("ours", "one")))


@pytest.mark.parametrize(
    "stored, dtype, known",
    [
        ("float32", None, True),
        ("float32", "float32", True),
        ("float32", "bfloat16", False),
        ("bfloat16", None, True),
        ("bfloat16", "bfloat16", True),
        ("float16", None, False),  # it becomes bfloat16
        ("float16", "float32", True),
    ],
)
def test_a_hub_model_is_named_for_its_own_weights_alone(stored, dtype, known, family, tmp_path, monkeypatch):
    """With its commit, so that what PEFT loads below the adapters later is what they were trained on."""
    import peft

    theirs, directory = family("qwen2")
    theirs.to(getattr(torch, stored)).save_pretrained(directory)
    snapshot = directory.rename(tmp_path / "0123abcd")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(snapshot))
    convert("owner/model", tmp_path / "base", dtype=dtype)
    peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    convert(tmp_path / "adapters", tmp_path / "ours", base=tmp_path / "base")
    if not known:
        with pytest.raises(UserError, match="PEFT needs to know its base"):
            export(tmp_path / "ours", tmp_path / "back", "peft")
        return
    export(tmp_path / "ours", tmp_path / "back", "peft")
    stated = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (stated["base_model_name_or_path"], stated["revision"]) == ("owner/model", "0123abcd")


@pytest.mark.parametrize("kind", ["mixtral", "smollm3", "qwen2_vl", "gemma2"])
def test_what_is_no_llama_is_refused_by_its_model_type(kind, family, tmp_path):
    _, directory = family("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(UserError, match=f"model_type is {kind!r}; those that can be run here are llama, mistral"):
        convert(directory, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
