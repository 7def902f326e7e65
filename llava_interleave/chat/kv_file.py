"""Files of a saved conversation, written atomically. A KV cache is safetensors with a checksum."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.safetensors_file import TYPES, Reader, read_header
from ..checkpoints.safetensors_file import write as write_tensors
from ..engine.kv_snapshot import KVSnapshot
from ..errors import DataError

ABOUT, SUM = "about", "crc32"
"""Tensors in addition to those of the KV cache. The checksum finds damage, not manipulation."""
MOST_ABOUT = 16 << 20
"""Bytes of the metadata at most; that of 100,000 tokens is a twentieth of it."""


def kv_path(path: str | os.PathLike[str]) -> Path:
    """The file of the KV cache of a conversation saved at `path`."""
    return Path(f"{os.fspath(path)}.kv.safetensors")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A private temporary file that replaces `target` once it is written, or is deleted.

    Raises `DataError` where it cannot be written.
    """
    partial = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        partial = Path(name)
        yield partial
        partial = partial.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}") from error
    finally:
        if partial is not None and partial != target:
            partial.unlink(missing_ok=True)


def write(path: Path, saved: KVSnapshot) -> int:
    """Write a KV snapshot tensor by tensor; the bytes of the file. Raises `DataError`."""
    tensors = {**saved.tensors, ABOUT: _tensor(json.dumps(saved.metadata).encode())}
    checksum = 0

    def value(name: str) -> Tensor:
        nonlocal checksum
        if name == SUM:
            return _tensor(checksum.to_bytes(4, "little"))
        whole = tensors[name].cpu().contiguous()
        checksum = zlib.crc32(_raw(whole), checksum)
        return whole

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()} | {SUM: (4,)}
    types = {name: tensor.dtype for name, tensor in tensors.items()} | {SUM: torch.uint8}
    with replacing(path) as partial:
        write_tensors(partial, shapes, types, value)
        return partial.stat().st_size


def read(path: Path, room: int) -> KVSnapshot:
    """A KV cache of at most `room` bytes; its tensors are the file, mapped (see `Reader`).

    Raises `DataError` or `CheckpointError` for a file that is too large, invalid or damaged.
    """
    if (size := path.stat().st_size) > room + MOST_ABOUT:
        raise DataError(
            f"{path} has {size:,} bytes, but the KV cache has room for {room:,}: raise kv_bytes"
        )
    headers = read_header(path)
    header = headers.get(ABOUT)
    if (
        header is None
        or header.bytes > MOST_ABOUT
        or not all(s.dtype in TYPES and s.bytes for s in headers.values())
    ):
        raise DataError(f"{path} does not hold a KV cache")
    with path.open("rb", buffering=0) as file:
        reader, place = Reader(file), torch.device("cpu")
        tensors = {
            name: reader.read(stored, TYPES[stored.dtype], place)
            for name, stored in headers.items()
        }
    checksum, right = 0, tensors.pop(SUM, None)
    for tensor in tensors.values():
        checksum = zlib.crc32(_raw(tensor), checksum)
    if right is None or bytes(_raw(right)) != checksum.to_bytes(4, "little"):
        raise DataError(f"{path} is damaged: wrong checksum")
    try:
        about = json.loads(bytes(_raw(tensors.pop(ABOUT))))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} does not hold a KV cache: its description is not JSON") from error
    if not isinstance(about, dict):
        raise DataError(f"{path} does not hold a KV cache: its description is not a JSON object")
    return KVSnapshot(about, tensors)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data
