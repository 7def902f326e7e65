"""Tests for a CUDA GPU. What a CPU can run it runs, too, so that they are known to work; the rest
says why it is left out.
"""

import os

import pytest
import torch

WHY_NOT = (
    None
    if torch.cuda.is_available()
    else f"this PyTorch ({torch.__version__}) sees no CUDA GPU here"
)
GPU = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def card() -> torch.device:
    """A GPU; without one the test is left out."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    return torch.device("cuda", torch.cuda.current_device())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With TESTS_CUDA_ONLY=1 what a CPU can run is left out."""
    if os.environ.get("TESTS_CUDA_ONLY") != "1":
        return
    params = {item: getattr(item, "callspec", None) for item in items}
    here = [
        item
        for item in items
        if item.path.parent.name == "cuda"
        and "card" not in getattr(item, "fixturenames", ())
        and not (params[item] and params[item].params.get("device") == "cuda")
    ]
    config.hook.pytest_deselected(items=here)
    items[:] = [item for item in items if item not in here]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NOT:
        terminalreporter.write_line(
            f"tests/cuda: what only a GPU can show was left out, for {WHY_NOT}"
        )
