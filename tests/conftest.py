"""Fixtures and markers of the whole suite.

Tests run on all cores (pytest-xdist). `-m fast` leaves out what is marked `slow`: tests that train,
start servers, browsers or several processes, or compile C++.
"""

import os
from contextlib import suppress

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


def pytest_configure(config: pytest.Config) -> None:
    """A checkout that was never installed, as a git worktree, has no kernels yet: half a minute."""
    if not hasattr(config, "workerinput"):
        with suppress(kernels.compilation.CompileError):
            list(kernels.compilation.compile_all())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without `slow` a test is `fast`."""
    for item in items:
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


@pytest.fixture(params=kernels.compilation.flags())
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of one instruction set, whichever is this machine's best."""
    if request.param not in kernels.binding.supported_instructions():
        pytest.skip(f"this CPU has no {request.param}")
    found = kernels.binding.bind(kernels.binding.find_library(request.param))
    monkeypatch.setattr(kernels.binding, "library", lambda: found)
