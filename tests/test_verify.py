"""The parity table: it passes for a faithful checkpoint and tells a network that differs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_interleave import verify as parity
from llava_interleave import weights
from llava_interleave.errors import Unsupported
from llava_interleave.testing import tiny_checkpoint, tiny_config


@pytest.mark.parametrize("layout", ["hub", "original", "transformers-5"])
def test_our_networks_agree_with_transformers(tmp_path: Path, layout: weights.CheckpointLayout) -> None:
    config = tiny_config(text={"num_kv_heads": 2, "tie_word_embeddings": layout == "hub"})
    cases = parity.verify(tiny_checkpoint(tmp_path / "tiny", config, layout=layout), tokens=12)
    assert [case.name for case in cases] == ["text only", "one image", "three images", "two turns"]
    for case in cases:
        assert case.passed, case
        assert (case.ids, case.pixels, case.same, case.tokens) == (True, 0, 12, 12)


def test_a_wrong_network_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that cannot fail would say nothing: one norm's weights are off by a thousandth here."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    loaded = weights.load

    def slightly_off(*given: object, **named: object) -> object:
        model = loaded(*given, **named)
        with torch.no_grad():
            model.language_model.norm.weight.mul_(1.001)
        return model

    monkeypatch.setattr(parity.weights, "load", slightly_off)
    cases = parity.verify(folder, tokens=2)
    assert not any(case.passed for case in cases)
    assert all(case.ids and case.logits > parity.TOLERANCE for case in cases)


def test_command(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-c", "from llava_interleave.cli import main; main()", "verify", str(folder), "--tokens", "3"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [case["passed"] for case in json.loads(done.stdout)] == [True] * 4


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unsupported, match=r"pip install 'llava-interleave\[verify\]'"):
        parity.verify(tiny_checkpoint(tmp_path / "tiny"))


def test_furthest() -> None:
    assert parity.furthest(torch.zeros(2), torch.tensor([0.0, -3.0])) == 3
    assert parity.furthest(torch.zeros(0), torch.zeros(0)) == 0
    assert math.isinf(parity.furthest(torch.zeros(2), torch.zeros(3)))
