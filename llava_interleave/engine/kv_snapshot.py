"""Saves the KV cache of a sequence and restores it in another engine: tensors, content,
provenance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, OptionError
from ..lora import Adapters, LoraLinear
from ..model import Llava, StoredKV
from ..quantization.replace import quantized_precision
from .kv_contiguous import ContiguousKVCache
from .kv_paged import PagedKVCache
from .prefix_cache import HASH_BLOCK, CacheKey, MediaIds, PrefixCache, SequenceKV, salted

FORMAT, VERSION = "llava-interleave KV cache", 1
"""Another version: the same tokens have another KV cache, or it is stored differently."""
SAMPLE_BYTES = 1024

MediaSpan = tuple[int, int, bytes]
"""Index of the first placeholder, number of placeholders, key of the media."""


class KVSnapshot(NamedTuple):
    """The KV cache of a sequence.

    metadata: JSON with the model, precision and adapter that computed it, its tokens and media.
    tensors: as `ContiguousKV.export_tensors` names them.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class KVSnapshots:
    """Saves and restores sequences of one engine."""

    def __init__(
        self,
        model: Llava,
        adapters: Adapters,
        prefix_cache: PrefixCache,
        kv_cache: ContiguousKVCache | PagedKVCache,
        media_ids: MediaIds,
    ) -> None:
        self.model, self.adapters, self.media_ids = model, adapters, media_ids
        self.prefix_cache, self.kv_cache = prefix_cache, kv_cache

    def save(self, key: CacheKey) -> KVSnapshot | None:
        """As `Engine.save`."""
        adapter = next((a for a in self._adapters() if salted(b"", a) == key.salt), None)
        if adapter is None:
            raise OptionError("a KV cache computed under a salt is private and cannot be saved")
        kv, length, _ = self.prefix_cache.find(key, len(key.ids))
        if kv is None or length < HASH_BLOCK:
            return None
        key = key.extended([], length)
        media, image = self.media_ids.by_number(), self.model.config.image_token_id
        spans = key.media_spans()
        metadata = provenance(self.model, self.kv_cache.dtype) | {
            "adapter": adapter_hash(self.model, adapter),
            "tokens": np.where(key.ids < 0, image, key.ids).tolist(),
            "images": [[start, count, media[number].hex()] for start, count, number in spans],
        }
        return KVSnapshot(metadata, self.kv_cache.export_tensors(kv, length))

    def lend(self, key: CacheKey) -> tuple[int, StoredKV]:
        """The length of the longest cached prefix of a sequence; its KV cache by layer, for any
        thread."""
        kv, length, _ = self.prefix_cache.find(key, len(key.ids))
        if kv is None or not length:
            return 0, _nothing_stored
        tensors = self.kv_cache.lend_tensors(kv, length)
        contiguous = self.kv_cache.import_tensors(tensors, length)
        dtype = self.model.language_model.norm.weight.dtype

        def stored(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = contiguous.read(layer, length, dtype)
            return keys.permute(2, 0, 1), values.transpose(0, 1)

        return length, stored

    def restore(self, snapshot: KVSnapshot) -> CacheKey:
        """As `Engine.restore`."""
        metadata, config = snapshot.metadata, self.model.config
        if reason := mismatch_reason(metadata, provenance(self.model, self.kv_cache.dtype)):
            raise DataError(reason)
        hashes = ((a, adapter_hash(self.model, a)) for a in self._adapters())
        adapter = next((a for a, value in hashes if value == metadata.get("adapter")), None)
        if adapter is None:
            raise DataError("the KV cache was computed with an adapter that is not loaded here")
        tokens, images = parse_content(metadata, config.text.vocab_size, config.image_token_id)
        media = [(start, count, self.media_ids.of(key)) for start, count, key in images]
        key = CacheKey.of(tokens, media, salted(b"", adapter))
        kv = SequenceKV(key, len(tokens))
        contiguous = self.kv_cache.import_tensors(snapshot.tensors, len(tokens))
        if not self.prefix_cache.insert(kv):
            total = self.prefix_cache.total
            running = self.prefix_cache.used - self.prefix_cache.idle_tokens
            raise DataError(
                f"no room for {len(tokens)} tokens: there is KV memory for {total}, of which "
                f"{running} are in use: raise kv_bytes"
            )
        if kv.capacity:  # else it was cached already
            self.kv_cache.adopt(kv, contiguous)
        return key

    def _adapters(self) -> list[str]:
        """Keys of all adapters; first "", no adapter."""
        return [self.adapters.keys(name)[0] for name in (None, *self.adapters.names)]


def _nothing_stored(layer: int) -> tuple[Tensor, Tensor]:
    raise LookupError(f"layer {layer} has no KV cache")


def provenance(model: Llava, kv_dtype: torch.dtype) -> dict[str, Any]:
    """All that a KV cache depends on except its tokens and adapter."""
    weight = model.language_model.norm.weight
    return {
        "format": FORMAT,
        "version": VERSION,
        "precision": quantized_precision(model) or str(weight.dtype).removeprefix("torch."),
        "kv_dtype": str(kv_dtype).removeprefix("torch."),
        "model": model_hash(model),
    }


def mismatch_reason(metadata: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Why a snapshot with this metadata cannot be used by a model of provenance `own`, or None."""
    if any(metadata.get(name) != own[name] for name in ("format", "version")):
        return f"this is not a {FORMAT} of version {VERSION}"
    for name, verb in (("precision", "computed"), ("kv_dtype", "stored")):
        if metadata.get(name) != own[name]:
            other = str(metadata.get(name))[:20]
            return f"the KV cache was {verb} in {other!r}, this engine's is {verb} in {own[name]!r}"
    if metadata.get("model") != own["model"]:
        return "the KV cache was computed by another model"
    return None


def parse_content(
    metadata: Mapping[str, Any], vocab: int, image_token_id: int
) -> tuple[list[int], list[MediaSpan]]:
    """The tokens, with ids below `vocab`, and the media of untrusted metadata.

    Raises `DataError` for anything else, or if placeholders and media do not match.
    """
    tokens = metadata.get("tokens")
    if isinstance(tokens, list) and all(
        type(token) is int and 0 <= token < vocab for token in tokens
    ):
        spans = _media_spans(metadata.get("images"), len(tokens))
        if spans is not None:
            expected = [start + offset for start, length, _ in spans for offset in range(length)]
            if expected == [i for i, token in enumerate(tokens) if token == image_token_id]:
                return tokens, spans
    raise DataError("the tokens and images of the KV cache are invalid or do not match")


def _media_spans(value: object, tokens: int) -> list[MediaSpan] | None:
    """The media of so many tokens, none longer than these; None for anything else."""
    spans: list[MediaSpan] = []
    for entry in value if isinstance(value, list) else (None,):
        match entry:
            case [int(start), int(length), str(key)] if (
                0 < length <= tokens and len(spans) < tokens
            ):
                try:
                    spans.append((start, length, bytes.fromhex(key)))
                except ValueError:
                    return None
            case _:
                return None
    return spans if sum(length for _, length, _ in spans) <= tokens else None


def model_hash(model: Llava) -> str:
    """A hash, 32 hex digits, of a model without its adapters.

    Of its config, and of every tensor: name, dtype, shape, first and last 1024 bytes.
    """
    state = blake2b(repr(model.config).encode(), digest_size=16)
    tensors = {
        name.replace(".base.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".low." not in name
    }
    for name, tensor in sorted(tensors.items()):
        count = SAMPLE_BYTES // tensor.itemsize
        flat = tensor.detach().reshape(-1)
        header = repr((name, tensor.dtype, tuple(tensor.shape))).encode()
        state.update(header + _bytes([flat[:count], flat[-count:]]))
    return state.hexdigest()


def adapter_hash(model: Llava, key: str) -> str:
    """A hash, 32 hex digits, of all weights of the adapter with this key; "" is none."""
    state = blake2b(digest_size=16)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and key in module.low:
            weights = module.low[key]
            tensors = weights.state_dict()
            shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
            state.update(repr((name, getattr(weights, "scale", 1.0), shapes)).encode())
            state.update(_bytes([tensor.flatten() for tensor in tensors.values()]))
    return state.hexdigest()


def _bytes(parts: Sequence[Tensor]) -> bytes:
    return torch.cat([part.detach() for part in parts]).cpu().view(torch.uint8).numpy().tobytes()
