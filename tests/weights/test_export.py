"""Exports that transformers and PEFT load, imports of PEFT's adapters; both there and back without a bit changed."""

import json
import shutil

import jax
import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save_file

from jaxcrystal.config import LoraConfig, MeshConfig, Recipe, load
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.sentence_pieces import with_pad
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.training.loop import train
from jaxcrystal.weights.config_map import read_hf, read_peft
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.export import export, parse_size
from jaxcrystal.weights.saved import load_model, read_description

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
    (source / "recipe.yaml").write_text("a stranger's")
    convert(source, tmp_path / "ours", make_mesh(MeshConfig(1, 2, 4)))
    assert not (tmp_path / "ours/recipe.yaml").exists()
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_a_model_directory_too(dtype, tmp_path):
    """Trained here, in the symmetry form: the same weights, texts and crystals, for us and for transformers."""
    shape = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=2"]
    keys = [f"out={tmp_path / 'run'}", "text.form=symmetry", "tokenizer=compact-symmetry", "augment.translate=false"]
    keys += [
        "augment.infill=0",
        "data.train=mp20-test",
        "data.tokens_per_row=512",
        "data.rows_per_batch=2",
        "mesh.data=1",
        "mesh.fsdp=1",
    ]
    keys += [*(f"model.{one}" for one in (*shape, "num_key_value_heads=2", "head_dim=16")), "steps=2"]
    train(load(Recipe, None, keys))
    export(tmp_path / "run", tmp_path / "hf", "hf", dtype=dtype, shard_size="100KB")
    before, after = load_model(tmp_path / "run"), load_model(tmp_path / "hf", make_mesh(MeshConfig(1, 2, 1)))
    assert after.text == before.text and after.tokenizer.sha256 == before.tokenizer.sha256
    rows = before.config.vocab_size  # those behind them have no piece, and get no logit
    cut = {"embed_tokens": np.s_[:rows], "lm_head": np.s_[:, :rows]}
    for name in before.params:
        for found, value in zip(*(jax.tree.leaves(one.params[name]) for one in (after, before)), strict=True):
            assert found.shape == value.shape
            found, expected = (np.asarray(x.astype(dtype))[cut.get(name, ...)] for x in (found, value))
            np.testing.assert_array_equal(found, expected, err_msg=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    np.testing.assert_allclose(our_logits(tmp_path / "hf", draw_tokens()), logits(theirs, draw_tokens()), atol=1e-5)
    for name in ("recipe.yaml", "num_atoms.json", "formulas.txt"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    if dtype == "float32":
        tables = []
        for model in ("run", "hf"):
            out = tmp_path / f"{model}.parquet"
            sample(tmp_path / model, 6, out, slots=6, max_new_tokens=200, new=True)
            tables.append(pd.read_parquet(out))
        assert tables[0]["text"].tolist() == tables[1]["text"].tolist()
    convert(tmp_path / "hf", tmp_path / "again")
    assert load_model(tmp_path / "again").text == before.text
    assert (tmp_path / "again/formulas.txt").read_bytes() == (tmp_path / "run/formulas.txt").read_bytes()
    with pytest.raises(UserError, match="adapters are float32"):
        export(tmp_path / "run", tmp_path / "peft", "peft", dtype=dtype)
    (tmp_path / "hf/model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="hf"):
        load_model(tmp_path / "hf")


def test_an_export_is_a_base_too(tmp_path):
    """Adapters that are trained on it are read again; and what is merged is no longer what was converted."""
    shape = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=2"]
    common = ["data.train=prototypes:validation", "data.tokens_per_row=512", "data.rows_per_batch=2", "mesh.data=1"]
    common += ["mesh.fsdp=1", "steps=2"]
    keys = ["tokenizer=compact", *(f"model.{one}" for one in (*shape, "num_key_value_heads=2", "head_dim=16"))]
    train(load(Recipe, None, [*common, *keys, f"out={tmp_path / 'run'}"]))
    export(tmp_path / "run", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "base")
    lora = ["lora.rank=2", "lora.alpha=4", "lora.dropout=0", "lora.targets=[q_proj]"]
    for base in ("hf", "base"):
        train(load(Recipe, None, [*common, *lora, f"base={tmp_path / base}", f"out={tmp_path / f'on_{base}'}"]))
    found, expected = load_model(tmp_path / "on_hf"), load_model(tmp_path / "on_base")
    for one, other in zip(*map(jax.tree.leaves, (found.adapters, expected.adapters)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    export(tmp_path / "on_base", tmp_path / "merged", "hf")
    checksum = read_description(tmp_path / "base").float_checksum
    assert checksum is not None and read_description(tmp_path / "merged").float_checksum is None
    export(tmp_path / "base", tmp_path / "same", "hf")
    assert read_description(tmp_path / "same").float_checksum == checksum


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


def test_the_base_that_peft_loads_is_never_ours(checkpoint, tmp_path):
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
    remedy = r"give --base-name what .*base was converted from, .*export --model .*base --format hf` writes"
    with pytest.raises(UserError, match=f"PEFT needs to know its base: {remedy}"):
        export(tmp_path / "ours", tmp_path / "back", "peft")
    with pytest.raises(UserError, match=f"PEFT cannot load .*base: {remedy}"):
        export(tmp_path / "ours", tmp_path / "back", "peft", base_name=str(tmp_path / "base"))
    export(tmp_path / "ours", tmp_path / "back", "peft", base_name=str(source))
    stated = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(source) and stated["lora_alpha"] == 2.5
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back")  # which loads the base by that name
    assert_close(our_logits(tmp_path / "ours", draw_tokens())[..., :96], logits(again.eval(), draw_tokens()))
    for name, value in tensors_of(tmp_path / "back").items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, adapters[name].float().numpy(), err_msg=name)


MERGE = r"merge it in PEFT \(`AutoPeftModelForCausalLM.*merge_and_unload\(\).*convert NEW without --base"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3', only 'LORA'"),
        (dict(bias="all"), f"bias is 'all', .*{MERGE}"),
        (dict(use_dora=True), f"use_dora is True, .*{MERGE}"),
        (dict(modules_to_save=["lm_head"]), rf"modules_to_save is \['lm_head'\], .*{MERGE}"),
        (dict(rank_pattern={"q_proj": 2}), f"rank_pattern is .*{MERGE}"),
        (dict(layers_to_transform=[0]), f"layers_to_transform is .*{MERGE}"),
        (dict(something_new=1), f"something_new is 1, .*{MERGE}"),
        (dict(init_lora_weights="pissa"), f"init_lora_weights is 'pissa', which trains on a base .*{MERGE}"),
        (
            dict(target_modules=["q_proj", "lm_head"]),
            f"target_modules is .*kernels that can be adapted are q_proj.*{MERGE}",
        ),
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


def resized(source, dtype="float32", rows=97):
    """As crystal-text-llm trains: [PAD] is added, the vocabulary resized, adapters trained; PEFT saves both."""
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    base.resize_token_embeddings(rows, mean_resizing=False)
    theirs = adapted(base)
    with torch.no_grad():
        for weight in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
            weight[96:] = torch.randn_like(weight[96:])  # whatever the new rows hold
    return theirs


def save_changed(theirs, directory, change):
    with torch.no_grad():
        change(theirs)
    theirs.save_pretrained(directory)
    return tensors_of(directory)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("stored", "trained"), [("float32",) * 2, ("bfloat16", "float16"), ("float32", "bfloat16")])
def test_adapters_whose_embeddings_peft_saved_again(tied, stored, trained, checkpoint, tmp_path):
    theirs, source = checkpoint(tie_word_embeddings=tied)
    theirs.to(torch.float16 if trained == "float16" else torch.float32).save_pretrained(source)
    convert(source, tmp_path / "base", dtype=stored)
    theirs = resized(source, trained, rows=99)
    saved = save_changed(theirs, tmp_path / "peft", lambda model: None)
    names = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert names & saved.keys() and all(saved[name].shape == (99, 32) for name in names & saved.keys())
    convert(tmp_path / "peft", tmp_path / "ours", base=tmp_path / "base")
    model = load_model(tmp_path / "ours")
    assert model.lora.targets == TARGETS and (model.config.vocab_size, model.config.padded_vocab_size) == (97, 128)
    expected = logits(theirs.float(), draw_tokens())[..., :96]
    if stored == trained:
        assert_close(our_logits(tmp_path / "ours", draw_tokens())[..., :96], expected)
    for name, value in model.adapters["layers"]["self_attn"]["q_proj"].items():
        kernel = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name.upper()}.weight"
        np.testing.assert_array_equal(value[0].T, saved[kernel].astype(np.float32))

    for which in ("input", "output"):

        def changed(model, which=which):
            weight = getattr(model.get_base_model(), f"get_{which}_embeddings")().weight
            weight[7, 3] += weight[7].abs().max() / 20

        theirs = resized(source, trained, rows=99)
        save_changed(theirs, tmp_path / which, changed)
        with pytest.raises(UserError, match=rf"weight differs from the base's in 1 of 96 rows: .*{MERGE}") as error:
            convert(tmp_path / which, tmp_path / "none", base=tmp_path / "base")
        assert "\n" not in str(error.value) and not (tmp_path / "none").exists()


def test_embeddings_of_another_base(checkpoint, tmp_path):
    _, source = checkpoint()
    convert(source, tmp_path / "base")
    _, other = checkpoint(seed=1)
    theirs = resized(other)
    save_changed(theirs, tmp_path / "peft", lambda model: None)
    with pytest.raises(UserError, match=r"differs from the base's in 96 of 96 rows: .*belongs to another base"):
        convert(tmp_path / "peft", tmp_path / "ours", base=tmp_path / "base")
    _, smaller = checkpoint(vocab_size=90)
    theirs = resized(smaller, rows=95)
    save_changed(theirs, tmp_path / "small", lambda model: None)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[95, 32\], the base's has 96 rows of 32; .*another"):
        convert(tmp_path / "small", tmp_path / "ours", base=tmp_path / "base")


@pytest.mark.parametrize("changes", [dict(use_dora=True), dict(modules_to_save=["lm_head"]), dict(bias="all")])
def test_the_remedy_works(changes, checkpoint, pieces, tmp_path):
    """What the refusal of DoRA, trained modules and biases says, done by PEFT, gives the model that was trained."""
    _, source = checkpoint()
    base = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    theirs = adapted(base, **changes)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight += 0.1 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "peft")
    convert(source, tmp_path / "base")
    with pytest.raises(UserError, match=MERGE):
        convert(tmp_path / "peft", tmp_path / "ours", base=tmp_path / "base")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")
    again.merge_and_unload().save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "tokenizer.model").write_bytes(pieces)
    convert(tmp_path / "new", tmp_path / "ours")
    assert_close(our_logits(tmp_path / "ours", draw_tokens())[..., :96], logits(theirs, draw_tokens()))


def test_adapters_saved_by_the_names_of_a_living_model(checkpoint, tmp_path):
    _, source = checkpoint(num_hidden_layers=1)
    convert(source, tmp_path / "base")
    theirs = adapted(transformers.AutoModelForCausalLM.from_pretrained(source))
    theirs.save_pretrained(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    tensors = {name: value for name, value in theirs.state_dict().items() if "lora_" in name}
    torch.save(tensors, tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"lora_A.default.weight bears the name .*`model.save_pretrained\(DIR\)`"):
        convert(tmp_path / "peft", tmp_path / "ours", base=tmp_path / "base")


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
