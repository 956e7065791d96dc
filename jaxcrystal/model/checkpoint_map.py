"""Hugging Face checkpoints of LLaMA, onto a mesh and back: one table says which tensor is which parameter.

Reading and writing go through the same rows. A tensor of a layer becomes one slice of the parameter that stacks all
layers; PyTorch's linear weights are [out, in], our kernels [in, out].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxcrystal.config import LlamaConfig, Weights, from_dict
from jaxcrystal.errors import UserError
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.model.quantize import quantizer

#: parameter path (a regex) -> name of the tensor, and whether it is transposed
TABLE = (
    (r"embed_tokens/embedding", r"model.embed_tokens.weight", False),
    (r"layers/(\w+_layernorm|input_layernorm)/scale", r"model.layers.{layer}.\1.weight", False),
    (r"layers/(self_attn|mlp)/(\w+)/kernel", r"model.layers.{layer}.\1.\2.weight", True),
    (r"norm/scale", r"model.norm.weight", False),
    (r"lm_head/kernel", r"lm_head.weight", True),
)

#: Tensors that carry nothing we need: RoPE's frequencies follow from the config, a tied head is the embedding.
IGNORED = r".*\.rotary_emb\.inv_freq"
IGNORED_WHEN_TIED = r"lm_head\.weight"


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from: one tensor, or one for each layer."""

    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool


def source(path: str, layers: int) -> Source:
    """The row of the table that holds the parameter at `path` (names joined by `/`)."""
    for pattern, template, transposed in TABLE:
        if match := re.fullmatch(pattern, path):
            name = match.expand(template)
            stacked = "{layer}" in name
            names = [name.format(layer=i) for i in range(layers)] if stacked else [name]
            return Source(tuple(names), stacked, transposed)
    raise KeyError(path)


def to_hf(params: dict[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a Hugging Face checkpoint, by name, one at a time on the host; the opposite of `load_hf`."""
    for path, value in flatten_dict(params, sep="/").items():
        row = source(path, layers)
        for i, name in enumerate(row.tensors):
            tensor = np.asarray(value[i] if row.stacked else value)
            yield name, np.ascontiguousarray(tensor.T if row.transposed else tensor)


def load_hf(
    directory: str | Path, mesh: Mesh, dtype: DTypeLike | None = None, weights: Weights = "float"
) -> tuple[LlamaConfig, dict[str, Any]]:
    """The config and the parameters of a Hugging Face directory with `config.json` and safetensors.

    Each device's part of each parameter is read from the files on its own, so that the host holds no more than one
    part at a time. `dtype` of the parameters is by default that of the config (float16, which TPUs lack, becomes
    bfloat16). The layers' kernels are stored as `weights` says, each as soon as it is loaded. Raises UserError: for a
    config that is not such a LLaMA's; once, for all tensors that are missing, unexpected or of another shape, by name;
    for a file that cannot be read.
    """
    directory = Path(directory)
    config = read_config(directory)
    files = _tensor_files(directory)
    wanted = flatten_dict(abstract_variables(Llama(config), mesh)["params"], sep="/")
    sources = {path: source(path, config.num_hidden_layers) for path in wanted}
    _check(directory, config, files, wanted, sources)
    dtype = np.dtype(dtype or config.dtype)

    def load(leaf: jax.ShapeDtypeStruct, row: Source) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            if not row.stacked:
                return _read(files, row, row.tensors[0], index).astype(dtype)
            shape = [len(range(size)[along]) for along, size in zip(index, leaf.shape, strict=True)]
            stack = np.empty(shape, dtype)
            for layer, name in zip(stack, row.tensors[index[0]], strict=True):
                layer[:] = _read(files, row, name, index[1:])
            return stack

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part, dtype=dtype)

    config = replace(config, weights=weights)
    store = quantizer(config, mesh)
    params = {path: store(path, load(wanted[path], sources[path])) for path in wanted}
    return config, unflatten_dict(params, sep="/")


def read_config(directory: Path) -> LlamaConfig:
    """`config.json` of transformers, old or new, as a LlamaConfig. Raises UserError for what cannot be run here."""
    path = directory / "config.json"
    theirs = _read_json(path)
    if theirs.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {theirs.get('model_type')!r}; only 'llama' can be converted")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if theirs.get(key, only) != only:
            raise UserError(f"{path}: {key} is {theirs[key]!r}; only {only!r} is supported")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if key not in theirs]:
        raise UserError(f"{path}: {', '.join(missing)} missing; is it the config of a LLaMA?")
    heads = theirs["num_attention_heads"]
    # What a config leaves out has the value that transformers gives it.
    ours = {key: theirs[key] for key in required} | {
        "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
        "max_position_embeddings": theirs.get("max_position_embeddings", 2048),
        "rms_norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": theirs.get("tie_word_embeddings", False),
        "dtype": "float32" if _stated_dtype(theirs) == "float32" else "bfloat16",
        **_rope(theirs, path),
    }
    return from_dict(LlamaConfig, ours, str(path))


def _stated_dtype(theirs: dict[str, Any]) -> str:
    return theirs.get("dtype") or theirs.get("torch_dtype") or "float32"


def _rope(theirs: dict[str, Any], path: Path) -> dict[str, Any]:
    """Before transformers 5: rope_theta beside rope_scaling; since then: both in rope_parameters."""
    stated = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = stated.get("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = stated.get("rope_type", stated.get("type", "default"))
    scaling = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in scaling:
        raise UserError(f"{path}: rope_type is {kind!r}; supported are {', '.join(scaling)}")
    if missing := [key for key in scaling[kind] if key not in stated]:
        raise UserError(f"{path}: rope_type {kind!r} needs {', '.join(missing)}")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **{key: stated[key] for key in scaling[kind]}}}


def _tensor_files(directory: Path) -> dict[str, Path]:
    """In which file each tensor is said to be; the file may be missing."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map; download or save the checkpoint again")
        return {name: directory / file for name, file in weight_map.items()}
    if not single.exists():
        raise UserError(f"{directory} holds neither {single.name} nor {index.name}; save the model as safetensors")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def _check(
    directory: Path,
    config: LlamaConfig,
    files: dict[str, Path],
    wanted: dict[str, jax.ShapeDtypeStruct],
    sources: dict[str, Source],
) -> None:
    """Raises one UserError for all tensors that are missing, unexpected or of another shape than `wanted`."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, row in sources.items():
        shape = wanted[path].shape[row.stacked :]
        expected |= dict.fromkeys(row.tensors, shape[::-1] if row.transposed else shape)
    found: dict[str, tuple[int, ...]] = {}
    absent = {file for file in files.values() if not file.exists()}
    for file in sorted(set(files.values()) - absent):
        with _open(file) as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    problems = []
    for name, shape in expected.items():
        if name not in found:
            where = f" ({files[name].name} is not there)" if files.get(name) in absent else ""
            problems.append(f"{name}: expected {list(shape)}, missing{where}")
        elif found[name] != shape:
            problems.append(f"{name}: expected {list(shape)}, found {list(found[name])}")
    ignored = f"{IGNORED}|{IGNORED_WHEN_TIED}" if config.tie_word_embeddings else IGNORED
    for name in found.keys() - expected.keys():
        if not re.fullmatch(ignored, name):
            problems.append(f"{name}: not expected, found {list(found[name])}")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise UserError(f"{directory} does not hold the LLaMA that its config.json describes:\n  {listed}")


def _read(files: dict[str, Path], row: Source, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """This part of a parameter (of one layer), and nothing else of the file."""
    with _open(files[name]) as file:
        tensor = file.get_slice(name)
        return tensor[index[::-1]].T if row.transposed else tensor[index]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download or save it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object, found {type(data).__name__}")
    return data
