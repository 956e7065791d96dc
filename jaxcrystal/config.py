"""Every setting of the package, as frozen dataclasses: defaults <- YAML file <- command line.

A recipe is a YAML file whose keys are the fields below; `load(Recipe, path, ["optimizer.learning_rate=1e-3"])`
reads it. A key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from jaxcrystal.errors import UserError

T = TypeVar("T")

#: How the kernels of a model's layers are stored (`jaxcrystal.model.kernels`).
Weights = Literal["float", "int8", "nf4"]
NF4_BLOCK = 64  #: inputs that share one scale in nf4

#: The labels a prompt can state, in the order in which tables hold them (names as CDVAE publishes them).
ATTRIBUTES = (
    "pretty_formula",
    "elements",
    "spacegroup.number",
    "formation_energy_per_atom",
    "band_gap",
    "e_above_hull",
)


def _at_least_one(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{prefix}{name} is {getattr(config, name)}; it must be at least 1")


@dataclass(frozen=True)
class TextFormat:
    """How a crystal is written as text (arXiv 2402.04379, figure 2)."""

    coord_decimals: int = 2  #: decimals of the fractional coordinates, 1 to 6
    length_decimals: int = 1  #: decimals of a, b, c in Å, 1 to 4
    angle_decimals: int = 0  #: decimals of α, β, γ in degrees, 0 to 2
    paper_compat: bool = False  #: the original's quirks: angles truncated, a coordinate may read 1.00

    def __post_init__(self) -> None:
        for name, low, high in (("coord_decimals", 1, 6), ("length_decimals", 1, 4), ("angle_decimals", 0, 2)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"text.{name} is {getattr(self, name)}; it must lie between {low} and {high}")


@dataclass(frozen=True)
class Augment:
    """What is drawn afresh for a crystal each time it is read."""

    translate: bool = True  #: shift all atoms by one vector of [0, 1)³
    permute: bool = False  #: shuffle the order of the atoms
    infill: float = 0.34  #: probability of the infilling task instead of generation
    attributes: tuple[str, ...] = ATTRIBUTES  #: labels that a generation prompt may state
    attribute_probability: float = 0.5  #: each known label is stated with this probability, independently
    loss_on: Literal["all", "response"] = "all"  #: tokens that the loss counts: with the prompt, or without

    def __post_init__(self) -> None:
        for name in ("infill", "attribute_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}; a probability lies between 0 and 1")
        for name in self.attributes:
            if name not in ATTRIBUTES:
                raise UserError(f"augment.attributes names {name!r}; known are {', '.join(ATTRIBUTES)}")


@dataclass(frozen=True)
class RopeScaling:
    """Rescaled rotary frequencies, as a Hugging Face config states them (`rope_type` linear or llama3)."""

    rope_type: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


#: Fields of LlamaConfig that say how a model is computed: the same model may be computed in another way at any time.
EXECUTION = ("scan_layers", "attention", "remat")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA; field names are those of a Hugging Face `config.json`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    vocab_multiple: int = 1  #: embedding and head have rows up to a multiple of this; those beyond get no logit
    scan_layers: bool = True  #: one compiled layer, scanned; False unrolls, and remat then saves less
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of activations and matrix products
    weights: Weights = "float"  #: how the layers' kernels are stored; int8 and nf4 are a frozen base for adapters
    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"  #: auto: the platform's kernel, or blocks
    remat: Literal["none", "dots", "full"] = "none"  #: backward repeats: nothing, all but matrix products, everything

    def __post_init__(self) -> None:
        counts = [f.name for f in dataclasses.fields(self) if f.type == "int"]
        _at_least_one(self, "model.", *counts)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary positions turn pairs, so it must be even")
        if self.weights == "nf4":
            heads = ("num_attention_heads * head_dim", self.num_attention_heads * self.head_dim)
            sizes = [heads, *((name, getattr(self, name)) for name in ("hidden_size", "intermediate_size"))]
            for name, size in sizes:
                if size % NF4_BLOCK:
                    raise UserError(
                        f"model.weights is 'nf4', which scales {NF4_BLOCK} inputs at once, but model.{name} is {size}, "
                        f"no multiple of that; take 'int8' or another size"
                    )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head, which is also the width of the logits."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): W x + (alpha / rank) · B A dropout(x)."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (once) takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class DataConfig:
    train: str = "prototypes:train"  #: a file written by `jaxcrystal prepare`, or a side of the embedded set
    validation: str = "prototypes:validation"
    tokens_per_row: int = 1024  #: a row packs as many crystals as fit
    rows_per_batch: int = 8  #: of one optimizer step
    accumulate: int = 1  #: micro-batches that a step's rows are divided into, one after the other: less memory
    loss_block: int = 256  #: tokens of each row whose logits exist at the same time
    validation_rows: int = 64  #: rows on which the validation loss is taken

    def __post_init__(self) -> None:
        names = ("tokens_per_row", "rows_per_batch", "accumulate", "loss_block", "validation_rows")
        _at_least_one(self, "data.", *names)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine to `final_fraction` of the peak, clipping by global norm."""

    learning_rate: float = 1e-4
    warmup_steps: int = 100
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that one training run depends on: `jaxcrystal train CONFIG`."""

    out: str = "runs/run"  #: the run's directory: checkpoints, metrics, and the model that `sample` reads
    base: str | None = None  #: a directory written by `jaxcrystal convert`; None trains `model` from random weights
    lora: LoraConfig | None = None  #: adapters on a frozen model; None trains every weight
    model: LlamaConfig = field(default_factory=LlamaConfig)  #: used when `base` is None; vocab_size is the tokenizer's
    tokenizer: str = "compact"  #: used when `base` is None: `compact`, or a SentencePiece model file
    text: TextFormat = field(default_factory=TextFormat)
    augment: Augment = field(default_factory=Augment)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    epochs: float | None = 10.0  #: passes over the training set; None counts `steps` instead
    steps: int | None = None  #: optimizer steps; overrides `epochs`
    seed: int = 0
    log_every: int = 10
    validate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _at_least_one(self, "", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")


def load(cls: type[T], path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> T:
    """`cls` from a YAML file and `key.sub=value` overrides (values in YAML's notation).

    Raises UserError that names the file and key for a missing file, bad YAML, an unknown key or a wrong type.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise UserError(f"{path} must hold `key: value` lines, found {type(data).__name__}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: write key=value, for example optimizer.learning_rate=1e-3")
        node = data
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: {value!r} is not valid YAML; quote it") from None
    return from_dict(cls, data, str(path or "configuration"))


def from_dict(cls: type[T], data: dict[str, Any], where: str = "configuration") -> T:
    """Builds the dataclass `cls` from plain data; `where` is what an error calls its origin."""
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {key!r} in {cls.__name__}; {remedy}")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data (for YAML or JSON) from which `from_dict` builds an equal object."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _convert(hint, value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}; it must be a list")
        return tuple(_convert(args[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}; it must hold keys of {hint.__name__}")
        return from_dict(hint, value, where)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except (TypeError, ValueError):
            raise UserError(f"{where} is {value!r}; it must be a number") from None
    if type(value) is not hint:
        raise UserError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    return value
