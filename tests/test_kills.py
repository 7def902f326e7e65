"""The commands themselves under SIGKILL; `python bench/kills.py` does it twenty times each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork")
def test_commands_go_on_where_they_were_killed(tmp_path: Path) -> None:
    own = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rounds", "1"], capture_output=True, text=True, env=own
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"llava (\w+): killed and gone on 1 times; 24 rows", done.stdout)
    assert told == ["batch", "eval"]
