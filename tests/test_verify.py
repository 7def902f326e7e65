"""The parity report: it passes for a faithful checkpoint, names the layer where a network differs;
ablations.
"""

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llava_interleave import checkpoints, kernels, load
from llava_interleave.cli import app
from llava_interleave.config import LoraConfig
from llava_interleave.errors import Unsupported
from llava_interleave.lora import attach
from llava_interleave.quantization.linear_cpu import QuantizedLinear
from llava_interleave.testing import tiny_checkpoint, tiny_config
from llava_interleave.verify import ablate, ablations, candidate, parity

pytestmark = pytest.mark.slow

WHOLE = LoraConfig(
    rank=3,
    alpha=5.0,
    dropout=0.0,
    targets=("vision_tower.*", "multi_modal_projector.linear_1", "*.q_proj", "*.down_proj"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own, so that greedy tokens of random weights are not one token again and
    again.
    """
    return tiny_checkpoint(
        tmp_path_factory.mktemp("tiny") / "model", tiny_config(text={"tie_word_embeddings": False})
    )


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """An adapter as training leaves it, at linears of tower, projector and decoder."""
    made = attach(checkpoints.load(folder), WHOLE, 1)
    for part in made.parts.values():
        part.b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    checkpoints.write_adapter(folder.parent / "adapter", made)
    return folder.parent / "adapter"


@pytest.fixture(scope="module", params=["int8", "int4"])
def packed(folder: Path, request: pytest.FixtureRequest) -> Path:
    """The same weights quantized."""
    target = folder.parent / request.param
    checkpoints.save(
        checkpoints.load(folder, precision=request.param), target, processor_from=folder
    )
    return target


@pytest.mark.parametrize("layout", ["hub", "original", "transformers-5"])
def test_our_networks_agree_with_transformers(
    tmp_path: Path, layout: checkpoints.CheckpointLayout
) -> None:
    config = tiny_config(text={"num_kv_heads": 2, "tie_word_embeddings": layout == "hub"})
    cases = parity.verify(tiny_checkpoint(tmp_path / "tiny", config, layout=layout), tokens=12)
    assert [case.name for case in cases] == ["text only", "one image", "three images", "two turns"]
    layers = [*(f"layer {i + 1}" for i in range(config.text.num_layers)), "norm", "logits"]
    for case in cases:
        assert case.passed, case
        assert (case.same_ids, case.matching, case.tokens) == (True, 12, 12)
        assert case.candidate == case.reference
        assert [layer.name for layer in case.layers] == [
            *(["pixels", "tower", "projector"] if case.images else []),
            *layers,
        ]
        assert all(
            layer.relative <= parity.TOLERANCE and layer.largest > 0 for layer in case.layers
        )
        assert case.kl is not None and 0 <= case.kl < 1e-9
    assert [case.images for case in cases] == [False, True, True, True]
    assert all(case.layer("pixels").error == 0 for case in cases[1:])


@pytest.mark.parametrize(
    ("where", "first"),
    [
        ("language_model.layers.1.mlp.down_proj", "layer 2"),
        ("multi_modal_projector.linear_2", "projector"),
    ],
)
def test_a_wrong_network_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, first: str
) -> None:
    """A table that cannot fail would say nothing: one matrix is off by a hundredth here, and the
    layer where it is is named.
    """
    folder = tiny_checkpoint(tmp_path / "tiny")
    loaded = checkpoints.load

    def slightly_off(*given: object, **named: object) -> object:
        model = loaded(*given, **named)
        with torch.no_grad():
            model.get_submodule(where).weight.mul_(1.01)
        return model

    monkeypatch.setattr(checkpoints, "load", slightly_off)
    cases = parity.verify(folder, tokens=2)
    for case in cases:
        wrong = [layer.name for layer in case.layers if layer.relative > parity.TOLERANCE]
        assert case.same_ids
        assert case.passed == (first == "projector" and not case.images)
        assert case.passed or wrong[0] == first


def test_other_ids_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compared beyond the pixels where the template makes other tokens."""
    made = parity.Processor.prompt
    monkeypatch.setattr(
        parity.Processor, "prompt", lambda self, chat, **_: made(self, chat, preset="official")
    )
    cases = parity.verify(tiny_checkpoint(tmp_path / "tiny"), tokens=2)
    assert not any(case.same_ids or case.passed for case in cases)
    assert [[layer.name for layer in case.layers] for case in cases] == [
        [],
        ["pixels"],
        ["pixels"],
        ["pixels"],
    ]
    as_json = cases[0].to_dict()
    assert (as_json["passed"], math.isinf(cases[0].layer("logits").error)) == (False, True)
    json.dumps(as_json, allow_nan=False)


def test_ablations() -> None:
    """The baseline equals the answer of transformers; each changed setting changes prompts and
    distributions.
    """
    calls: list[tuple[int, int]] = []
    results = ablate(tokens=6, progress=lambda done, total: calls.append((done, total)))
    names = [
        "baseline",
        *ablations.PROMPTS,
        "layer before the last",
        "bfloat16",
        "float16",
        "int8",
        "int4",
    ]
    assert [(e.setting, e.case) for e in results] == [
        (name, case) for name in names for case in ablations.CASES
    ]
    assert calls[-1] == (len(results), len(results))
    found = {(e.setting, e.case): e for e in results}
    for case, passed in ((c.name, c) for c in parity.verify(tokens=6)[1:3]):
        base = found["baseline", case]
        assert (base.text, base.kl, base.same_top1, base.matching, base.prompt_tokens) == (
            passed.reference,
            0,
            True,
            6,
            passed.prompt_tokens,
        )
        assert found["geometry pad", case].kl > 1e-8  # small: the sample images are refused
        assert found["layer before the last", case].kl > 1e-6
        assert 0 < found["float16", case].kl < 0.1
        assert 0 < found["bfloat16", case].kl < 0.1
        assert 0 < found["int8", case].kl < 0.1
        assert found["int8", case].kl < found["int4", case].kl < 0.5
        assert (
            found["preset official", case].prompt_tokens
            != base.prompt_tokens
            != found["preset interleave", case].prompt_tokens
        )
    assert (
        found["geometry anyres", "one image"].prompt_tokens
        > found["baseline", "one image"].prompt_tokens
    )
    chat = parity.conversations()["one image"]
    bot = load()
    assert (
        found["preset official", "one image"].text
        == bot.chat(chat, preset="official", max_new_tokens=6, ignore_eos=True).text
    )


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
    page = tmp_path / "report.html"
    words = ["verify", str(folder), "--tokens", "3", "--json", "--ablate", "--html", str(page)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [case["passed"] for case in report["cases"]] == [True] * 4
    assert report["cases"][1]["layers"][0] == {"name": "pixels", "error": 0.0, "relative": 0.0}
    assert len(report["ablations"]) == 20
    tags = Tags()
    tags.feed(page.read_text())
    assert (tags.found.count("table"), tags.sources, "script" in tags.found) == (6, [], False)
    for shown in ("layer 2", "geometry anyres", "two turns", ablations.BASELINE):
        assert shown in page.read_text()


def test_command_with_everything(packed: Path, folder: Path, adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    given = [
        str(packed),
        "--against",
        str(folder),
        "--adapter",
        str(adapter),
        "--tokens",
        "2",
        "--html",
        str(page),
    ]
    done = CliRunner().invoke(app, ["verify", *given, "--ablate", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["adapter"], report["against"]) == (str(adapter), str(folder))
    assert [result["setting"] for result in report["ablations"]][::2] == [
        "baseline",
        *ablations.PROMPTS,
        "layer before the last",
        "bfloat16",
    ]
    assert report["cases"][0]["tolerance"].startswith(
        "equal ids, equal pixels, every quantized linear"
    )
    for shown in (candidate.LINEARS, str(adapter), parity.OTHER_WEIGHTS.reference):
        assert shown in page.read_text()


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unsupported, match=r"pip install 'llava-interleave\[verify\]'"):
        parity.verify(tiny_checkpoint(tmp_path / "tiny"))


def test_an_adapter_agrees_with_peft(
    folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, through = (
        parity.verify(folder, tokens=8),
        parity.verify(folder, adapter=adapter, tokens=8),
    )
    for case, other in zip(through, plain, strict=True):
        assert case.passed, case
        assert all(layer.relative <= parity.TOLERANCE for layer in case.layers)
        assert (
            abs(case.layer("logits").largest - other.layer("logits").largest) > 1e-3
        )  # it is there, on both sides
    assert [case.reference for case in through] != [case.reference for case in plain]
    monkeypatch.setattr(LoraConfig, "scale", lambda self, rank: 1.01 * self.alpha / rank)
    assert not any(case.passed for case in parity.verify(folder, adapter=adapter, tokens=1))


def test_quantized_weights_are_computed_right(
    packed: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same weights as floats; also with an adapter. What a kernel gets
    wrong by a thousandth is told.
    """
    for adapter_folder in (None, adapter):
        for case in parity.verify(packed, adapter=adapter_folder, tokens=8):
            assert case.passed, case
            assert (case.tolerance, case.layers[-1].name) == (parity.QUANTIZED, candidate.LINEARS)
            assert case.layers[-1].largest > 0
            assert case.layer("layer 1").relative < 0.05
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: None)
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: self.plain(x) * 1.001)
    cases = parity.verify(packed, tokens=1)
    assert not any(case.passed for case in cases)
    assert all(
        case.layer(candidate.LINEARS).relative == pytest.approx(1e-3, rel=0.01) for case in cases
    )
    assert all(case.layer("logits").relative < parity.QUANTIZED.logits for case in cases)


def test_the_error_of_quantization(packed: Path, folder: Path) -> None:
    """Against the checkpoint it was made from every layer is off, a little; nothing is
    asked of it.
    """
    other = tiny_checkpoint(
        packed.parent / f"beside-{packed.name}", checkpoints.Checkpoint.open(folder).config, seed=1
    )
    own, against, foreign = (
        parity.verify(packed, against=source, tokens=2) for source in (None, folder, other)
    )
    lost = [sum(case.kl or 0.0 for case in cases) for cases in (own, against, foreign)]
    assert 0 < 2 * lost[0] < lost[1] < 0.1 * lost[2]
    for case, right in zip(against, own, strict=True):
        assert case.passed
        assert case.tolerance is parity.OTHER_WEIGHTS
        assert 1e-3 < case.layer("layer 1").relative < 0.2
        assert case.layer(candidate.LINEARS) == right.layer(candidate.LINEARS)
        assert json.dumps(case.to_dict(), allow_nan=False)
    assert not any(case.passed for case in parity.verify(folder, against=other, tokens=1))


def test_without_peft(folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        Unsupported, match=r"peft is not installed; pip install 'llava-interleave\[verify\]'"
    ):
        parity.verify(folder, adapter=adapter)


def test_measured() -> None:
    assert candidate.layer_diff(
        "x", torch.zeros(2), torch.tensor([0.0, -3.0])
    ) == candidate.LayerDiff("x", 3.0, 3.0)
    assert candidate.layer_diff("x", torch.zeros(0), torch.zeros(0)).relative == 0
    assert math.isinf(candidate.layer_diff("x", torch.zeros(2), torch.zeros(3)).error)
    assert parity.matching_prefix([1, 2, 3], [1, 2]) == 2
    assert parity.matching_prefix([1, 2, 3], [1, 5, 3]) == 1
