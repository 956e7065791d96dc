"""A model directory: the same for a converted checkpoint and for a training run.

    DIR/model.json           {"model": LlamaConfig, "lora": LoraConfig | null, "text": TextFormat, "base": path | null,
                              "float_checksum": the fingerprint of the float weights that all this comes from | null,
                              "begin", "end": tokens around a text, where the tokenizer's file does not say | null,
                              "source": what `convert` read | null}
    DIR/tokenizer.model      SentencePiece, or
    DIR/tokenizer.json       byte-level BPE
    DIR/checkpoints/STEP/    written by Orbax; the item `weights` is {"params": ...}, or only {"lora": ...} on a base
    DIR/config.json          instead, in what `export --format hf` wrote: Hugging Face's files of the whole model
    DIR/recipe.yaml          of a training run: what its texts stated;
    DIR/num_atoms.json, formulas.txt, labels.parquet    and what its crystals were

DIR is a folder, or `gs://BUCKET/FOLDER` (`jaxcrystal.paths`). `base` is the model directory whose parameters the
adapters belong to, as a path relative to DIR, so that the two can be moved together; absolute where only one of them
lies in a bucket, or they lie in two. Another base may take its place if it was made of the same float weights, by their
`float_checksum`: that of what `convert` read, before it was quantized, and for adapters that of their base.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxcrystal import box, locks, paths
from jaxcrystal.config import (
    EXECUTION,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    Settings,
    TextFormat,
    from_dict,
    to_dict,
)
from jaxcrystal.crystals import known_formulas, num_atoms, training_labels
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables
from jaxcrystal.paths import AnyPath, as_path
from jaxcrystal.texts.tokenizer import FILES, Tokenizer, load_tokenizer
from jaxcrystal.weights.checkpoint_map import open_checkpoint
from jaxcrystal.weights.vocabulary import check_rows

MODEL_FILE, CHECKPOINTS, HF_CONFIG = "model.json", "checkpoints", "config.json"
OF_DATA = (num_atoms.FILE, known_formulas.FILE, training_labels.FILE)
OF_TRAINING = ("recipe.yaml", *OF_DATA)


@dataclass(frozen=True)
class Origin(Settings):
    """What `convert` read."""

    name: str  #: as it was asked for
    quantization: str | None = None  #: of the source's own weights, as its file calls it
    licence: str | None = None
    sha256: str | None = None  #: of its file, where it is one
    hub: str | None = None  #: the Hugging Face model whose weights these are, to the last bit
    revision: str | None = None  #: of `hub`: the commit
    rows: int | None = None  #: of embedding and head there


@dataclass(frozen=True)
class Description(Settings):
    """What `model.json` holds."""

    model: LlamaConfig
    lora: LoraConfig | None
    text: TextFormat
    base: str | None  #: relative to the directory of the file
    float_checksum: str | None = None  #: None for a model trained whole, and where an earlier version wrote the file
    begin: tuple[int, ...] | None = None  #: of a tokenizer.json; a tokenizer.model says it itself
    end: int | None = None  #: likewise
    source: Origin | None = None

    def tokenizer(self, directory: AnyPath) -> Tokenizer:
        """That of the model directory. Raises UserError if it is not there."""
        path = next((directory / name for name in FILES if (directory / name).exists()), None)
        if path is None:
            raise UserError(f"{directory} is not complete: it has no tokenizer; convert or train the model again")
        return load_tokenizer(path, self.begin, self.end)


@dataclass(frozen=True)
class SavedModel:
    """A model as it was read from its directory, its arrays on the devices."""

    config: LlamaConfig
    lora: LoraConfig | None
    text: TextFormat
    params: dict[str, Any]
    adapters: dict[str, Any] | None  #: None exactly if `lora` is
    tokenizer: Tokenizer
    step: int  #: the optimizer step after which the weights were saved; 0 as converted
    float_checksum: str | None = None  #: as in `Description`

    @property
    def module(self) -> Llama:
        """The module that runs the variables, as it runs best here and not as training had it.

        Layers are a loop: one by one, each token that is drawn would copy the whole cache. Attention is what this
        machine can run.
        """
        return Llama(replace(self.config, scan_layers=True, attention="auto"), self.lora)

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes first."""
        return {"params": self.params} | ({} if self.adapters is None else {"lora": self.adapters})


def model_directory(model: str | AnyPath) -> AnyPath:
    """The directory itself, or that of the package's model of this name. Raises UserError as `box.model`."""
    return box.model(model) or as_path(model)


def read_origin(directory: AnyPath, description: Description) -> Origin | None:
    """What the model, or the one that it was trained from, was converted from; None where that is not known."""
    if description.source is None and description.base is not None:
        base = paths.joined(directory, description.base)
        return read_description(base).source if (base / MODEL_FILE).exists() else None
    return description.source


def describe(
    directory: str | AnyPath,
    config: LlamaConfig,
    lora: LoraConfig | None,
    text: TextFormat,
    tokenizer: Tokenizer,
    base: str | AnyPath | None = None,
    source: Origin | None = None,
) -> None:
    """Writes `model.json` and copies the tokenizer; checkpoints are for the caller to add.

    A directory that is already so described is left as it is, whatever it says of how the model is computed. Raises
    UserError for one that describes another model, that holds something else, or that cannot be written.
    """
    directory = as_path(directory)
    below = None if base is None else paths.relative(base, directory)
    description = Description(config, lora, text, below, source=source, **tokenizer.ends)
    if (directory / MODEL_FILE).exists():
        found = read_description(directory)
        same_way = replace(found.model, **{name: getattr(config, name) for name in EXECUTION})
        theirs, ours = to_dict(replace(found, model=same_way, float_checksum=None)), to_dict(description)
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            what = "; ".join(f"{key} is {theirs[key]} there, {ours[key]} here" for key in differing)
            raise UserError(f"{directory} already holds another model ({what}); choose another directory")
        return
    ours = {f"{MODEL_FILE}{paths.UNFINISHED}", *FILES, locks.INSIDE}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        there = directory.iterdir() if directory.exists() else ()  # a store has no empty folder
        if foreign := {path.name for path in there} - ours:
            raise UserError(f"{directory} holds {min(foreign)!r} and no {MODEL_FILE}; choose another directory")
        write_description(directory, description, tokenizer)
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
        write_json(as_path(directory), replace(description, float_checksum=checksum))
    except OSError as error:
        raise UserError(f"cannot write the model directory {directory}: {error.strerror or error}") from None


def write_description(directory: AnyPath, description: Description, tokenizer: Tokenizer) -> None:
    """The tokenizer, then `model.json`: a directory that has it is complete. Raises OSError."""
    (directory / tokenizer.file_name).write_bytes(tokenizer.file)
    write_json(directory, description)


def write_json(directory: AnyPath, description: Description) -> None:
    """`model.json`, all at once. Raises OSError."""
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
            f"`jaxcrystal convert` and `jaxcrystal train` make one{_shipped()}"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _shipped() -> str:
    return f", and {', '.join(box.MODELS)} comes with the package" if box.MODELS else ""


def copy_of_training(source: AnyPath, directory: AnyPath, names: Sequence[str] = OF_TRAINING) -> None:
    """Whatever of `names` lies in one directory, into another. Raises OSError."""
    for name in names:
        if (source / name).exists():
            (directory / name).write_bytes((source / name).read_bytes())


def load_model(directory: str | AnyPath, mesh: Mesh | None = None, base: str | AnyPath | None = None) -> SavedModel:
    """The model of a directory with the weights of its latest checkpoint, laid out on `mesh` (default: one device).

    Adapters lie on their own base, or on another `base` that was made of the same float weights: of int8, for example.

    Raises UserError for a directory that is not one, for one without a checkpoint, for weights or a tokenizer that do
    not fit, for a `base` of other float weights.
    """
    directory = as_path(directory)
    description = read_description(directory)
    if base is not None:
        description = _on_base(directory, description, as_path(base))
    tokenizer = description.tokenizer(directory)
    config = _with_pieces(description.model, tokenizer)
    mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
    wanted = abstract_variables(Llama(description.model, description.lora), mesh)
    if description.base is None or description.lora is None:  # trained whole, wherever it began
        step, weights = restore(directory, wanted)
    else:
        step, weights = restore(directory, {"lora": wanted["lora"]})
        weights["params"] = _base_params(directory, description, wanted["params"])
    return SavedModel(
        config=config,
        lora=description.lora,
        text=description.text,
        params=weights["params"],
        adapters=weights.get("lora"),
        tokenizer=tokenizer,
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


def _with_pieces(model: LlamaConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The same rows, of which those without a piece get no logit: earlier versions of `convert` gave them one."""
    pieces = tokenizer.vocab_size
    check_rows(tokenizer, model.vocab_size)
    if pieces == model.vocab_size:
        return model
    return replace(model, vocab_size=pieces, vocab_multiple=model.padded_vocab_size)


def _base_params(directory: AnyPath, description: Description, wanted: dict[str, Any]) -> dict[str, Any]:
    base = paths.joined(directory, description.base)
    try:
        _, weights = restore(base, {"params": wanted})
    except UserError as error:
        raise UserError(f"the base of {directory}: {error}") from None
    return weights["params"]


def restore(directory: AnyPath, wanted: dict[str, Any], part: bool = False) -> tuple[int, dict[str, Any]]:
    """The latest step and its weights, each straight into its sharding, in the dtype in which it was saved.

    All that was saved must be `wanted`, unless only a `part` of it is. Of an export the step is 0.
    """
    if (directory / HF_CONFIG).exists():
        return 0, _of_export(directory, wanted, part)
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


def _of_export(directory: AnyPath, wanted: dict[str, Any], part: bool) -> dict[str, Any]:
    """The weights in Hugging Face's files, which `export` wrote, as `restore`."""
    if paths.is_remote(directory):
        raise UserError(f"{directory} holds an export, which is read from a disk: copy it, or `jaxcrystal convert` it")
    description, places = read_description(directory), flatten_dict(wanted, sep="/")
    checkpoint = open_checkpoint(paths.local(directory)).with_vocabulary(
        description.tokenizer(directory).vocab_size, description.model.vocab_multiple, keep=True
    )
    mesh = next(iter(places.values())).sharding.mesh
    found = {f"params/{name}": array for name, array in checkpoint.load(mesh)}
    if part:
        found = {name: array for name, array in found.items() if name in places}
    _check_fit(directory / HF_CONFIG, found, places)
    return unflatten_dict(found, sep="/")


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
    For the holder of `out`'s lock: what an earlier one that was killed left beside it is removed. Raises UserError if
    `out` is there and not empty, and for what the disk refuses to write, or to read meanwhile.
    """
    remote = paths.is_remote(out)
    place = paths.absolute(out)  # what a link leads to is what is replaced
    partial = out if remote else place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        for left in () if remote or not place.parent.is_dir() else place.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(place.name)}\.\d+\.partial", left.name):  # not that of `out.other`
                paths.remove(left)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty directory; choose another, or remove it")
        with ExitStack() as failed:
            failed.callback(paths.remove, partial)
            partial.mkdir(parents=True, exist_ok=remote)
            with paths.reaching(out):
                yield partial
            if not remote:
                partial.replace(place)
            failed.pop_all()
    except OSError as error:
        reason, where = error.strerror or error, error.filename
        ours = where is None or as_path(where).is_relative_to(partial) or partial.is_relative_to(where)
        if not ours:
            raise UserError(f"cannot read {where}: {reason}") from None
        raise UserError(f"cannot write the directory {out}: {reason}{f' ({where})' if where else ''}") from None


def save_weights(directory: AnyPath, weights: dict[str, Any]) -> None:
    """`weights` as the checkpoint of step 0. Raises OSError for what the disk refuses."""
    try:
        with ocp.CheckpointManager(paths.absolute(directory / CHECKPOINTS)) as manager:
            manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(weights)))
    except ValueError as error:  # what Orbax makes of a full disk
        raise OSError(" ".join(str(error).split())) from None
