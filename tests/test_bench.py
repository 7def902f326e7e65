"""`llava bench`: its arithmetic against counters of what the network really does, and what it
tells.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from llava_interleave import checkpoints
from llava_interleave.bench import matmul_throughput, measure
from llava_interleave.chat import load
from llava_interleave.cli import app
from llava_interleave.flops import decoder_bytes, prefill_flops, vision_flops
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.options import Options
from llava_interleave.testing import tiny_checkpoint
from recipes.tiny_world.benchmark import World

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


def test_a_ceiling_is_soon_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`llava bench` took two minutes to learn that a CPU without AVX-512 multiplies slowly in 8
    bits.
    """
    sides, slow = [], False

    def multiply(a: torch.Tensor, _: torch.Tensor) -> None:
        sides.append(len(a))
        time.sleep(0.06 * slow)

    monkeypatch.setattr(torch, "_int_mm", multiply)
    assert matmul_throughput("int8", torch.device("cpu"), side=512) > 0
    assert set(sides) == {256, 512}
    sides, slow = [], True
    assert 2 * 256**3 / 0.2 < matmul_throughput("int8", torch.device("cpu")) <= 2 * 256**3 / 0.06
    assert set(sides) == {256}


def decode(model: Llava, tokens: int = 1) -> None:
    hidden = model.forward(
        model.embed(torch.zeros(tokens, dtype=torch.int64)),
        torch.arange(tokens),
        PackedAttention([tokens]),
    )
    model.logits(hidden[-1:])


@torch.inference_mode()
def test_work_is_what_is_computed(folder: Path) -> None:
    """Counted by PyTorch in its products; it knows of no causal attention, which needs a little
    more than half.
    """
    model, tokens = checkpoints.load(folder), 33
    c, size = model.config.text, model.config.vision.image_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 3, size, size))
    assert vision_flops(model.config) == counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decode(model, tokens)
    unseen = c.num_layers * 4 * c.num_heads * c.head_dim * tokens * (tokens - 1) // 2
    assert prefill_flops(model.config, tokens) == counter.get_total_flops() - unseen


@torch.inference_mode()
@pytest.mark.parametrize("precision", [None, "int4"])
def test_bytes_of_a_token_are_those_of_the_modules_that_ran(
    folder: Path, precision: str | None
) -> None:
    model, ran = checkpoints.load(folder, precision=precision), set()
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding):  # of which one row is read
            module.register_forward_hook(lambda module, *_: ran.add(module))
    decode(model)
    read = {
        id(t): t.nbytes
        for m in ran
        for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    }
    assert decoder_bytes(model) == sum(read.values())


@pytest.mark.slow
def test_every_round_has_new_images_but_its_second_question_has_none(folder: Path) -> None:
    bot, seen = load(folder), []
    report = measure(
        bot, images=3, tokens=4, rounds=2, progress=lambda done, total: seen.append((done, total))
    )
    assert bot.engine.load().crops_encoded == 3 * (2 + 1)
    assert seen == [(0, 3), (1, 3), (2, 3)]
    found = {figure.name: figure for figure in report.figures}
    assert list(found) == [
        "vision",
        "prefill",
        "first token",
        "decode",
        "second question",
        "peak memory",
    ]
    assert all(0 < figure.minimum <= figure.median <= figure.maximum for figure in report.figures)
    assert found["first token"].minimum > 3 * found["vision"].minimum
    assert {name for name, figure in found.items() if figure.share} == {
        "vision",
        "prefill",
        "decode",
    }
    assert (report.about["precision"], report.about["linears"], report.about["images"]) == (
        "float32",
        "PyTorch",
        3,
    )


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(folder: Path) -> None:
    words = ["bench", "-m", str(folder), "--tokens", "3", "--rounds", "1", "--images", "1"]
    shown, as_json = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--json"]))
    assert shown.exit_code == as_json.exit_code == 0, shown.output
    report = json.loads(as_json.stdout)
    assert report["about"]["source"] == str(folder)
    for figure in report["figures"]:
        assert f"{figure['name']}, {figure['unit']}" in shown.output
    assert all(f"{name}: " in shown.output for name in report["about"])


@pytest.mark.slow
def test_the_bench_compares_with_transformers(folder: Path, tmp_path: Path) -> None:
    """A piece of it: both wrote the same tokens, every figure of both is there and on the page."""
    out, page = tmp_path / "latest.json", tmp_path / "page" / "index.html"
    systems = ["llava float32", "transformers float32"]
    flags = [
        "--systems",
        *systems,
        "--brief",
        "--minutes",
        "0",
        "--work",
        "conversation",
        "--out",
        out,
    ]
    subprocess.run([sys.executable, BENCH / "peers.py", folder, *flags], check=True)
    subprocess.run([sys.executable, BENCH / "page.py", out, page], check=True)
    found = json.loads(out.read_text())
    assert found["first tokens as the last system"] == dict.fromkeys(systems, 8)
    ours, theirs = (found["systems"][name] for name in systems)
    assert ours.keys() == theirs.keys()
    assert {
        "first token, 2 images, s",
        "decode after 2 images, tokens/s",
        "vision, s an image",
    } < ours.keys()
    assert all(
        figure["times"] == 1 and figure["median"] > 0
        for figure in [*ours.values(), *theirs.values()]
    )
    drawn = page.read_text()
    assert all(drawn.count(f"<h2>{figure}</h2>") == 1 for figure in ours)
    assert drawn.count('class="bar ours"') == len(ours)
    assert drawn.count('class="bar"') == len(theirs)


@pytest.mark.slow
def test_the_bench_of_a_gpu(tmp_path: Path) -> None:
    """Two processes of it, on the CPU: what is measured has its share of a ceiling, what cannot be
    done its reason.
    """
    out, processes = tmp_path / "found.json", ["ceilings", "ours small"]
    command = [sys.executable, BENCH / "gpu.py", "--device", "cpu", "--small", "--out", out]
    how: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    how["env"] = {**os.environ, "TRITON_INTERPRET": "0"}  # by the formulas of the kernels
    shown = subprocess.run([*command, "--only", *processes], **how).stdout
    found = json.loads(out.read_text())
    rows = {(row["process"], row["name"]): row for row in found["rows"]}
    assert {process for process, _ in rows} == set(processes)
    measured = {name: row for (_, name), row in rows.items() if row["least"]}
    assert measured.keys() == {
        "bfloat16 decode, 1 at a time after 21",
        "bfloat16 decode, 2 at a time after 21",
        "bfloat16 decode, 1 at a time after 30",
        "int8 decode, 1 at a time after 21",
        "int4 decode, 1 at a time after 21",
        "first token, 1 image",
        "first token, 2 images",
        "tower, 1 at a time",
        "tower, 8 at a time",
    }
    assert all(row["value"] > 0 and row["of the ceiling"] > 0 for row in measured.values())
    assert rows["ours small", "attention"]["note"].startswith("Triton over a paged KV cache")
    assert rows["ours small", "kernels of a decode step"]["note"] == "a profile needs a GPU"
    assert shown.count("x transformers") == 1 and found["about"]["torch"] == torch.__version__
    subprocess.run([*command, "--only", "ours small", "--minutes", "0"], **how)
    late = json.loads(out.read_text())["rows"]
    assert len(late) == 9 and {row["note"] for row in late} == {"left out: the minutes were over"}


def test_approximations_that_leave_nothing_out_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    script = importlib.import_module("approximations")
    bot = load(precision="float32")
    most, videos = 40, []
    for example in World(questions=2, scenario="views,video").examples:
        (message,) = example.ask(tmp_path)
        prompt = bot.prompt([message])
        exact = bot.answer_prompts([prompt], Options(max_new_tokens=most))[0].text
        assert script.contrastive(bot, prompt, most, 0.0) == exact
        assert script.position_independent(bot, prompt, most, 1.0) == exact
        videos += message["content"][:1] * (example.group == "video")
    longer = bot.prompt([{"role": "user", "content": [*videos, *message["content"]]}])
    exact = bot.answer_prompts([longer], Options(max_new_tokens=most))[0].text
    assert script.eviction(bot, longer, most, "nothing") == exact
    # rotated back, keys are as if they had been computed at the new position
    kept = script.KVSequence(bot)
    kept.append(script.embedded(bot, longer)[:20], 7)
    moved = kept.rotated(kept.kv, -7)
    there = script.KVSequence(bot)
    there.append(script.embedded(bot, longer)[:20], 0)
    for (k, v), (right_k, right_v) in zip(moved, there.kv, strict=True):
        assert torch.allclose(k, right_k, atol=1e-3) and torch.allclose(v, right_v, atol=1e-3)
