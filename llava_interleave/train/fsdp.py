"""Fully sharded data parallelism (FSDP2): each process has a shard of every parameter, and gathers
a layer while it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ..distributed.process_group import ProcessGroup
from ..model import Llava
from ..model.siglip import SigLIP
from .data.packing import Batch, DummyBatch, Pairs
from .losses import Loss

T = TypeVar("T")


class InsideFsdp(Protocol):
    """Calls `fn(network, *args)`; with a sharded network all ranks call it together."""

    def __call__(self, fn: Callable[..., T], /, *args: Any) -> T: ...


class _Whole(nn.Module):
    """FSDP gathers parameters around `forward`, so everything with a network runs inside one."""

    def __init__(self, network: Llava) -> None:
        super().__init__()
        self.network = network

    def forward(self, fn: Callable[..., T], *args: Any) -> T:
        return fn(self.network, *args)


def layers(network: Llava) -> list[nn.Module]:
    """The layers of tower and decoder: nearly all computation and activations."""
    tower = network.vision_tower
    layers = tower.encoder.layers if isinstance(tower, SigLIP) else tower.blocks
    return [*layers, *network.language_model.layers]


def shard_fsdp(
    network: Llava,
    ranks: ProcessGroup,
    device: torch.device,
    *,
    wide: bool,
    cpu_offload: bool = False,
) -> InsideFsdp:
    """Move a network to the device, or shard it over the devices of all ranks; `wide`: in float32.

    cpu_offload: shards stay in the CPU's memory.

    -> the function to compute inside; outside of it parameters are shards.
    """
    if ranks.world_size == 1:
        network.to(device)
        _widen(network, wide)
        return lambda fn, *args: fn(network, *args)
    whole, mesh = _Whole(network), init_device_mesh(device.type, (ranks.world_size,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for part in (*layers(network), whole):  # one by one: never all in full size
        _widen(part, wide)
        fully_shard(part, mesh=mesh, offload_policy=policy)
    sharded = [module for module in whole.modules() if isinstance(module, FSDPModule)]
    for module in sharded:  # the loop divides by the global count
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def inside(fn: Callable[..., T], /, *args: Any) -> T:
        image_size = network.config.vision.image_size
        result = whole(fn, *(_with_an_image(arg, image_size) for arg in args))
        if not torch.is_grad_enabled():  # else the backward pass does
            for module in sharded:
                module.reshard()
        return result

    return inside


def enable_activation_checkpointing(network: Llava) -> None:
    """Layers keep only their inputs and recompute the rest for the gradient (Chen et al. 2016,
    arXiv 1604.06174)."""
    for layer in layers(network):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _widen(module: nn.Module, wide: bool) -> None:
    for p in module.parameters():
        if wide and p.dtype != torch.float32:
            p.data = p.data.float()


def _with_an_image(arg: Any, size: int) -> Any:
    """A batch without images gets a blank one, so that all ranks gather the tower's layers."""
    if isinstance(arg, Batch | Pairs) and not len(arg.pixels):
        return replace(arg, pixels=torch.zeros(1, 3, size, size))
    return arg


def fsdp_loss(
    loss: Callable[[Llava, Any], Loss], inside: InsideFsdp
) -> Callable[[Llava, Any], Loss]:
    """The loss of a sharded network: all ranks call it together; a `DummyBatch` counts 0."""

    def with_tensor(network: Llava, batch: Batch | Pairs) -> tuple[Tensor, Loss]:
        part = loss(network, batch)
        return part.total, part  # FSDP looks for tensors in tuples

    def sharded(_: Llava, batch: Batch | Pairs | DummyBatch) -> Loss:
        if isinstance(batch, DummyBatch):
            return Loss(inside(with_tensor, batch.batch)[0] * 0, 0, 0)
        return inside(with_tensor, batch)[1]

    return sharded
