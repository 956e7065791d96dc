"""Every setting of the package, as frozen dataclasses: defaults <- YAML file <- command line.

A recipe is a YAML file whose keys are the fields below; `load(Recipe, path, ["optimizer.learning_rate=1e-3"])`
reads it. A key that does not exist is an error that names the nearest one that does. Each number states beside its type
the bounds within which it makes sense (`Bounds`); beyond them is an error, whether it comes from a file, from the
command line or from Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, as_path

T = TypeVar("T")

#: How the kernels of a model's layers are stored (`jaxcrystal.model.kernels`).
Weights = Literal["float", "int8", "nf4"]
NF4_BLOCK = 64  #: inputs that share one scale in nf4

#: A label that a prompt can state; ATTRIBUTES is the order in which tables hold them (names as CDVAE publishes them).
Attribute = Literal[
    "pretty_formula", "elements", "spacegroup.number", "formation_energy_per_atom", "band_gap", "e_above_hull"
]
ATTRIBUTES: tuple[Attribute, ...] = typing.get_args(Attribute)

#: A kernel that may be adapted, by the name that PEFT's `target_modules` uses.
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = typing.get_args(Target)

#: What a value of each type is called where another was found.
CALLED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Bounds:
    """The values that a number may have: from `low` to `high`, both included, or `also`; nan never."""

    low: float
    high: float
    also: int | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, if anything."""
        if value == self.also or self.low <= value <= self.high:
            return None
        return f"it must {'' if self.also is None else f'be {self.also} or '}lie between {self.low} and {self.high}"


Count = Annotated[int, Bounds(1, 2**31 - 1)]
Share = Annotated[float, Bounds(0, 1)]
MeshSize = Annotated[int, Bounds(1, 2**20, also=-1)]


class SettingError(UserError):
    """A value that a setting cannot have; `key` is the setting's dotted name, as far as it is known."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key, self.problem = key, problem


class Settings:
    """Base of all settings: each value has its field's type and lies within its bounds, however the object is made."""

    def __post_init__(self) -> None:
        for name, hint in type_hints(type(self)).items():
            value = getattr(self, name)
            if problem := _problem(hint, value):
                raise SettingError(name, f"is {value!r}; {problem}")


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """The type of each field, with the bounds of numbers."""
    return typing.get_type_hints(cls, include_extras=True)


def _problem(hint: Any, value: Any) -> str | None:
    """Why a field of type `hint` cannot be `value`, if it cannot."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, bounds = args
        return _problem(kind, value) or bounds.problem(value)
    if origin in (typing.Union, types.UnionType):
        (hint,) = [a for a in args if a is not types.NoneType]
        return None if value is None else _problem(hint, value)
    if origin is Literal:
        return None if value in args else f"it must be one of {', '.join(map(repr, args))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "it must be a list"
        twice = [item for i, item in enumerate(value) if item in value[:i]]
        found = (f"{item!r}: {problem}" for item in value if (problem := _problem(args[0], item)))
        return f"{twice[0]!r} is there twice" if twice else next(found, None)
    if dataclasses.is_dataclass(hint):
        return None if isinstance(value, hint) else f"it must hold keys of {hint.__name__}"
    fits = isinstance(value, (int, float) if hint is float else hint) and isinstance(value, bool) == (hint is bool)
    return None if fits else f"it must be {CALLED[hint]}"


@dataclass(frozen=True)
class Property(Settings):
    """A label of one's own (`jaxcrystal prepare --labels`) that prompts may state, as a sentence and its value."""

    name: str  #: the column's
    decimals: Annotated[int, Bounds(0, 6)] | None = 2  #: of a number; null: it is text
    subject: str | None = None  #: how its sentence begins; null: "The NAME is", underscores as spaces
    unit: str = ""  #: for help and reports; no sentence states it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.strip() or set(self.name) & set("=,\n"):
            raise SettingError("name", f"is {self.name!r}; it must be a column's name, without `=` and `,`")
        if self.name in (*ATTRIBUTES, "num_atoms"):
            raise SettingError("name", f"is {self.name!r}, which prompts state anyway; rename the column")
        if not self.sentence[:1].isalpha() or "\n" in self.sentence:
            raise SettingError("subject", f"is {self.subject!r}; it must be words, such as `The bulk modulus is`")

    @property
    def sentence(self) -> str:
        """How it begins."""
        return f"The {self.name.replace('_', ' ')} is" if self.subject is None else self.subject


@dataclass(frozen=True)
class TextFormat(Settings):
    """How a crystal is written as text (arXiv 2402.04379, figure 2)."""

    coord_decimals: Annotated[int, Bounds(1, 6)] = 2  #: decimals of the fractional coordinates
    length_decimals: Annotated[int, Bounds(1, 4)] = 1  #: decimals of a, b, c in Å
    angle_decimals: Annotated[int, Bounds(0, 2)] = 0  #: decimals of α, β, γ in degrees
    paper_compat: bool = False  #: the original's quirks: angles truncated, a coordinate may read 1.00
    form: Literal["p1", "symmetry"] = "p1"  #: all atoms, as the paper has it; or space group and free parameters
    properties: tuple[Property, ...] = ()  #: labels of one's own that prompts may state

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [each.name for each in self.properties]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise SettingError("properties", f"has {twice[0]!r} twice")
        if self.properties and self.paper_compat:
            raise SettingError("properties", "go beyond what the paper's code writes: leave paper_compat out")

    @property
    def attributes(self) -> tuple[str, ...]:
        """All that prompts may state, in the order of tables."""
        return (*ATTRIBUTES, *(each.name for each in self.properties))


@dataclass(frozen=True)
class Augment(Settings):
    """What is drawn afresh for a crystal each time it is read."""

    translate: bool = True  #: shift all atoms by one vector of [0, 1)³
    permute: bool = False  #: shuffle the order of the atoms
    descriptions: bool = False  #: of the symmetry form: any description and free origin, but where it infills
    infill: Share = 0.34  #: probability of the infilling task instead of generation
    attributes: tuple[Attribute, ...] = ATTRIBUTES  #: labels that a generation prompt may state, beside one's own
    #: Each known label is stated with this probability, independently; with text.paper_compat 0 is none, and any other
    #: as many as the original states.
    attribute_probability: Share = 0.5
    loss_on: Literal["all", "response"] = "all"  #: tokens that the loss counts: with the prompt, or without


@dataclass(frozen=True)
class RopeScaling(Settings):
    """Rescaled rotary frequencies, as a Hugging Face config states them (`rope_type` linear or llama3)."""

    rope_type: Literal["linear", "llama3"] = "linear"
    factor: Annotated[float, Bounds(1, 1e6)] = 1.0
    low_freq_factor: Annotated[float, Bounds(1e-3, 1e6)] = 1.0
    high_freq_factor: Annotated[float, Bounds(1e-3, 1e6)] = 4.0
    original_max_position_embeddings: Count = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise SettingError(
                "high_freq_factor",
                f"is {self.high_freq_factor}; it must be above low_freq_factor, {self.low_freq_factor}",
            )


#: Fields of LlamaConfig that say how a model is computed: the same model may be computed in another way at any time.
EXECUTION = ("scan_layers", "attention", "remat")


@dataclass(frozen=True)
class LlamaConfig(Settings):
    """The shape of a LLaMA; field names are those of a Hugging Face `config.json`."""

    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count = 32
    head_dim: Count = 128
    max_position_embeddings: Count = 4096
    rms_norm_eps: Annotated[float, Bounds(1e-12, 0.1)] = 1e-5
    rope_theta: Annotated[float, Bounds(1, 1e12)] = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  #: queries, keys and values have a bias (Qwen2)
    qk_norm: bool = False  #: queries and keys are normed, head by head (Qwen3)
    vocab_multiple: Count = 1  #: embedding and head have rows up to a multiple of this; those beyond get no logit
    #: One compiled layer, scanned, except where `training.step.unrolls` says so; False unrolls: remat saves less.
    scan_layers: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of activations and matrix products
    weights: Weights = "float"  #: how the layers' kernels are stored; int8 and nf4 are a frozen base for adapters
    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"  #: auto: the platform's kernel, or blocks
    remat: Literal["none", "dots", "full"] = "none"  #: backward repeats: nothing, all but matrix products, everything
    dropout: Annotated[float, Bounds(0, 0.9)] = 0.0  #: in training, of what attention and feed-forward add

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise SettingError(
                "num_attention_heads",
                f"is {self.num_attention_heads}; it must be a multiple of num_key_value_heads, "
                f"{self.num_key_value_heads}",
            )
        if self.head_dim % 2:
            raise SettingError("head_dim", f"is {self.head_dim}; rotary positions turn pairs, so it must be even")
        if self.weights == "nf4":
            heads = ("num_attention_heads * head_dim", self.num_attention_heads * self.head_dim)
            sizes = [heads, *((name, getattr(self, name)) for name in ("hidden_size", "intermediate_size"))]
            for name, size in sizes:
                if size % NF4_BLOCK:
                    raise SettingError(
                        "weights",
                        f"is 'nf4', which scales {NF4_BLOCK} inputs at once, but {name} is {size}, no multiple of "
                        "that; take 'int8' or another size",
                    )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head, which is also the width of the logits."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adapters (arXiv 2106.09685): W x + (alpha / rank) · B A dropout(x)."""

    rank: Annotated[int, Bounds(1, 2**16)] = 8
    alpha: Annotated[float, Bounds(1e-3, 1e6)] = 32.0
    dropout: Annotated[float, Bounds(0, 0.9)] = 0.05
    targets: tuple[Target, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise SettingError("targets", f"is empty; kernels that can be adapted are {', '.join(TARGETS)}")


@dataclass(frozen=True)
class MeshConfig(Settings):
    """Devices along each mesh axis; -1 (once) takes what is left."""

    data: MeshSize = 1
    fsdp: MeshSize = -1
    tensor: MeshSize = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data == -1 and -1 in (self.fsdp, self.tensor)) or self.fsdp == self.tensor == -1:
            raise SettingError(
                "data", f"is {self.data}, fsdp {self.fsdp}, tensor {self.tensor}; one may be -1, not two"
            )


@dataclass(frozen=True)
class DataConfig(Settings):
    train: str = "prototypes:train"  #: a file written by `jaxcrystal prepare`, or a side of the embedded set
    validation: str = "prototypes:validation"
    tokens_per_row: Count = 1024  #: a row packs as many crystals as fit
    rows_per_batch: Count = 8  #: of one optimizer step
    accumulate: Count = 1  #: micro-batches that a step's rows are divided into, one after the other: less memory
    loss_block: Count = 256  #: tokens of each row whose logits exist at the same time
    validation_rows: Count = 64  #: rows on which the validation loss is taken


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW or Muon, linear warm-up, cosine to `final_fraction` of the peak, clipping by global norm."""

    learning_rate: Annotated[float, Bounds(1e-9, 10)] = 1e-4
    warmup_steps: Annotated[int, Bounds(0, 2**31 - 1)] = 100
    final_fraction: Share = 0.0
    weight_decay: Annotated[float, Bounds(0, 10)] = 0.0
    beta1: Annotated[float, Bounds(0, 0.99999)] = 0.9
    beta2: Annotated[float, Bounds(0, 0.99999)] = 0.999
    clip_norm: Annotated[float, Bounds(1e-3, 1e6)] = 1.0  #: below, Adam's epsilon would outweigh the gradients
    name: Literal["adamw", "muon"] = "adamw"  #: muon: for the layers' kernels; embedding, head and norms keep AdamW
    muon_beta: Annotated[float, Bounds(0, 0.99999)] = 0.95  #: Muon's momentum
    muon_rms: Annotated[float, Bounds(1e-4, 100)] = (
        0.2  #: root mean square of Muon's update, over the rate; AdamW's is near 0.2
    )


@dataclass(frozen=True)
class PreferenceConfig(Settings):
    """Training on pairs of crystals, of which one is preferred (`jaxcrystal.training.preferences`)."""

    pairs: str = "pairs.parquet"  #: columns preferred and dispreferred: ids of `data.train`; and perhaps conditions
    beta: Annotated[float, Bounds(1e-4, 100)] = 0.1  #: the higher, the nearer to the start the model stays
    likelihood: Annotated[float, Bounds(0, 100)] = 1.0  #: weight of the preferred text's nats a token, which are added


@dataclass(frozen=True)
class Recipe(Settings):
    """Everything that one training run depends on: `jaxcrystal train CONFIG`."""

    out: str = "runs/run"  #: the run's directory: checkpoints, metrics, and the model that `sample` reads
    base: str | None = None  #: a directory written by `jaxcrystal convert`; None trains `model` from random weights
    lora: LoraConfig | None = None  #: adapters on a frozen model; None trains every weight
    model: LlamaConfig = field(default_factory=LlamaConfig)  #: used when `base` is None; vocab_size is the tokenizer's
    tokenizer: str = "compact"  #: used when `base` is None: `compact`, a tokenizer's file, or a directory with one
    text: TextFormat = field(default_factory=TextFormat)
    augment: Augment = field(default_factory=Augment)
    preferences: PreferenceConfig | None = None  #: steps are on pairs of crystals; None: on the training set
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    epochs: Annotated[float, Bounds(1e-6, 1e6)] | None = 10.0  #: passes over the training set; None: `steps` counts
    steps: Count | None = None  #: optimizer steps; overrides `epochs`
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    log_every: Count = 10
    validate_every: Count = 200
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2


def load(cls: type[T], path: str | AnyPath | None = None, overrides: Sequence[str] = ()) -> T:
    """`cls` from a YAML file and `key.sub=value` overrides (values in YAML's notation).

    A `path` without folder and ending, where no such file lies, is the name of a recipe of the package (`recipes`).

    Raises UserError that names the file or override, and the key: for a missing file, bad YAML, a key that is unknown
    or there twice, a wrong type, a number out of its bounds.
    """
    data = {} if path is None else _read(as_path(path))
    origins: dict[str, str] = {}
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
        origins[key] = f"--set {override}"
    try:
        return _build(cls, data)
    except SettingError as error:
        set_here = [origin for key, origin in origins.items() if f"{error.key}.".startswith(f"{key}.")]
        raise UserError(f"{set_here[-1] if set_here else path or 'configuration'}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML, but a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name; they lie in it when it is installed, else in the checkout."""
    here = Path(__file__).parent
    folder = next((folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()), here)
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if folder != here}


def _read(path: AnyPath) -> dict[str, Any]:
    if path.name == str(path) and not path.suffix and not path.is_file():
        known = recipes()
        if str(path) not in known:
            raise UserError(
                f"there is no recipe {str(path)!r}; give a YAML file, or the name of one of {', '.join(known)}"
            )
        path = known[str(path)]
    try:
        data = yaml.load(path.read_text(), _Loader) or {}
    except OSError as error:
        raise UserError(
            f"cannot read the configuration {path}: {error.strerror}; give a YAML file, or the name of one of "
            f"{', '.join(recipes())}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold `key: value` lines, found {type(data).__name__}")
    return data


def from_dict(cls: type[T], data: dict[str, Any], where: str = "configuration") -> T:
    """Builds the settings `cls` from plain data; `where` is what an error calls its origin."""
    try:
        return _build(cls, data)
    except SettingError as error:
        raise UserError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data (for YAML or JSON) from which `from_dict` builds an equal object."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def _build(cls: type[T], data: dict[str, Any], prefix: str = "") -> T:
    hints = type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise SettingError(f"{prefix}{key}", f"is no key of {cls.__name__}; {remedy}")
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except SettingError as error:
        raise SettingError(f"{prefix}{error.key}", error.problem) from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Plain data as a field of type `hint` holds it; a value that does not fit stays, for the settings to refuse."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _convert(args[0], value, key)
    if origin in (typing.Union, types.UnionType):
        (hint,) = [a for a in args if a is not types.NoneType]
        return None if value is None else _convert(hint, value, key)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], item, key) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, f"{key}.")
    if hint is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)  # YAML reads 1e-4 as text
    return value
