"""A stand-in for Google Cloud Storage, with objects in memory: they are put whole, read, listed and deleted, no more.

TensorStore's own `gcs` driver speaks to it over HTTP, in the four requests of the JSON API that it makes. etils.epath,
through which our code and Orbax read and write all else, comes by fsspec, to a class that stands in for gcsfs; what a
store has not (appending, renaming) raises there. Buckets are without hierarchical namespace. What is not tried here:
Google's own client and gcsfs, access rights, and what a network does.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from etils.epath import backend
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


class Objects:
    """What the buckets hold, by `bucket/name`; each with a number that grows with every change."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[bytes, int]] = {}
        self._lock = threading.Lock()
        self._changes = 0
        self.refused: list[str] = []  #: what was tried that a store has not

    def get(self, name: str) -> tuple[bytes, int] | None:
        return self._held.get(name)

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in list(self._held) if name.startswith(prefix))

    def put(self, name: str, data: bytes, expected: int | None = None) -> int | None:
        """Its new number; None where `expected` is not the number that it has (0: that there is no such object)."""
        with self._lock:
            if expected is not None and expected != self._held.get(name, (b"", 0))[1]:
                return None
            self._changes += 1
            self._held[name] = data, self._changes
            return self._changes

    def delete(self, name: str, expected: int | None = None) -> bool:
        with self._lock:
            if expected is not None and expected != self._held.get(name, (b"", 0))[1]:
                return False
            return self._held.pop(name, None) is not None

    def refuse(self, what: str) -> None:
        self.refused.append(what)
        raise NotImplementedError(f"a store cannot {what}")


class Requests(BaseHTTPRequestHandler):
    """The JSON API as far as TensorStore uses it."""

    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *_: Any) -> None:
        pass

    def _asked(self) -> tuple[str, str | None, dict[str, str]]:
        url = urlsplit(self.path)
        _, _, rest = url.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        return bucket, unquote(name[1:]) or None, query

    def _answer(self, status: int, body: bytes = b"", generation: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if name is None:
            found = self.objects.names(f"{bucket}/{query.get('prefix', '')}")
            items = [
                {"name": one.removeprefix(f"{bucket}/"), "size": str(len(data)), "generation": str(generation)}
                for one in found
                for data, generation in [self.objects.get(one)]
            ]
            return self._answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        found = self.objects.get(f"{bucket}/{name}")
        if found is None:
            return self._answer(404)
        data, generation = found
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412)
        first, last = 0, len(data) - 1
        if wanted := self.headers.get("Range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            if not begin:
                first = max(0, len(data) - int(end))
            else:
                first, last = int(begin), min(int(end or last), last)
            span = f"bytes {first}-{last}/{len(data)}"
            return self._answer(206, data[first : last + 1], generation, Content_Range=span)
        return self._answer(200, data, generation)

    def do_POST(self) -> None:
        bucket, _, query = self._asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        expected = query.get("ifGenerationMatch")
        name = query["name"]
        generation = self.objects.put(f"{bucket}/{name}", data, None if expected is None else int(expected))
        if generation is None:
            return self._answer(412)
        item = {"kind": "storage#object", "name": name, "size": str(len(data)), "generation": str(generation)}
        return self._answer(200, json.dumps(item).encode(), generation)

    def do_DELETE(self) -> None:
        bucket, name, query = self._asked()
        expected = query.get("ifGenerationMatch")
        return self._answer(204 if self.objects.delete(f"{bucket}/{name}", expected and int(expected)) else 404)


class FileSystem(fsspec.AbstractFileSystem):
    """Stands in for gcsfs: folders are what names have in common, and there is none without an object in it."""

    protocol = ("gs", "gcs")
    cachable = False
    objects: Objects

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("gs://").removeprefix("gcs://").rstrip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if found := self.objects.get(name):
            return {"name": name, "size": len(found[0]), "type": "file"}
        if "/" not in name or self.objects.names(f"{name}/"):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        name = self._strip_protocol(path)
        if self.info(name)["type"] == "file":
            return [self.info(name)] if detail else [name]
        below = {f"{name}/" + one[len(name) + 1 :].split("/")[0] for one in self.objects.names(f"{name}/")}
        return [self.info(one) if detail else one for one in sorted(below)]

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Nothing: a store has no folders."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: a store has no folders."""

    def rmdir(self, path: str) -> None:
        """Nothing: a store has no folders."""

    def _rm(self, path: str) -> None:
        if not self.objects.delete(self._strip_protocol(path)) and not self.isdir(path):
            raise FileNotFoundError(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        name = self._strip_protocol(path)
        found = self.objects.names(f"{name}/") if recursive else []
        if not found and self.objects.get(name) is None:
            raise FileNotFoundError(path)
        for one in [*found, name]:
            self.objects.delete(one)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self.objects.refuse(f"rename {path1}")

    rename = move = mv

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        name = self._strip_protocol(path)
        if mode == "wb":
            return _Upload(self.objects, name)
        if mode != "rb":
            self.objects.refuse(f"open {path} to {mode}")
        found = self.objects.get(name)
        if found is None:
            raise FileNotFoundError(path)
        return io.BytesIO(found[0])


class _Upload(io.BytesIO):
    """Becomes an object when it is closed."""

    def __init__(self, objects: Objects, name: str) -> None:
        super().__init__()
        self._objects, self._name = objects, name

    def close(self) -> None:
        if not self.closed:
            self._objects.put(self._name, self.getvalue())
        super().close()


@contextmanager
def served() -> Iterator[Objects]:
    """A store that `gs://` leads to, in this process and in those that it starts with its environment."""
    objects = Objects()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Requests,), {"objects": objects}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    fsspec.get_filesystem_class("file")
    file_system = type("FileSystem", (FileSystem,), {"objects": objects})
    backend.fsspec_backend._get_filesystem.cache_clear()
    try:
        with (
            mock.patch.dict("os.environ", environment),
            mock.patch.dict(_registry, {"gs": file_system, "gcs": file_system}),
            mock.patch.object(gcs_utils, "get_bucket", lambda name: SimpleNamespace()),
        ):
            yield objects
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
        server.shutdown()
        server.server_close()
