"""GGUF files, llama.cpp's format: configuration, tokenizer and weights in one.

Matrices may be quantized, in blocks along a row: a part of them is decoded when it is read, to float32, by the `gguf`
package. Rows of queries and keys lie as Meta has them (`meta_shards`), the two of a rotated pair side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrystal.config import LlamaConfig, from_dict
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.texts.byte_pairs import TIKTOKEN, tokenizer_json
from jaxcrystal.texts.tokenizer import BYTE_PAIRS, Tokenizer, load_tokenizer
from jaxcrystal.weights.checkpoint_map import Checkpoint, checked, source
from jaxcrystal.weights.meta_shards import paired_rows
from jaxcrystal.weights.tensor_files import Index

NORMAL = 1  #: of `tokenizer.ggml.token_type`: text; other kinds are not
#: Q5_0, Q5_1 and IQ4_NL are what K-quants become where rows are no multiple of 256, as SmolLM2's 576.
STORED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
STORED += ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

#: Fields `llama.…` that are read, and those that change nothing in what is computed.
FIELDS = (
    {"embedding_length", "feed_forward_length", "block_count", "context_length", "expert_count", "rope.freq_base"}
    | {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
    | {"attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"}
    | {"rope.scale_linear", "attention.causal"}
    | {"vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"}
)

#: What a damaged file makes its reader raise. No OSError: a disk that is full or cannot be read damages no file.
BROKEN = (ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError, StopIteration)


class GgufFile:
    """The tensors and fields of a file. Raises UserError if it is none, if it is cut short, or for another storage."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UserError(f"{path} needs the package gguf; pip install 'jaxcrystal[gguf]'") from None
        with _whole(path):
            reader = gguf.GGUFReader(path)
            self.fields = dict(reader.fields)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.path = path
        self._decode = gguf.dequantize
        self._order: dict[str, np.ndarray] = {}
        self.shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        self.dtypes = dict.fromkeys(self.shapes, "F32")  # once decoded
        kinds = {tensor.tensor_type.name for tensor in self._tensors.values()}
        if foreign := kinds - set(STORED):
            raise UserError(f"{path} stores weights as {min(foreign)}; supported are {', '.join(STORED)}")

    def field(self, name: str, default: Any = None) -> Any:
        """Raises UserError if it is not there and has no default."""
        if name in self.fields:
            return self.fields[name].contents()
        if default is None:
            raise UserError(f"{self.path} lacks {name}; it is no file of a LLaMA that llama.cpp would run")
        return default

    def pair(self, heads: dict[str, int]) -> None:
        """Reads the rows of these tensors, of so many heads, in our order."""
        self._order = {name: paired_rows(self.shapes[name][0], n) for name, n in heads.items() if name in self.shapes}

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._tensors[name]
        rows = self._order[name][index[0]] if name in self._order else index[0]
        part = self._decode(tensor.data[rows], tensor.tensor_type)
        return part[(slice(None), *index[1:])]

    def storage(self, name: str) -> str:
        """How a tensor is stored."""
        return self._tensors[name].tensor_type.name

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """A file that is cut short or changed shows in as many ways as it has parts."""
    try:
        yield
    except BROKEN as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is not a whole GGUF file ({reason}); download it again") from None


def open_gguf(path: Path, home: AnyPath) -> tuple[Checkpoint, Tokenizer, dict[str, Any]]:
    """Weights; the tokenizer, written to the directory `home`; and what the file says of itself: fields of `Origin`.

    Raises UserError as `GgufFile`; for another architecture than llama, and what else cannot be run here; for tensors
    that are missing, unexpected or of another shape; for a tokenizer that is not byte-level BPE, or of an unknown kind.
    """
    file = GgufFile(path)
    with _whole(path):
        config = _config(file)
        tokenizer, licence = tokenizer_of_gguf(file, home), str(file.field("general.license", "")) or None
    file.fields.clear()  # a vocabulary of them, which need not lie beside the weights
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    file.pair(
        {
            name: count
            for kernel, count in heads.items()
            for name in source(f"layers/self_attn/{kernel}/kernel", config.num_hidden_layers, "gguf").tensors
        }
    )
    checkpoint = checked(Checkpoint(config, file, "gguf"), f"{path} does not hold the LLaMA that its fields describe")
    storage = file.storage("blk.0.ffn_up.weight")
    quantization = None if storage.startswith(("F", "BF")) else storage
    return checkpoint, tokenizer, {"quantization": quantization, "licence": licence, "sha256": file.sha256()}


def _config(file: GgufFile) -> LlamaConfig:
    if (parts := file.field("split.count", 0)) > 1:
        raise UserError(f"{file.path} is one of {parts} parts; join them by `llama-gguf-split --merge`")
    architecture = file.field("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file.path}: general.architecture is {architecture!r}; only 'llama' can be converted")
    if file.field("llama.expert_count", 0):
        raise UserError(f"{file.path}: llama.expert_count is {file.field('llama.expert_count')}; experts cannot be run")
    foreign = {name for name in file.fields if name.startswith("llama.")} - {f"llama.{key}" for key in FIELDS}
    for name in sorted(foreign):
        if value := file.field(name):
            raise UserError(f"{file.path}: {name} is {value!r}, which cannot be run here")
    if not file.field("llama.attention.causal", True):
        raise UserError(f"{file.path}: llama.attention.causal is false; a model that reads ahead cannot be run here")
    if "rope_freqs.weight" in file.shapes:
        raise UserError(
            f"{file.path} scales rotary positions by a table of its own (rope_freqs.weight); convert the Hugging Face "
            "release, whose config.json says how"
        )
    factor = float(file.field("llama.rope.scaling.factor", file.field("llama.rope.scale_linear", 1.0)))
    scaling = file.field("llama.rope.scaling.type", "linear")  # what llama.cpp takes for a factor alone
    if scaling not in ("none", "linear"):
        raise UserError(f"{file.path}: llama.rope.scaling.type is {scaling!r}; supported are none and linear")
    width, heads = file.field("llama.embedding_length"), file.field("llama.attention.head_count")
    head_dim = file.field("llama.attention.key_length", width // heads)
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.field(name, head_dim) != head_dim:
            raise UserError(f"{file.path}: {name} is {file.field(name)}, which cannot be run with heads of {head_dim}")
    ours = {
        "vocab_size": file.shapes.get("token_embd.weight", (0,))[0],
        "hidden_size": width,
        "intermediate_size": file.field("llama.feed_forward_length"),
        "num_hidden_layers": file.field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.field("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.field("llama.context_length"),
        "rms_norm_eps": float(file.field("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(file.field("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "dtype": "float32",
    }
    if scaling == "linear" and factor not in (0.0, 1.0):
        ours["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return from_dict(LlamaConfig, ours, str(file.path))


def tokenizer_of_gguf(file: GgufFile, home: AnyPath) -> Tokenizer:
    """Written to the directory `home` as a tokenizer.json, and read again. Raises UserError as `open_gguf`."""
    kind = file.field("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; of a GGUF only byte-level BPE ('gpt2') is read: convert "
            "the Hugging Face release, which has the tokenizer's own file"
        )
    tokens, kinds = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    special = {i: token for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != NORMAL}
    pre = file.field("tokenizer.ggml.pre", "default")
    begins = file.field("tokenizer.ggml.add_bos_token", pre in TIKTOKEN)
    begin = [file.field("tokenizer.ggml.bos_token_id")] if begins else []
    if begin and begin[0] not in range(len(tokens)):
        raise UserError(f"{file.path}: tokenizer.ggml.bos_token_id is {begin[0]}, but there are {len(tokens)} tokens")
    merges, end = file.field("tokenizer.ggml.merges"), file.field("tokenizer.ggml.eos_token_id")
    if end not in range(len(tokens)):
        raise UserError(f"{file.path}: tokenizer.ggml.eos_token_id is {end}, but there are {len(tokens)} tokens")
    try:
        text = tokenizer_json(tokens, merges, pre, special, begin)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    (home / BYTE_PAIRS).write_text(text)
    tokenizer = load_tokenizer(home / BYTE_PAIRS, begin, end)
    tokenizer.path = file.path  # what errors name
    return tokenizer
