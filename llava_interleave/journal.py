"""A file of JSON lines that grows a row at a time and survives being killed: no row is lost, none
is there twice.

The first line has the settings of the run; a file with other settings is refused. A line that was
truncated by a kill is removed when the file is opened again. One process writes at a time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import DataError

if sys.platform != "win32":
    import fcntl

JsonRow = dict[str, Any]


class Journal:
    """Rows with an `id` in a file. `done`: the ids in it, with their offsets."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Open or create the file. `DataError` if it is not a journal, has another `run`, or is
        being written.
        """
        self.path = path
        self.done: dict[str, int] = {}
        header = _line({"run": run})
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            lock(self._file, path)
            self._file.seek(0)
            first = self._file.readline()
            if not first.endswith(b"\n"):  # new, or killed while the first line was written
                if not header.startswith(first):
                    raise DataError(
                        f"{path} is not a results file of this program; choose another file"
                    )
                self._file.truncate(0)
                self._write(header)
                return
            _same(path, _header(path, first), json.loads(header)["run"])
            end = len(first)
            for row, size in _rows(path, self._file):
                self.done[row["id"]] = end
                end += size
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def add(self, rows: Iterable[JsonRow]) -> None:
        """Append rows; when this returns they are on the disk."""
        lines = []
        self._file.seek(0, os.SEEK_END)
        at = self._file.tell()
        for row in rows:
            assert row["id"] not in self.done, row["id"]
            lines.append(_line(row))
            self.done[row["id"]] = at
            at += len(lines[-1])
        self._write(b"".join(lines))

    def row(self, name: str) -> JsonRow:
        """The row with an id."""
        self._file.seek(self.done[name])
        return json.loads(self._file.readline())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def read(path: Path) -> tuple[dict[str, Any], list[JsonRow]]:
    """The settings of a file, and its rows without a truncated last line. Raises
    `DataError`.
    """
    try:
        with path.open("rb") as file:
            run = _header(path, file.readline())
            return run, [row for row, _ in _rows(path, file)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        run = json.loads(line)["run"]
        if isinstance(run, dict) and line.endswith(b"\n"):
            return run
    except (ValueError, TypeError, KeyError):
        pass
    raise DataError(f"{path} is not a results file of this program; choose another file")


def _rows(path: Path, file: BinaryIO) -> Iterator[tuple[JsonRow, int]]:
    """The rows behind the first line, which has been read, and how many bytes each has; one that
    was cut short is left out.
    """
    known: set[str] = set()
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
            name = row["id"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"line {number} of {path} is damaged; delete it, and its sample is answered again"
            ) from error
        if not isinstance(name, str) or name in known:
            raise DataError(
                f"line {number} of {path} has the id {name!r}: not a string, or a duplicate"
            )
        known.add(name)
        yield row, len(line)


def _same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise DataError(
                f"{path} was made with {key} {old.get(key)!r}, not {new.get(key)!r}; name another "
                "file, or go on as it was begun"
            )


def lock(file: IO[bytes], path: Path) -> None:
    """Lock `path` by an open file until that is closed or the process is killed.

    Raises DataError where another process has it. Where locks are not supported nothing is locked.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is writing {path}") from error
        except OSError:  # a network file system without locks
            pass
