"""Qwen2 decoder over a flat batch: embeddings `[T, D]`, positions `[T]` -> hidden states `[T, D]`.

Llama's decoder is the same without biases.

`quantization.fused` is a second implementation, for a CPU.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..config import TextConfig
from ..kernels import training
from ..kernels.triton.reference import power_of_two_above
from .attention import AttentionFn


class RMSNorm(nn.Module):
    """Normalizes in float32, scales in the type of the weights, as transformers' Qwen2 does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        f32 = x.dtype == self.weight.dtype == torch.float32
        if f32 and training.fits(x.shape[-1]) and training.applies(x, self.weight):
            return training.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        y = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )
        return y.to(self.weight.dtype)  # of a float32 residual stream


def rotary(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, 1, d]` of RoPE (Su et al. 2021, arXiv 2104.09864); the two halves of a
    head are rotated against each other."""
    powers = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**powers)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if cos.dtype == torch.float32 and training.fits(x.shape[-1] // 2) and training.applies(x):
        return training.rotate(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class SummedLinear(nn.Module):
    """A linear whose outputs are summed over processes, scaled before: `forward(x, scale)`."""


def product(linear: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear without a bias of rows `[..., in]`, in a network that computes in `dtype`.

    In float16 nothing overflows: a row is divided by a power of two first, so that its magnitudes
    sum to less than 1 and no output exceeds the largest weight. The result is float32, as is the
    residual stream, which may exceed float16's 65,504 in Qwen2."""
    if dtype != torch.float16:
        found: Tensor = linear(x)
        return found
    scale = power_of_two_above(x.detach().abs().sum(-1, dtype=torch.float32))
    rows = (x / scale[..., None]).to(dtype)
    if isinstance(linear, SummedLinear):
        return linear(rows, scale)
    return linear(rows).float() * scale[..., None]


class Attention(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        q, kv, bias = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.attention_bias
        self.q_proj = nn.Linear(c.hidden_size, q, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: AttentionFn, layer: int
    ) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(layer, rotate(q, *rope), rotate(k, *rope), v).flatten(-2)
        return product(self.o_proj, attended, attended.dtype)


class MLP(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if training.fits(gate.shape[-1]) and training.applies(gate, up):
            return product(self.down_proj, training.swiglu(gate, up), gate.dtype)
        if gate.dtype == torch.float16:
            return product(self.down_proj, silu(gate.float()) * up.float(), gate.dtype)
        return product(self.down_proj, silu(gate) * up, gate.dtype)


class Layer(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: AttentionFn, layer: int
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, attend: AttentionFn) -> Tensor:
        rope = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, attend, index)
        return self.norm(x)
