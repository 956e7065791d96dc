"""A model directory: the same for a converted checkpoint and for a training run.

    DIR/model.json           {"model": LlamaConfig, "lora": LoraConfig | null, "text": TextFormat, "base": path | null,
                              "float_checksum": the fingerprint of the float weights that all this comes from | null}
    DIR/tokenizer.model      SentencePiece
    DIR/checkpoints/STEP/    written by Orbax; the item `weights` is {"params": ...}, or only {"lora": ...} on a base

DIR is a folder, or `gs://BUCKET/FOLDER` (`jaxcrystal.paths`). `base` is the model directory whose parameters the
adapters belong to, as a path relative to DIR, so that the two can be moved together; absolute where only one of them
lies in a bucket, or they lie in two. Another base may take its place if it was made of the same float weights, by their
`float_checksum`: that of what `convert` read, before it was quantized, and for adapters that of their base.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxcrystal import locks, paths
from jaxcrystal.config import (
    EXECUTION,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    Settings,
    TextFormat,
    Weights,
    from_dict,
    to_dict,
)
from jaxcrystal.crystals.tokenizer import load_tokenizer, with_pad, without_pad
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.model.quantize import quantizer
from jaxcrystal.paths import AnyPath, as_path
from jaxcrystal.weights.checkpoint_map import open_adapters, open_checkpoint
from jaxcrystal.weights.fingerprint import Passing
from jaxcrystal.weights.resized_embeddings import check_embeddings, saved_embeddings
from jaxcrystal.weights.vocabulary import check_rows

MODEL_FILE, TOKENIZER_FILE, CHECKPOINTS = "model.json", "tokenizer.model", "checkpoints"


@dataclass(frozen=True)
class Description(Settings):
    """What `model.json` holds."""

    model: LlamaConfig
    lora: LoraConfig | None
    text: TextFormat
    base: str | None  #: relative to the directory of the file
    float_checksum: str | None = None  #: None for a model trained whole, and where an earlier version wrote the file


@dataclass(frozen=True)
class SavedModel:
    """A model as it was read from its directory, its arrays on the devices."""

    config: LlamaConfig
    lora: LoraConfig | None
    text: TextFormat
    params: dict[str, Any]
    adapters: dict[str, Any] | None  #: None exactly if `lora` is
    tokenizer_path: AnyPath
    step: int  #: the optimizer step after which the weights were saved; 0 as converted
    float_checksum: str | None = None  #: as in `Description`

    @property
    def module(self) -> Llama:
        """The module that runs the variables."""
        return Llama(self.config, self.lora)

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes first."""
        return {"params": self.params} | ({} if self.adapters is None else {"lora": self.adapters})


def describe(
    directory: str | AnyPath,
    config: LlamaConfig,
    lora: LoraConfig | None,
    text: TextFormat,
    tokenizer_path: str | AnyPath,
    base: str | AnyPath | None = None,
) -> None:
    """Writes `model.json` and copies the tokenizer; checkpoints are for the caller to add.

    A directory that is already so described is left as it is, whatever it says of how the model is computed. Raises
    UserError for one that describes another model, that holds something else, or that cannot be written.
    """
    directory = as_path(directory)
    description = Description(config, lora, text, None if base is None else paths.relative(base, directory))
    if (directory / MODEL_FILE).exists():
        found = read_description(directory)
        same_way = replace(found.model, **{name: getattr(config, name) for name in EXECUTION})
        theirs, ours = to_dict(replace(found, model=same_way, float_checksum=None)), to_dict(description)
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            what = "; ".join(f"{key} is {theirs[key]} there, {ours[key]} here" for key in differing)
            raise UserError(f"{directory} already holds another model ({what}); choose another directory")
        return
    ours = {f"{MODEL_FILE}{paths.UNFINISHED}", TOKENIZER_FILE, locks.INSIDE}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        there = directory.iterdir() if directory.exists() else ()  # a store has no empty folder
        if foreign := {path.name for path in there} - ours:
            raise UserError(f"{directory} holds {min(foreign)!r} and no {MODEL_FILE}; choose another directory")
        _write_description(directory, description, as_path(tokenizer_path).read_bytes())
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot write the model directory {directory}: {error.strerror or error}{where}") from None


def record_checksum(directory: str | AnyPath, checksum: str) -> None:
    """Writes into `model.json` of which float weights the model was made, if that is not what it says already.

    Raises UserError for what the disk refuses.
    """
    description = read_description(directory)
    if description.float_checksum == checksum:
        return
    try:
        _write_json(as_path(directory), replace(description, float_checksum=checksum))
    except OSError as error:
        raise UserError(f"cannot write the model directory {directory}: {error.strerror or error}") from None


def _write_description(directory: AnyPath, description: Description, tokenizer: bytes) -> None:
    (directory / TOKENIZER_FILE).write_bytes(tokenizer)
    _write_json(directory, description)  # last: a directory with a model.json is complete


def _write_json(directory: AnyPath, description: Description) -> None:
    """All at once."""
    paths.write(directory / MODEL_FILE, json.dumps(to_dict(description), indent=2) + "\n")


def read_description(directory: str | AnyPath) -> Description:
    """`model.json`. Raises UserError if the directory is no model directory."""
    path = as_path(directory) / MODEL_FILE
    try:
        with paths.reaching(path):
            text = path.read_text()
        return from_dict(Description, json.loads(text), str(path))
    except OSError as error:
        reason = os.strerror(errno.ENOENT) if isinstance(error, FileNotFoundError) else error.strerror or error
        raise UserError(
            f"{directory} is not a model directory: {path.name}: {reason}; "
            "`jaxcrystal convert` and `jaxcrystal train` make one"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def load_model(directory: str | AnyPath, mesh: Mesh | None = None, base: str | AnyPath | None = None) -> SavedModel:
    """The model of a directory with the weights of its latest checkpoint, laid out on `mesh` (default: one device).

    Adapters lie on their own base, or on another `base` that was made of the same float weights: of int8, for example.

    Raises UserError for a directory that is not one, for one without a checkpoint, for weights or a tokenizer that do
    not fit, for a `base` of other float weights.
    """
    directory = as_path(directory)
    description, tokenizer = read_description(directory), directory / TOKENIZER_FILE
    if base is not None:
        description = _on_base(directory, description, as_path(base))
    if not tokenizer.exists():
        raise UserError(f"{directory} is not complete: {TOKENIZER_FILE} is missing; convert or train the model again")
    config = _with_pieces(description.model, tokenizer)
    mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
    wanted = abstract_variables(Llama(description.model, description.lora), mesh)
    if description.base is None or description.lora is None:  # trained whole, wherever it began
        step, weights = _restore(directory, wanted)
    else:
        step, weights = _restore(directory, {"lora": wanted["lora"]})
        weights["params"] = _base_params(directory, description, wanted["params"])
    return SavedModel(
        config=config,
        lora=description.lora,
        text=description.text,
        params=weights["params"],
        adapters=weights.get("lora"),
        tokenizer_path=tokenizer,
        step=step,
        float_checksum=description.float_checksum,
    )


def _on_base(directory: AnyPath, description: Description, base: AnyPath) -> Description:
    """The description of the same adapters on another base. Raises UserError for one that is not made of the same."""
    if description.base is None or description.lora is None:
        raise UserError(f"{directory} has no adapters on a base, but weights of its own; leave the base {base} out")
    theirs = read_description(base)
    if theirs.lora is not None:
        raise UserError(f"base {base} has adapters of its own; give a model directory that `jaxcrystal convert` wrote")
    if description.float_checksum is None:
        recipe = directory / "recipe.yaml"
        again = f"`jaxcrystal train {recipe}` adds it" if recipe.exists() else "convert the adapters again"
        raise UserError(
            f"{directory / MODEL_FILE} was written by an earlier version, or for a base that was: it lacks the "
            f"float_checksum of its own base, which the base {base} must have too; {again}"
        )
    if theirs.float_checksum is None:
        raise UserError(
            f"{base / MODEL_FILE} does not say of which float weights it was made (float_checksum), as none of earlier "
            "versions does; make the base again with `jaxcrystal convert`"
        )
    if theirs.float_checksum != description.float_checksum:
        raise UserError(
            f"{directory} was trained on the float weights {description.float_checksum}, and the base {base} was made "
            f"of {theirs.float_checksum}; give one that was converted from the same SOURCE, with the same --dtype"
        )
    return replace(
        description, model=replace(description.model, weights=theirs.model.weights), base=str(paths.absolute(base))
    )


def _with_pieces(model: LlamaConfig, tokenizer: AnyPath) -> LlamaConfig:
    """The same rows, of which those without a piece get no logit: earlier versions of `convert` gave them one."""
    pieces = load_tokenizer(tokenizer).vocab_size
    check_rows(str(tokenizer), pieces, model.vocab_size)
    if pieces == model.vocab_size:
        return model
    return replace(model, vocab_size=pieces, vocab_multiple=model.padded_vocab_size)


def _base_params(directory: AnyPath, description: Description, wanted: dict[str, Any]) -> dict[str, Any]:
    base = paths.joined(directory, description.base)
    try:
        _, weights = _restore(base, {"params": wanted})
    except UserError as error:
        raise UserError(f"the base of {directory}: {error}") from None
    return weights["params"]


def _restore(directory: AnyPath, wanted: dict[str, Any], part: bool = False) -> tuple[int, dict[str, Any]]:
    """The latest step and its weights, each straight into its sharding, in the dtype in which it was saved.

    All that was saved must be `wanted`, unless only a `part` of it is.
    """
    checkpoints = paths.absolute(directory / CHECKPOINTS)
    steps = ocp.utils.checkpoint_steps(checkpoints) if checkpoints.is_dir() else []
    if not steps:
        raise UserError(f"{checkpoints} holds no checkpoint; `jaxcrystal convert` and `jaxcrystal train` write them")
    path = checkpoints / str(max(steps)) / "weights"
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = flatten_dict(dict(handler.metadata(path).tree), sep="/")
        places = flatten_dict(wanted, sep="/")
        if part:
            saved = {name: leaf for name, leaf in saved.items() if name in places}
        _check_fit(path, saved, places)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
            for name, leaf in places.items()
        }
        tree = unflatten_dict(target, sep="/")
        places = ocp.checkpoint_utils.construct_restore_args(tree)
        return max(steps), handler.restore(
            path, args=ocp.args.PyTreeRestore(tree, restore_args=places, partial_restore=part)
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the checkpoint {path}: {reason}; remove it to use the one before") from error
    finally:
        handler.close()


def _check_fit(path: AnyPath, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    problems = []
    for name in sorted(saved.keys() | wanted.keys()):
        found = list(saved[name].shape) if name in saved else "nothing"
        expected = list(wanted[name].shape) if name in wanted else "nothing"
        if found != expected:
            problems.append(f"{name}: expected {expected}, found {found}")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"the checkpoint {path} does not fit the model that {MODEL_FILE} describes:\n  {listed}")


@contextmanager
def written_whole(out: AnyPath) -> Iterator[AnyPath]:
    """A directory to write to, beside `out`, that becomes `out` when all went well and vanishes when not.

    In a store, where nothing can be renamed, it is `out` itself: no model until MODEL_FILE, which comes last, is there.
    Raises UserError if `out` is there and not empty, and for what the disk refuses.
    """
    remote = paths.is_remote(out)
    partial = out if remote else out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty directory; choose another, or remove it")
        with ExitStack() as failed:
            failed.callback(paths.remove, partial)
            partial.mkdir(parents=True, exist_ok=remote)
            with paths.reaching(out):
                yield partial
            if not remote:
                partial.replace(out)
            failed.pop_all()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot write the directory {out}: {error.strerror or error}{where}") from None


def save_weights(directory: AnyPath, weights: dict[str, Any]) -> None:
    """`weights` as the checkpoint of step 0. Raises OSError for what the disk refuses."""
    try:
        with ocp.CheckpointManager(paths.absolute(directory / CHECKPOINTS)) as manager:
            manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(weights)))
    except ValueError as error:  # what Orbax makes of a full disk
        raise OSError(" ".join(str(error).split())) from None


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
    """LLaMA weights of Hugging Face or Meta, or PEFT's adapters, as the model directory `out`: all at once or not.

    `dtype` of the parameters is by default the source's; the layers' kernels are stored as `weights` says, each as soon
    as it is loaded. `pad_token` gives a vocabulary without padding a piece [PAD]
    and its row; a row beyond the tokenizer's pieces that the source has already becomes [PAD]'s as it is, and further
    ones, which pad the source's vocabulary, stay behind. Embedding and head are stored with rows up to a multiple of
    `vocab_multiple`. Adapters need the model directory `base`; their
    vocabulary is its.

    Raises UserError if `out` is not empty, if the tokenizer does not fit, and as `open_checkpoint` and `open_adapters`.
    """
    source, out = paths.local(source), as_path(out)
    mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
    with locks.held(paths.on_disk(out)), written_whole(out) as partial:
        if (source / "adapter_config.json").exists():
            if dtype is not None:
                raise UserError(f"{source} holds adapters, which are float32 whatever the weights are; leave dtype out")
            if weights != "float":
                raise UserError(f"{source} holds adapters; convert their base with weights {weights!r}, not them")
            return _convert_adapters(source, base, partial, mesh)
        if base is not None:
            raise UserError(f"{source} holds no adapter_config.json: without adapters there is no use for a base")
        tokenizer = source / TOKENIZER_FILE
        if not tokenizer.exists():
            raise UserError(f"{source} has no {TOKENIZER_FILE}; put the model's SentencePiece file there")
        checkpoint = open_checkpoint(source)
        pieces, model = load_tokenizer(tokenizer).vocab_size, tokenizer.read_bytes()
        check_rows(str(tokenizer), pieces, checkpoint.config.vocab_size)
        padded = with_pad(model) if pad_token else model
        checkpoint = checkpoint.with_vocabulary(pieces + (padded != model), vocab_multiple)
        config = replace(checkpoint.config, weights=weights)
        store, read = quantizer(config, mesh), Passing()
        params = {path: store(path, read.seen(path, parameter)) for path, parameter in checkpoint.load(mesh, dtype)}
        save_weights(partial, {"params": unflatten_dict(params, sep="/")})
        _write_description(partial, Description(config, None, TextFormat(), None, read.fingerprint), padded)
    return config


def _convert_adapters(source: Path, base: str | AnyPath | None, partial: AnyPath, mesh: Mesh) -> LlamaConfig:
    if base is None:
        raise UserError(f"{source} holds adapters; name the model directory that they belong to: --base DIR")
    description = read_description(base)
    if description.lora is not None:
        raise UserError(f"base {base} has adapters of its own; give the model that it was trained on")
    checkpoint = open_adapters(source, description.model)
    tokenizer = as_path(base) / TOKENIZER_FILE
    if copies := set(saved_embeddings(checkpoint).values()):
        wanted = flatten_dict(abstract_variables(Llama(description.model), mesh), sep="/")
        part = {name: leaf for name, leaf in wanted.items() if name.removeprefix("params/") in copies}
        _, weights = _restore(as_path(base), unflatten_dict(part, sep="/"), part=True)
        file = tokenizer.read_bytes()
        pieces = load_tokenizer(tokenizer).vocab_size - (without_pad(file) != file)
        check_embeddings(source, checkpoint, flatten_dict(weights["params"], sep="/"), pieces)
    save_weights(partial, {"lora": unflatten_dict(dict(checkpoint.load(mesh)), sep="/")})
    ours = Description(
        description.model,
        checkpoint.lora,
        description.text,
        paths.relative(base, partial),
        description.float_checksum,
    )
    _write_description(partial, ours, tokenizer.read_bytes())
    return description.model
