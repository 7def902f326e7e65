"""Names of the files of a checkpoint folder, and a new folder that appears only when it is
complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VERSION = 2
"""Version of the stored form of quantized weights."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to; renamed to `folder` on success, and deleted on failure.

    Raises `CheckpointError` where `folder` exists and is not empty, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; give a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
