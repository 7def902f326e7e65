"""Counts before compute, one placeholder a feature, exact estimates."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_interleave.errors import ContextError, MediaError, OptionError, PromptError
from llava_interleave.image_layout import anyres
from llava_interleave.processing import FrameSampling, Limits, Processor
from llava_interleave.testing import tiny_checkpoint, tiny_config

IMAGE = Image.new("RGB", (50, 40), "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder)


def user(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


VIDEO = {"type": "video", "video": [IMAGE] * 5, "frames": 3}
PARTS = st.sampled_from([
    {"type": "text", "text": "What?"},
    {"type": "text", "text": "<image> and <|im_end|>"},
    {"type": "image"},
    {"type": "image", "image": IMAGE},
    {"type": "image_url", "image_url": {"url": "x:"}},
    {"type": "views", "views": {"front": IMAGE, "left": IMAGE}},
    VIDEO,
])  # fmt: skip
TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.lists(PARTS, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=100)
@given(
    turns=TURNS,
    preset=st.sampled_from(["interleave", "official", "hf"]),
    tiles=st.booleans(),
    times=st.booleans(),
)
def test_placeholders_stand_for_their_media_and_the_estimate_is_exact(
    processor: Processor,
    tmp_path_factory: pytest.TempPathFactory,
    turns: list[tuple[str, list[Any]]],
    preset: str,
    tiles: bool,
    times: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "red.png"
    if not path.exists():
        IMAGE.save(path)
    messages: list[dict[str, Any]] = [
        {
            "role": role,
            "content": [
                {"type": "image", "path": str(path)} if p["type"] == "image_url" else p
                for p in parts
            ],
        }
        for role, parts in turns
        if preset != "hf" or all(p["type"] != "views" for p in parts)
    ] or [user("Hi")]
    count = sum(
        (p["type"] == "image" and len(p) == 1) or "<image>" in p.get("text", "")
        for m in messages
        for p in m["content"]
    )
    options: dict[str, Any] = {"preset": preset, "anyres": tiles, "frame_times": times}
    prompt = processor.prompt(messages, [IMAGE] * count, **options)
    inside = {
        i for item in prompt.media for i in range(item.start, item.start + item.layout.length)
    }
    assert inside == {
        i for i, token in enumerate(prompt.tokens) if token == processor.tokenizer.image_id
    }
    assert len(inside) == sum(item.layout.length for item in prompt.media)
    size = processor.config.vision.image_size
    assert all(item.pixels.shape == (item.layout.crops, 3, size, size) for item in prompt.media)
    estimate = processor.estimate(messages, [IMAGE] * count, **options)
    assert (estimate.total, [part.tokens for part in estimate.parts[1:]]) == (
        len(prompt),
        [m.layout.length for m in prompt.media],
    )


def test_counts_are_checked_before_anything_is_opened(processor: Processor) -> None:
    """The original repeats the last image when there are too few, and ignores those that are too
    many.
    """
    with pytest.raises(PromptError, match="the prompt has 3 `<image>` but 2 images were given"):
        processor.prompt([user("<image><image> <image>")], ["/absent.png"] * 2)
    with pytest.raises(PromptError, match="the prompt has 0 `<image>` but 1 image was given"):
        processor.raw("Hi", ["/absent.png"])
    with pytest.raises(PromptError, match="has 1 `<image>` but 0 images were"):
        processor.prompt([user({"type": "image"}, {"type": "image", "path": "/absent.png"})])
    with pytest.raises(PromptError, match="must be a list"):
        processor.prompt([user("<image>")], "cat.png")
    with pytest.raises(PromptError, match="3 images and videos are more than the limit of 2"):
        Processor(
            processor.tokenizer, processor.config, processor.images, Limits(prompt_media=2)
        ).prompt([user("<image>" * 3)], ["x"] * 3)


def test_overflow_is_refused_with_the_numbers_and_the_way_out(folder: Path) -> None:
    """The original cuts at the context's end in silence, an image in two if need be."""
    config = tiny_config(text={"context": 100})
    processor = Processor.from_folder(folder, config)  # 16 tokens an image
    video = {"type": "video", "video": [IMAGE] * 9}
    with pytest.raises(
        ContextError, match=r"the context is 100: at most 3 frames fit .*; ask for fewer frames"
    ) as caught:
        processor.prompt([user(video, "Hi")], max_new_tokens=8)
    text = processor.estimate([user(video, "Hi")]).parts[0].tokens
    assert (
        f"{text + 9 * 16} tokens ({text} of text, {9 * 16} of images), and 8 are to be generated"
        in str(caught.value)
    )
    assert len(processor.prompt([user(video | {"frames": 3}, "Hi")], max_new_tokens=8)) == text + 48
    with pytest.raises(ContextError, match="at most 3 frames fit"):
        processor.prompt([user(video | {"frames": 4}, "Hi")], max_new_tokens=8)
    with pytest.raises(ContextError, match="at most 4 images of 16 tokens fit"):
        processor.prompt([user("<image>" * 9)], ["/absent.png"] * 9)  # refused before any is opened
    with pytest.raises(ContextError, match="without anyres it would be"):
        processor.prompt([user("<image>")], [IMAGE], anyres=True, max_new_tokens=20)
    with pytest.raises(ContextError, match="shorten the text or ask for fewer"):
        processor.prompt([user("Hi")], max_new_tokens=99)
    assert processor.estimate([user("<image>" * 9)], ["/absent.png"] * 9).left < 0


def test_anyres_of_images_not_of_frames(processor: Processor) -> None:
    vision = processor.config.vision
    layout = anyres(50, 40, vision.image_size, vision.grid)
    prompt = processor.prompt([user({"type": "image"}, VIDEO)], [IMAGE], anyres=True)
    assert [item.layout.crops for item in prompt.media] == [layout.crops, 3]
    assert prompt.media[0].layout == layout
    url = "data:image/png;base64," + _png()
    for detail, crops in (("low", 1), ("high", layout.crops), ("auto", layout.crops)):
        part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        assert processor.prompt([user(part)], anyres=True).media[0].layout.crops == crops
    with pytest.raises(OptionError, match="anyres and pad"):
        processor.prompt([user("Hi")], anyres=True, pad=True)


def _png() -> str:
    import base64
    from io import BytesIO

    file = BytesIO()
    IMAGE.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_padding_changes_pixels_and_key(processor: Processor) -> None:
    plain, padded = (
        processor.prompt([user("<image>")], [IMAGE], pad=pad).media[0] for pad in (False, True)
    )
    assert plain.layout == padded.layout
    assert plain.key != padded.key
    assert not torch.equal(plain.pixels, padded.pixels)


def test_an_image_has_one_key_wherever_it_stands_and_however_it_came(
    processor: Processor, tmp_path: Path
) -> None:
    IMAGE.save(tmp_path / "a.png")
    messages = [
        user(
            {"type": "image", "path": str(tmp_path / "a.png")},
            "and",
            {"type": "image", "base64": _png()},
            {"type": "image"},
        )
    ]
    prompt = processor.prompt(
        messages, [torch.tensor([[[255]], [[0]], [[0]]], dtype=torch.uint8).expand(3, 40, 50)]
    )
    assert len({item.key for item in prompt.media}) == 1


def test_many_files_load_in_order(processor: Processor, tmp_path: Path) -> None:
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8), (i, 0, 0)).save(paths[-1])
    mixed = [Image.new("RGB", (8, 8), (i, 0, 0)) if i % 3 else path for i, path in enumerate(paths)]
    media = processor.raw("<image>" * 20, mixed).media
    assert [round(float((item.pixels[0, 0, 0, 0] + 1) * 127.5)) for item in media] == list(
        range(20)
    )
    with pytest.raises(MediaError, match=r"^image 20: .*absent\.png: there is no such file"):
        processor.raw("<image>" * 20, [*paths[:19], tmp_path / "absent.png"])


def test_examples_learn_answers_and_their_end_only(processor: Processor) -> None:
    messages = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Sure?\n"},
        {"role": "assistant", "content": "Yes."},
    ]
    for preset in ("interleave", "official", "hf"):
        example = processor.example(messages, [IMAGE], preset=preset)
        assert example.loss_mask is not None
        learnt = [
            token for token, flag in zip(example.tokens, example.loss_mask, strict=True) if flag
        ]
        assert (
            processor.tokenizer.decode(learnt, skip_special=False)
            == "A square.<|im_end|>Yes.<|im_end|>"
        )
        assert (
            example.tokens
            == processor.prompt(
                messages, [IMAGE], preset=preset, add_generation_prompt=False
            ).tokens
        )
    with pytest.raises(PromptError, match="ends with an answer"):
        processor.example(messages[:1], [IMAGE])


def test_each_answer_has_its_own_weight_of_the_loss(processor: Processor) -> None:
    """Also next to answers without loss, and to one that is an image alone."""
    messages = [
        user("<image> A?"), {"role": "assistant", "content": "One.", "loss": 0.5},
        user("B?"), {"role": "assistant", "content": "Two.", "loss": False},
        user("C?"), {"role": "assistant", "content": [{"type": "image"}], "loss": 3.0},
        user("D?"), {"role": "assistant", "content": "Four.", "loss": 2.0},
    ]  # fmt: skip
    for preset in ("interleave", "official", "hf"):
        example = processor.example(messages, [IMAGE, IMAGE], preset=preset)
        learnt: dict[float, list[int]] = {}
        for token, weight in zip(example.tokens, example.loss_mask or (), strict=True):
            learnt.setdefault(weight, []).append(token)
        text = partial(processor.tokenizer.decode, skip_special=False)
        assert (text(learnt[0.5]), text(learnt[2.0])) == ("One.<|im_end|>", "Four.<|im_end|>")
        assert "Two" in text(learnt[False])


def test_what_is_learnt_is_what_is_generated(processor: Processor) -> None:
    prompt = processor.prompt([user("Hi")]).tokens
    example = processor.example([user("Hi"), {"role": "assistant", "content": "\nHo"}])
    assert example.loss_mask is not None
    assert example.tokens[: len(prompt)] == prompt
    assert example.loss_mask.index(True) == len(prompt)


def test_estimate_names_its_parts_and_opens_no_images(processor: Processor) -> None:
    views = {"type": "views", "views": {"front": "/absent.png"}}
    estimate = processor.estimate(
        [user("<image>", VIDEO, views)], ["/absent/cat.png"], number_bytes=4
    )
    assert [part.name for part in estimate.parts] == [
        "text",
        "image 1: /absent/cat.png",
        "video 2: list of 5 frames (3 frames)",
        "view front: /absent.png",
    ]
    text = processor.config.text
    assert (
        estimate.kv_bytes
        == 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4 * estimate.total
    )
    assert estimate.feature_bytes == text.hidden_size * 4 * 16 * 5
    assert estimate.left == text.context - estimate.total
    assert json.loads(json.dumps(dataclasses.asdict(estimate)))["total"] == estimate.total
    assert "view front: /absent.png" in str(estimate)


def test_media_may_be_videos(processor: Processor, tmp_path: Path) -> None:
    for i in range(3):
        IMAGE.save(tmp_path / f"{i}.png")
    prompt = processor.raw(
        "<image> and <image>", [tmp_path, [IMAGE] * 9], frames=FrameSampling(frames=4)
    )
    assert [item.layout.crops for item in prompt.media] == [3, 4]


def test_processing_needs_no_torch_to_estimate(folder: Path) -> None:
    """Importing torch takes seconds; planning a prompt needs none of it."""
    import subprocess
    import sys

    code = (
        "import sys; from llava_interleave.processing import Processor; "
        f"Processor.from_folder({str(folder)!r}).estimate([{{'role': 'user', 'content': 'Hi'}}]); "
        "assert not {'torch', 'transformers', 'av'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("preset", ["interleave", "hf", "official"])
def test_a_prompt_that_continues_an_answer(processor: Processor, preset: str) -> None:
    """It ends with the answer's text, without the tokens that close the message."""
    messages = [user("What is this?"), {"role": "assistant", "content": "It is a red"}]
    form = {"preset": preset, "add_generation_prompt": False}
    closed = processor.prompt(messages, **form).tokens
    open_end = processor.prompt(messages, **form, continue_final_message=True).tokens
    end = [processor.tokenizer.im_end, *processor.tokenizer.encode("\n", special=False)]
    assert [*open_end, *end] == closed
    with pytest.raises(PromptError, match="beginning of an answer"):
        processor.prompt(messages[:1], **form, continue_final_message=True)
    with pytest.raises(OptionError, match="contradict"):
        processor.prompt(messages, preset=preset, continue_final_message=True)
