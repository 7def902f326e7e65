"""Tensor parallelism: each rank keeps its attention heads and its part of every layer's inner
width.

Of a layer's linears the first (q, k, v; gate, up) are split by outputs and the last (o; down) by
inputs, so that one all-reduce of `[T, D]` follows each last one (Megatron-LM, Shoeybi et al. 2019,
arXiv 1909.08053). The output head, a third (0.5B) or an eleventh (7B) of the weights that a token
reads, is split by the vocabulary, and its logits are gathered. The vision tower is replicated:
split, it would need 52 all-reduces of 1.7 MB per crop to save 0.8 GB. Its crops are distributed
instead, and their features gathered once. Embeddings, norms and projector are replicated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..errors import OptionError, Unsupported
from ..kernels import GROUP, PANEL
from ..model.llava import Llava
from ..model.qwen2 import Layer, SummedLinear
from ..quantization.linear_cpu import QuantizedLinear
from .process_group import ProcessGroup


class TensorParallelGroup(threading.local):
    """The ranks of a sharded network, and whether this thread computes in lockstep with all of
    them.

    A forward on one rank only would deadlock in the collectives; it raises `Unsupported` instead.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        self.process_group, self.in_lockstep = process_group, False

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """All ranks enter this context, and call the network alike and in the same order."""
        self.in_lockstep = True
        try:
            yield
        finally:
            self.in_lockstep = False

    def checked(self) -> ProcessGroup:
        """The process group, for a collective."""
        if not self.in_lockstep:
            raise Unsupported(
                "this operation is not supported under tensor parallelism "
                f"(world size {self.process_group.world_size}); run it in a single process"
            )
        return self.process_group


class RowParallelLinear(SummedLinear):
    """A linear without bias that has this rank's inputs: all-reduced, its outputs are those of the
    whole linear. scale: of this rank's rows in float16 (`model.qwen2.product`)."""

    def __init__(self, shard: nn.Module, tp_group: TensorParallelGroup) -> None:
        super().__init__()
        self.shard, self.tp_group = shard, tp_group

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        group, y = self.tp_group.checked(), self.shard(x)
        return group.all_reduce_(y if scale is None else y.float() * scale[..., None])


class ColumnParallelLinear(nn.Module):
    """A linear that has this rank's outputs: gathered, they are those of the whole linear."""

    def __init__(self, shard: nn.Module, tp_group: TensorParallelGroup) -> None:
        super().__init__()
        self.shard, self.tp_group = shard, tp_group

    @property
    def weight(self) -> Tensor:
        """The weight of this rank."""
        weight = self.shard.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        group = self.tp_group.checked()
        return torch.cat(group.all_gather(self.shard(x)), -1)


class DataParallelTower(nn.Module):
    """A replicated vision tower: each rank encodes some of the crops `[N, 3, S, S]`, and all ranks
    gather all features."""

    def __init__(self, tower: nn.Module, tp_group: TensorParallelGroup) -> None:
        super().__init__()
        self.tower, self.tp_group = tower, tp_group

    def forward(self, pixels: Tensor) -> Tensor:
        group, crops = self.tp_group.checked(), len(pixels)
        per_rank = -(-crops // group.world_size)
        own = (group.rank * per_rank + torch.arange(per_rank, device=pixels.device)).clamp_max(
            crops - 1
        )  # the last rank repeats a crop where they do not divide evenly
        return torch.cat(group.all_gather(self.tower(pixels[own])))[:crops]


def shard_model(
    network: Llava, group: ProcessGroup, device: torch.device, dtype: torch.dtype
) -> TensorParallelGroup:
    """Reduce a finished network, whole on the CPU or mapped, to this rank's shard: on `device`,
    floats in `dtype`.

    Its config becomes that of the shard, with fewer heads and a smaller inner width, so that a KV
    cache made by it holds this rank's heads. This thread is in lockstep afterwards, until an engine
    is started. Raises `OptionError` where the sizes of the network do not divide by the world size.
    """
    tp_group, is_quantized = (
        TensorParallelGroup(group),
        any(isinstance(module, QuantizedLinear) for module in network.modules()),
    )
    config, multiple = network.config, GROUP if is_quantized else 1
    text = local_config(config.text, group, multiple)
    for layer in network.language_model.layers:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            shard_linear(linear, group, 0)
        for linear in (mlp.gate_proj, mlp.up_proj):
            shard_linear(linear, group, 0, multiple)
        attention.set_submodule(
            "o_proj", RowParallelLinear(shard_linear(attention.o_proj, group, 1), tp_group)
        )
        mlp.set_submodule(
            "down_proj",
            RowParallelLinear(shard_linear(mlp.down_proj, group, 1, multiple), tp_group),
        )
    network.set_submodule("vision_tower", DataParallelTower(network.vision_tower, tp_group))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)
    if config.text.vocab_size % (group.world_size * (PANEL if is_quantized else 1)) == 0:
        tied = network.lm_head.weight is network.language_model.embed_tokens.weight
        head = shard_linear(network.lm_head, group, 0, copy=not tied)
        network.set_submodule("lm_head", ColumnParallelLinear(head, tp_group))
    network.config = replace(config, text=text)
    network.language_model.config = text
    tp_group.in_lockstep = True
    return tp_group


def local_config(c: TextConfig, group: ProcessGroup, multiple: int) -> TextConfig:
    """The decoder that one rank computes; its linears are split at a multiple of `multiple`
    weights.

    Heads are split evenly, the inner width as evenly as the multiple allows.
    """

    def fits(n: int) -> bool:
        heads = c.num_heads % n or c.num_kv_heads % n
        return not (
            heads
            or c.num_heads * c.head_dim % (n * multiple)
            or c.num_kv_heads * c.head_dim % (n * multiple)
        ) and (n * multiple <= c.intermediate_size)

    n = group.world_size
    if not fits(n):
        possible = ["1", *(str(n) for n in range(2, c.num_kv_heads + 1) if fits(n))]
        whole = f" in whole groups of {multiple} quantized weights" if multiple > 1 else ""
        group.raise_everywhere(
            OptionError(
                f"{n} processes cannot share {c.num_heads} attention heads and {c.num_kv_heads} "
                "KV heads evenly "
                f"and an inner width of {c.intermediate_size}{whole}: "
                f"start torchrun with --nproc-per-node {' or '.join(possible)}"
            )
        )
    inner = local_slice(c.intermediate_size, group, multiple)
    return replace(
        c,
        num_heads=c.num_heads // n,
        num_kv_heads=c.num_kv_heads // n,
        intermediate_size=inner.stop - inner.start,
    )


def local_slice(size: int, group: ProcessGroup, multiple: int) -> slice:
    """This rank's part of `size` rows or columns, from a multiple to a multiple or the end."""
    first, last = (
        -(-size // multiple) * rank // group.world_size * multiple
        for rank in (group.rank, group.rank + 1)
    )
    return slice(first, min(size, last))


def shard_linear(
    linear: nn.Linear | QuantizedLinear,
    group: ProcessGroup,
    dim: int,
    multiple: int | None = None,
    *,
    copy: bool = True,
) -> nn.Module:
    """Reduce a linear to this rank's outputs (`dim` 0) or inputs (1), split at a `multiple`; None:
    evenly.

    copy: the shard is memory of its own, so that the whole weight can be freed.
    """
    assert dim == 0 or linear.bias is None
    size = linear.in_features if dim else linear.out_features
    own = local_slice(size, group, multiple or size // group.world_size)
    for name, whole in [*linear.named_parameters(), *linear.named_buffers()]:
        unit = (
            1 if isinstance(whole, nn.Parameter) else GROUP if dim else PANEL
        )  # buffers have a row per panel of outputs and a column per group of inputs
        count = -(-own.stop // unit) - own.start // unit
        shard = whole.narrow(dim, own.start // unit, count)
        shard = shard.clone(memory_format=torch.contiguous_format) if copy else shard
        is_parameter = isinstance(whole, nn.Parameter)
        setattr(linear, name, nn.Parameter(shard, requires_grad=False) if is_parameter else shard)
    if dim == 0:
        linear.out_features = own.stop - own.start
    else:
        linear.in_features = own.stop - own.start
    return linear
