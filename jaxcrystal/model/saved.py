"""A model directory: the same for a converted checkpoint and for a training run.

    DIR/model.json           {"model": LlamaConfig, "lora": LoraConfig | null, "text": TextFormat, "base": path | null}
    DIR/tokenizer.model      SentencePiece
    DIR/checkpoints/STEP/    written by Orbax; the item `weights` is {"params": ...}, or only {"lora": ...} on a base

`base` is the model directory whose parameters the adapters belong to, as a path relative to DIR, so that the two can
be moved together.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, TextFormat, Weights, from_dict, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.checkpoint_map import load_hf
from jaxcrystal.model.llama import Llama, abstract_variables

MODEL_FILE, TOKENIZER_FILE, CHECKPOINTS = "model.json", "tokenizer.model", "checkpoints"


@dataclass(frozen=True)
class Description:
    """What `model.json` holds."""

    model: LlamaConfig
    lora: LoraConfig | None
    text: TextFormat
    base: str | None  #: relative to the directory of the file


@dataclass(frozen=True)
class SavedModel:
    """A model as it was read from its directory, its arrays on the devices."""

    config: LlamaConfig
    lora: LoraConfig | None
    text: TextFormat
    params: dict[str, Any]
    adapters: dict[str, Any] | None  #: None exactly if `lora` is
    tokenizer_path: Path
    step: int  #: the optimizer step after which the weights were saved; 0 as converted

    @property
    def module(self) -> Llama:
        """The module that runs the variables."""
        return Llama(self.config, self.lora)

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes first."""
        return {"params": self.params} | ({} if self.adapters is None else {"lora": self.adapters})


def describe(
    directory: str | Path,
    config: LlamaConfig,
    lora: LoraConfig | None,
    text: TextFormat,
    tokenizer_path: str | Path,
    base: str | Path | None = None,
) -> None:
    """Writes `model.json` and copies the tokenizer; checkpoints are for the caller to add.

    A directory that is already so described is left as it is. Raises UserError for one that describes another model,
    that holds something else, or that cannot be written.
    """
    directory = Path(directory)
    base = None if base is None else os.path.relpath(Path(base).resolve(), directory.resolve())
    description = Description(config, lora, text, base)
    target = directory / MODEL_FILE
    if target.exists():
        theirs, ours = to_dict(read_description(directory)), to_dict(description)
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            what = "; ".join(f"{key} is {theirs[key]} there, {ours[key]} here" for key in differing)
            raise UserError(f"{directory} already holds another model ({what}); choose another directory")
        return
    partial = directory / f"{MODEL_FILE}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if foreign := {path.name for path in directory.iterdir()} - {partial.name, TOKENIZER_FILE}:
            raise UserError(f"{directory} holds {min(foreign)!r} and no {MODEL_FILE}; choose another directory")
        shutil.copyfile(tokenizer_path, directory / TOKENIZER_FILE)
        partial.write_text(json.dumps(to_dict(description), indent=2) + "\n")
        partial.replace(target)  # last and at once: a directory with a model.json is complete
    except OSError as error:
        raise UserError(f"cannot write the model directory {directory}: {error.strerror} ({error.filename})") from None


def read_description(directory: str | Path) -> Description:
    """`model.json`. Raises UserError if the directory is no model directory."""
    path = Path(directory) / MODEL_FILE
    try:
        return from_dict(Description, json.loads(path.read_text()), str(path))
    except OSError as error:
        raise UserError(
            f"{directory} is not a model directory: {path.name}: {error.strerror}; "
            "`jaxcrystal convert` and `jaxcrystal train` make one"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def load_model(directory: str | Path, mesh: Mesh | None = None) -> SavedModel:
    """The model of a directory with the weights of its latest checkpoint, laid out on `mesh` (default: one device).

    Raises UserError for a directory that is not one, for one without a checkpoint, and for weights that do not fit.
    """
    directory = Path(directory)
    description = read_description(directory)
    tokenizer = directory / TOKENIZER_FILE
    if not tokenizer.exists():
        raise UserError(f"{directory} is not complete: {TOKENIZER_FILE} is missing; convert or train the model again")
    mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
    wanted = abstract_variables(Llama(description.model, description.lora), mesh)
    if description.base is None:
        step, weights = _restore(directory, wanted)
    else:
        step, weights = _restore(directory, {"lora": wanted["lora"]})
        weights["params"] = _base_params(directory, description, wanted["params"])
    return SavedModel(
        config=description.model,
        lora=description.lora,
        text=description.text,
        params=weights["params"],
        adapters=weights.get("lora"),
        tokenizer_path=tokenizer,
        step=step,
    )


def _base_params(directory: Path, description: Description, wanted: dict[str, Any]) -> dict[str, Any]:
    base = (directory / description.base).resolve()
    try:
        _, weights = _restore(base, {"params": wanted})
    except UserError as error:
        raise UserError(f"the base of {directory}: {error}") from None
    return weights["params"]


def _restore(directory: Path, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The latest step and its weights, each straight into its sharding, in the dtype in which it was saved."""
    checkpoints = (directory / CHECKPOINTS).resolve()
    steps = ocp.utils.checkpoint_steps(checkpoints) if checkpoints.is_dir() else []
    if not steps:
        raise UserError(f"{checkpoints} holds no checkpoint; `jaxcrystal convert` and `jaxcrystal train` write them")
    path = checkpoints / str(max(steps)) / "weights"
    handler = ocp.StandardCheckpointHandler()
    try:
        saved = flatten_dict(handler.metadata(path).tree, sep="/")
        places = flatten_dict(wanted, sep="/")
        _check_fit(path, saved, places)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype, sharding=leaf.sharding)
            for name, leaf in places.items()
        }
        return max(steps), handler.restore(path, args=ocp.args.StandardRestore(unflatten_dict(target, sep="/")))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the checkpoint {path}: {reason}; remove it to use the one before") from error
    finally:
        handler.close()


def _check_fit(path: Path, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    problems = []
    for name in sorted(saved.keys() | wanted.keys()):
        found = list(saved[name].shape) if name in saved else "nothing"
        expected = list(wanted[name].shape) if name in wanted else "nothing"
        if found != expected:
            problems.append(f"{name}: expected {expected}, found {found}")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"the checkpoint {path} does not fit the model that {MODEL_FILE} describes:\n  {listed}")


def convert(
    source: str | Path,
    out: str | Path,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    weights: Weights = "float",
) -> LlamaConfig:
    """A Hugging Face LLaMA directory as the model directory `out`, all at once or not at all.

    `dtype` of the parameters is by default the source's; the layers' kernels are stored as `weights` says. Raises
    UserError if `out` is not empty, and as `load_hf`.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory; choose another, or remove it")
    tokenizer = source / TOKENIZER_FILE
    if not tokenizer.exists():
        raise UserError(f"{source} has no {TOKENIZER_FILE}; put the model's SentencePiece file there")
    mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            partial = Path(scratch) / "model"
            config, params = load_hf(source, mesh, dtype, weights)
            describe(partial, config, None, TextFormat(), tokenizer)
            with ocp.CheckpointManager((partial / CHECKPOINTS).resolve()) as manager:
                manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave({"params": params})))
            partial.replace(out)
    except OSError as error:
        raise UserError(f"cannot write the model directory {out}: {error.strerror} ({error.filename})") from None
    return config
