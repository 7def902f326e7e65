"""Every Triton kernel compiled for every architecture, without a GPU (`bench/compile_kernels.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_interleave.kernels.triton.launch import SHARED_MEMORY

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_fit_all_architectures(tmp_path: Path) -> None:
    """Into their shared memory, and without spilling registers; docs/gpu.md has the numbers.

    One architecture is compiled always, the others where the kernels are not those of the table."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), "--json", "90"]
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8").split("<!-- kernels -->")[1]
    table = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    for capability, kernels in json.loads(done.stdout).items():
        for label, one in kernels.items():
            assert one["shared"] <= SHARED_MEMORY[int(capability)], (capability, label)
            assert one["stack"] == 0, (capability, label)
        column = next(n for n, head in enumerate(table[0]) if f"sm_{capability} " in head)
        rows = table[2 : 2 + len(kernels)]
        assert {line[0][2:]: line[column].removesuffix(" |") for line in rows} == {
            label: f"{one['shared']} KiB, {one['registers']}" for label, one in kernels.items()
        }, "run `python bench/compile_kernels.py`"
