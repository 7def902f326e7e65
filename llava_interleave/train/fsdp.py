"""One network over several processes: each holds a shard of every parameter, and gathers a layer while it computes (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from ..distributed.process_group import ProcessGroup
from ..model import Llava
from .losses import Loss
from .packing import Batch, DummyBatch, Pairs

T = TypeVar("T")


class InsideFsdp(Protocol):
    """Does something with a network. With one in shards all ranks do it at once, each with words of its own."""

    def __call__(self, do: Callable[..., T], /, *words: Any) -> T: ...


class _Whole(nn.Module):
    """FSDP gathers parameters around `forward`; so all that is done with a network is done in one."""

    def __init__(self, network: Llava) -> None:
        super().__init__()
        self.network = network

    def forward(self, do: Callable[..., T], *words: Any) -> T:
        return do(self.network, *words)


def layers(network: Llava) -> list[nn.Module]:
    """The layers of tower and decoder, which hold nearly all that is computed and kept."""
    return [*network.vision_tower.encoder.layers, *network.language_model.layers]


def shard_fsdp(
    network: Llava, ranks: ProcessGroup, device: torch.device, *, wide: bool
) -> InsideFsdp:
    """Move a network to the device, or to those of all ranks in shards, `wide` in float32; -> the way to compute with it.

    Of a network in shards, parameters are shards outside of that.
    """
    if ranks.world_size == 1:
        network.to(device)
        _widen(network, wide)
        return lambda do, *words: do(network, *words)
    whole, mesh = _Whole(network), init_device_mesh(device.type, (ranks.world_size,))
    for part in (*layers(network), whole):  # one after another: never is all of it whole
        _widen(part, wide)
        fully_shard(part, mesh=mesh)
    sharded = [module for module in whole.modules() if isinstance(module, FSDPModule)]
    for module in sharded:  # the loop divides, by what all ranks have counted
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def within(do: Callable[..., T], /, *words: Any) -> T:
        found = whole(do, *(_seeing(word, network.config.vision.image_size) for word in words))
        if not torch.is_grad_enabled():  # else the backward pass does
            for module in sharded:
                module.reshard()
        return found

    return within


def enable_activation_checkpointing(network: Llava) -> None:
    """From now on layers keep only what goes into them, and compute the rest again for the gradient (Chen et al. 2016,
    arXiv 1604.06174)."""
    for layer in layers(network):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _widen(module: nn.Module, wide: bool) -> None:
    for p in module.parameters():
        if wide and p.dtype != torch.float32:
            p.data = p.data.float()


def _seeing(word: Any, side: int) -> Any:
    """A batch without pictures with a blank one: layers are gathered by all ranks or by none, those of the tower too."""
    if isinstance(word, Batch | Pairs) and not len(word.pixels):
        return replace(word, pixels=torch.zeros(1, 3, side, side))
    return word


def fsdp_loss(
    loss: Callable[[Llava, Any], Loss], within: InsideFsdp
) -> Callable[[Llava, Any], Loss]:
    """A loss of a network in shards: every call is made by all ranks, also by one whose batch is `Idle`."""

    def told(network: Llava, batch: Batch | Pairs) -> tuple[Tensor, Loss]:
        part = loss(network, batch)
        return part.total, part  # FSDP looks for tensors in tuples

    def computed(_: Llava, batch: Batch | Pairs | DummyBatch) -> Loss:
        if isinstance(batch, DummyBatch):
            return Loss(within(told, batch.batch)[0] * 0, 0, 0)
        return within(told, batch)[1]

    return computed
