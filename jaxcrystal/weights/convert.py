"""Models of others as model directories: Hugging Face, Meta, GGUF, and PEFT's adapters.

What the tokenizer is decides what becomes of the vocabulary. To a SentencePiece model [PAD] is added, as
crystal-text-llm does it, and rows that only pad stay behind (`vocabulary`). A byte-level BPE is left as it is: its end
of text fills rows of a batch, and rows without a token stay, without a logit.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxcrystal import locks, paths
from jaxcrystal.config import LlamaConfig, TextFormat, Weights
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import widest_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.model.quantize import quantizer
from jaxcrystal.paths import AnyPath, as_path
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.sentence_pieces import SentencePieceTokenizer, with_pad, without_pad
from jaxcrystal.texts.tokenizer import BYTE_PAIRS, SENTENCE_PIECES, Tokenizer, load_tokenizer
from jaxcrystal.weights.checkpoint_map import Checkpoint, open_adapters, open_checkpoint
from jaxcrystal.weights.fingerprint import Passing
from jaxcrystal.weights.gguf_files import open_gguf
from jaxcrystal.weights.named import find
from jaxcrystal.weights.resized_embeddings import check_embeddings, saved_embeddings
from jaxcrystal.weights.saved import (
    MODEL_FILE,
    Description,
    copy_of_training,
    read_description,
    restore,
    save_weights,
    write_description,
    written_whole,
)
from jaxcrystal.weights.vocabulary import check_rows


def convert(
    source: str | Path,
    out: str | AnyPath,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    weights: Weights = "float",
    *,
    base: str | AnyPath | None = None,
    pad_token: bool = True,
    vocab_multiple: int = 128,
) -> LlamaConfig:
    """LLaMA weights, or PEFT's adapters, as the model directory `out`: all at once or not.

    `source` is a directory of Hugging Face or Meta, a GGUF file, a directory of adapters, a name that `named.KNOWN`
    has, or a model's name at Hugging Face. `dtype` of the parameters is by default the source's, or bfloat16 for
    float16, which TPUs lack; the layers' kernels are stored as `weights` says, each as soon as it is loaded.

    `pad_token` gives a SentencePiece vocabulary without padding a piece [PAD] and its row; a row beyond the tokenizer's
    pieces that the source has already becomes [PAD]'s as it is, and further ones, which pad the source's vocabulary,
    stay behind. Embedding and head are stored with rows up to a multiple of `vocab_multiple`. Adapters need the model
    directory `base`; their vocabulary is its. `mesh` is by default one of all devices, or of as many as divide every
    parameter.

    Raises UserError if `out` is not empty, if the tokenizer does not fit, and as `find`, `open_checkpoint`, `open_gguf`
    and `open_adapters`.
    """
    if vocab_multiple < 1:
        raise UserError(f"vocab_multiple is {vocab_multiple}; it must be at least 1")
    out = as_path(out)
    path, origin = find(source)
    with locks.held(paths.on_disk(out)), written_whole(out) as partial:
        if (path / "adapter_config.json").exists():
            if dtype is not None:
                raise UserError(f"{path} holds adapters, which are float32 whatever the weights are; leave dtype out")
            if weights != "float":
                raise UserError(f"{path} holds adapters; convert their base with weights {weights!r}, not them")
            return _convert_adapters(path, base, partial, mesh)
        if base is not None:
            raise UserError(f"{path} holds no adapter_config.json: without adapters there is no use for a base")
        if path.suffix == ".gguf":
            checkpoint, tokenizer, found = open_gguf(path, partial)
            origin = replace(origin, **found)
        else:
            tokenizer, checkpoint = tokenizer_of(path), open_checkpoint(path)
        if not checkpoint.exact_in(dtype):
            origin = replace(origin, hub=None, revision=None)  # rounded, they are not its weights
        origin = replace(origin, rows=checkpoint.config.vocab_size)
        checkpoint, tokenizer = _with_rows(checkpoint, tokenizer, partial, pad_token, vocab_multiple)
        config = replace(checkpoint.config, weights=weights)
        each = Llama(checkpoint.config), Llama(config)  # as they are read, and as they are stored
        mesh = mesh or widest_mesh(lambda mesh: [abstract_variables(model, mesh) for model in each])
        store, read = quantizer(config, mesh), Passing()
        params = {
            name: store(name, read.seen(name, _finite(path, name, parameter)))
            for name, parameter in checkpoint.load(mesh, dtype)
        }
        save_weights(partial, {"params": unflatten_dict(params, sep="/")})
        ours = (path / MODEL_FILE).exists()  # an export, which says how its texts are written
        text = read_description(path).text if ours else TextFormat()
        if ours:
            copy_of_training(path, partial)
        description = Description(config, None, text, None, read.fingerprint, source=origin, **tokenizer.ends)
        write_description(partial, description, tokenizer)
    return config


@jax.jit  # or there would be an array of answers, one for each weight
def _all_finite(parameter: Array) -> Array:
    return jnp.isfinite(parameter).all()


def _finite(source: Path, name: str, parameter: Array) -> Array:
    if not _all_finite(parameter):
        wide = " (float16 has none above 65,504: take another --dtype)" if parameter.dtype == jnp.float16 else ""
        raise UserError(f"{source} gives nan or infinite numbers for {name}{wide}; download it again")
    return parameter


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer of a directory of Hugging Face or Meta. Raises UserError if there is none, or if two disagree."""
    first, second = directory / SENTENCE_PIECES, directory / BYTE_PAIRS
    if not first.exists():
        if not second.exists():
            raise UserError(
                f"{directory} has neither {SENTENCE_PIECES} nor {BYTE_PAIRS}; put the model's tokenizer there"
            )
        return load_tokenizer(second)
    tokenizer = load_tokenizer(first)
    if second.exists() and find_spec("tokenizers"):  # which a model that has the first does not need
        text = "Below is a bulk material:\n5.1 5.2 5.7\n90 90 120\nNa\n0.25 0.50 0.75\nCl\n[MASK]\n"
        if load_tokenizer(second, (), tokenizer.eos_id).encode(text) != tokenizer.encode(text):
            raise UserError(
                f"{first} and {second.name} beside it have different tokens for the same text; remove the one that is "
                "not this model's"
            )
    return tokenizer


def _with_rows(
    checkpoint: Checkpoint, tokenizer: Tokenizer, partial: AnyPath, pad_token: bool, multiple: int
) -> tuple[Checkpoint, Tokenizer]:
    """The checkpoint with the rows that its vocabulary shall have, and the tokenizer that goes with them."""
    form_of(TextFormat()).tables(tokenizer)  # refuses one that cannot write crystals, before all the weights are read
    check_rows(tokenizer, checkpoint.config.vocab_size)
    pieces = tokenizer.vocab_size
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return checkpoint.with_vocabulary(pieces, multiple, keep=True), tokenizer
    if pad_token and (padded := with_pad(tokenizer.file)) != tokenizer.file:
        pieces += 1
        (partial / SENTENCE_PIECES).write_bytes(padded)
        tokenizer = load_tokenizer(partial / SENTENCE_PIECES)
    return checkpoint.with_vocabulary(pieces, multiple), tokenizer


def _convert_adapters(source: Path, base: str | AnyPath | None, partial: AnyPath, mesh: Mesh | None) -> LlamaConfig:
    if base is None:
        raise UserError(f"{source} holds adapters; name the model directory that they belong to: --base DIR")
    base = as_path(base)
    description = read_description(base)
    if description.lora is not None:
        raise UserError(f"base {base} has adapters of its own; give the model that it was trained on")
    checkpoint, tokenizer = open_adapters(source, description.model), description.tokenizer(base)
    adapted = Llama(description.model, checkpoint.lora)
    mesh = mesh or widest_mesh(lambda mesh: abstract_variables(adapted, mesh))
    if copies := set(saved_embeddings(checkpoint).values()):
        wanted = flatten_dict(abstract_variables(Llama(description.model), mesh), sep="/")
        part = {name: leaf for name, leaf in wanted.items() if name.removeprefix("params/") in copies}
        _, weights = restore(base, unflatten_dict(part, sep="/"), part=True)
        padded = isinstance(tokenizer, SentencePieceTokenizer) and without_pad(tokenizer.file) != tokenizer.file
        params = flatten_dict(weights["params"], sep="/")
        check_embeddings(source, checkpoint, params, tokenizer.vocab_size - padded)
    save_weights(partial, {"lora": unflatten_dict(dict(checkpoint.load(mesh)), sep="/")})
    ours = Description(
        description.model,
        checkpoint.lora,
        description.text,
        paths.relative(base, partial),
        description.float_checksum,
        **tokenizer.ends,
    )
    write_description(partial, ours, tokenizer)
    return description.model
