"""Checkpoints of Hugging Face, Meta, GGUF and PEFT, onto a mesh and back: `source` says which tensor is what.

Reading and writing both ask it. A tensor of a layer becomes one slice of the parameter that stacks all
layers; PyTorch's linear weights are [out, in], our kernels and adapters [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.weights.config_map import read_hf, read_meta, read_peft
from jaxcrystal.weights.meta_shards import MetaShards
from jaxcrystal.weights.tensor_files import Index, TensorFiles, Tensors
from jaxcrystal.weights.vocabulary import Vocabulary

#: A parameter, and what Meta and GGUF call its tensor; Hugging Face calls it as we do. All end with .weight.
TABLE = (
    ("embed_tokens/embedding", "tok_embeddings", "token_embd"),
    ("layers/input_layernorm/scale", "layers.{}.attention_norm", "blk.{}.attn_norm"),
    ("layers/self_attn/q_proj/kernel", "layers.{}.attention.wq", "blk.{}.attn_q"),
    ("layers/self_attn/k_proj/kernel", "layers.{}.attention.wk", "blk.{}.attn_k"),
    ("layers/self_attn/v_proj/kernel", "layers.{}.attention.wv", "blk.{}.attn_v"),
    ("layers/self_attn/o_proj/kernel", "layers.{}.attention.wo", "blk.{}.attn_output"),
    ("layers/post_attention_layernorm/scale", "layers.{}.ffn_norm", "blk.{}.ffn_norm"),
    ("layers/mlp/gate_proj/kernel", "layers.{}.feed_forward.w1", "blk.{}.ffn_gate"),
    ("layers/mlp/up_proj/kernel", "layers.{}.feed_forward.w3", "blk.{}.ffn_up"),
    ("layers/mlp/down_proj/kernel", "layers.{}.feed_forward.w2", "blk.{}.ffn_down"),
    ("norm/scale", "norm", "output_norm"),
    ("lm_head/kernel", "output", "output"),
)

#: The parameters that have a row (or column) for each piece of the vocabulary.
EMBEDDINGS = ("embed_tokens/embedding", "lm_head/kernel")

#: How PEFT calls the adapters of a kernel: as Hugging Face calls the kernel, between these.
PEFT_PREFIX, PEFT_SUFFIX = "base_model.model.", {"a": ".lora_A", "b": ".lora_B"}

#: Tensors that carry nothing we need: RoPE's frequencies follow from the config, a tied head is the embedding.
IGNORED = r".*\.rotary_emb\.inv_freq|rope\.freqs"
IGNORED_WHEN_TIED = r"lm_head\.weight"

#: What safetensors and numpy call the numbers that weights may be.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Dialect = Literal["hf", "meta", "gguf", "peft"]


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from: one tensor, or one for each layer."""

    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool


def source(path: str, layers: int, dialect: Dialect = "hf") -> Source:
    """Where the parameter at `path` (names joined by `/`) lies. Raises KeyError if a dialect has no name for it."""
    module, _, last = path.rpartition("/")
    if dialect in ("hf", "peft"):
        name = f"model.{module}".replace("/", ".").replace(".layers.", ".layers.{}.")
        name = name.removeprefix("model.") if module == "lm_head" else name
        if dialect == "peft":
            name = f"{PEFT_PREFIX}{name}{PEFT_SUFFIX.get(last, '')}"
    else:
        name = {parameter: (meta, gguf) for parameter, meta, gguf in TABLE}[path][dialect == "gguf"]
    ending = "bias" if last == "bias" else "weight"
    stacked = "{}" in name
    names = [f"{name}.{ending}".format(i) for i in range(layers if stacked else 1)]
    return Source(tuple(names), stacked, transposed=last in ("kernel", *PEFT_SUFFIX))


def to_hf(params: Mapping[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a Hugging Face checkpoint, by name, one at a time on the host; the opposite of `load_hf`."""
    return _to_files(params, layers, "hf")


def to_peft(adapters: Mapping[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Likewise every tensor of PEFT's file of adapters."""
    return _to_files(adapters, layers, "peft")


def _to_files(variables: Mapping[str, Any], layers: int, dialect: Dialect) -> Iterator[tuple[str, np.ndarray]]:
    for path, value in flatten_dict(dict(variables), sep="/").items():
        row = source(path, layers, dialect)
        for i, name in enumerate(row.tensors):
            tensor = np.asarray(value[i] if row.stacked else value)
            yield name, np.ascontiguousarray(tensor.T if row.transposed else tensor)


@dataclass(frozen=True)
class Checkpoint:
    """Weights as somebody else stored them, whole and of the right shapes; nothing of them is loaded yet."""

    config: LlamaConfig
    tensors: Tensors
    dialect: Dialect
    lora: LoraConfig | None = None  #: of adapters, which are then all that the checkpoint holds

    def load(self, mesh: Mesh, dtype: DTypeLike | None = None) -> Iterator[tuple[str, jax.Array]]:
        """Each parameter, by path, on its devices.

        Each device's part of each tensor is read from the files on its own, so that beside what the devices hold, the
        host holds one tensor at a time. `dtype` is by default that of the config (float16, which TPUs lack, becomes
        bfloat16); adapters are float32.
        """
        dtype = np.dtype(np.float32 if self.lora else dtype or self.config.dtype)
        for path, leaf in _wanted(self.config, self.lora, mesh).items():
            row = source(path, self.config.num_hidden_layers, self.dialect)
            yield path, _load(self.tensors, row, leaf, dtype)

    def exact_in(self, dtype: DTypeLike | None) -> bool:
        """Whether no number is rounded in `dtype` (None: the config's)."""
        own = {np.dtype(FLOATS.get(name, name)) for name in self.tensors.dtypes.values()}
        return all(np.can_cast(each, np.dtype(dtype or self.config.dtype), "safe") for each in own)

    def with_vocabulary(self, pieces: int, multiple: int, keep: bool = False) -> Checkpoint:
        """With a row for each of `pieces` (`Vocabulary`), and rows of zeros up to a multiple, which get no logit.

        With `keep`, rows that the source has beyond `pieces` stay as they are, and get no logit either.
        """
        if keep:
            rows = -(-self.config.vocab_size // multiple) * multiple
            config, pieces = replace(self.config, vocab_size=pieces, vocab_multiple=rows), self.config.vocab_size
        else:
            config = replace(self.config, vocab_size=pieces, vocab_multiple=multiple)
        paths = EMBEDDINGS[: 1 if config.tie_word_embeddings else 2]
        names = tuple(source(path, 1, self.dialect).tensors[0] for path in paths)
        tensors = Vocabulary(self.tensors, names, pieces, config.padded_vocab_size)
        return replace(self, config=config, tensors=tensors)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """The LLaMA in a directory of Hugging Face (config.json) or Meta (params.json).

    Raises UserError: for a config that is not such a LLaMA's; once, for all tensors that are missing, unexpected or of
    another shape, by name; for a file that cannot be read.
    """
    directory = Path(directory)
    if (directory / "params.json").exists() and not (directory / "config.json").exists():
        return _open_meta(directory)
    config = read_hf(directory)
    files = TensorFiles(directory)
    complaint = f"{directory} does not hold the LLaMA that its config.json describes"
    return checked(Checkpoint(config, files, "hf"), complaint, files.lost)


def _open_meta(directory: Path) -> Checkpoint:
    shards = MetaShards(directory)
    head = source("lm_head/kernel", 1, "meta").tensors[0]
    half = {"float16", "bfloat16"} & set(shards.dtypes.values())
    config = read_meta(directory, max(shards.rows(head), 1), "bfloat16" if half else "float32")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    rotary = {
        name: count
        for kernel, count in heads.items()
        for name in source(f"layers/self_attn/{kernel}/kernel", config.num_hidden_layers, "meta").tensors
    }
    shards.join(_expected(config, None, "meta"), rotary)
    return checked(
        Checkpoint(config, shards, "meta"), f"{directory} does not hold the LLaMA that its params.json describes"
    )


def open_adapters(directory: str | Path, config: LlamaConfig) -> Checkpoint:
    """PEFT's adapters for a model of this config, embedding and head beside them or not (`resized_embeddings`).

    Raises UserError as `open_checkpoint` does.
    """
    directory = Path(directory)
    files = TensorFiles(directory, ("adapter_model.safetensors", "adapter_model.bin"))
    if named := next((name for name in files.shapes if re.search(r"\.lora_[AB]\.\w+\.weight$", name)), None):
        raise UserError(
            f"{directory}: {named} bears the name that it has within a living model; save the adapters with PEFT's "
            "`model.save_pretrained(DIR)`, which leaves the adapter's name out, and convert DIR"
        )
    found = {match[1] for name in files.shapes if (match := re.search(r"\.(\w+)\.lora_A\.", name))}
    checkpoint = Checkpoint(config, files, "peft", read_peft(directory, found))
    complaint = f"{directory} does not hold the adapters that its adapter_config.json describes, for this base"
    return checked(checkpoint, complaint)


def load_hf(directory: str | Path, mesh: Mesh, dtype: DTypeLike | None = None) -> tuple[LlamaConfig, dict[str, Any]]:
    """The config and all parameters of `open_checkpoint`, its vocabulary as it is."""
    checkpoint = open_checkpoint(directory)
    return checkpoint.config, unflatten_dict(dict(checkpoint.load(mesh, dtype)), sep="/")


def _wanted(config: LlamaConfig, lora: LoraConfig | None, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a checkpoint: all of a model, or its adapters alone where there are any."""
    variables = abstract_variables(Llama(config, lora), mesh)
    return flatten_dict(variables["params" if lora is None else "lora"], sep="/")


def _expected(config: LlamaConfig, lora: LoraConfig | None, dialect: Dialect) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that there should be."""
    expected = {}
    for path, leaf in _wanted(config, lora, make_mesh(MeshConfig(1, 1, 1), jax.local_devices())).items():
        row = source(path, config.num_hidden_layers, dialect)
        shape = leaf.shape[row.stacked :]
        expected |= dict.fromkeys(row.tensors, shape[::-1] if row.transposed else shape)
    return expected


SHOWN = 10  #: problems of a checkpoint that are told one by one


def checked(checkpoint: Checkpoint, complaint: str, lost: Mapping[str, str] = {}) -> Checkpoint:
    """Itself. Raises one UserError for all tensors that are missing, unexpected, misshapen, or no floating point."""
    found, dtypes = checkpoint.tensors.shapes, checkpoint.tensors.dtypes
    expected = _expected(checkpoint.config, checkpoint.lora, checkpoint.dialect)
    ignored = [IGNORED]
    if checkpoint.config.tie_word_embeddings:
        ignored.append(IGNORED_WHEN_TIED)
    if checkpoint.lora is not None:
        ignored += (re.escape(source(path, 1, "peft").tensors[0]) for path in EMBEDDINGS)
    problems = []
    for name, shape in expected.items():
        if name not in found:
            where = f" ({lost[name]} is not there)" if name in lost else ""
            problems.append(f"{name}: expected {list(shape)}, missing{where}")
        elif found[name] != shape:
            problems.append(f"{name}: expected {list(shape)}, found {list(found[name])}")
        elif dtypes[name] not in {*FLOATS, *FLOATS.values()}:
            problems.append(f"{name}: expected floating-point numbers, found {dtypes[name]}; is it quantized?")
    for name in found.keys() - expected.keys():
        if not re.fullmatch("|".join(ignored), name):
            problems.append(f"{name}: not expected, found {list(found[name])}")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        listed = "\n  ".join([*sorted(problems)[:SHOWN], *more])
        raise UserError(f"{complaint}:\n  {listed}")
    return checkpoint


def _load(tensors: Tensors, row: Source, leaf: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.Array:
    """One parameter. Layers are written into their stack one after the other, on the devices."""
    if not row.stacked:
        return _load_tensor(tensors, row, row.tensors[0], leaf.shape, leaf.sharding, dtype)
    stack = jnp.zeros(leaf.shape, dtype, device=leaf.sharding)
    one = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    for i, name in enumerate(row.tensors):
        layer = _load_tensor(tensors, row, name, leaf.shape[1:], one, dtype)
        stack = _write_layer(stack, layer, i, leaf.sharding).block_until_ready()  # the host's copy can go
    return stack


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write_layer(stack: jax.Array, layer: jax.Array, i: jax.Array, sharding: NamedSharding) -> jax.Array:
    stack = jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
    return jax.lax.with_sharding_constraint(stack, sharding)


def _load_tensor(
    tensors: Tensors, row: Source, name: str, shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype
) -> jax.Array:
    """One tensor, each device's part read on its own, and once for devices that hold the same part."""
    read: dict[str, np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        if (key := str(index)) not in read:
            part = tensors.read(name, index[::-1]).T if row.transposed else tensors.read(name, index)
            read[key] = np.array(part, dtype, order="C")  # a copy: never a window into the file
        return read[key]

    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)
