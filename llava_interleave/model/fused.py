"""A decoder's layers in one call of a kernel, for steps in which few tokens are new.

Of a step of one token at 0.5B, hundreds of calls of small operators cost as much time as its products. The kernel divides every
product among threads that stay awake between them, and keeps float32 from the first layer to the last where PyTorch's operators
round to bfloat16 each time; it writes and reads the same keys and values. A token's result is the same in any company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import kernels
from .lora import Adapted
from .quantise import QuantisedLinear
from .text import Layer, Qwen2, rotary


@dataclass(frozen=True, slots=True)
class Rows:
    """The new tokens of one sequence. memory: by layer, the addresses of its keys `[Hkv, d, capacity]`, its values
    `[Hkv, capacity, d]` and their scales (0 in bfloat16); `at`: the place of the first in it."""

    count: int
    at: int
    capacity: int
    memory: Sequence[tuple[int, int, int, int]]


class Fused:
    """The layers and the last norm of `decoder`, whose weights must stay where they are."""

    def __init__(self, decoder: Qwen2) -> None:
        assert possible(decoder)
        c = decoder.config
        self.decoder = decoder
        self.shape = torch.tensor([c.num_layers, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim])
        self.weights = torch.tensor([_addresses(layer) for layer in _layers(decoder)])

    def __call__(self, x: Tensor, positions: Tensor, sequences: Sequence[Rows]) -> Tensor:
        """Embeddings `[T, D]` at `positions [T]`, the rows of the sequences one after another -> hidden states `[T, D]`."""
        c = self.decoder.config
        memory = torch.tensor([rows.memory for rows in sequences])
        found, first = [], 0
        for rows, own in zip(sequences, memory, strict=True):
            found.append((first, rows.count, rows.at, rows.capacity, own.data_ptr()))
            first += rows.count
        hidden = x.clone(memory_format=torch.contiguous_format)
        rope = rotary(positions, c.head_dim, c.rope_theta, x.dtype)
        kernels.decode(hidden, self.weights, self.shape, c.rms_norm_eps, torch.tensor(found), rope)
        return self.decoder.norm(hidden)


def possible(decoder: Qwen2) -> bool:
    """Whether every layer is of quantised linears, in sizes that the kernel divides, beside bfloat16, and there are kernels."""
    c = decoder.config
    whole = all(size % kernels.GROUP == 0 for size in (c.hidden_size, c.intermediate_size, c.head_dim))
    quantised = all(isinstance(linear, QuantisedLinear) for layer in _layers(decoder) for linear in _linears(layer))
    plain = decoder.norm.weight.dtype == torch.bfloat16 and decoder.norm.weight.is_cpu
    return whole and quantised and plain and kernels.why_not() is None


def _layers(decoder: Qwen2) -> list[Layer]:
    return [layer for layer in decoder.layers if isinstance(layer, Layer)]


def _linears(layer: Layer) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    found = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return [linear.base if isinstance(linear, Adapted) else linear for linear in found]


def _addresses(layer: Layer) -> list[int]:
    found = [layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr()]
    for linear in _linears(layer):
        assert isinstance(linear, QuantisedLinear)
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        found += [linear.bits, linear.weight.data_ptr(), linear.scale.data_ptr(), bias]
    return found
