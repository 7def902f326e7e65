"""The files of a checkpoint folder: config.json, the index of shards, headers. Reads no tensor's numbers but a few."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import METHOD, QUANTIZATION, LlavaConfig, read_json
from ..errors import CheckpointError
from ..quantization.precision import parse_precision
from .safetensors_file import Stored, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VERSION = 2
"""Of the form in which quantized weights are packed and stored."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes the name `folder` when all is written, and is gone otherwise.

    Raises `CheckpointError` where `folder` is there and not empty, or cannot be written.
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


def read_config(folder: str | Path) -> LlavaConfig:
    """The network that the config.json of a checkpoint folder describes."""
    return LlavaConfig.from_dict(read_json(Path(folder) / "config.json"))


def stored_precision(folder: str | Path) -> str | None:
    """What the weights in a checkpoint folder were quantized to by `save`; None where they are floats."""
    about = read_json(Path(folder) / "config.json").get(QUANTIZATION)
    if not isinstance(about, dict) or about.get("quant_method") != METHOD:
        return None
    if about.get("version") != VERSION or not parse_precision(str(about.get("precision"))):
        raise CheckpointError(
            f"{folder} was quantized by another release ({QUANTIZATION} {about}); quantize its original again with this one"
        )
    return str(about["precision"])


def read_headers(folder: Path) -> dict[str, Stored]:
    """Where every tensor of a checkpoint folder lies, under the names it is stored by; one file or shards with an index."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        # A name, never a path: an index may come from anywhere and must not make us read ../../elsewhere.
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{folder / INDEX} names the shard {file[:100]!r}; a shard is a .safetensors file beside the index"
            )
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / INDEX} names {file}, which is not there; fetch the checkpoint again"
            )
        tensors |= {
            name: stored
            for name, stored in read_header(folder / file).items()
            if weight_map.get(name) == file
        }
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(
            f"{folder / INDEX} promises tensors that their shards do not hold: {', '.join(lost[:8])}"
        )
    return tensors


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when they are read, and no safetensors. "
            "Where you trust them, transformers converts: "
            "LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    return CheckpointError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; weights are read from safetensors only"
    )


def fingerprint(folder: str | Path) -> str:
    """A hash, 32 hex digits, that tells checkpoints apart in milliseconds.

    It covers config.json, every tensor's name, type and shape, and the first 1024 bytes of its numbers; not the rest of the
    numbers, the tokenizer, or how the tensors are spread over files.
    """
    folder = Path(folder)
    state = hashlib.blake2b(
        json.dumps(read_json(folder / "config.json"), sort_keys=True).encode(), digest_size=16
    )
    for name, stored in sorted(read_headers(folder).items()):
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            state.update(
                repr(
                    (name, stored.dtype, stored.shape, file.read(min(1024, stored.bytes)))
                ).encode()
            )
    return state.hexdigest()
