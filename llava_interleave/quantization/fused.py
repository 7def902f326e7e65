"""Fused decoder and fused tower: all their layers in one call of a CPU kernel.

In a decode step at 0.5B, hundreds of calls of small operators cost as much time as the matrix
products; in a prefill or an image they and PyTorch's attention cost more. The kernel splits every
product over threads that spin between products, and keeps float32 activations from the first layer
to the last where PyTorch's operators round to bfloat16 each time. It reads and writes the engine's
KV cache. It is batch-invariant: a token's result is bit-identical for any batch composition and any
prefill chunking. `model.qwen2` and `model.siglip` are the reference implementations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from .. import kernels
from ..config import EfficientNetConfig, VisionConfig
from ..lora import LoraLinear
from ..model.qwen2 import Layer, Qwen2, rotary
from ..model.siglip import Layer as TowerLayer
from ..model.siglip import SigLIP
from .linear_cpu import QuantizedLinear

FUSED_TOKENS = 384
"""Tokens per call: their activations between two layers stay in the CPU's caches."""


@dataclass(frozen=True, slots=True)
class FusedSequence:
    """The new tokens of one sequence.

    tokens: how many are new; position: of the first; capacity: positions that the KV cache has room
    for. outputs: hidden states of the last `outputs` tokens are returned. kv_addresses: by layer,
    the addresses of keys `[Hkv, d, capacity]`, of values `[Hkv, capacity, d]` and of the scales of
    both (0 in bfloat16)."""

    tokens: int
    position: int
    capacity: int
    outputs: int
    kv_addresses: Sequence[tuple[int, int, int, int]]


class FusedDecoder:
    """The layers and the last norm of `decoder`, whose weights must stay at their addresses."""

    def __init__(self, decoder: Qwen2) -> None:
        assert can_fuse_decoder(decoder)
        c = decoder.config
        self.decoder = decoder
        self.shape = torch.tensor(
            [
                c.num_layers,
                c.hidden_size,
                c.intermediate_size,
                c.num_heads,
                c.num_kv_heads,
                c.head_dim,
            ]
        )
        self.weights = torch.tensor([_layer_words(layer) for layer in _layers(decoder)])

    def __call__(self, x: Tensor, positions: Tensor, sequences: Sequence[FusedSequence]) -> Tensor:
        """Embeddings `[T, D]` at `positions [T]`, sequence by sequence -> the hidden states of
        their outputs."""
        c = self.decoder.config
        kv_addresses = torch.tensor([sequence.kv_addresses for sequence in sequences])
        hidden = x.clone(memory_format=torch.contiguous_format)
        cos, sin = rotary(positions, c.head_dim, c.rope_theta, x.dtype)
        calls = zip(
            hidden.split(FUSED_TOKENS),
            cos.split(FUSED_TOKENS),
            sin.split(FUSED_TOKENS),
            _calls(sequences, kv_addresses),
            strict=True,
        )
        outputs = []
        for rows, rows_cos, rows_sin, words in calls:
            kernels.decode(
                rows,
                self.weights,
                self.shape,
                c.rms_norm_eps,
                torch.tensor(words),
                (rows_cos, rows_sin),
            )
            outputs.append(rows[: sum(count for *_, count, _ in words)])
        return self.decoder.norm(torch.cat(outputs))


class FusedTower:
    """The layers of `tower`, whose weights must stay at their addresses."""

    def __init__(self, tower: SigLIP, c: VisionConfig | EfficientNetConfig) -> None:
        assert can_fuse_tower(tower, c) and isinstance(c, VisionConfig)
        self.tower, self.eps = tower, c.layer_norm_eps
        heads, d = c.num_heads, c.hidden_size // c.num_heads
        self.shape = torch.tensor(
            [c.num_layers, c.hidden_size, c.intermediate_size, heads, heads, d]
        )
        self.weights = torch.tensor([_tower_words(layer) for layer in _tower_layers(tower)])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Crops `[N, 3, S, S]` -> features `[N, grid * grid, D]`; each crop is computed alone."""
        features = []
        for crop in pixels.split(1):
            hidden = self._embed(crop)
            kernels.encode(hidden[0], self.weights, self.shape, self.eps)
            features.append(hidden)
        return torch.cat(features)

    def _embed(self, crop: Tensor) -> Tensor:
        """In float32: on a CPU without bfloat16 products, PyTorch's would take a tenth of the
        tower's time."""
        embeddings = self.tower.embeddings
        patches, positions = embeddings.patch_embedding, embeddings.position_embedding
        assert patches.bias is not None
        x = conv2d(
            crop.float(), patches.weight.float(), patches.bias.float(), stride=patches.stride
        )
        return (x.flatten(2).transpose(1, 2) + positions.weight).to(crop.dtype).contiguous()


def can_fuse_tower(tower: nn.Module, c: VisionConfig | EfficientNetConfig) -> TypeGuard[SigLIP]:
    """As `can_fuse_decoder`, for a tower."""
    if not (isinstance(tower, SigLIP) and isinstance(c, VisionConfig)):
        return False  # a `DataParallelTower`, or a network of convolutions
    sizes_fit = (
        c.hidden_size % kernels.PANEL
        == c.intermediate_size % kernels.PANEL
        == c.hidden_size // c.num_heads % 2
        == 0
    )
    weight = tower.embeddings.position_embedding.weight
    return (
        sizes_fit
        and all(_all_quantized(_tower_linears(layer)) for layer in _tower_layers(tower))
        and weight.dtype == torch.bfloat16
        and weight.is_cpu
        and kernels.unavailable_reason() is None
    )


def can_fuse_decoder(decoder: Qwen2) -> bool:
    """Whether all linears of the layers are quantized, the kernel supports the sizes, and
    activations are bfloat16 on a CPU."""
    c = decoder.config
    sizes_fit = (
        c.hidden_size % kernels.PANEL
        == c.intermediate_size % kernels.PANEL
        == c.head_dim % (2 * kernels.PANEL)
        == 0
    )
    return (
        sizes_fit
        and all(_all_quantized(_linears(layer)) for layer in _layers(decoder))
        and decoder.norm.weight.dtype == torch.bfloat16
        and decoder.norm.weight.is_cpu
        and kernels.unavailable_reason() is None
    )


def _calls(
    sequences: Sequence[FusedSequence], kv_addresses: Tensor
) -> Iterator[list[tuple[int, ...]]]:
    """The kernel's `Sequence` structs, for one call of `FUSED_TOKENS` rows after another."""
    call: list[tuple[int, ...]] = []
    rows = 0
    for sequence, addresses in zip(sequences, kv_addresses, strict=True):
        done = 0
        while done < sequence.tokens:
            count = min(FUSED_TOKENS - rows, sequence.tokens - done)
            first_output = sequence.tokens - sequence.outputs
            outputs = max(0, min(count, done + count - first_output))
            position = sequence.position + done
            call.append((rows, count, position, sequence.capacity, outputs, addresses.data_ptr()))
            done, rows = done + count, rows + count
            if rows == FUSED_TOKENS:
                yield call
                call, rows = [], 0
    if call:
        yield call


def _layers(decoder: Qwen2) -> list[Layer]:
    return [layer for layer in decoder.layers if isinstance(layer, Layer)]


def _tower_layers(tower: SigLIP) -> list[TowerLayer]:
    return [layer for layer in tower.encoder.layers if isinstance(layer, TowerLayer)]


def _linears(layer: Layer) -> list[nn.Module]:
    a, mlp = layer.self_attn, layer.mlp
    linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return [_base(linear) for linear in linears]


def _tower_linears(layer: TowerLayer) -> list[nn.Module]:
    a, mlp = layer.self_attn, layer.mlp
    return [
        _base(linear) for linear in (a.q_proj, a.k_proj, a.v_proj, a.out_proj, mlp.fc1, mlp.fc2)
    ]


def _base(linear: nn.Module) -> nn.Module:
    return linear.base if isinstance(linear, LoraLinear) else linear


def _all_quantized(linears: list[nn.Module]) -> bool:
    return all(isinstance(linear, QuantizedLinear) for linear in linears)


def _layer_words(layer: Layer) -> list[int]:
    """The kernel's `LayerWeights` struct."""
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return [norm.data_ptr() for norm in norms] + _weight_words(_linears(layer))


def _tower_words(layer: TowerLayer) -> list[int]:
    """The kernel's `TowerWeights` struct."""
    one, two = layer.layer_norm1, layer.layer_norm2
    norms = (one.weight, one.bias, two.weight, two.bias)
    return [norm.data_ptr() for norm in norms] + _weight_words(_tower_linears(layer))


def _weight_words(linears: list[nn.Module]) -> list[int]:
    """The kernel's `Weight` structs."""
    words = []
    for linear in linears:
        assert isinstance(linear, QuantizedLinear)
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        words += [linear.bits, linear.weight.data_ptr(), linear.scale.data_ptr(), bias]
    return words
