"""Uploads that several questions refer to: named by their content, kept in memory, apart for each API key."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import MediaError
from ..processing.loader import IMAGES, VIDEOS, image_format, video_format
from .api_errors import ApiError

FILE_ID = re.compile(r"file-[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stored:
    """An upload."""

    data: bytes = field(repr=False)
    filename: str
    purpose: str
    created: int

    def told(self, name: str) -> dict[str, Any]:
        """As OpenAI describes a file."""
        return {
            "id": name,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
        }


class Files:
    """The uploads of all keys, `most` bytes each. Who does not hold the key neither reads a file nor learns that it is there."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._of: dict[str, dict[str, Stored]] = {}

    def put(self, key: str, data: bytes, filename: str, purpose: str) -> dict[str, Any]:
        """Keep an image or a video. The same content again is the file that is there, as it is. Raises MediaError or Refusal."""
        if image_format(data[:512]) is None and video_format(data[:512]) is None:
            raise MediaError(f"the file is neither an image ({IMAGES}) nor a video ({VIDEOS})")
        name = "file-" + hashlib.sha256(data).hexdigest()
        files = self._of.setdefault(key, {})
        if name not in files:
            used = sum(len(file.data) for file in files.values())
            if used + len(data) > self.most:
                full = f"the file has {len(data):,} bytes, but {used:,} of {self.most:,} are taken already: delete some"
                raise ApiError(413, "files_full", full)
            files[name] = Stored(data, filename[:255], purpose[:64], int(time.time()))
        return files[name].told(name)

    def get(self, key: str, name: str) -> Stored:
        """Raises Refusal for a name that this key has not uploaded."""
        stored = self._of.get(key, {}).get(name)
        if stored is None:
            raise ApiError(
                404,
                "file_not_found",
                f"there is no file {name[:80]!r}; upload it with POST /v1/files",
            )
        return stored

    def among(self, key: str, names: Iterable[str]) -> dict[str, Stored]:
        """Those of these files that there are."""
        files = self._of.get(key, {})
        return {name: files[name] for name in names if name in files}

    def list(self, key: str) -> list[dict[str, Any]]:
        """All files of a key, oldest first."""
        return [stored.told(name) for name, stored in self._of.get(key, {}).items()]

    def delete(self, key: str, name: str) -> None:
        """Raises Refusal as `get`."""
        self.get(key, name)
        del self._of[key][name]


class RequestScopedFiles(Files):
    """Files that requests bring along, there for as long as one of these is under way."""

    def __init__(self) -> None:
        super().__init__(0)
        self._holders: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def during(self, key: str, files: Mapping[str, Stored]) -> Iterator[None]:
        """A request of this key and its files."""
        self._of.setdefault(key, {}).update(files)
        self._holders.update((key, name) for name in files)
        try:
            yield
        finally:
            for name in files:
                self._holders[key, name] -= 1
                if not self._holders[key, name]:
                    del self._holders[key, name], self._of[key][name]
