"""Files that `torch.save` wrote (.bin, .pth), read without torch and without running what they say.

    FILE.zip     NAME/data.pkl      a pickle: tensor names, shapes, strides, and the storage that each looks into
                 NAME/data/KEY      the bytes of one storage, stored uncompressed

A pickle may call any function by name. Ours knows three names and refuses every other, so that a checkpoint from a
stranger can do no more than describe tensors; their bytes are then mapped from the file, part by part.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxcrystal.errors import UserError

#: torch's storage classes that may occur -> dtype of their elements.
STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
}


@dataclass(frozen=True)
class _View:
    """A tensor as its pickle describes it: a strided look into a storage, counted in elements."""

    dtype: np.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchZip:
    """The tensors of one file. Raises UserError for a file that is not such a zip, or that holds anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._views, self._places = self._describe(archive)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except zipfile.BadZipFile as error:
            self._refuse_no_zip(error)
        self.shapes = {name: view.shape for name, view in self._views.items()}
        self.dtypes = {name: str(view.dtype) for name, view in self._views.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, mapped from the file: nothing is read before it is looked at."""
        view = self._views[name]
        file = np.memmap(self.path, np.uint8, "r")
        strides = [stride * view.dtype.itemsize for stride in view.strides]
        offset = self._places[view.key][0] + view.offset * view.dtype.itemsize
        try:
            return np.ndarray(view.shape, view.dtype, buffer=file, offset=offset, strides=strides)[index]
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path} is damaged: {name} lies outside the file ({error})") from None

    def _describe(self, archive: zipfile.ZipFile) -> tuple[dict[str, _View], dict[str, tuple[int, int]]]:
        """What each tensor is, and where in the file each storage begins and how many bytes it has."""
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{self.path} is a zip file, but torch.save did not write it: no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{self.path} was written on a big-endian machine; save it again as safetensors")
        with archive.open(pickles[0]) as stream:
            views = self._unpickle(stream)
        places = {}
        for view in views.values():
            entry = entries.get(f"{root}data/{view.key}")
            if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{self.path} is damaged: storage {view.key} is missing or compressed; save it again")
            places[view.key] = self._begin(archive, entry), entry.file_size
        for name, view in views.items():
            last = view.offset + sum(s * (n - 1) for s, n in zip(view.strides, view.shape, strict=True))
            if math.prod(view.shape) and (last + 1) * view.dtype.itemsize > places[view.key][1]:
                raise UserError(f"{self.path} is damaged: {name} is longer than its storage; download it again")
        return views, places

    @staticmethod
    def _begin(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: behind a header of 30 bytes, its name, and padding."""
        archive.fp.seek(entry.header_offset)
        name, padding = struct.unpack("<26xHH", archive.fp.read(30))
        return entry.header_offset + 30 + name + padding

    def _unpickle(self, stream: Any) -> dict[str, _View]:
        try:
            found = _Unpickler(stream, self.path).load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle fails in any way
            raise UserError(f"{self.path} is damaged: {error}; download or save it again") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.path} holds one {type(found).__name__}; a dictionary of tensors was expected")
        for name, view in found.items():
            if not isinstance(view, _View):
                raise UserError(f"{self.path}: {name!r} is a {type(view).__name__}; a tensor was expected")
        return dict(found)

    def _refuse_no_zip(self, error: zipfile.BadZipFile) -> NoReturn:
        with self.path.open("rb") as file:
            start = file.read(2)
        if start[:1] == pickle.PROTO:
            raise UserError(
                f"{self.path} is in torch's format from before 1.6, which cannot be read safely; load it with torch "
                "and save it as safetensors"
            ) from None
        state = "is cut short" if start == b"PK" else "is no file of torch.save"
        raise UserError(f"{self.path} {state} ({error}); download or save it again") from None


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of tensors, and nothing else."""

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._view
        if module == "torch" and name in STORAGES:
            return name  # a mere name: nothing that could be called
        raise UserError(f"{self._path} holds a {module}.{name}; only tensors of floating-point numbers are read")

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        kind, storage, key, _, _ = pid
        if kind != "storage":
            raise ValueError(f"{kind!r} is no storage")
        return STORAGES[storage], str(key)

    def _view(self, storage: tuple[np.dtype, str], offset: int, shape: Any, strides: Any, *_: Any) -> _View:
        dtype, key = storage
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ValueError(f"a tensor of shape {shape} has strides {strides} and begins at {offset}")
        return _View(dtype, key, int(offset), shape, strides)
