"""Checkpoints with a template and defaults of their own, and texts that mention `<image>`."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_interleave.chat.attachments import content
from llava_interleave.errors import CheckpointError, PromptError
from llava_interleave.processing import Processor
from llava_interleave.processing.hf_template import HfTemplate

RED = Image.new("RGB", (20, 20), "red")
PART = {"type": "image", "image": RED}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}, {"type": "image"}]},
]
TEMPLATES = {
    "parts in order": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- for part in m['content'] %}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "generation": "{% for m in messages %}{{ '<|im_start|>' ~ m['role'] ~ '\n' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ part['text'] }}{% endgeneration %}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "namespace and macro": "{% set ns = namespace(n=0) %}{% macro head(role) %}"
    "{{ '<|im_start|>' + role + '\n' }}{% endmacro %}{% for m in messages %}{{ head(m.role) }}"
    "{% for part in m.content %}{% if part.type == 'image' %}{% set ns.n = ns.n + 1 %}"
    "{{ 'Image ' ~ ns.n ~ ': <image>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{{ head('assistant') if add_generation_prompt }}",
}


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model", copy_function=shutil.copy))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["jinja", "json", "tokenizer"])
def test_preset_hf_renders_the_folders_template(folder: Path, name: str, place: str) -> None:
    from transformers import AutoProcessor

    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    template = TEMPLATES[name]
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(template)
    elif place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    else:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    expected = AutoProcessor.from_pretrained(folder)
    text = expected.apply_chat_template(
        TALK, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    tokens = list(expected(text=text, images=[RED, RED])["input_ids"][0])
    processor = Processor.from_folder(folder)
    assert processor.prompt(TALK, [RED, RED], preset="hf").tokens == tokens
    example = processor.example(TALK[:2], [RED], preset="hf")
    assert example.loss_mask is not None
    learnt = [t for t, m in zip(example.tokens, example.loss_mask, strict=True) if m]
    assert processor.tokenizer.decode(learnt, skip_special=False) == "Red.<|im_end|>"


def test_a_template_for_texts_gets_texts() -> None:
    template = HfTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    assert not template.takes_parts
    assert HfTemplate().takes_parts


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "longer"),
        ("{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
         "{% endfor %}", "more than"),
        ("{{ 'a' * 999999999 }}", "more than"),
        ("{{ 9 ** 99 }}", "powers"),
        ("{{ (9 ** 60) ** 2 }}", "large"),
        ("{{ 'a'.ljust(999999999) }}", "width"),
        ("{{ 'a' | center(999999999) }}", "width"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe|not safely"),
        ("{{ raise_exception('only one image') }}", "only one image"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)  # fmt: skip
def test_a_template_is_bounded_and_safe(
    monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr("llava_interleave.processing.template_sandbox.SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(PromptError, match=message):
        HfTemplate(source).render([{"role": "user", "content": []}], False)
    assert time.monotonic() - began < 20


def test_a_template_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        HfTemplate("{% for %}").render([], False)
    (folder / "chat_template.jinja").write_text("x" * 1_000_001)
    with pytest.raises(CheckpointError, match="at most 1,000,000 characters"):
        Processor.from_folder(folder)
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")
    with pytest.raises(PromptError, match="writes 0 <image> or <video> for 1 images"):
        Processor.from_folder(folder).prompt(TALK[:1], [RED], preset="hf")


@pytest.mark.parametrize("preset", ["interleave", "official", "hf"])
def test_image_in_written_text_is_text(tiny: Path, preset: str) -> None:
    """A question about the tag, or an answer with it, ended a chat for good."""
    processor = Processor.from_folder(tiny)
    words = "What does <image> mean?"

    def text(prompt: Any) -> str:
        places = {m.start + i for m in prompt.media for i in range(m.layout.length)}
        return processor.tokenizer.decode(
            [t for i, t in enumerate(prompt.tokens) if i not in places], skip_special=False
        )

    for messages, media, images in (
        ([{"role": "user", "content": words}], [], 0),
        ([{"role": "system", "content": words}, {"role": "user", "content": "Hi"}], [], 0),
        ([{"role": "user", "content": [PART, {"type": "text", "text": words}]}], [], 1),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}],
         [RED], 1),
        ([{"role": "user", "content": [PART, {"type": "text", "text": "Hi"}]},
          {"role": "assistant", "content": words}, {"role": "user", "content": "And?"}], [], 1),
    ):  # fmt: skip
        prompt = processor.prompt(messages, media, preset=preset)
        assert len(prompt.media) == images
        assert words in text(prompt)
        estimate = processor.estimate(messages, media, preset=preset)
        assert estimate.total == len(prompt)
    placed = processor.prompt([{"role": "user", "content": "<image> a"}], [RED], preset=preset)
    assert len(placed.media) == 1
    assert len(processor.raw("<image>", [RED]).media) == 1
    with pytest.raises(PromptError, match="has 1 `<image>` but 2 images were given"):
        processor.prompt([{"role": "user", "content": "<image>"}], [RED, RED], preset=preset)
    with pytest.raises(PromptError, match="has 1 `<image>` but 0 images were given"):
        processor.raw("<image>")


def test_a_question_about_the_tag_without_attachments() -> None:
    assert content("What is <image>?", []) == [{"type": "text", "text": "What is <image>?"}]
    with pytest.raises(PromptError, match="1 <image> but 2 attachments"):
        content("<image>", [RED, RED])
