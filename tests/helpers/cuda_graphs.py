"""Shared by tests: see tests/test_kv_paged.py."""

from __future__ import annotations

import pytest
from torch import Tensor

from llava_interleave.engine.cuda_graphs import CudaGraphDecoder


class Graph:
    """Runs a step again in the tensors that it was captured in. Graphs share memory: what others
    found is gone then.
    """

    def __init__(self, captured: CudaGraphDecoder, size: int, others: list[Graph]) -> None:
        self.graphs, self.size, self.others, self.replays = captured, size, others, 0
        self.found = self.computed()

    def computed(self) -> tuple[Tensor, Tensor]:
        found = self.graphs._step(self.size)
        for other in self.others:
            for tensor in other.found:
                tensor.fill_(-1)
        return found

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(self.found, self.computed(), strict=True):
            old.copy_(new)


def graphs_of(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """All graphs that are captured from now on, as if there were a card."""
    found: list[Graph] = []

    def capture(self: CudaGraphDecoder, size: int) -> tuple[Graph, tuple[Tensor, Tensor]]:
        found.append(Graph(self, size, [graph for graph in found if graph.graphs is self]))
        return found[-1], found[-1].found

    monkeypatch.setattr("llava_interleave.engine.cuda_graphs.unavailable_reason", lambda _: None)
    monkeypatch.setattr(CudaGraphDecoder, "_capture", capture)
    return found
