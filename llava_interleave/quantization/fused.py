"""All layers of the decoder, and of the image tower, in one call of a kernel.

Of a step of one token at 0.5B, hundreds of calls of small operators cost as much time as its products; of a prompt or a picture
they and PyTorch's attention cost more. The kernel divides every product among threads that stay awake between them, and keeps
float32 from the first layer to the last where PyTorch's operators round to bfloat16 each time; it writes and reads the same keys
and values. A token's result is the same to the last bit in any company: however a prompt is cut, and whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from .. import kernels
from ..config import VisionConfig
from ..lora import LoraLinear
from ..model.qwen2 import Layer, Qwen2, rotary
from ..model.siglip import Layer as TowerLayer
from ..model.siglip import SigLIP
from .linear import QuantizedLinear

FUSED_TOKENS = 384
"""Tokens that go through all layers together: what is kept of them between two layers stays in a processor's caches."""


@dataclass(frozen=True, slots=True)
class FusedSequence:
    """The new tokens of one sequence. memory: by layer, the addresses of its keys `[Hkv, d, capacity]`, its values
    `[Hkv, capacity, d]` and their scales (0 in bfloat16); `at`: the place of the first in it. asked: hidden states of the
    last so many are wanted."""

    count: int
    at: int
    capacity: int
    asked: int
    memory: Sequence[tuple[int, int, int, int]]


class FusedDecoder:
    """The layers and the last norm of `decoder`, whose weights must stay where they are."""

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
        self.weights = torch.tensor([_addresses(layer) for layer in _layers(decoder)])

    def __call__(self, x: Tensor, positions: Tensor, sequences: Sequence[FusedSequence]) -> Tensor:
        """Embeddings `[T, D]` at `positions [T]`, sequence by sequence -> hidden states of those asked for."""
        c = self.decoder.config
        memory = torch.tensor([rows.memory for rows in sequences])
        hidden = x.clone(memory_format=torch.contiguous_format)
        cos, sin = rotary(positions, c.head_dim, c.rope_theta, x.dtype)
        parts = zip(
            hidden.split(FUSED_TOKENS),
            cos.split(FUSED_TOKENS),
            sin.split(FUSED_TOKENS),
            _blocks(sequences, memory),
            strict=True,
        )
        asked = []
        for part, part_cos, part_sin, block in parts:
            kernels.decode(
                part,
                self.weights,
                self.shape,
                c.rms_norm_eps,
                torch.tensor(block),
                (part_cos, part_sin),
            )
            asked.append(part[: sum(count for *_, count, _ in block)])
        return self.decoder.norm(torch.cat(asked))


class FusedTower:
    """The tower whose layers are those of `tower`, whose weights must stay where they are."""

    def __init__(self, tower: SigLIP, c: VisionConfig) -> None:
        assert can_fuse_tower(tower, c)
        self.tower, self.eps = tower, c.layer_norm_eps
        heads, d = c.num_heads, c.hidden_size // c.num_heads
        self.shape = torch.tensor(
            [c.num_layers, c.hidden_size, c.intermediate_size, heads, heads, d]
        )
        self.weights = torch.tensor([_tower_addresses(layer) for layer in _tower_layers(tower)])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Crops `[N, 3, S, S]` -> features `[N, grid * grid, D]`, each crop as it would be alone."""
        found = []
        for crop in pixels.split(1):
            hidden = self.embedded(crop)
            kernels.encode(hidden[0], self.weights, self.shape, self.eps)
            found.append(hidden)
        return torch.cat(found)

    def embedded(self, crop: Tensor) -> Tensor:
        """In float32: where a CPU has no products in bfloat16, PyTorch's take a tenth of the whole tower's time."""
        patches, places = (
            self.tower.embeddings.patch_embedding,
            self.tower.embeddings.position_embedding,
        )
        assert patches.bias is not None
        found = conv2d(
            crop.float(), patches.weight.float(), patches.bias.float(), stride=patches.stride
        )
        return (found.flatten(2).transpose(1, 2) + places.weight).to(crop.dtype).contiguous()


def can_fuse_tower(tower: nn.Module, c: VisionConfig) -> bool:
    """As `possible`, of a tower."""
    if not isinstance(tower, SigLIP):  # but one whose crops are dealt out
        return False
    whole = (
        c.hidden_size % kernels.PANEL
        == c.intermediate_size % kernels.PANEL
        == c.hidden_size // c.num_heads % 2
        == 0
    )
    quantised = all(
        isinstance(linear, QuantizedLinear)
        for layer in _tower_layers(tower)
        for linear in _tower_linears(layer)
    )
    weight = tower.embeddings.position_embedding.weight
    return (
        whole
        and quantised
        and weight.dtype == torch.bfloat16
        and weight.is_cpu
        and kernels.unavailable_reason() is None
    )


def can_fuse_decoder(decoder: Qwen2) -> bool:
    """Whether every layer is of quantised linears, in sizes that the kernel divides, beside bfloat16, and there are kernels."""
    c = decoder.config
    whole = (
        c.hidden_size % kernels.PANEL
        == c.intermediate_size % kernels.PANEL
        == c.head_dim % (2 * kernels.PANEL)
        == 0
    )
    quantised = all(
        isinstance(linear, QuantizedLinear)
        for layer in _layers(decoder)
        for linear in _linears(layer)
    )
    plain = decoder.norm.weight.dtype == torch.bfloat16 and decoder.norm.weight.is_cpu
    return whole and quantised and plain and kernels.unavailable_reason() is None


def _blocks(sequences: Sequence[FusedSequence], memory: Tensor) -> Iterator[list[tuple[int, ...]]]:
    """What the kernel calls sequences, of one BLOCK of rows after another."""
    block: list[tuple[int, ...]] = []
    taken = 0
    for rows, own in zip(sequences, memory, strict=True):
        done = 0
        while done < rows.count:
            some = min(FUSED_TOKENS - taken, rows.count - done)
            asked = max(0, min(some, done + some - (rows.count - rows.asked)))
            block.append((taken, some, rows.at + done, rows.capacity, asked, own.data_ptr()))
            done, taken = done + some, taken + some
            if taken == FUSED_TOKENS:
                yield block
                block, taken = [], 0
    if block:
        yield block


def _layers(decoder: Qwen2) -> list[Layer]:
    return [layer for layer in decoder.layers if isinstance(layer, Layer)]


def _tower_layers(tower: SigLIP) -> list[TowerLayer]:
    return [layer for layer in tower.encoder.layers if isinstance(layer, TowerLayer)]


def _linears(layer: Layer) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    found = (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )
    return [_base(linear) for linear in found]


def _tower_linears(layer: TowerLayer) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    found = (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.out_proj,
        mlp.fc1,
        mlp.fc2,
    )
    return [_base(linear) for linear in found]


def _base(linear: nn.Module) -> nn.Module:
    return linear.base if isinstance(linear, LoraLinear) else linear


def _addresses(layer: Layer) -> list[int]:
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return [norm.data_ptr() for norm in norms] + _words(_linears(layer))


def _tower_addresses(layer: TowerLayer) -> list[int]:
    one, two = layer.layer_norm1, layer.layer_norm2
    return [part.data_ptr() for part in (one.weight, one.bias, two.weight, two.bias)] + _words(
        _tower_linears(layer)
    )


def _words(linears: list[nn.Module]) -> list[int]:
    """What the kernel calls weights."""
    found = []
    for linear in linears:
        assert isinstance(linear, QuantizedLinear)
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        found += [linear.bits, linear.weight.data_ptr(), linear.scale.data_ptr(), bias]
    return found
