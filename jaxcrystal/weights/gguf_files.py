"""GGUF files, llama.cpp's format: configuration, tokenizer and weights in one.

Matrices may be quantized, in blocks along a row: a part of them is decoded when it is read, to float32, by the `gguf`
package. Rows of queries and keys lie as Meta has them (`meta_shards`), the two of a rotated pair side by side.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrystal.config import LlamaConfig, from_dict
from jaxcrystal.crystals.byte_pairs import tokenizer_json
from jaxcrystal.crystals.tokenizer import BYTE_PAIRS, Tokenizer, load_tokenizer
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.weights.checkpoint_map import Checkpoint, checked, source
from jaxcrystal.weights.meta_shards import paired_rows
from jaxcrystal.weights.tensor_files import Index

NORMAL = 1  #: of `tokenizer.ggml.token_type`: text; other kinds are not
STORED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class GgufFile:
    """The tensors and fields of a file. Raises UserError if it is none, if it is cut short, or for another storage."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UserError(f"{path} needs the package gguf; pip install 'jaxcrystal[gguf]'") from None
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OSError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is not a whole GGUF file ({reason}); download it again") from None
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
        if name in self._fields:
            return self._fields[name].contents()
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

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def open_gguf(path: Path, home: AnyPath) -> tuple[Checkpoint, Tokenizer, dict[str, Any]]:
    """Weights; the tokenizer, written to the directory `home`; and what the file says of itself: fields of `Origin`.

    Raises UserError as `GgufFile`; for another architecture than llama, and what else cannot be run here; for tensors
    that are missing, unexpected or of another shape; for a tokenizer that is not byte-level BPE, or of an unknown kind.
    """
    file = GgufFile(path)
    config = _config(file)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    file.pair(
        {
            name: count
            for kernel, count in heads.items()
            for name in source(f"layers/self_attn/{kernel}/kernel", config.num_hidden_layers, "gguf").tensors
        }
    )
    checkpoint = checked(Checkpoint(config, file, "gguf"), f"{path} does not hold the LLaMA that its fields describe")
    storage = file._tensors["blk.0.ffn_up.weight"].tensor_type.name
    found = {
        "quantization": None if storage.startswith(("F", "BF")) else storage,
        "licence": str(file.field("general.license", "")) or None,
        "sha256": file.sha256(),
    }
    return checkpoint, tokenizer_of_gguf(file, home), found


def _config(file: GgufFile) -> LlamaConfig:
    architecture = file.field("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file.path}: general.architecture is {architecture!r}; only 'llama' can be converted")
    if file.field("llama.expert_count", 0):
        raise UserError(f"{file.path}: llama.expert_count is {file.field('llama.expert_count')}; experts cannot be run")
    if "rope_freqs.weight" in file.shapes:
        raise UserError(
            f"{file.path} scales rotary positions by a table of its own (rope_freqs.weight); convert the Hugging Face "
            "release, whose config.json says how"
        )
    scaling = file.field("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UserError(f"{file.path}: llama.rope.scaling.type is {scaling!r}; supported are none and linear")
    width, heads = file.field("llama.embedding_length"), file.field("llama.attention.head_count")
    head_dim = file.field("llama.attention.key_length", width // heads)
    if file.field("llama.rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{file.path} rotates only a part of each head (llama.rope.dimension_count)")
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
    if scaling == "linear":
        ours["rope_scaling"] = {"rope_type": "linear", "factor": float(file.field("llama.rope.scaling.factor"))}
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
    begin = [file.field("tokenizer.ggml.bos_token_id")] if file.field("tokenizer.ggml.add_bos_token", False) else []
    pre = file.field("tokenizer.ggml.pre", "default")
    try:
        text = tokenizer_json(tokens, file.field("tokenizer.ggml.merges"), pre, special, begin)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    (home / BYTE_PAIRS).write_text(text)
    return load_tokenizer(home / BYTE_PAIRS, begin, file.field("tokenizer.ggml.eos_token_id"))
