"""`<image>` in the text of a training sample whose parts place the media is text, as in a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_interleave.processing import Processor
from llava_interleave.train.data import datasets, formats
from llava_interleave.train.data.samples import SampleFormat, move_images_first

TAG = "What does <image> mean here?"
PART = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def read(folder: Path, content: Any, answer: str, **more: Any) -> Any:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    (folder / "data.json").write_text(json.dumps([{"id": "s", "messages": said, **more}]))
    (row,) = datasets.rows(folder / "data.json")
    return row


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ([PART, text(TAG)], ["a.png"]),
        ([{"type": "image", "path": "a.png"}, text(TAG)], []),
        ([text(TAG), PART, text("<image>"), PART], ["a.png", "b.png"]),
    ],
)
def test_the_tag_is_text_where_parts_place_the_media(
    tiny: Path, tmp_path: Path, content: Any, images: list[str]
) -> None:
    processor = Processor.from_folder(tiny)
    row = read(tmp_path, content, "It is <image>, a tag.", **({"images": images} if images else {}))
    reading = formats.reading(row.sample, row.root)
    assert not reading.faults, reading.faults
    messages, media = row.messages()
    count = len(images) or 1
    for images_first in (False, True):
        prompt = SampleFormat().example(processor, messages, media, images_first=images_first)
        assert len(prompt.media) == count
        written = processor.tokenizer.decode(
            [t for t in prompt.tokens if t != processor.tokenizer.image_id]
        )
        assert written.count("<image>") == 2 + (count == 2)
        assert "It is <image>, a tag." in written
        shown = move_images_first(messages, len(media)) if images_first else messages
        counted = SampleFormat().count(processor, shown, media)
        assert counted == (len(prompt), count)
    moved = move_images_first(messages, len(media))
    assert (moved is messages) == (count < 2)
    plain = SampleFormat("plain").example(processor, messages, media)
    answer = processor.tokenizer.encode("It is <image>, a tag.\n", special=False)
    assert (len(plain.media), plain.tokens[-len(answer) :]) == (count, answer)


@pytest.mark.parametrize(
    ("content", "images"), [(TAG, []), ([text(TAG)], []), ([PART, text(TAG), PART], ["a.png"] * 3)]
)
def test_the_tag_is_a_place_where_it_has_to_be(
    tmp_path: Path, content: Any, images: list[str]
) -> None:
    """Without an image for it that is a fault; with one more image than parts it has that."""
    more = {"images": images} if images else {}
    row = read(tmp_path, content, "A tag.", **more)
    kinds = [fault.kind for fault in formats.reading(row.sample, row.root).faults]
    assert kinds == ([] if images else ["placeholders"])
