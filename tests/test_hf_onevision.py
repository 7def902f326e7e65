"""`llava_interleave.hf` with LLaVA-OneVision: inputs and ids equal to transformers' processor and
model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from llava_interleave import checkpoints, hf
from llava_interleave.errors import OptionError, PromptError, Unsupported
from llava_interleave.hf import model as light_model
from llava_interleave.hf import processor as light_processor
from llava_interleave.hf.pipelines import pipeline as light_pipeline
from llava_interleave.processing import Processor
from llava_interleave.testing import tiny_checkpoint, tiny_onevision_config
from tests.helpers.images import random_image

FLAGS: dict[str, Any] = {
    "add_generation_prompt": True,
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
}
ONE, TWO, TALL = random_image(58, 44), random_image(93, 82, 1), random_image(6, 182, 2)
CLIP, OTHER = ([random_image(40, 30, seed + k) for k in range(3)] for seed in (0, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / "tiny", tiny_onevision_config())


class Oracle(LlavaOnevisionProcessor):  # type: ignore[misc]
    """transformers' processor; in place of its video processor, which needs torchvision, frames
    go through its image processor.
    """

    @classmethod
    def of(cls, folder: Path) -> Oracle:
        return cls(
            LlavaOnevisionImageProcessorPil.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder),
            SimpleNamespace(model_input_names=["pixel_values_videos"]),
            num_image_tokens=25,
            vision_feature_select_strategy="full",
            chat_template=json.loads((folder / "chat_template.json").read_text())["chat_template"],
        )

    def check_argument_for_proper_class(self, *_: Any) -> type:
        return object

    def _process_videos(self, videos: Any, **_: Any) -> Any:
        clips = videos if isinstance(videos[0], list) else [videos]
        images = [self.image_processor(clip, return_tensors="pt") for clip in clips]
        pixels = torch.stack([one["pixel_values"][:, 0] for one in images])  # the squashed image
        made = {"pixel_values_videos": pixels}
        return made, [self.replace_video_token(made, k) for k in range(len(clips))]


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Oracle]:
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>")
    vocab = model.config.text_config.vocab_size
    model.generation_config.suppress_tokens = list(range(tokens, vocab))
    return model, Oracle.of(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[Any, Any]:
    """Without transformers."""
    return (
        light_model.LlavaOnevisionForConditionalGeneration.from_pretrained(folder),
        light_processor.LlavaOnevisionProcessor.from_pretrained(folder),
    )


def same(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], torch.as_tensor(theirs[name])), name


def user(*content: object) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, list):
            parts.append({"type": "video", "video": part})
        else:
            parts.append({"type": "image", "image": part})
    return {"role": "user", "content": parts}


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]}
CHATS: dict[str, list[dict[str, Any]]] = {
    "text": [user("Hello", "again")],
    "one image": [user("What?", ONE)],
    "a strip": [user(TALL, "What?")],
    "two images": [user("First", ONE, "second", TWO, "?")],
    "two turns": [user(ONE, "What?"), ANSWER, user(TWO, "And?")],
    "two videos": [user(CLIP, "What moves?", OTHER)],
    "a video before an image": [user(CLIP, "What?", ONE), ANSWER, user("So?")],
    "media in two turns": [user(ONE, CLIP, "?"), ANSWER, user(OTHER, "and", TWO)],
}


@pytest.mark.parametrize("case", CHATS)
def test_inputs_and_ids(ours: Any, theirs: Any, case: str) -> None:
    (model, processor), (hf_model, hf_processor) = ours, theirs
    chat = CHATS[case]
    assert processor.apply_chat_template(chat) == hf_processor.apply_chat_template(chat)
    text = hf_processor.apply_chat_template(chat, add_generation_prompt=True)
    # The oracle's own apply_chat_template reads videos with torchvision.
    parts = [part for turn in chat for part in turn["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    expected = hf_processor(
        images=[images] if images else None, text=text, videos=videos or None, return_tensors="pt"
    )
    inputs = processor.apply_chat_template(chat, **FLAGS)
    same(inputs, expected)
    by_hand = processor([images] if images else None, text, videos or None, return_tensors="pt")
    same(by_hand, expected)
    ids = hf_model.generate(**expected, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), ids)


@pytest.mark.parametrize("case", CHATS)
def test_preset_hf_has_the_ids_of_transformers(folder: Path, ours: Any, case: str) -> None:
    """Whatever the order of parts in a message: each placeholder has its own media."""
    chat = CHATS[case]
    prompt = Processor.from_folder(folder).prompt(chat, preset="hf")
    assert prompt.tokens == ours[1].apply_chat_template(chat, **FLAGS)["input_ids"][0].tolist()
    kinds = [media.name.split()[0] for media in prompt.media]
    config = ours[0].model.config
    for kind, media in zip(kinds, prompt.media, strict=True):
        token = config.placeholder_id(kind == "video")
        span = prompt.tokens[media.start : media.start + media.layout.length]
        assert span == [token] * media.layout.length


def test_media_apart_from_the_messages_keep_their_order(folder: Path) -> None:
    """The first of `media` is the first part, though the template puts images before videos."""
    processor = Processor.from_folder(folder)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "image"}]}]
    apart = processor.prompt(chat, [CLIP, ONE, TWO], preset="hf")
    inside = processor.prompt([user(CLIP, ONE, TWO)], preset="hf")
    assert apart.tokens == inside.tokens
    assert [m.key for m in apart.media] == [m.key for m in inside.media]
    assert [m.name for m in apart.media] == ["image 1", "image 2", "video 3"]
    # A `<image>` in text and a part of either kind: the source decides.
    unknown = [{"role": "user", "content": "<image>\n<image>\nWhat?"}]
    prompt = processor.prompt(unknown, [CLIP, ONE], preset="hf")
    assert [m.name for m in prompt.media] == ["video 1", "image 2"]
    assert prompt.tokens[prompt.media[0].start] == processor.config.video_token_id


@pytest.mark.parametrize("preset", ["interleave", "hf", "official"])
def test_a_spelled_video_token_is_text(folder: Path, preset: str) -> None:
    processor = Processor.from_folder(folder)
    prompt = processor.prompt([user("What is <video>?", CLIP)], preset=preset)
    video = processor.config.video_token_id
    assert prompt.tokens.count(video) == prompt.media[0].layout.length
    assert "<video>?" in processor.tokenizer.decode(prompt.tokens)
    raw = processor.raw("<video>Who is <image>?", [CLIP, ONE])
    assert [m.name for m in raw.media] == ["video 1", "image 2"]
    with pytest.raises(PromptError, match="2 `<image>` but 1"):
        processor.raw("<video>Who is <image>?", [CLIP])


def test_flat_lists_are_tiled(ours: Any, theirs: Any) -> None:
    texts = ["user\n<image><image>\nWhat?", "user\n<image>\nWho?"]
    arguments: dict[str, Any] = {
        "images": [ONE, TWO, TALL],
        "text": texts,
        "return_tensors": "pt",
        "padding": True,
        "padding_side": "left",
    }
    inputs = ours[1](**arguments)
    same(inputs, theirs[1](**arguments))
    assert inputs["batch_num_images"].tolist() == [1, 1, 1]
    expected = theirs[0].generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours[0].generate(**inputs, max_new_tokens=6), expected)


def test_a_batch_of_all_kinds(ours: Any, theirs: Any, folder: Path) -> None:
    texts = [
        "user\nTell me.",
        "user\n<image><image>\nWhat?",
        "user\n<image><video>\nWho?",
        "user\n<video>\nWho?",
    ]
    arguments: dict[str, Any] = {
        "images": [[], [ONE, TWO], [TALL], []],
        "text": texts,
        "videos": [CLIP, OTHER],
        "return_tensors": "pt",
        "padding": True,
        "padding_side": "left",
    }
    inputs = ours[1](**arguments)
    same(inputs, theirs[1](**arguments))
    expected = theirs[0].generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours[0].generate(**inputs, max_new_tokens=6), expected)
    engine = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(engine, transformers.LlavaOnevisionForConditionalGeneration)
    engine.generation_config = theirs[0].generation_config
    assert torch.equal(engine.generate(**inputs, max_new_tokens=6), expected)
    assert engine._llava_engine.engine.load().crops_encoded > 0
    copies = engine.generate(**inputs, max_new_tokens=6, num_return_sequences=2, do_sample=True)
    assert copies.shape[0] == 8
    # transformers' own loop, for what the engine does not do.
    beams = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(engine.generate(**inputs, **beams), theirs[0].generate(**inputs, **beams))


def test_round_trip(ours: Any, folder: Path, tmp_path: Path) -> None:
    model = hf.LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "saved" / name).write_bytes((folder / name).read_bytes())
    inputs = ours[1].apply_chat_template(CHATS["media in two turns"], **FLAGS)
    expected = ours[0].generate(**inputs, max_new_tokens=6)
    again = light_model.LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(**inputs, max_new_tokens=6), expected)


def test_pipelines(ours: Any, folder: Path, tmp_path: Path) -> None:
    ONE.save(tmp_path / "one.png")
    part = {"type": "image", "path": str(tmp_path / "one.png")}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    expected = light_pipeline("image-text-to-text", model=ours[0], processor=ours[1])(
        text=chat, max_new_tokens=6
    )
    assert hf.pipeline("image-text-to-text", model=folder)(text=chat, max_new_tokens=6) == expected


def test_quantized_weights(ours: Any, folder: Path, tmp_path: Path) -> None:
    checkpoints.save(
        checkpoints.load(folder, precision="int8"), tmp_path / "int8", processor_from=folder
    )
    inputs = ours[1].apply_chat_template(CHATS["one image"], **FLAGS)
    small = light_model.LlavaForConditionalGeneration.from_pretrained(tmp_path / "int8")
    expected = small.generate(**inputs, max_new_tokens=6)
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "int8")
    assert isinstance(model, transformers.LlavaOnevisionForConditionalGeneration)
    first = small.tokenizer.image_id
    model.generation_config.suppress_tokens = list(
        range(first, model.config.text_config.vocab_size)
    )
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)
    with pytest.raises(OptionError, match="LlavaOnevisionForConditionalGeneration"):
        hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "int8")


def test_names(folder: Path) -> None:
    assert isinstance(hf.AutoProcessor.from_pretrained(folder), light_processor.AutoProcessor)
    assert hf.LlavaOnevisionProcessor is light_processor.LlavaOnevisionProcessor


def test_mistakes(ours: Any) -> None:
    model, processor = ours
    with pytest.raises(PromptError, match="1 <image> but 2 images"):
        processor(images=[ONE, TWO], text="<image>", return_tensors="pt")
    clips: list[Sequence[object]] = [CLIP, CLIP[:2]]
    with pytest.raises(PromptError, match=r"videos of \[2, 3\] frames"):
        processor(text="<video><video>", videos=clips, return_tensors="pt")
    with pytest.raises(PromptError, match="more videos"):
        processor(text="<video>", videos=clips, return_tensors="pt")
    with pytest.raises(PromptError, match="<video>, not its media"):
        processor(text="<video><video>", videos=[CLIP], return_tensors="pt")
    inputs = processor(images=ONE, text="<image>", return_tensors="pt")
    with pytest.raises(PromptError, match="image tokens"):
        model.generate(**inputs | {"input_ids": inputs["input_ids"][:, 1:], "attention_mask": None})
    with pytest.raises(PromptError, match="image_sizes"):
        model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(Unsupported, match="num_frames"):
        processor(text="<video>", videos=[CLIP], num_frames=3)
