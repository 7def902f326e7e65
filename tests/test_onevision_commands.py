"""Commands, server, caches and training with a checkpoint of LLaVA-OneVision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from starlette.testclient import TestClient

from llava_interleave import load
from llava_interleave.checkpoints import load as load_network
from llava_interleave.config import LoraConfig
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.errors import MediaError
from llava_interleave.image_layout import ONEVISION, anyres, max_tokens_per_image
from llava_interleave.model import PackedAttention
from llava_interleave.processing import Limits, Processor
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from llava_interleave.testing import tiny_checkpoint, tiny_onevision_config
from llava_interleave.train.recipe import DPOConfig, Recipe
from llava_interleave.train.run import run
from tests.helpers.cli import llava
from tests.helpers.images import random_image
from tests.helpers.requests import data_url

pytestmark = pytest.mark.slow

ASK = ("--max-new-tokens", 6, "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("onevision") / "tiny", tiny_onevision_config())


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images one.png (2 x 2 tiles) and two.png, and the frames of a video."""
    made = tmp_path_factory.mktemp("media")
    random_image(58, 44).save(made / "one.png")
    random_image(93, 82, 1).save(made / "two.png")
    (made / "frames").mkdir()
    for number in range(3):
        random_image(40, 30, number).save(made / "frames" / f"frame_{number:04}.png")
    return made


def attached(media: Path, *names: str) -> tuple[object, ...]:
    return tuple(word for name in names for word in ("-a", media / name))


CASES = {"one": ("one.png",), "two": ("one.png", "two.png"), "frames": ("frames", "one.png")}


@pytest.mark.parametrize("case", CASES)
def test_ask_estimate_and_other_forms_of_the_checkpoint(
    folder: Path, media: Path, tmp_path: Path, case: str
) -> None:
    """Counts are equal, and a converted checkpoint has the same answer."""
    words = (*attached(media, *CASES[case]), "What is it?")
    report = json.loads(llava("ask", "-m", folder, *words, *ASK).out)
    planned = json.loads(llava("estimate", "-m", folder, *words, "--json").out)
    assert planned["total"] == report["usage"]["prompt"]
    if case == "one":
        assert planned["parts"][1]["tokens"] == anyres(58, 44, 35, 5, arrangement=ONEVISION).length
    for layout in ("original", "transformers-5.23"):
        done = llava("convert", folder, tmp_path / layout, "--layout", layout)
        assert done.code == 0, done.err
        again = llava("ask", "-m", tmp_path / layout, *words, *ASK)
        assert json.loads(again.out)["text"] == report["text"], again.err
    small = llava("quantize", folder, tmp_path / "int8", "--precision", "int8")
    assert small.code == 0, small.err
    assert json.loads(llava("ask", "-m", tmp_path / "int8", *words, *ASK).out)["text"]


def test_chat_goes_on_after_a_video(folder: Path, media: Path) -> None:
    lines = (
        f"/attach {media / 'frames'}\nWhat moves?\n/attach {media / 'one.png'}\nAnd this?\n/quit\n"
    )
    done = llava("chat", "-m", folder, "--max-new-tokens", 3, stdin=lines.encode())
    assert (done.code, done.err.count("error")) == (0, 0), done.err


def test_a_batch_of_one_image_several_and_a_video(
    folder: Path, media: Path, tmp_path: Path
) -> None:
    rows = [
        {"id": case, "media": list(names), "question": "What is it?"}
        for case, names in CASES.items()
    ]
    (media / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = llava(
        "batch", media / "rows.jsonl", tmp_path / "out.jsonl", "-m", folder,
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert done.code == 0, done.err
    answers = {
        row["id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    }
    for case, names in CASES.items():
        words = (*attached(media, *names), "What is it?")
        alone = json.loads(llava("ask", "-m", folder, *words, *ASK).out)
        assert answers[case]["answer"] == alone["text"], answers[case]


def test_caches_hold_a_tiled_image(folder: Path) -> None:
    """By image: another question about it, and the same image in int8 KV, encode nothing anew."""
    for kv in ("auto", "int8"):
        bot = load(folder, device="cpu", kv_precision=kv)
        image, clip = random_image(58, 44), [random_image(40, 30, k) for k in range(3)]
        first = bot.ask("What is it?", [image], max_new_tokens=4, ignore_eos=True)
        encoded = bot.engine.load().crops_encoded
        assert encoded == 1 + 2 * 2
        again = bot.ask("What is it?", [image], max_new_tokens=4, ignore_eos=True)
        assert (again.text, again.usage.cached) == (first.text, first.usage.prompt - 1)
        other = bot.ask(f"{'Long before. ' * 40}<image> Who?", [image], max_new_tokens=4)
        assert other.usage.cached < 100
        assert bot.engine.load().crops_encoded == encoded
        # Frames of a video are cached each; a longer video has another end.
        bot.ask("What moves?", [clip], max_new_tokens=4)
        assert bot.engine.load().crops_encoded == encoded + 3
        bot.engine.check()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_equal_tiles_are_encoded_once(folder: Path, precision: str) -> None:
    """A screenshot with one changed tile: that tile and the whole image. An image of one tile: once
    for both crops. Answers are as without a cache."""

    def fresh() -> Any:
        return load(folder, device="cpu", precision=precision)

    first = random_image(70, 70)  # 2 x 2 tiles without padding
    second = first.copy()
    second.paste((200, 30, 30), (40, 40, 60, 60))
    bot, counts = fresh(), []
    for image in (first, second, random_image(35, 35)):
        before = bot.engine.load().crops_encoded
        answer = bot.ask("What is it?", [image], max_new_tokens=6, ignore_eos=True)
        counts.append(bot.engine.load().crops_encoded - before)
        alone = fresh().ask("What is it?", [image], max_new_tokens=6, ignore_eos=True)
        assert answer.tokens == alone.tokens
        bot.engine.check()
    assert counts == [5, 2, 1]


def test_an_image_larger_than_a_step(folder: Path) -> None:
    """A tiled image of more crops and tokens than a step has is one encoder input."""
    model, processor = load_network(folder), Processor.from_folder(folder)
    prompt = processor.prompt(
        [{"role": "user", "content": [{"type": "image", "image": random_image(210, 210)}]}]
    )
    answers = []
    for step, crops in ((32, 2), (1024, 64)):
        engine = Engine(
            model,
            eos_ids=(),
            vocab=processor.tokenizer.size,
            kv_bytes=1 << 24,
            feature_bytes=0,
            max_num_batched_tokens=step,
            max_batched_images=crops,
            max_num_seqs=8,
        )
        (request,) = engine.generate([prompt], SamplingParams(max_new_tokens=6))
        answers.append(request.generated)
        engine.check()
    assert len(prompt.media[0].pixels) == 37
    assert answers[0] == answers[1]


def test_a_long_video_is_as_in_one_forward_pass(folder: Path) -> None:
    """Its frames stay bytes, and are encoded and pooled four at a time."""
    model, processor = load_network(folder), Processor.from_folder(folder)
    clip = [random_image(40, 30, number) for number in range(70)]
    content = [{"type": "video", "video": clip, "frames": 70}, {"type": "text", "text": "What?"}]
    prompt = processor.prompt([{"role": "user", "content": content}])
    (media,) = prompt.media
    assert media.crops.dtype == torch.uint8
    assert media.layout.length == 70 * 9 + 1
    with torch.inference_mode():
        features = model.arrange(model.encode(media.pixels), media.layout)
        x = model.embed(torch.tensor(prompt.tokens), [(media.start, features)])
        hidden = model(x, torch.arange(len(prompt)), PackedAttention([len(prompt)]))
        logits = model.logits(hidden[-1])[: processor.tokenizer.image_id]
    engine = Engine(
        model,
        eos_ids=(),
        vocab=processor.tokenizer.size,
        kv_bytes=1 << 24,
        feature_bytes=0,
        max_num_batched_tokens=64,
        max_batched_images=4,
        max_num_seqs=8,
    )
    params = SamplingParams(max_new_tokens=1, logprobs=3)
    engine.add(prompt, params)
    events = []
    while engine.busy:
        events += engine.step()
    found = events[-1].top_logprobs
    best = logits.log_softmax(-1).topk(3)
    assert [token for token, _ in found] == best.indices.tolist()
    assert [value for _, value in found] == pytest.approx(best.values.tolist(), abs=1e-4)
    engine.check()


@pytest.mark.slow
def test_the_server_counts_tokens(folder: Path, tmp_path: Path) -> None:
    bot = load(folder, device="cpu")
    path = tmp_path / "a.png"
    random_image(58, 44).save(path)
    part = {"type": "image_url", "image_url": {"url": data_url(path.read_bytes())}}

    def ask(client: TestClient, *content: dict[str, Any]) -> Any:
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
        return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4})

    app = create_app(bot, Settings())
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["tokens_per_image"] == 26
        assert model["max_tokens_per_image"] == max_tokens_per_image(35, 5, ONEVISION)
        assert (model["tokens_per_frame"], model["video_frames"]) == (9, 32)
        one, two = (ask(client, *[part] * count).json()["usage"] for count in (1, 2))
        tiled = anyres(58, 44, 35, 5, arrangement=ONEVISION).length
        assert one["prompt_tokens"] - two["prompt_tokens"] > tiled - 2 * 26 - 8
        low = part | {"image_url": part["image_url"] | {"detail": "low"}}
        assert ask(client, low).json()["usage"]["prompt_tokens"] < one["prompt_tokens"]
        long = [{"type": "text", "text": "word " * 900}] * 4
        refused = ask(client, part, *long)
        assert refused.status_code == 400
        assert "26 of images" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_adapters_and_pairs_are_trained(folder: Path, tmp_path: Path) -> None:
    random_image(58, 44).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    rows = [{"id": str(k), "image": "a.png", "conversations": turns} for k in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    pairs = [
        {
            "id": str(k),
            "prompt": "<image>\nWho?",
            "chosen": "A.",
            "rejected": "B.",
            "images": ["a.png"],
        }
        for k in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    shared: dict[str, Any] = {
        "model": str(folder),
        "steps": 2,
        "lr": 0.01,
        "tokens": 1000,
        "workers": 0,
    }
    lora = Recipe(source=tmp_path / "data.json", adapter=LoraConfig(rank=2), **shared)
    adapter = run(lora, tmp_path / "lora", log=lambda _: None)
    bot = load(folder, device="cpu", adapters={"own": adapter})
    assert bot.ask("What?", [random_image(58, 44)], max_new_tokens=2, adapter="own").tokens
    low_rank = load_file(adapter / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in low_rank.items() if "lora_B" in name)
    dpo = Recipe(source=tmp_path / "pairs.jsonl", dpo=DPOConfig(), projector_lr_scale=1.0, **shared)
    trained = load_network(run(dpo, tmp_path / "dpo", log=lambda _: None))
    before = load_network(folder)
    weights = (net.multi_modal_projector.linear_1.weight for net in (trained, before))
    assert not torch.equal(*weights)


def shown(image: Image.Image) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}]}]


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "I;16"])
def test_odd_images(folder: Path, mode: str) -> None:
    """Gray and transparent images, one pixel, and strips: as many placeholders as features."""
    model, processor = load_network(folder), Processor.from_folder(folder)
    with pytest.raises(MediaError, match="200 times"):
        processor.prompt(shown(Image.new(mode, (1, 4000))))
    processor = Processor.from_folder(folder, limits=Limits(side_ratio=4000))
    for size in ((1, 1), (1, 4000), (4000, 1), (37, 35)):
        image = Image.new(mode, size)
        prompt = processor.prompt(shown(image))
        (one,) = prompt.media
        assert torch.isfinite(one.pixels).all()
        with torch.inference_mode():
            features = model.arrange(model.encode(one.pixels), one.layout)
        assert (
            len(features) == one.layout.length == prompt.tokens.count(processor.tokenizer.image_id)
        )
