"""Models for others to load: PEFT's adapters, or a whole LLaMA in a directory of Hugging Face.

    --format peft    adapter_model.safetensors, adapter_config.json
    --format hf      model.safetensors, or model-0000i-of-0000n.safetensors with their index; config.json,
                     generation_config.json; tokenizer.model or tokenizer.json, tokenizer_config.json
                     adapters are merged into the weights; rows that only pad the vocabulary stay behind
                     and model.json with what training left beside it: the directory is one of ours too

Files are written one at a time, and the host holds the tensors of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxcrystal import locks, paths
from jaxcrystal.config import LoraConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import widest_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.model.lora import merge
from jaxcrystal.paths import AnyPath, as_path
from jaxcrystal.texts.sentence_pieces import SentencePieceTokenizer, without_pad
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.checkpoint_map import EMBEDDINGS, to_hf, to_peft
from jaxcrystal.weights.config_map import hf_config, peft_config
from jaxcrystal.weights.saved import (
    HF_CONFIG,
    MODEL_FILE,
    Description,
    Origin,
    SavedModel,
    copy_of_training,
    load_model,
    model_directory,
    read_description,
    read_origin,
    write_json,
    written_whole,
)

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    out: Path
    files: int  #: of weights
    tensors: int
    bytes: int  #: of the tensors


def export(
    model_dir: str | AnyPath,
    out: str | Path,
    format: Literal["peft", "hf"],
    *,
    shard_size: str = "5GB",
    base_name: str | None = None,
    pad_token: bool = True,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> ExportReport:
    """The model in `model_dir` as the directory `out`, all at once or not at all.

    `shard_size` (such as 500MB) is how large one file of weights may become, unless one tensor alone is larger.
    `base_name` is what PEFT loads below the adapters: the name at Hugging Face, or the folder, of what `convert` made
    the base from; by default the name that `convert` was given, if it loaded just these weights from there. Without
    `pad_token`, a [PAD] that ends the vocabulary stays behind, row and piece.

    `dtype` (float32, bfloat16) is by default that of the weights; `mesh` one of all devices, or of as many as divide
    every parameter.

    Raises UserError if `out` is not empty or cannot be written, and as `load_model`; for peft, if the model has no
    adapters on a base, or without a `base_name` that PEFT can load; for hf, if its weights are int8 or nf4.
    """
    model_dir, out, size = model_directory(model_dir), paths.local(out), parse_size(shard_size)
    description = read_description(model_dir)
    if format == "peft" and dtype is not None:
        raise UserError("PEFT's adapters are float32, as they are trained; leave dtype out")
    if format == "peft" and (description.lora is None or description.base is None):
        raise UserError(f"{model_dir} has no adapters on a base, which is what PEFT loads; export it with --format hf")
    revision, origin = None, read_origin(model_dir, description)
    if format == "peft" and base_name is None:
        base_name, revision = _on_hub(paths.joined(model_dir, description.base))
    if format == "peft" and (base_name is None or _ours_alone(as_path(base_name))):
        base = paths.joined(model_dir, description.base)
        what = "PEFT needs to know its base" if base_name is None else f"PEFT cannot load {base_name}"
        raise UserError(
            f"{what}: give --base-name what {base} was converted from, by its name at Hugging Face (such as "
            "meta-llama/Llama-2-7b-hf) or as a folder; where it was trained here, give it what `jaxcrystal export "
            f"--model {base} --format hf` writes"
        )
    if format == "hf" and description.model.weights != "float":
        raise UserError(
            f"{model_dir} stores its weights as {description.model.weights}, which transformers does not read; export "
            "its adapters with --format peft, or train them on a base converted with --weights float"
        )
    with locks.held(out), written_whole(out) as partial:
        trained = Llama(description.model, description.lora)
        model = load_model(model_dir, mesh or widest_mesh(lambda mesh: abstract_variables(trained, mesh)))
        if format == "peft":
            return _export_peft(model, partial, out, base_name, revision)
        copy_of_training(model_dir, partial)
        if description.base is not None or dtype not in (None, stored_dtype(model)):
            model = replace(model, float_checksum=None)  # others than those that were converted
            origin = origin and replace(origin, hub=None, revision=None)
        return _export_hf(model, partial, out, size, pad_token, origin, dtype)


def _on_hub(base: AnyPath) -> tuple[str | None, str | None]:
    """Name and commit of the model at Hugging Face whose weights the base has, not only others of the same name."""
    there = read_description(base)
    found = there.source is not None and there.model.weights == "float"
    return (there.source.hub, there.source.revision) if found else (None, None)


def _ours_alone(directory: AnyPath) -> bool:
    """Whether it is a model directory, and none of Hugging Face too."""
    return (directory / MODEL_FILE).exists() and not (directory / HF_CONFIG).exists()


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB or 4.5GB. Raises UserError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"the size {text!r} is not of the form 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def _export_peft(model: SavedModel, partial: Path, out: Path, base: str, revision: str | None) -> ExportReport:
    tensors = dict(to_peft(model.adapters, model.config.num_hidden_layers))
    _save(partial / "adapter_model.safetensors", tensors)
    _write_json(partial / "adapter_config.json", peft_config(model.lora, base, revision))
    return ExportReport(out, 1, len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def _export_hf(
    model: SavedModel,
    partial: Path,
    out: Path,
    limit: int,
    pad_token: bool,
    origin: Origin | None,
    dtype: str | None,
) -> ExportReport:
    tokenizer, rows = model.tokenizer, model.config.vocab_size
    kept, settings = tokenizer.file, {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
        if not pad_token and (kept := without_pad(tokenizer.file)) != tokenizer.file and tokenizer.vocab_size == rows:
            rows -= 1  # the last row is [PAD]'s
    else:
        rows = (origin and origin.rows) or model.config.padded_vocab_size  # some without a token
    (partial / tokenizer.file_name).write_bytes(kept)
    special = load_tokenizer(partial / tokenizer.file_name, **tokenizer.ends).special
    config = replace(model.config, vocab_size=rows, vocab_multiple=1)

    with jax.default_matmul_precision("highest"):  # or an accelerator merges adapters in bfloat16
        tensors = _merged(model, rows)
        dtype = dtype or stored_dtype(model)
        home, total = _save_split(partial, ((name, tensor.astype(jnp.dtype(dtype))) for name, tensor in tensors), limit)
    files = sorted(set(home.values()))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": home}
        _write_json(partial / "model.safetensors.index.json", index)
    ids = {"bos_token_id": None} | {f"{name}_token_id": i for name, (_, i) in special.items() if name != "unk"}
    _write_json(partial / "config.json", hf_config(config, dtype, ids))
    _write_json(partial / "generation_config.json", ids)
    tokens = {f"{name}_token": piece for name, (piece, _) in special.items()}
    _write_json(partial / "tokenizer_config.json", {**settings, **tokens})
    shape = replace(model.config, vocab_size=rows)
    saved = Description(shape, None, model.text, None, model.float_checksum, source=origin, **tokenizer.ends)
    write_json(partial, saved)
    return ExportReport(out, len(files), len(home), total)


def stored_dtype(model: SavedModel) -> str:
    """Of the weights."""
    return model.params["embed_tokens"]["embedding"].dtype.name


def _merged(model: SavedModel, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model without adapters that computes the same, its vocabulary cut to `rows`."""
    params, adapters = (flatten_dict(tree or {}, sep="/") for tree in (model.params, model.adapters))
    for path, value in params.items():
        module, _, last = path.rpartition("/")
        if last == "kernel" and f"{module}/a" in adapters:
            value = _Adapted(value, adapters[f"{module}/a"], adapters[f"{module}/b"], model.lora)
        elif path in EMBEDDINGS:
            value = value[:rows] if path.endswith("embedding") else value[:, :rows]
        yield from to_hf({path: value}, model.config.num_hidden_layers)


@dataclass(frozen=True)
class _Adapted:
    """The kernels of all layers with their adapters merged, each merged when it is indexed."""

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    lora: LoraConfig

    def __getitem__(self, i: int) -> jax.Array:
        return merge({"kernel": self.kernel[i]}, {"a": self.a[i], "b": self.b[i]}, self.lora)["kernel"]


def _save_split(directory: Path, tensors: Iterator[tuple[str, np.ndarray]], limit: int) -> tuple[dict[str, str], int]:
    """Saves `tensors` in files of at most `limit` bytes; returns the file of each, and the bytes of all."""
    files: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = 0

    def save() -> None:
        files.append(list(waiting))
        _save(directory / f"{len(files)}.partial", waiting)
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(x.nbytes for x in waiting.values()) + tensor.nbytes > limit:
            save()
        waiting[name] = tensor
        total += tensor.nbytes
    save()
    home = {}
    for i, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        (directory / f"{i}.partial").replace(directory / file)
        home |= dict.fromkeys(names, file)
    return home, total


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path.name}: {error}") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
