"""The safetensors format: headers, reading tensors to a type and device, streaming writes.

The safetensors package returns memory-mapped tensors, whose pages stay resident while a checkpoint
is cast: for float32 -> bfloat16 the peak is 3 times the weights. With a small buffer for casts and
copies to a GPU it is 1.0 times. The format: 8 bytes with the length of a JSON header, the header,
the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = FLOATS | {"U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
_WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
}
_WIDTHS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_CHUNK = 4 << 20
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk: `shape` numbers of type `dtype` in the file `path`, from byte `start`
    on."""

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.dtype]


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file lies. A broken or truncated file raises
    `CheckpointError`."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _broken(path, f"{size} bytes cannot hold a header of {length} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _broken(path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.bytes)):
        if stored.start != end:
            raise _broken(
                path, f"a tensor begins at byte {stored.start} where byte {end} was expected"
            )
        end += stored.bytes
    if end != size:
        raise _broken(
            path,
            f"it has {size} bytes, its header tells of {end}: truncated or damaged, fetch it again",
        )
    return tensors


def _stored(path: Path, base: int, name: str, entry: object) -> Stored:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
        } if (
            dtype in _WIDTHS
            and all(type(n) is int and 0 <= n < 2**48 for n in shape)
            and begin >= 0
        ):
            stored = Stored(path, base + begin, dtype, tuple(shape))
            if end - begin == stored.bytes:
                return stored
    raise _broken(path, f"the entry of tensor {name[:100]!r} is inconsistent or of an unknown type")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is no intact safetensors file: {why}")


class Reader:
    """Reads tensors of one file to a type and a device, through one small buffer.

    A tensor whose type and place are those of the file is the file itself, mapped: it takes no
    time, its pages come when they are first used, are shared with other processes, and are copied
    where they are written to. Such a file must not be changed in place while the tensors live;
    replacing or deleting it is safe.
    """

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.mapped = torch.from_file(
            str(file.name), shared=False, size=os.fstat(file.fileno()).st_size, dtype=torch.uint8
        )
        self.buffer = torch.empty(_CHUNK, dtype=torch.uint8)

    def read(self, stored: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
        source = TYPES[stored.dtype]
        if (source, device.type) == (dtype, "cpu") and stored.start % dtype.itemsize == 0:
            return (
                self.mapped[stored.start : stored.start + stored.bytes]
                .view(dtype)
                .view(stored.shape)
            )
        target = torch.empty(stored.shape, dtype=dtype, device=device)
        buffer = self.buffer.view(source)
        self.file.seek(stored.start)
        for part in target.view(-1).split(len(buffer)):
            piece = buffer[: len(part)]
            self._fill(piece)
            part.copy_(piece)
        return target

    def rows(self, stored: Stored, count: int) -> Iterator[Tensor]:
        """The rows of a matrix in their stored type, in pieces of a multiple of `count`.

        A piece is valid until the next one. It is small, to stay in a core's cache.
        """
        height, width = stored.shape
        size = width * FLOATS[stored.dtype].itemsize
        count = max(1, _CHUNK // 8 // size // count) * count
        buffer = torch.empty(min(count, height) * size, dtype=torch.uint8)
        for start in range(0, height, count):
            piece = buffer[: min(count, height - start) * size]
            self.file.seek(stored.start + start * size)
            self._fill(piece)
            yield piece.view(FLOATS[stored.dtype]).view(-1, width)

    def _fill(self, piece: Tensor) -> None:
        view = piece.view(torch.uint8).numpy().data
        while view.nbytes:
            count = self.file.readinto(view)
            if not count:
                raise _broken(Path(str(self.file.name)), "it became shorter while it was read")
            view = view[count:]


def same(a: Stored, b: Stored) -> bool:
    """Whether two stored tensors have the same type, shape and bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.path.open("rb") as left, b.path.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        sizes = [min(_CHUNK, a.bytes - done) for done in range(0, a.bytes, _CHUNK)]
        return all(left.read(size) == right.read(size) for size in sizes)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file, asking `tensor(name)` for one at a time and casting it in pieces;
    `dtype` of all, or by name."""
    types = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * types[name].itemsize
        header[name] = {
            "dtype": _NAMES[types[name]],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that mapped tensors lie on cache lines
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            value = tensor(name)
            assert value.shape == shape, (name, value.shape, shape)
            for piece in value.detach().reshape(-1).split(_CHUNK // 4):
                file.write(piece.to("cpu", types[name]).contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def shards(
    shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, torch.dtype], max_bytes: int
) -> Iterable[dict[str, tuple[int, ...]]]:
    """Cut a list of tensors, in order, into lists of at most `max_bytes`; a larger tensor is
    alone."""
    part: dict[str, tuple[int, ...]] = {}
    part_bytes = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * types[name].itemsize
        if part and part_bytes + size > max_bytes:
            yield part
            part, part_bytes = {}, 0
        part[name] = shape
        part_bytes += size
    yield part
