"""Adapters in PEFT's file format: a folder with adapter_config.json and adapter_model.safetensors.

Names of the newest transformers are written, those of every layout of the family are read.
"""

from __future__ import annotations

import hashlib
import json
import re
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
_READ = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
)
# Where it was made, how it began, and which modules it has, which its tensors say better: of no
# effect on what it computes.
_INERT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *(
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    ),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern", "target_modules"),
)
_UNSET: tuple[object, ...] = (None, False, "none", "", [], {})
_TOLD = 8


def read_adapter(
    folder: str | Path, network: Llava, *, dtype: torch.dtype | None = None
) -> LoraAdapter:
    """The adapter in a folder for `network`, on its device; in `dtype`, or without it in the type
    that the network computes in.

    Raises `CheckpointError` for what is no adapter, is of another network, or asks for what is not
    computed here.
    """
    folder, weight = Path(folder), network.language_model.norm.weight
    config = _settings(folder)
    _refuse(config, folder / CONFIG)
    pairs = _match(read_header(folder / TENSORS), network, config, folder)
    try:
        lora = LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=tuple(pairs),
            rslora=config.get("use_rslora") is True,
        )
    except OptionError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    with (folder / TENSORS).open("rb", buffering=0) as file:
        reader = Reader(file)

        def read(stored: Stored) -> Tensor:
            return reader.read(stored, dtype or weight.dtype, weight.device)

        parts = {name: LoraWeights(read(a), read(b), lora) for name, (a, b) in pairs.items()}
    return LoraAdapter(lora, parts)


def _settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises `CheckpointError` for a folder that is no adapter."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is no adapter: in PEFT's format that is a folder with {CONFIG} and {TENSORS}"
        )
    if not (folder / TENSORS).is_file():
        pickled = " but adapter_model.bin, a pickle, which can run code when it is read: where you trust it, PEFT converts"
        raise CheckpointError(
            f"{folder} holds no {TENSORS}" + pickled * (folder / "adapter_model.bin").is_file()
        )
    return read_json(folder / CONFIG)


def _refuse(config: dict[str, Any], path: Path) -> None:
    """Raises `CheckpointError` for settings under which an adapter computes anything but scale * B
    A x beside linears."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is of the type {config.get('peft_type')!r}; adapters are read of the type "
            "'LORA'"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{path} is for the task {config['task_type']!r}; this network writes text: "
            "'CAUSAL_LM', or none"
        )
    if lost := [name for name in ("r", "lora_alpha") if name not in config]:
        raise CheckpointError(f"{path} does not say {' and '.join(lost)}")
    odd = {
        name: value
        for name, value in config.items()
        if name not in (*_READ, *_INERT) and value not in _UNSET
    }
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        odd["init_lora_weights"] = config[
            "init_lora_weights"
        ]  # others begin by changing the weights of the network
    if odd:
        told = ", ".join(f"{name}={str(value)[:60]}" for name, value in sorted(odd.items()))
        raise CheckpointError(
            f"{path} asks for what is not computed here: {told}; merge it into its network with "
            "PEFT"
        )


def _match(
    headers: dict[str, Stored], network: Llava, config: dict[str, Any], folder: Path
) -> dict[str, tuple[Stored, Stored]]:
    """A and B by our name of the linear that they stand beside; all that does not fit is in one
    `CheckpointError`."""
    known, wrong = linears(network), []
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in headers.items():
        named = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        name = network_name(f"{named[1]}.weight").removesuffix(".weight") if named else ""
        if not named or name not in known:
            wrong.append(f"{key} {list(stored.shape)} stands beside no linear of the network")
        elif stored.dtype not in FLOATS:
            wrong.append(f"{key} is of type {stored.dtype}, quantized tensors are not read")
        elif named[2] in found.setdefault(name, {}):
            wrong.append(f"{key} is a second {named[2]} of {name}")
        else:
            found[name][named[2]] = stored
    for name, pair in found.items():
        inputs, outputs = known[name].in_features, known[name].out_features
        shapes = {side: list(stored.shape) for side, stored in sorted(pair.items())}
        rank = (shapes.get("A") or [0])[0] if config.get("rank_pattern") else config["r"]
        if not rank or shapes != {"A": [rank, inputs], "B": [outputs, rank]}:
            told = " and ".join(f"{side} {shape}" for side, shape in shapes.items())
            wrong.append(
                f"{name} has {inputs} inputs and {outputs} outputs, the adapter, of rank "
                f"{config['r']}, {told}"
            )
    if wrong or not found:
        more = f" and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise CheckpointError(
            f"the adapter in {folder} is of another network: "
            + ("; ".join(wrong[:_TOLD]) + more or "it has no tensors")
        )
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def write_adapter(folder: str | Path, adapter: LoraAdapter, *, base: str | None = None) -> None:
    """Write an adapter as a folder that PEFT loads onto transformers' network; all of it or
    nothing.

    base: the folder or hub name of the network it is for, as a note. The folder must not exist or
    be empty.
    """
    lora = adapter.lora
    names = {
        name: stored_name(f"{name}.weight", "transformers-5").removesuffix(".weight")
        for name in adapter.parts
    }
    tensors = {
        f"base_model.model.{names[name]}.lora_{side}.weight": tensor
        for name, part in sorted(adapter.parts.items())
        for side, tensor in (("A", part.a), ("B", part.b))
    }
    config = {
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {
            names[name]: len(part.a)
            for name, part in adapter.parts.items()
            if len(part.a) != lora.rank
        },
        "target_modules": sorted(names.values()),
        "task_type": None,
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
    """A hash, 32 hex digits, of all that an adapter is: its settings and every number."""
    state = hashlib.blake2b(
        json.dumps(_settings(Path(folder)), sort_keys=True).encode(), digest_size=16
    )
    with (Path(folder) / TENSORS).open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()
