"""A checkpoint folder: config.json read once, stored precision, headers of its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import config_json
from ..config import LlavaConfig
from ..config_json import METHOD, QUANTIZATION, read_json
from ..errors import CheckpointError
from ..quantization.precision import parse_precision
from .files import INDEX, SINGLE, VERSION
from .safetensors_file import Stored, read_header

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors. Each is read once.

    values: the content of config.json.
    """

    folder: Path
    values: dict[str, Any]

    @classmethod
    def open(cls, source: str | Path | Checkpoint) -> Checkpoint:
        """The checkpoint in a folder. Raises `CheckpointError`."""
        if isinstance(source, Checkpoint):
            return source
        return cls(Path(source), read_json(Path(source) / "config.json"))

    @cached_property
    def config(self) -> LlavaConfig:
        """The network that config.json describes. Raises `CheckpointError`."""
        return config_json.from_dict(self.values)

    @cached_property
    def precision(self) -> str | None:
        """The precision that `save` stored the weights in; None for floats."""
        entry = self.values.get(QUANTIZATION)
        if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
            return None
        if entry.get("version") != VERSION or not parse_precision(str(entry.get("precision"))):
            raise CheckpointError(
                f"{self.folder} was quantized by another release ({QUANTIZATION} {entry}); "
                "quantize its original again with this one"
            )
        return str(entry["precision"])

    @cached_property
    def headers(self) -> dict[str, Stored]:
        """Where each tensor lies, by its stored name; one file, or shards with an index."""
        folder = self.folder
        if (folder / SINGLE).is_file():
            return read_header(folder / SINGLE)
        if not (folder / INDEX).is_file():
            raise self._no_weights()
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        tensors: dict[str, Stored] = {}
        for file in sorted(set(map(str, weight_map.values()))):
            # A name, never a path: an untrusted index must not make us read ../../secret.
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
                raise CheckpointError(
                    f"{folder / INDEX} names the shard {file[:100]!r}; "
                    "a shard is a .safetensors file next to the index"
                )
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"{folder / INDEX} names {file}, which does not exist; "
                    "download the checkpoint again"
                )
            tensors |= {
                name: stored
                for name, stored in read_header(folder / file).items()
                if weight_map.get(name) == file
            }
        if missing := sorted(weight_map.keys() - tensors.keys()):
            raise CheckpointError(
                f"{folder / INDEX} lists tensors that are not in their shards: "
                f"{', '.join(missing[:8])}"
            )
        return tensors

    def _no_weights(self) -> CheckpointError:
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            return CheckpointError(
                f"{self.folder} has pickled weights ({pickles[0]}) and no safetensors. A pickle "
                "can run code when it is read. If you trust it, convert it with transformers: "
                "LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(new_folder)"
            )
        return CheckpointError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}; weights are read from safetensors "
            "only"
        )

    def fingerprint(self) -> str:
        """A hash, 32 hex digits, that distinguishes checkpoints in milliseconds.

        It covers config.json, every tensor's name, type and shape, and the first 1024 bytes of its
        numbers; not the other numbers, the tokenizer, or the distribution of tensors over files.
        """
        config = json.dumps(self.values, sort_keys=True).encode()
        state = hashlib.blake2b(config, digest_size=16)
        for name, stored in sorted(self.headers.items()):
            with stored.path.open("rb") as file:
                file.seek(stored.start)
                start = file.read(min(1024, stored.bytes))
            state.update(repr((name, stored.dtype, stored.shape, start)).encode())
        return state.hexdigest()


def fingerprint(folder: str | Path) -> str:
    """`Checkpoint.fingerprint` of a folder."""
    return Checkpoint.open(folder).fingerprint()
