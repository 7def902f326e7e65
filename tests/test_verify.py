"""The parity report: it passes for a faithful checkpoint, tells a network that differs and where, and what each switch does."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from llava_interleave import load, weights
from llava_interleave.errors import Unsupported
from llava_interleave.testing import tiny_checkpoint, tiny_config
from llava_interleave.verify import parity, switches, why


@pytest.mark.parametrize("layout", ["hub", "original", "transformers-5"])
def test_our_networks_agree_with_transformers(tmp_path: Path, layout: weights.CheckpointLayout) -> None:
    config = tiny_config(text={"num_kv_heads": 2, "tie_word_embeddings": layout == "hub"})
    cases = parity.verify(tiny_checkpoint(tmp_path / "tiny", config, layout=layout), tokens=12)
    assert [case.name for case in cases] == ["text only", "one image", "three images", "two turns"]
    layers = [*(f"layer {i + 1}" for i in range(config.text.num_layers)), "norm", "logits"]
    for case in cases:
        assert case.passed, case
        assert (case.ids, case.same, case.tokens, case.ours == case.theirs) == (True, 12, 12, True)
        assert [stage.name for stage in case.stages] == [*(["pixels", "tower", "projector"] if case.images else []), *layers]
        assert all(stage.relative <= parity.TOLERANCE and stage.largest > 0 for stage in case.stages)
    assert [case.images for case in cases] == [False, True, True, True]
    assert all(case.stage("pixels").error == 0 for case in cases[1:])


@pytest.mark.parametrize(
    ("where", "first"), [("language_model.layers.1.mlp.down_proj", "layer 2"), ("multi_modal_projector.linear_2", "projector")]
)
def test_a_wrong_network_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, first: str) -> None:
    """A table that cannot fail would say nothing: one matrix is off by a hundredth here, and the stage where it is is named."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    loaded = weights.load

    def slightly_off(*given: object, **named: object) -> object:
        model = loaded(*given, **named)
        with torch.no_grad():
            model.get_submodule(where).weight.mul_(1.01)
        return model

    monkeypatch.setattr(parity.weights, "load", slightly_off)
    cases = parity.verify(folder, tokens=2)
    for case in cases:
        wrong = [stage.name for stage in case.stages if stage.relative > parity.TOLERANCE]
        assert case.ids
        assert case.passed == (first == "projector" and not case.images)
        assert case.passed or wrong[0] == first


def test_other_ids_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compared beyond the pixels where the template makes other tokens."""
    made = parity.Processor.prompt
    monkeypatch.setattr(parity.Processor, "prompt", lambda self, chat, **_: made(self, chat, preset="official"))
    cases = parity.verify(tiny_checkpoint(tmp_path / "tiny"), tokens=2)
    assert not any(case.ids or case.passed for case in cases)
    assert [[stage.name for stage in case.stages] for case in cases] == [[], ["pixels"], ["pixels"], ["pixels"]]
    told = cases[0].told()
    assert (told["passed"], math.isinf(cases[0].stage("logits").error)) == (False, True)
    json.dumps(told, allow_nan=False)


def test_switches() -> None:
    """The baseline is transformers' answer; what is switched changes prompts and distributions as it must."""
    said: list[tuple[int, int]] = []
    effects = why(tokens=6, say=lambda done, total: said.append((done, total)))
    names = ["baseline", *switches.PROMPTS, "layer before the last", "bfloat16", "float16"]
    assert [(e.switch, e.case) for e in effects] == [(name, case) for name in names for case in switches.CASES]
    assert said[-1] == (len(effects), len(effects))
    found = {(e.switch, e.case): e for e in effects}
    for case, passed in ((c.name, c) for c in parity.verify(tokens=6)[1:3]):
        base = found["baseline", case]
        assert (base.text, base.kl, base.likeliest, base.same, base.prompt) == (passed.theirs, 0, True, 6, passed.prompt)
        assert found["geometry pad", case].kl > 1e-6
        assert found["layer before the last", case].kl > 1e-6
        assert 0 < found["float16", case].kl < 0.1
        assert 0 < found["bfloat16", case].kl < 0.1
        assert found["preset official", case].prompt != base.prompt != found["preset interleave", case].prompt
    assert found["geometry anyres", "one image"].prompt > found["baseline", "one image"].prompt
    chat = parity.conversations()["one image"]
    bot = load()
    assert found["preset official", "one image"].text == bot.chat(chat, preset="official", max_new_tokens=6, ignore_eos=True).text


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.sources += [name for name, _ in attrs if name in ("src", "href")]


def test_command(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-c", "from llava_interleave.cli import main; main()", "verify", str(folder), "--tokens", "3"]
    page = tmp_path / "report.html"
    done = subprocess.run([*command, "--json", "--why", "--html", str(page)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [case["passed"] for case in told["cases"]] == [True] * 4
    assert told["cases"][1]["stages"][0] == {"name": "pixels", "error": 0.0, "relative": 0.0}
    assert len(told["why"]) == 16
    tags = Tags()
    tags.feed(page.read_text())
    assert (tags.found.count("table"), tags.sources, "script" in tags.found) == (6, [], False)
    for shown in ("layer 2", "geometry anyres", "two turns", switches.BASELINE):
        assert shown in page.read_text()


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unsupported, match=r"pip install 'llava-interleave\[verify\]'"):
        parity.verify(tiny_checkpoint(tmp_path / "tiny"))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    network = weights.load(folder, dtype=torch.float32, precision="int8")
    weights.save(network, tmp_path / "int8", processor_from=folder)
    with pytest.raises(Unsupported, match="int8 weights"):
        parity.verify(tmp_path / "int8")


def test_measured() -> None:
    assert parity.measured("x", torch.zeros(2), torch.tensor([0.0, -3.0])) == parity.Stage("x", 3.0, 3.0)
    assert parity.measured("x", torch.zeros(0), torch.zeros(0)).relative == 0
    assert math.isinf(parity.measured("x", torch.zeros(2), torch.zeros(3)).error)
    assert parity.agreeing([1, 2, 3], [1, 2]) == 2
    assert parity.agreeing([1, 2, 3], [1, 5, 3]) == 1
