"""An engine on a device that is behind the host answers as one on a CPU; what would be read too
early, or written too soon, is caught.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_interleave.config import EfficientNetConfig
from llava_interleave.engine import Engine
from llava_interleave.engine.device_stream import Download
from llava_interleave.model import Llava
from tests.helpers.engine import (
    CONFIG,
    GREEDY,
    MIXED,
    SAMPLED,
    TOKEN,
    VOCAB,
    answers,
    engine,
    expected,
)
from tests.helpers.gpu import SimulatedDevice, simulated

OPTIONS: dict[str, Any] = {"kv_block_size": 16, "max_num_seqs": 6}


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedDevice]:
    return simulated(monkeypatch)


def test_answers_of_a_slow_device(devices: list[SimulatedDevice]) -> None:
    """Greedy ones run ahead of the host; sampled ones have penalties, bias and log-probabilities."""
    e = engine(**OPTIONS)
    assert answers(e.generate(MIXED, GREEDY)) == expected()
    assert devices[0].ahead >= 10
    sampled = [(r.generated, r.usage) for r in e.generate(MIXED, SAMPLED)]
    alone = engine(kv_block_size=0)
    alone.generate(MIXED, GREEDY)
    assert sampled == [(r.generated, r.usage) for r in alone.generate(MIXED, SAMPLED)]
    e.check()


def test_tokens_read_before_they_have_arrived(
    devices: list[SimulatedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Download, "wait", lambda download: download._host)
    assert wrong() and devices


def test_a_buffer_that_is_used_again_too_soon(
    devices: list[SimulatedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One buffer for the inputs of all steps: the copy of the step before may not have been made."""
    buffers: dict[Any, Tensor] = {}
    host = SimulatedDevice.host

    def reused(device: SimulatedDevice, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        if (shape, dtype) not in buffers:
            buffers[shape, dtype] = host(device, *shape, dtype=dtype)
        return buffers[shape, dtype]

    monkeypatch.setattr(SimulatedDevice, "host", reused)
    assert wrong() and devices


def test_a_launch_that_does_not_wait_for_its_inputs(
    devices: list[SimulatedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a stream of its own, without an event."""
    monkeypatch.setattr(SimulatedDevice, "launch", lambda device, work: device._do(work))
    assert wrong() and devices


def wrong() -> bool:
    """Whether answers are wrong, or none at all."""
    e = engine(**OPTIONS)
    try:
        return answers(e.generate(MIXED, GREEDY)) != expected()
    except (RuntimeError, IndexError):
        return True


@torch.inference_mode()
def test_graphs_of_an_efficientnet(devices: list[SimulatedDevice]) -> None:
    """Three crops are a graph of two and one of one."""
    tower = EfficientNetConfig(48, 64, width=0.2, depth=0.5, pool_size=1, pool_stride=1)
    model = Llava(replace(CONFIG, vision=tower)).eval().requires_grad_(False)
    runner = Engine(model, eos_ids=(), vocab=VOCAB, kv_bytes=400 * TOKEN, kv_block_size=16)._runner
    assert runner.tower_graphs is not None and set(runner.tower_graphs._graphs) == {1, 2, 4, 8}
    pixels = torch.randn(3, 3, tower.image_size, tower.image_size)
    with devices[0].active():
        found = runner._encode_images(pixels, "")
        devices[0].synchronize()
    torch.testing.assert_close(found, model.encode(pixels))
    assert sum(graph.replays for graph in devices[0].graphs) == 2


def test_the_device_does_nothing_before_it_has_to() -> None:
    device = SimulatedDevice(torch.device("cpu"))
    host, there = device.host(3), torch.zeros(3, dtype=torch.int32)
    with device.active():
        host[:] = torch.tensor([1, 2, 3])
        device.upload(host, there)
        device.launch(partial(there.add_, 1))
        first = device.download(there)
        device.launch(partial(there.mul_, 10))
        second = device.download(there)
    assert len(device.queue) == 5 and there.tolist() == [0, 0, 0]
    assert first._host.tolist() == [0x5A] * 3
    with device.active():
        assert first.wait().tolist() == [2, 3, 4]
        assert len(device.queue) == 2
        assert second.wait().tolist() == [20, 30, 40]
