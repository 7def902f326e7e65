"""What was computed of a sequence, on its way from one engine to another: numbers, what they stand for, what made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from ..lora import LoraLinear, LoraWeights
from ..model import Llava
from ..quantization.replace import quantized_precision

FORMAT, VERSION = "llava-interleave keys and values", 1
"""Another version: the same tokens give other keys and values, or they are stored otherwise."""
SAMPLE = 1024

Image = tuple[int, int, bytes]
"""Index of the first placeholder, number of placeholders, key of the media."""


class KVSnapshot(NamedTuple):
    """about: what JSON holds: what made the keys and values, the tokens they are of, and the images among these.

    tensors: as `Slab.stored` names them.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def made_by(model: Llava, kept: torch.dtype) -> dict[str, Any]:
    """All that keys and values depend on beside the tokens and an adapter; they are kept in the type `kept`."""
    weight = model.language_model.norm.weight
    return {
        "format": FORMAT,
        "version": VERSION,
        "precision": quantized_precision(model) or str(weight.dtype).removeprefix("torch."),
        "kept": str(kept).removeprefix("torch."),
        "network": network_hash(model),
    }


def mismatch_reason(about: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Why what was made by `about` is of no use where all would be made by `here`; None where it is."""
    if any(about.get(name) != here[name] for name in ("format", "version")):
        return f"this is not {FORMAT} of version {VERSION}"
    for name in ("precision", "kept"):
        if about.get(name) != here[name]:
            how = {"precision": "computed", "kept": "kept"}[name]
            return f"these keys and values were {how} in {str(about.get(name))[:20]!r}, here they are in {here[name]!r}"
    return (
        None
        if about.get("network") == here["network"]
        else "another network computed these keys and values"
    )


def sequence(about: Mapping[str, Any], vocab: int, image: int) -> tuple[list[int], list[Image]]:
    """The tokens and images that were told, which may come from anywhere: ids below `vocab`, of which `image` is the placeholder.

    Raises `DataError` for what is no such thing, or where placeholders and images disagree.
    """
    tokens, images = about.get("tokens"), about.get("images")
    if isinstance(tokens, list) and all(
        type(token) is int and 0 <= token < vocab for token in tokens
    ):
        found = _images(images, len(tokens))
        places = [start + offset for start, length, _ in found or () for offset in range(length)]
        if found is not None and places == [
            index for index, token in enumerate(tokens) if token == image
        ]:
            return tokens, found
    raise DataError(
        "the tokens and images that keys and values are said to be of are no such, or disagree"
    )


def _images(told: object, tokens: int) -> list[Image] | None:
    """The images of so many tokens, none longer than these; None for anything else."""
    found: list[Image] = []
    for entry in told if isinstance(told, list) else (None,):
        match entry:
            case [int(start), int(length), str(key)] if (
                0 < length <= tokens and len(found) < tokens
            ):
                try:
                    found.append((start, length, bytes.fromhex(key)))
                except ValueError:
                    return None
            case _:
                return None
    return found if sum(length for _, length, _ in found) <= tokens else None


def network_hash(model: Llava) -> str:
    """A hash, 32 hex digits, of a network in memory without the adapters beside it: its config, and of every tensor name, type,
    shape and the first and last 1024 bytes."""
    state = blake2b(repr(model.config).encode(), digest_size=16)
    tensors = {
        name.replace(".base.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".low." not in name
    }
    for name, tensor in sorted(tensors.items()):
        count = SAMPLE // tensor.itemsize
        flat = tensor.detach().reshape(-1)
        state.update(
            repr((name, tensor.dtype, tuple(tensor.shape))).encode()
            + _bytes([flat[:count], flat[-count:]])
        )
    return state.hexdigest()


def adapter_hash(model: Llava, key: str) -> str:
    """A hash, 32 hex digits, of every number of the adapter that has this key in a network; "" is none."""
    state = blake2b(digest_size=16)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and key in module.low:
            part = module.low[key]
            assert isinstance(part, LoraWeights)
            state.update(
                repr((name, part.scale, tuple(part.a.shape))).encode()
                + _bytes([part.a.flatten(), part.b.flatten()])
            )
    return state.hexdigest()


def _bytes(parts: Sequence[Tensor]) -> bytes:
    return torch.cat([part.detach() for part in parts]).cpu().view(torch.uint8).numpy().tobytes()
