"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after each step (Polyak and Juditsky
    1992; the decay as in Tarvainen and Valpola 2017, arXiv 1703.01780).

    tensors: by the names of the trained parameters, sharded as those are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for average, weight in self._pairs(model):
            average.lerp_(weight, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the averages, and `tensors` the weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for average, weight in self._pairs(model):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, p in model.named_parameters():
            if name in self.tensors:
                yield _local(self.tensors[name]), _local(p.detach())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
