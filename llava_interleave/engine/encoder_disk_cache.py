"""Image features on disk, so that they outlive the process. Knows no images and no requests.

One file per `EncoderInput`, written aside and renamed; several processes can use one folder. A file
that is damaged or from another model is never used.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import zlib
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..model import Llava
from .kv_snapshot import model_hash

HEADER = struct.Struct("<8sII32sII8x")
"""Magic, rows, numbers per row, name of the dtype, CRC-32 of the numbers, CRC-32 of the fields
before."""
MAGIC = b"llavaEF1"
SUFFIX = ".features"
EVICT_TO = 0.9
"""Fraction of `max_bytes` that is left when the folder has grown above it."""


class EncoderDiskCache:
    """Features `[tokens, D]` by key in a folder, evicted in LRU order above `max_bytes`.

    Raises `DataError` where the folder cannot be made. Failures later only cost the cache: a file
    that cannot be read is computed again, one that cannot be written is not kept.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, model: Llava) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        weight = model.language_model.norm.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.model = f"{model_hash(model)} {weight.dtype} {weight.device.type}".encode()
        self.hits = self.misses = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.bytes = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise DataError(f"cannot use {folder} as a cache: {error.strerror}") from error

    def get(self, key: tuple[bytes, int]) -> Tensor | None:
        """The features of a key, on the model's device; None if they are not here."""
        path = self._path(key)
        try:
            data = bytearray(path.read_bytes())
        except OSError:
            self.misses += 1
            return None
        features = self._decode(data)
        if features is None:
            self._remove(path, len(data))
            self.misses += 1
            return None
        self.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path)
        return features.to(self.device)

    def put(self, key: tuple[bytes, int], features: Tensor) -> None:
        """Keep features, unless they are here already."""
        path = self._path(key)
        if path.exists():
            return
        numbers = features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        rows, width = features.shape
        fields = MAGIC, rows, width, str(features.dtype).encode(), zlib.crc32(numbers)
        checked = HEADER.pack(*fields, 0)
        header = HEADER.pack(*fields, zlib.crc32(checked))
        size = len(header) + len(numbers)
        if size > self.max_bytes:
            return
        try:
            path.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(header + numbers)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError:  # full or read-only: the answer does not need it
            return
        self.bytes += size
        if self.bytes > self.max_bytes:
            self._evict()

    def _decode(self, data: bytearray) -> Tensor | None:
        """The features of a file; None if it is damaged or of another dtype."""
        if len(data) < HEADER.size:
            return None
        *fields, checksum = HEADER.unpack_from(data)
        magic, rows, width, dtype, crc = fields
        if zlib.crc32(HEADER.pack(*fields, 0)) != checksum or magic != MAGIC:
            return None
        numbers = memoryview(data)[HEADER.size :]
        whole = len(numbers) == rows * width * self.dtype.itemsize
        if dtype.rstrip(b"\0") != str(self.dtype).encode() or not whole:
            return None
        if zlib.crc32(numbers) != crc:
            return None
        return torch.frombuffer(data, dtype=self.dtype, offset=HEADER.size).view(rows, width)

    def _path(self, key: tuple[bytes, int]) -> Path:
        media, crop = key
        name = blake2b(b"%s %d " % (self.model, crop) + media, digest_size=20).hexdigest()
        return self.folder / name[:2] / (name + SUFFIX)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each file."""
        files = []
        for path in self.folder.glob(f"??/*{SUFFIX}"):
            with contextlib.suppress(OSError):  # removed by another process
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        return files

    def _evict(self) -> None:
        files = sorted(self._files())
        self.bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self.bytes <= EVICT_TO * self.max_bytes:
                break
            self._remove(path, size)

    def _remove(self, path: Path, size: int) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self.bytes -= size
