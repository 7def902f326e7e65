"""Uploads that requests refer to: named by their hash, in memory, separate for each API key."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import MediaError
from ..processing.formats import HEAD, IMAGES, VIDEOS, image_format, video_format
from .api_errors import ApiError
from .openai_types import File


@dataclass(frozen=True, slots=True)
class Stored:
    """An upload."""

    data: bytes = field(repr=False)
    filename: str
    purpose: str
    created: int

    def info(self, name: str) -> File:
        """OpenAI's description of a file."""
        return File(
            id=name,
            bytes=len(self.data),
            created_at=self.created,
            filename=self.filename,
            purpose=self.purpose,
        )


class Files:
    """The uploads of all API keys, up to `max_bytes` for each.

    A key neither reads nor detects another key's files.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._by_key: dict[str, dict[str, Stored]] = {}

    def put(self, key: str, data: bytes, filename: str, purpose: str) -> File:
        """Store an image or a video. Known content returns the existing file.

        Raises MediaError or ApiError.
        """
        if image_format(data[:HEAD]) is None and video_format(data[:HEAD]) is None:
            raise MediaError(f"the file is neither an image ({IMAGES}) nor a video ({VIDEOS})")
        name = "file-" + hashlib.sha256(data).hexdigest()
        files = self._by_key.setdefault(key, {})
        if name not in files:
            used = sum(len(file.data) for file in files.values())
            if used + len(data) > self.max_bytes:
                raise ApiError(
                    413,
                    "files_full",
                    f"the file has {len(data):,} bytes, but {used:,} of {self.max_bytes:,} "
                    "are used; delete other files",
                )
            files[name] = Stored(data, filename[:255], purpose[:64], int(time.time()))
        return files[name].info(name)

    def get(self, key: str, name: str) -> Stored:
        """Raises ApiError for a name that this key has not uploaded."""
        stored = self._by_key.get(key, {}).get(name)
        if stored is None:
            raise ApiError(
                404,
                "file_not_found",
                f"no such file: {name[:80]!r}; upload it with POST /v1/files",
            )
        return stored

    def existing(self, key: str, names: Iterable[str]) -> dict[str, Stored]:
        """The files of these names that exist."""
        files = self._by_key.get(key, {})
        return {name: files[name] for name in names if name in files}

    def list(self, key: str) -> list[File]:
        """All files of a key, oldest first."""
        return [stored.info(name) for name, stored in self._by_key.get(key, {}).items()]

    def delete(self, key: str, name: str) -> None:
        """Raises ApiError as `get`."""
        self.get(key, name)
        del self._by_key[key][name]

    def retain(self, keys: Collection[str]) -> None:
        """Delete the files of all other keys."""
        self._by_key = {key: files for key, files in self._by_key.items() if key in keys}


class RequestScopedFiles(Files):
    """Files that requests bring along; each exists while one of its requests runs."""

    def __init__(self) -> None:
        super().__init__(0)
        self._references: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def during(self, key: str, files: Mapping[str, Stored]) -> Iterator[None]:
        """For the duration of a request of this key with these files."""
        self._by_key.setdefault(key, {}).update(files)
        self._references.update((key, name) for name in files)
        try:
            yield
        finally:
            for name in files:
                self._references[key, name] -= 1
                if not self._references[key, name]:
                    del self._references[key, name], self._by_key[key][name]
