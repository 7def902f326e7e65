"""The decoder and the vision tower by few launches, for a GPU: the Triton kernels and one product
each for q, k and v, and for gate and up.

`model.qwen2` and `model.siglip` are the reference implementations; requests with an adapter are
computed by them. The weights of merged linears are shared with theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from ..config import VisionConfig
from ..kernels import triton as kt
from ..lora import LoraLinear
from ..model.qwen2 import Layer, Qwen2, SummedLinear
from ..model.siglip import Layer as TowerLayer
from ..model.siglip import SigLIP
from ..quantization.linear_cuda import FP8_MULTIPLE, Float8Linear, TritonLinear
from .kv_paged import PagedBatch, PagedKVCache


class GpuDecoder:
    """The layers and the last norm of `decoder`, over a paged KV cache."""

    def __init__(self, decoder: Qwen2, cache: PagedKVCache) -> None:
        self.decoder, self.cache = decoder, cache
        c = decoder.config
        self.rope = kt.rope_table(c.context, c.head_dim, c.rope_theta, cache.pool.device)
        self.layers = [
            (layer, merge(_qkv(layer)), merge([layer.mlp.gate_proj, layer.mlp.up_proj]))
            for layer in decoder.layers
            if isinstance(layer, Layer)
        ]

    def __call__(self, x: Tensor, batch: PagedBatch) -> Tensor:
        """Embeddings `[T, D]` of a step -> hidden states `[T, D]`."""
        c, h, scaled = self.decoder.config, None, x.dtype == torch.float16
        y: Tensor | kt.Product = x
        for number, (layer, qkv_proj, gate_up_proj) in enumerate(self.layers):
            norm, kv = layer.input_layernorm, self.cache.layers[number]
            x, h = kt.add_rms_norm(y, norm.weight, norm.eps, h)
            q = kt.rotary_kv_write(
                product(qkv_proj, x), batch.positions, batch.slots, self.rope, kv, c.num_heads
            )
            attended = batch.attend(q, kv).flatten(1)
            rows = kt.scale_rows(attended) if scaled else (attended, None)
            y = product(layer.self_attn.o_proj, *rows)
            norm = layer.post_attention_layernorm
            x, h = kt.add_rms_norm(y, norm.weight, norm.eps, h)
            gate_up = product(gate_up_proj, x)
            rows = kt.scale_rows(gate_up, gated=True) if scaled else (kt.silu_mul(gate_up), None)
            y = product(layer.mlp.down_proj, *rows)
        norm = self.decoder.norm
        return kt.add_rms_norm(y, norm.weight, norm.eps, h)[0]


def product(module: nn.Module, x: Tensor, scale: Tensor | None = None) -> Tensor | kt.Product:
    """A linear, as the kernel after it reads it. scale: of the rows, in float16."""
    module = base(module)
    if isinstance(module, TritonLinear):
        return kt.packed_product(x, module.packed, module.bias)._replace(scale=scale)
    if scale is not None and not isinstance(module, SummedLinear):
        return kt.Product(module(x), None, scale, x.dtype)
    found: Tensor = module(x) if scale is None else module(x, scale)
    return found


class GpuTower:
    """The vision tower: crops `[N, 3, S, S]` -> features `[N, grid * grid, D]`."""

    def __init__(self, tower: SigLIP, c: VisionConfig) -> None:
        self.tower, self.heads = tower, c.num_heads
        self.layers = [
            (layer, merge([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]))
            for layer in tower.encoder.layers
            if isinstance(layer, TowerLayer)
        ]

    def __call__(self, pixels: Tensor) -> Tensor:
        embedded = self.tower.embeddings(pixels).contiguous()
        x, h = embedded.flatten(0, 1), None
        for layer, qkv_proj in self.layers:
            norm = layer.layer_norm1
            y, h = kt.add_layer_norm(x, norm.weight, norm.bias, norm.eps, h)
            qkv = qkv_proj(y).view(*embedded.shape[:2], 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = base(layer.self_attn.out_proj)(attended.flatten(0, 1))
            norm = layer.layer_norm2
            y, h = kt.add_layer_norm(x, norm.weight, norm.bias, norm.eps, h)
            x = base(layer.mlp.fc2)(gelu(base(layer.mlp.fc1)(y), approximate="tanh"))
        return (x + h).to(x.dtype).view_as(embedded)


class MergedLinear(nn.Module):
    """A linear whose outputs are those of several, one after another."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = torch.cat(tuple(one.weight for one in linears))
        biases = [one.bias for one in linears if one.bias is not None]
        assert len(biases) in (0, len(linears))
        self.bias = torch.cat(tuple(biases)) if biases else None
        start = 0
        for one in linears:  # whose own weights are views from now on
            rows = slice(start, start := start + one.out_features)
            one.weight.data = self.weight[rows]
            if self.bias is not None:
                one.bias.data = self.bias[rows]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ConcatLinear(nn.Module):
    """Linears of other kinds: a product for each."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = linears

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([one(x) for one in self.linears], -1)


@torch.inference_mode(False)  # a parameter takes no data that was made in it
@torch.no_grad()
def merge(linears: Sequence[nn.Module]) -> nn.Module:
    """One linear of several of the same inputs."""
    linears = [base(one) for one in linears]
    if all(isinstance(one, nn.Linear) for one in linears):
        return MergedLinear([one for one in linears if isinstance(one, nn.Linear)])
    if all(isinstance(one, Float8Linear) for one in linears):
        return merge_float8([one for one in linears if isinstance(one, Float8Linear)])
    packed = [one for one in linears if isinstance(one, TritonLinear)]
    merged = TritonLinear.merge(packed) if len(packed) == len(linears) else None
    return ConcatLinear(linears) if merged is None else merged


def merge_float8(linears: Sequence[Float8Linear]) -> nn.Module:
    """As `merge`: inputs are rounded once. Their own weights become views."""
    outputs = [one.out_features for one in linears]
    if any(n % FP8_MULTIPLE for n in outputs):
        return ConcatLinear(linears)
    with torch.device("meta"):
        size = linears[0].in_features, sum(outputs)
        merged = Float8Linear(*size, bias=linears[0].bias is not None)
    merged.weight = torch.cat([one.weight for one in linears])
    merged.scale = torch.cat([one.scale for one in linears], 1)
    if merged.bias is not None:
        biases = tuple(one.bias for one in linears if one.bias is not None)
        merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    for one, weight in zip(linears, merged.weight.split(outputs), strict=True):
        one.weight = weight
    return merged


def base(module: nn.Module) -> nn.Module:
    """A linear without its adapters."""
    return module.base if isinstance(module, LoraLinear) else module


def _qkv(layer: Layer) -> list[nn.Module]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]
