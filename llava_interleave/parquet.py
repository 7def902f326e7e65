"""Parquet and Arrow files as rows, one row group in memory at a time. Needs pyarrow, which is
optional. Knows no models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DataError, Unsupported

Row = dict[str, Any]


class Parquet:
    """The rows of one file, by number. Images embedded as Hugging Face's `datasets` does it come
    as {"bytes", "path"}.
    """

    def __init__(self, path: Path | str, file: BinaryIO | None = None) -> None:
        """file: where `path` is remote. Raises `Unsupported` without pyarrow, and `DataError` for a
        file that is no Parquet."""
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise Unsupported(
                "reading Parquet needs pyarrow: pip install 'llava-interleave[parquet]', or give "
                "the rows as .jsonl or .csv"
            ) from error
        self.path, self.name = Path(path), str(path)
        try:
            counts, schema = self._open(file or path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise DataError(f"{path} cannot be read as {type(self).__name__}: {error}") from error
        self._starts = [0, *accumulate(counts)]
        self._loaded: tuple[int, tuple[str, ...] | None, Any] | None = None
        self.columns: dict[str, str] = {field.name: str(field.type) for field in schema}
        """Their types, as pyarrow names them."""

    def _open(self, file: Any) -> tuple[list[int], Any]:
        """The rows of each row group, and the schema."""
        from pyarrow import parquet

        self._file = parquet.ParquetFile(file)
        metadata = self._file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return counts, self._file.schema_arrow

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int, columns: Sequence[str] | None = None) -> Row:
        """A row, or some columns of it. Neighbours are read once. Raises `DataError` for damaged
        pages.
        """
        (group, row), wanted = self.place(index), None if columns is None else tuple(columns)
        if self._loaded is None or self._loaded[:2] != (group, wanted):
            self._loaded = group, wanted, self.read_group(group, columns)
        return self._loaded[2].slice(row, 1).to_pylist()[0]

    def place(self, index: int) -> tuple[int, int]:
        """The row group of a row, and its number there."""
        group = bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> Any:
        """A row group, or some columns of it, as pyarrow's table.

        Raises `DataError` for damaged pages.
        """
        try:
            return self._file.read_row_group(group, columns=columns)
        except (OSError, ValueError) as error:
            raise DataError(
                f"rows {self._starts[group]} and on of {self.name} cannot be read: {error}"
            ) from error

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows in order. Raises `DataError` where a column is missing."""
        if missing := [name for name in columns or () if name not in self.columns]:
            raise DataError(
                f"{self.name} has no column {', '.join(missing)}; it has {', '.join(self.columns)}"
            )
        for index in range(len(self)):
            yield self.row(index, columns)


class Arrow(Parquet):
    """The rows of an Arrow stream, as `datasets` saves it. Its record batches are row groups; the
    file is mapped into memory."""

    def _open(self, file: Any) -> tuple[list[int], Any]:
        import pyarrow

        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))) as stream:
            self._batches, schema = list(stream), stream.schema
        return [batch.num_rows for batch in self._batches], schema

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> Any:
        """As of Parquet."""
        import pyarrow

        table = pyarrow.Table.from_batches([self._batches[group]])
        return table if columns is None else table.select(list(columns))
