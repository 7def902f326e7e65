"""Fixtures and markers of the whole suite.

Tests run on all cores (pytest-xdist). `-m fast` leaves out what is marked `slow`: tests that train,
start servers, browsers or several processes, or compile C++.
"""

import os

# Before PyTorch is imported: workers that each use every core slow each other down.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before Triton is imported: its interpreter runs the kernels of a GPU in tests that use `interpreted`.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from llava_interleave import kernels
from llava_interleave.kernels.triton import launch
from llava_interleave.testing import tiny_checkpoint


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A few named files run in one process: starting workers would take longer."""
    return 0 if all(".py" in word for word in config.args) and len(config.args) < 4 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without `slow` a test is `fast`; kernels of other instruction sets than this machine's are
    compiled for the tests alone, and slow.
    """
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {}).get("instructions")
        here = kernels.build.cpu_flags() if chosen and kernels.unavailable_reason() is None else ()
        if chosen and INSTRUCTIONS[chosen] != here:
            item.add_marker("slow")
        if item.get_closest_marker("slow") is None:
            item.add_marker("fast")


launch.INTERPRETED = False


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter runs the kernels of a GPU; memory that they allocate holds NaN."""
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "INTERPRETED", True)
    torch.use_deterministic_algorithms(True)  # which also fills memory that is not initialized
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint with random weights that all tests read and none changes."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


INSTRUCTIONS = {
    "AVX2": kernels.build.AVX2,
    "AVX-512 VNNI": kernels.build.AVX512,
    "AVX-512 BF16": kernels.build.AVX512_BF16,
}


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compiled for one instruction set, whichever is this machine's best."""
    flags = INSTRUCTIONS[request.param]
    if len(kernels.build.cpu_flags()) < len(flags):
        pytest.skip(f"this CPU has no {request.param}")
    found = kernels.build.bind(kernels.build.compile_kernels(flags))
    monkeypatch.setattr(kernels.build, "library", lambda: found)
