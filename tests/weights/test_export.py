"""Exports that transformers and PEFT load, imports of PEFT's adapters; both there and back without a bit changed."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save_file

from jaxcrystal.config import LoraConfig, MeshConfig
from jaxcrystal.crystals.tokenizer import load_tokenizer, with_pad
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.weights.config_map import read_hf, read_peft
from jaxcrystal.weights.export import export, parse_size
from jaxcrystal.weights.saved import convert, load_model

TARGETS = ("q_proj", "v_proj", "down_proj")
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(directory, tokens):
    model = load_model(directory)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    found, _ = jax.jit(model.module.apply)(model.variables, tokens, positions)
    return np.asarray(found)[..., : model.config.vocab_size]


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape and np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def draw_tokens(vocab=96):
    return np.random.default_rng(0).integers(0, vocab, (2, 30))


def tensors_of(directory):
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def adapted(model, **changes):
    """A PEFT model with random adapters, b not zero."""
    settings = dict(r=4, lora_alpha=10, lora_dropout=0.1, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings | changes))
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return theirs.eval()


# Hugging Face


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes", [{}, dict(tie_word_embeddings=True, rope_parameters=dict(LLAMA3, rope_theta=500.0))]
)
def test_hugging_face_there_and_back_is_exact(dtype, changes, checkpoint, pieces, tmp_path):
    theirs, source = checkpoint(**changes)
    theirs.to(getattr(torch, dtype)).save_pretrained(source)
    convert(source, tmp_path / "ours", make_mesh(MeshConfig(1, 2, 4)))
    report = export(tmp_path / "ours", tmp_path / "hf", "hf", pad_token=False, mesh=make_mesh(MeshConfig(1, 4, 2)))
    assert_same_tensors(tensors_of(tmp_path / "hf"), tensors_of(source))
    assert (report.files, report.tensors) == (1, len(tensors_of(source)))
    assert report.bytes == sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert read_hf(tmp_path / "hf") == read_hf(source)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == pieces
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert again.dtype == getattr(torch, dtype)
    ours, stated = again.config.to_dict(), theirs.config.to_dict()
    differing = {key for key in stated if ours.get(key) != stated[key]}
    assert differing <= {"architectures", "_name_or_path", "transformers_version", "initializer_range"}
    before = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    np.testing.assert_array_equal(logits(again.float(), draw_tokens()), logits(before.float(), draw_tokens()))


def test_pad_is_exported_and_the_rows_beyond_it_are_not(checkpoint, pieces, tmp_path):
    theirs, source = checkpoint()
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf", "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert again.config.vocab_size == 97 and again.config.pad_token_id == 96
    assert (again.generation_config.bos_token_id, again.generation_config.pad_token_id) == (1, 96)
    assert_close(logits(again, draw_tokens(97)), our_logits(tmp_path / "ours", draw_tokens(97)))
    assert_close(logits(again, draw_tokens())[..., :96], logits(theirs, draw_tokens()))
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == with_pad(pieces)
    # What was exported can be converted again: [PAD] is there, and nothing more is added.
    assert convert(tmp_path / "hf", tmp_path / "again").vocab_size == 97
    first, second = (load_model(tmp_path / name).variables for name in ("ours", "again"))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_tokenizer_of_an_export_is_llamas_with_pad(shared, checkpoint, tmp_path):
    _, source = checkpoint(vocab_size=32000, hidden_size=8, head_dim=2, intermediate_size=8, num_hidden_layers=1)
    shutil.copy(shared / "tokenizer" / "llama2" / "tokenizer.model", source)
    assert convert(source, tmp_path / "ours").padded_vocab_size == 32128
    export(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load_tokenizer(tmp_path / "ours" / "tokenizer.model")
    assert (theirs.pad_token, theirs.pad_token_id, len(theirs)) == ("[PAD]", 32000, 32001)
    assert (theirs.bos_token_id, theirs.eos_token_id, ours.pad_id) == (1, 2, 32000)
    for text in ("5.1 5.2 5.7\n90 90 90\nLi\n0.00 0.50 0.25", "The chemical formula is LiFePO4. "):
        assert theirs(text)["input_ids"] == [1, *ours.encode(text)]


def test_files_are_split_at_the_size_asked_for(checkpoint, tmp_path):
    theirs, source = checkpoint()
    convert(source, tmp_path / "ours", vocab_multiple=1, pad_token=False)
    report = export(tmp_path / "ours", tmp_path / "hf", "hf", shard_size="20KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert report.files == len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(size) <= 20_000 for size in sizes)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes == sum(map(sum, sizes))
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    np.testing.assert_array_equal(logits(again, draw_tokens()), logits(theirs, draw_tokens()))


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("4.5 gb", 4_500_000_000), ("1KB", 1000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1GB", "5TB", "many"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match=f"the size '{text}' is not of the form 500MB or 5GB"):
        parse_size(text)


# PEFT


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_there_and_back_is_exact(rslora, checkpoint, tmp_path):
    base, source = checkpoint()
    convert(source, tmp_path / "base")
    theirs = adapted(base, use_rslora=rslora)
    theirs.save_pretrained(tmp_path / "peft")
    expected = logits(theirs, draw_tokens())
    config = convert(tmp_path / "peft", tmp_path / "runs" / "ours", base=tmp_path / "base")
    model = load_model(tmp_path / "runs" / "ours", make_mesh(MeshConfig(2, 2, 2)))
    alpha = 10 * (2 if rslora else 1)  # alpha / √r with r = 4
    assert model.lora == LoraConfig(rank=4, alpha=alpha, dropout=0.1, targets=TARGETS) and config == model.config
    assert_close(our_logits(tmp_path / "runs" / "ours", draw_tokens())[..., :96], expected)

    export(tmp_path / "runs" / "ours", tmp_path / "back", "peft", base_name="meta-llama/Llama-2-7b-hf")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "peft"))
    stated = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf" and stated["task_type"] == "CAUSAL_LM"
    fresh = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    bare = logits(fresh, draw_tokens())
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "back").eval()
    assert again.peft_config["default"].lora_dropout == 0.1
    assert_close(logits(again, draw_tokens()), expected)

    export(tmp_path / "runs" / "ours", tmp_path / "merged", "hf", pad_token=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_close(logits(merged, draw_tokens()), expected)
    melted = theirs.merge_and_unload().state_dict()
    for name, value in tensors_of(tmp_path / "merged").items():
        np.testing.assert_allclose(value, melted[name].numpy(), atol=1e-6, err_msg=name)
    assert np.abs(bare - expected).max() > 0.05 * np.abs(expected).max()


def test_the_base_that_peft_is_told_of_is_ours_by_default(checkpoint, tmp_path):
    base, source = checkpoint(num_hidden_layers=1)
    convert(source, tmp_path / "base")
    torch.manual_seed(0)
    adapters = peft.get_peft_model_state_dict(adapted(base).to(torch.bfloat16))
    (tmp_path / "peft").mkdir()
    torch.save({name: value.clone() for name, value in adapters.items()}, tmp_path / "peft" / "adapter_model.bin")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 2.5,
        "lora_dropout": 0,
        "target_modules": ".*(q|v|down)_proj",
    }
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "peft", tmp_path / "ours", base=tmp_path / "base")
    assert load_model(tmp_path / "ours").lora == LoraConfig(rank=4, alpha=2.5, dropout=0.0, targets=TARGETS)
    export(tmp_path / "ours", tmp_path / "back", "peft")
    stated = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str((tmp_path / "base").resolve()) and stated["lora_alpha"] == 2.5
    for name, value in tensors_of(tmp_path / "back").items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, adapters[name].float().numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3', only 'LORA'"),
        (dict(bias="all"), "bias is 'all', only 'none'"),
        (dict(use_dora=True), "use_dora is True, which is not supported"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\], which is not supported"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern is .* not supported"),
        (dict(layers_to_transform=[0]), "layers_to_transform is .* not supported"),
        (dict(something_new=1), "something_new is 1, which is not supported"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
        (dict(target_modules=["q_proj", "lm_head"]), "target_modules is .*kernels that can be adapted are q_proj"),
        (dict(r=0), "r is 0; it must lie between 1 and 65536"),
        (dict(lora_alpha="many"), "lora_alpha is 'many'; it must be a number"),
    ],
)
def test_adapters_that_cannot_be_run(changes, message, tmp_path):
    path = tmp_path / "adapter_config.json"
    peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert read_peft(tmp_path, set()) == LoraConfig(rank=4, alpha=8, dropout=0.0, targets=("q_proj",))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"adapter_config.json: {message}") as error:
        read_peft(tmp_path, set())
    assert "\n" not in str(error.value)


def test_adapters_and_bases_that_do_not_belong_together(checkpoint, tmp_path):
    base, source = checkpoint(num_hidden_layers=1)
    convert(source, tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match=r"peft holds adapters; name the model directory .*--base DIR"):
        convert(tmp_path / "peft", tmp_path / "ours")
    with pytest.raises(UserError, match=r"adapters, which are float32 .*leave dtype out"):
        convert(tmp_path / "peft", tmp_path / "ours", dtype="bfloat16", base=tmp_path / "base")
    with pytest.raises(UserError, match=r"holds no adapter_config.json: .*no use for a base"):
        convert(source, tmp_path / "ours", base=tmp_path / "base")
    convert(tmp_path / "peft", tmp_path / "ours", base=tmp_path / "base")
    with pytest.raises(UserError, match=r"base .*ours has adapters of its own"):
        convert(tmp_path / "peft", tmp_path / "more", base=tmp_path / "ours")

    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {name: torch.tensor(value) for name, value in load_file(file).items()}
    prefix = "base_model.model.model.layers"
    tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 32)
    del tensors[f"{prefix}.0.mlp.down_proj.lora_B.weight"]
    tensors[f"{prefix}.1.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "peft", tmp_path / "more", base=tmp_path / "base")
    first, *problems = str(error.value).split("\n  ")
    assert "adapter_config.json describes, for this base" in first
    assert problems == [
        f"{prefix}.0.mlp.down_proj.lora_B.weight: expected [32, 4], missing",
        f"{prefix}.0.self_attn.q_proj.lora_A.weight: expected [4, 32], found [3, 32]",
        f"{prefix}.1.self_attn.q_proj.lora_A.weight: not expected, found [4, 32]",
    ]


# what cannot be exported, or not there


def test_what_cannot_be_exported(checkpoint, tmp_path, full_disk):
    _, source = checkpoint(num_hidden_layers=1)
    convert(source, tmp_path / "ours")
    with pytest.raises(UserError, match=r"ours has no adapters on a base, .* --format hf"):
        export(tmp_path / "ours", tmp_path / "out", "peft")
    with pytest.raises(UserError, match="nowhere is not a model directory"):
        export(tmp_path / "nowhere", tmp_path / "out", "hf")
    with pytest.raises(UserError, match="hf0 exists and is not an empty directory"):
        export(tmp_path / "ours", source, "hf")
    with pytest.raises(UserError, match=r"cannot write the directory .*config.json/out: Not a directory"):
        export(tmp_path / "ours", source / "config.json" / "out", "hf")
    with full_disk(10_000), pytest.raises(UserError, match=r"cannot write the directory .*out: ") as error:
        export(tmp_path / "ours", tmp_path / "out", "hf")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf0", "ours"]
    (tmp_path / "out").mkdir()
    export(tmp_path / "ours", tmp_path / "out", "hf")
    assert (tmp_path / "out" / "model.safetensors").exists()
