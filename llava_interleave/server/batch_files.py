"""Files of batches: input and output, on disk, separate for each API key, within a bound."""

from __future__ import annotations

import builtins
import hashlib
import json
import time
from pathlib import Path

from pydantic import BaseModel

from .api_errors import ApiError
from .openai_types import File

NO_KEY = "none"
"""Folder of a server without API keys; the name of a key is hexadecimal."""


class BatchFiles:
    """The files in `folder`, up to `max_bytes` for each API key. A file's id is its hash."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._by_key: dict[str, dict[str, File]] = {}
        for path in sorted(folder.glob("*/file-*.json")):
            key = "" if path.parent.name == NO_KEY else path.parent.name
            file = File.model_validate_json(path.read_bytes())
            self._by_key.setdefault(key, {})[file.id] = file

    def directory(self, key: str) -> Path:
        """The folder of a key."""
        path = self.folder / (key or NO_KEY)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def path(self, key: str, name: str) -> Path:
        """Where the content is. Raises ApiError as `get`."""
        return self.directory(key) / self.get(key, name).id

    def bytes_used(self, key: str) -> int:
        """By the files of a key, those that are being written included."""
        listed = sum(file.bytes for file in self._by_key.get(key, {}).values())
        return listed + sum(path.stat().st_size for path in self.directory(key).glob("*.part"))

    def check(self, key: str, size: int) -> None:
        """Raises ApiError where `size` more bytes do not fit."""
        if (used := self.bytes_used(key)) + size > self.max_bytes:
            raise ApiError(
                413,
                "files_full",
                f"{size:,} bytes more do not fit: {used:,} of {self.max_bytes:,} bytes of batch "
                "files are used; delete other files",
            )

    def put(self, key: str, data: bytes, filename: str, purpose: str = "batch") -> File:
        """Store a file; known content returns the existing one. Raises ApiError."""
        name = "file-" + hashlib.sha256(data).hexdigest()
        if name not in self._by_key.get(key, {}):
            self.check(key, len(data))
            (self.directory(key) / name).write_bytes(data)
        return self._add(key, name, len(data), filename, purpose)

    def adopt(self, key: str, path: Path, filename: str, purpose: str) -> File | None:
        """Make a finished `path` a file; None where it is empty."""
        if not path.exists() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            return None
        with path.open("rb") as file:
            name = "file-" + hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        path.replace(self.directory(key) / name)
        return self._add(key, name, size, filename, purpose)

    def _add(self, key: str, name: str, size: int, filename: str, purpose: str) -> File:
        files = self._by_key.setdefault(key, {})
        if name not in files:
            file = File(
                id=name,
                bytes=size,
                created_at=int(time.time()),
                filename=filename[:255],
                purpose=purpose,
            )
            write(self.directory(key) / f"{name}.json", file)
            files[name] = file
        return files[name]

    def has(self, key: str, name: str) -> bool:
        return name in self._by_key.get(key, {})

    def get(self, key: str, name: str) -> File:
        """Raises ApiError for a file that this key does not have."""
        if (file := self._by_key.get(key, {}).get(name)) is None:
            raise ApiError(
                404,
                "file_not_found",
                f"no such file: {name[:80]!r}; upload it with POST /v1/files and purpose 'batch'",
            )
        return file

    def list(self, key: str) -> builtins.list[File]:
        """All files of a key, oldest first."""
        return sorted(self._by_key.get(key, {}).values(), key=lambda file: file.created_at)

    def delete(self, key: str, name: str) -> None:
        """Raises ApiError as `get`."""
        path = self.path(key, name)
        del self._by_key[key][name]
        path.unlink(missing_ok=True)
        path.with_name(f"{name}.json").unlink(missing_ok=True)


def write(path: Path, value: BaseModel) -> None:
    """Replace a file of JSON as a whole."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value.model_dump()), "utf-8")
    partial.replace(path)
