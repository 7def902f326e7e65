"""What several test files share."""

import pytest

from llava_interleave import kernels


@pytest.fixture(params=["AVX2", "AVX-512 VNNI", "AVX-512 BF16"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compiled for one instruction set, whichever is this machine's best."""
    flags = {"AVX2": kernels._AVX2, "AVX-512 VNNI": kernels._AVX512}.get(
        request.param, kernels._BFLOAT16
    )
    if len(kernels.instructions()) < len(flags):
        pytest.skip(f"this CPU has no {request.param}")
    found = kernels.functions(kernels.compiled(flags))
    monkeypatch.setattr(kernels, "_library", lambda: found)
