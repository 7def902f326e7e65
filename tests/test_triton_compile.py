"""Every Triton kernel compiled for every architecture, without a GPU (`bench/compile_kernels.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_interleave.kernels.triton.launch import SHARED_MEMORY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_fit_an_architecture(capability: int, tmp_path: Path) -> None:
    """Into its shared memory, and without spilling registers; docs/gpu.md has the numbers."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), str(capability)]
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for label, one in found.items():
        assert one["shared"] <= SHARED_MEMORY[capability], label
        assert one["stack"] == 0, label
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8").split("<!-- kernels -->")[1]
    table = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    column = next(n for n, head in enumerate(table[0]) if head.startswith(f"sm_{capability} "))
    written = {line[0][2:]: line[column].removesuffix(" |") for line in table[2 : 2 + len(found)]}
    assert written == {
        label: f"{one['shared']} KiB, {one['registers']}" for label, one in found.items()
    }, "run `python bench/compile_kernels.py`"
