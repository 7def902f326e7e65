"""Adapters in PEFT's file format: a folder with adapter_config.json and adapter_model.safetensors.

LoRA and DoRA, ranks and alphas per linear, whole modules (`modules_to_save`). Names of the newest
transformers are written, those of every layout of the family are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LoraConfig
from ..config_json import read_json
from ..errors import CheckpointError, OptionError
from ..lora import LoraAdapter, LoraWeights, linears
from ..model import Llava
from .files import new_folder
from .layouts import network_name, stored_name
from .safetensors_file import FLOATS, Reader, Stored, read_header, write

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_SUPPORTED = (
    "alpha_pattern",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "task_type",
    "use_dora",
    "use_rslora",
)
# Origin, initialization, and which modules have it, which the tensors show: without effect on the
# result.
_IGNORED_KEYS = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
)
_UNSET: tuple[object, ...] = (None, False, "none", "", [], {})
_PREFIX = "base_model.model."
_MAX_LISTED = 8


def read_adapter(
    folder: str | Path, network: Llava, *, dtype: torch.dtype | None = None
) -> LoraAdapter:
    """The adapter in a folder for `network`, on its device; in `dtype`, or in the network's.

    Raises `CheckpointError` for a folder that is not an adapter, an adapter of another network, and
    settings that are not supported.
    """
    folder, weight = Path(folder), network.language_model.norm.weight
    config = _settings(folder)
    _check_supported(config, folder / CONFIG)
    parts, replaced, alphas = _match(read_header(folder / TENSORS), network, config, folder)
    with (folder / TENSORS).open("rb", buffering=0) as file:
        reader = Reader(file)

        def read(stored: Stored) -> Tensor:
            return reader.read(stored, dtype or weight.dtype, weight.device)

        try:
            lora = LoraConfig(
                rank=config["r"],
                alpha=config["lora_alpha"],
                dropout=config.get("lora_dropout", 0.0),
                targets=tuple(parts) or ("",),
                rslora=config.get("use_rslora") is True,
            )
            weights = {
                name: LoraWeights(
                    read(part["A"]),
                    read(part["B"]),
                    lora,
                    alpha=alphas[name],
                    magnitude=read(part["magnitude"]) if "magnitude" in part else None,
                )
                for name, part in parts.items()
            }
        except OptionError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        modules = {
            name: {key: read(stored) for key, stored in tensors.items()}
            for name, tensors in replaced.items()
        }
    return LoraAdapter(lora, weights, modules)


def _settings(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises `CheckpointError` if the folder is no adapter."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is not an adapter: in PEFT's format that is a folder with {CONFIG} and "
            f"{TENSORS}"
        )
    if not (folder / TENSORS).is_file():
        pickled = (
            " but adapter_model.bin, a pickle, which can run code when it is read; "
            "if you trust it, convert it with PEFT"
        )
        raise CheckpointError(
            f"{folder} has no {TENSORS}" + pickled * (folder / "adapter_model.bin").is_file()
        )
    return read_json(folder / CONFIG)


def _check_supported(config: dict[str, Any], path: Path) -> None:
    """Raises `CheckpointError` for settings that change the result in an unsupported way."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} has the peft_type {config.get('peft_type')!r}; only 'LORA' is supported"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{path} has the task_type {config['task_type']!r}; supported are 'CAUSAL_LM' and null"
        )
    if missing := [name for name in ("r", "lora_alpha") if name not in config]:
        raise CheckpointError(f"{path} has no {' and no '.join(missing)}")
    unsupported = {
        name: value
        for name, value in config.items()
        if name not in (*_SUPPORTED, *_IGNORED_KEYS) and value not in _UNSET
    }
    # the others begin by changing the base weights
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        unsupported["init_lora_weights"] = config["init_lora_weights"]
    if unsupported:
        settings = ", ".join(
            f"{key}={str(value)[:60]}" for key, value in sorted(unsupported.items())
        )
        raise CheckpointError(
            f"{path} has settings that are not supported: {settings}; merge it into its base model "
            "with PEFT"
        )


_Parts = dict[str, dict[str, Stored]]


def _match(
    headers: dict[str, Stored], network: Llava, config: dict[str, Any], folder: Path
) -> tuple[_Parts, _Parts, dict[str, float]]:
    """The tensors of each linear (A, B, magnitude), those of replaced modules, and the alphas.

    All mismatches are in one `CheckpointError`.
    """
    known, wrong = linears(network), []
    tensors = {name.replace(".base.", "."): t for name, t in network.state_dict().items()}
    parts: _Parts = {}
    replaced: _Parts = {}
    alphas: dict[str, float] = {}
    for key, stored in headers.items():
        short = key.removeprefix(_PREFIX)
        lora = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|(magnitude)_vector(?:\.weight)?)", short)
        name = network_name(f"{lora[1]}.weight" if lora else short)
        module, _, parameter = name.rpartition(".")
        if stored.dtype not in FLOATS:
            wrong.append(f"{key} is of type {stored.dtype}, quantized tensors are not supported")
        elif lora and module in known:
            side = lora[2] or lora[3]
            if side in parts.setdefault(module, {}):
                wrong.append(f"{key} is a second {side} of {module}")
            parts[module][side] = stored
            alphas[module] = _by_pattern(config, "alpha_pattern", lora[1], config["lora_alpha"])
        elif not lora and config.get("modules_to_save") and name in tensors:
            expected = _shape(known.get(module), parameter, tensors[name])
            if stored.shape != expected:
                wrong.append(f"{key} is {list(stored.shape)} instead of {list(expected)}")
            replaced.setdefault(module, {})[parameter] = stored
        else:
            wrong.append(f"{key} {list(stored.shape)} belongs to no linear of the network")
    wrong += _wrong_shapes(parts, known, config)
    if config.get("ensure_weight_tying") and _embeddings(replaced):
        wrong.append("ensure_weight_tying is not supported for embeddings in modules_to_save")
    if wrong or not (parts or replaced):
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        raise CheckpointError(
            f"the adapter in {folder} is of another network: "
            + ("; ".join(wrong[:_MAX_LISTED]) + more or "it has no tensors")
        )
    return parts, replaced, alphas


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """A setting of a module: that of the first pattern that matches the end of its name."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _shape(linear: Any, parameter: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of a replacing tensor; of a linear as of its floats, though it be quantized."""
    if linear is not None and parameter == "weight":
        return (linear.out_features, linear.in_features)
    return tuple(tensor.shape)


def _embeddings(replaced: _Parts) -> bool:
    return bool({"lm_head", "language_model.embed_tokens"} & replaced.keys())


def _wrong_shapes(
    parts: _Parts, known: dict[str, torch.nn.Module], config: dict[str, Any]
) -> Iterator[str]:
    for name, part in parts.items():
        inputs, outputs = known[name].in_features, known[name].out_features
        shapes = {side: list(stored.shape) for side, stored in sorted(part.items())}
        rank = (shapes.get("A") or [0])[0] if config.get("rank_pattern") else config["r"]
        expected = {"A": [rank, inputs], "B": [outputs, rank]}
        if config.get("use_dora"):
            expected["magnitude"] = [outputs]
        if not rank or shapes != expected:
            listed = " and ".join(f"{side} {shape}" for side, shape in shapes.items())
            yield (
                f"{name} has {inputs} inputs and {outputs} outputs, "
                f"the adapter, of rank {config['r']}, {listed}"
            )


def write_adapter(folder: str | Path, adapter: LoraAdapter, *, base: str | None = None) -> None:
    """Write an adapter as a folder that PEFT loads onto transformers' network; all or nothing.

    base: the folder or hub name of the network it is for, as a note. The folder must not exist or
    be empty.
    """
    lora = adapter.lora
    names = {
        name: stored_name(f"{name}.weight", "transformers-5").removesuffix(".weight")
        for name in (*adapter.parts, *adapter.replaced)
    }
    tensors: dict[str, Tensor] = {}
    for name, part in sorted(adapter.parts.items()):
        start = f"{_PREFIX}{names[name]}.lora_"
        tensors |= {f"{start}A.weight": part.a, f"{start}B.weight": part.b}
        if part.magnitude is not None:
            tensors[f"{start}magnitude_vector"] = part.magnitude
    for name, values in adapter.replaced.items():
        tensors |= {f"{_PREFIX}{names[name]}.{key}": value for key, value in values.items()}
    ranks = {names[n]: len(p.a) for n, p in adapter.parts.items() if len(p.a) != lora.rank}
    alphas = {names[n]: p.alpha for n, p in adapter.parts.items() if p.alpha != lora.alpha}
    config = {
        "alpha_pattern": alphas,
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": sorted(names[name] for name in adapter.replaced) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": ranks,
        "target_modules": sorted(names[name] for name in adapter.parts),
        "task_type": None,
        "use_dora": any(part.magnitude is not None for part in adapter.parts.values()),
        "use_rslora": lora.rslora,
    }
    with new_folder(Path(folder)) as partial:
        dtype = next(iter(tensors.values())).dtype
        write(
            partial / TENSORS,
            {name: tuple(t.shape) for name, t in tensors.items()},
            dtype,
            tensors.__getitem__,
        )
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def adapter_fingerprint(folder: str | Path) -> str:
    """A hash, 32 hex digits, of an adapter's settings and all its numbers."""
    state = hashlib.blake2b(
        json.dumps(_settings(Path(folder)), sort_keys=True).encode(), digest_size=16
    )
    with (Path(folder) / TENSORS).open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()
