"""WebDataset shards: the members of uncompressed tar files, grouped into samples by name. Nothing
is unpacked to the disk.

The grouping is that of the package `webdataset` (`tar_file_iterator`, `group_by_keys`): what stands
before the first dot of the last part of a member's name is its key, and neighbours with equal keys
are one sample. Names are keys only, never paths.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .folders import has_media_suffix

KEY = re.compile(r"(?!__[^/]*__/)((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
"""Key and suffix of a member's name; what lies below `__name__/` is WebDataset's own."""
MAX_BYTES, MAX_JSON_BYTES = 4_000_000_000, 10_000_000
"""Bytes of a member, and of a .json."""


class Member(NamedTuple):
    """Position of a file in a shard."""

    suffix: str
    shard: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """A file within another: its bytes, and a name with its suffix."""

    name: str
    data: bytes


class Shards:
    """The samples of tar files, in order: images, videos and one .json each; other members are not
    read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the headers. Raises `DataError` for a file that is not an uncompressed tar, or is
        truncated.
        """
        self._paths = list(paths)
        self._samples: list[tuple[str, list[Member]]] = []
        state = hashlib.blake2b(digest_size=16)
        skipped: Counter[tuple[str, str]] = Counter()
        for shard, path in enumerate(self._paths):
            last = None
            for key, member, stamp in _members(path, shard, skipped):
                state.update(f"{key}.{member} {stamp}".encode("utf-8", "backslashreplace"))
                if key != last:
                    self._samples.append((key, []))
                self._samples[-1][1].append(member)
                last = key
        self.skipped = [
            (name, why if count == 1 else f"{why}, {count} members")
            for (name, why), count in skipped.items()
        ]
        """Members that are not read, and why."""
        self.digest = state.hexdigest()
        """Hash of the members' names, sizes and times."""

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index][0]

    def row(self, index: int) -> dict[str, Any]:
        """A sample: `id`, `question` where its .json has one, and its files as `images`. Raises
        `DataError`.
        """
        key, members = self._samples[index]
        meta: Any = {}
        files = []
        for member in members:
            ending = f".{member.suffix}".lower()
            if ending == ".json":
                meta = json.loads(self._read(member, MAX_JSON_BYTES))
            elif has_media_suffix(ending):
                files.append(Embedded(ending, self._read(member, MAX_BYTES)))
        if not isinstance(meta, dict) or "messages" in meta:
            raise DataError(
                f"the .json of {key} is not an object, or has messages; in a shard it has a "
                "question and optionally an id"
            )
        return {"id": meta.get("id", key), "question": meta.get("question"), "images": files}

    def _read(self, member: Member, max_bytes: int) -> bytes:
        path = self._paths[member.shard]
        if member.size > max_bytes:
            raise DataError(
                f"a .{member.suffix} in {path.name} has {member.size} bytes, above the limit of "
                f"{max_bytes}"
            )
        with path.open("rb") as file:
            file.seek(member.at)
            data = file.read(member.size)
        if len(data) < member.size:
            raise DataError(f"{path} was truncated while it was read")
        return data


def _members(
    path: Path, shard: int, skipped: Counter[tuple[str, str]]
) -> list[tuple[str, Member, float]]:
    """Key, position and time of every regular file with a key.

    Links, devices, sparse files, files without a key and those of other types are counted in
    `skipped`.
    """
    members = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header
                if info.isdir():
                    continue
                match = KEY.fullmatch(info.name)
                if not info.isreg() or info.issparse():
                    skipped[info.name, "a link, a device or a sparse file"] += 1
                elif not match:
                    skipped[info.name, "a name without a key and a suffix"] += 1
                else:
                    suffix = match[2].rpartition(".")[2].lower()
                    if suffix != "json" and not has_media_suffix(f".{suffix}"):
                        skipped[f"*.{suffix}", "not an image, a video or a .json"] += 1
                    member = Member(match[2], shard, info.offset_data, info.size)
                    members.append((match[1], member, float(info.mtime)))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    return members
