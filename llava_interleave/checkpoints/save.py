"""A network becomes a checkpoint folder that transformers loads: all of it or nothing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import config_json
from ..config import LlavaConfig, VisionConfig
from ..config_json import METHOD, QUANTIZATION
from ..errors import CheckpointError, OptionError
from ..model import Llava
from ..quantization.linear_cpu import QuantizedLinear, QuantizedLinearBase
from ..quantization.replace import quantized_precision
from .files import INDEX, SINGLE, VERSION, new_folder
from .layouts import LAYOUTS, CheckpointLayout, stored_name
from .load import DTYPES, meta_network, tensor_shapes
from .safetensors_file import shards, write

COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files of a checkpoint that belong to text, pixels and generation; copied as they are."""


def save(
    model: Llava,
    folder: str | Path,
    *,
    processor_from: str | Path | None,
    dtype: torch.dtype | None = None,
    layout: CheckpointLayout | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a network as a checkpoint folder, with tokenizer, processor and generation files copied
    from `processor_from`.

    dtype: float32, bfloat16 or float16; None takes the embedding's own. layout: None is hub, and
    original for LLaVA-Video, which transformers' form cannot say. A tied head is stored once.
    A quantized network is written in a packed form that only `load` reads. The folder must not
    exist or be empty. It appears when it is complete; a failure leaves nothing.
    """
    state = model.state_dict()
    precision = quantized_precision(model)
    if any(
        isinstance(module, QuantizedLinearBase) and not isinstance(module, QuantizedLinear)
        for module in model.modules()
    ):
        raise OptionError(
            f"{precision} weights on a GPU are not written: load the checkpoint on the CPU, in "
            "int4 or int8"
        )
    if (names := tensor_shapes(meta_network(model.config, precision))) != (
        have := tensor_shapes(model)
    ):
        odd = sorted(names.items() ^ have.items())[0][0]
        raise CheckpointError(
            f"this network was changed ({odd}): merge adapters before it is saved"
        )
    write_checkpoint(
        folder,
        model.config,
        state.__getitem__,
        processor_from=processor_from,
        dtype=dtype or model.language_model.embed_tokens.weight.dtype,
        layout=layout,
        max_shard_bytes=max_shard_bytes,
        precision=precision,
    )


def write_checkpoint(
    folder: str | Path,
    config: LlavaConfig,
    tensor: Callable[[str], Tensor],
    *,
    processor_from: str | Path | None,
    dtype: torch.dtype,
    layout: CheckpointLayout | None = None,
    max_shard_bytes: int = 5_000_000_000,
    precision: str | None = None,
) -> None:
    """As `save`, for tensors on demand: `tensor(name)` is called for one after another."""
    if layout is None:
        layout = "hub" if config_json.has_hub_form(config) else "original"
    if layout not in LAYOUTS:
        raise OptionError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise OptionError(
            f"weights are stored as {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, "
            f"not {dtype}"
        )
    if max_shard_bytes < 1:
        raise OptionError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    companions = _companions(None if processor_from is None else Path(processor_from))
    with new_folder(Path(folder)) as partial:
        _write_tensors(
            partial, meta_network(config, precision), tensor, dtype, layout, max_shard_bytes
        )
        values = config_json.to_dict(config, original=layout == "original") | {
            "torch_dtype": str(dtype).removeprefix("torch.")
        }
        if precision:
            values[QUANTIZATION] = {
                "quant_method": METHOD,
                "version": VERSION,
                "precision": precision,
            }
        _write_json(partial / "config.json", values)
        for path in companions:
            shutil.copyfile(path, partial / path.name)


def _companions(source: Path | None) -> list[Path]:
    if source is None:
        return []
    paths = [source / name for name in COMPANIONS if (source / name).is_file()]
    if not paths:
        raise CheckpointError(f"{source} holds no tokenizer or processor files to copy")
    return paths


def _write_tensors(
    folder: Path,
    model: Llava,
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    layout: CheckpointLayout,
    max_bytes: int,
) -> None:
    width = (model.config.vision.hidden_size,)
    # Not used by the network, but transformers has this norm and calls a file without it
    # incomplete: the identity.
    norm = {
        "vision_tower.post_layernorm.weight": lambda: torch.ones(width),
        "vision_tower.post_layernorm.bias": lambda: torch.zeros(width),
    }
    if not isinstance(model.config.vision, VisionConfig):
        norm = {}
    mine = tensor_shapes(model) | dict.fromkeys(norm, width)
    packed = {name: value.dtype for name, value in model.named_buffers()}
    names = {
        stored_name(name, layout): name
        for name in sorted(mine, key=lambda name: name not in packed)
    }  # these whole cache lines
    types = {stored: packed.get(name, dtype) for stored, name in names.items()}
    parts = list(shards({stored: mine[name] for stored, name in names.items()}, types, max_bytes))

    def value(stored: str) -> Tensor:
        name = names[stored]
        return norm[name]() if name in norm else tensor(name)

    files = (
        [SINGLE]
        if len(parts) == 1
        else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    )
    for file, part in zip(files, parts, strict=True):
        write(folder / file, part, types, value)
    if len(parts) > 1:
        total = sum(
            math.prod(mine[name]) * types[stored].itemsize for stored, name in names.items()
        )
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
