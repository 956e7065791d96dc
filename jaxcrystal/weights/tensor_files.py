"""Tensors by name, wherever they lie: safetensors or torch's .bin, in one file or in several that an index lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcrystal.errors import UserError
from jaxcrystal.weights.torch_zip import TorchZip

Index = tuple[slice, ...]


class Tensors(Protocol):
    """Tensors of which any part can be read without the rest."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str, index: Index) -> np.ndarray:
        """This part of the tensor, of the tensor's own dtype; it may be a view of the file."""
        ...


class Safetensors:
    """One safetensors file. Raises UserError if it is none, or is cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        with self._open() as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()

    def read(self, name: str, index: Index) -> np.ndarray:
        with self._open() as file:  # anew each time, so that pages of the file that were read can go
            return file.get_slice(name)[index]

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.path} is not a readable safetensors file ({error}); download or save it again"
            ) from None


class TensorFiles:
    """The tensors of a directory's files, as transformers and PEFT lay them out; the first of `stems` that is there.

    For the stem `model.safetensors` that is model.safetensors, or what model.safetensors.index.json lists. `lost` says
    of tensors in the index which file, that is not there, should hold them. Raises UserError where there is no file of
    any stem, and for files that cannot be read.
    """

    def __init__(self, directory: Path, stems: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")) -> None:
        weight_map = _weight_map(directory, stems)
        paths = {directory / file for file in weight_map.values()}
        absent = {path for path in paths if not path.exists()}
        self.lost = {name: file for name, file in weight_map.items() if directory / file in absent}
        self._home: dict[str, Safetensors | TorchZip] = {}
        for path in sorted(paths - absent):
            file = open_file(path)
            self._home |= dict.fromkeys(file.shapes, file)
        self.shapes = {name: file.shapes[name] for name, file in self._home.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self._home.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._home[name].read(name, index)


def open_file(path: Path) -> Safetensors | TorchZip:
    """A file of tensors, in the format that its name tells."""
    return Safetensors(path) if path.suffix == ".safetensors" else TorchZip(path)


def _weight_map(directory: Path, stems: tuple[str, ...]) -> dict[str, str]:
    """In which file each tensor is said to be; the file may be missing."""
    for stem in stems:
        index, single = directory / f"{stem}.index.json", directory / stem
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{index} has no weight_map; download or save the checkpoint again")
            return weight_map
        if single.exists():
            return dict.fromkeys(open_file(single).shapes, stem)
    names = [name for stem in stems for name in (stem, f"{stem}.index.json")]
    raise UserError(f"{directory} holds neither {', '.join(names[:-1])} nor {names[-1]}; save the model as safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; name a model directory of Hugging Face, Meta or PEFT"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object, found {type(data).__name__}")
    return data
