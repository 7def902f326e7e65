"""The built-in model: it is small, it knows its world, and transformers answers with it as we
do.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from llava_interleave import load
from llava_interleave.chat import BUILTIN, Chatbot
from llava_interleave.checkpoints import save
from recipes.tiny_world import SCENARIOS, episode
from recipes.tiny_world.benchmark import Plain, World, evaluate
from recipes.tiny_world.data import exam, render
from recipes.tiny_world.out_of_domain import MADE_UP
from recipes.tiny_world.refusal import HELD_OUT_ABOUT_IMAGES, HELD_OUT_CHAT, REFUSAL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return load()


def answer(bot: Chatbot, questions: Sequence[list[dict[str, Any]]]) -> list[str]:
    return [a.text for a in bot.batch(questions, max_new_tokens=80)]


def test_it_is_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) <= 12_000_000
    card = (BUILTIN / "README.md").read_text("utf-8")
    assert all(word in card for word in ("Data", "Recipe", "Accuracy", "Limits"))


# Ten points or more below what the whole benchmark measured.
FLOOR = {"single": 0.86, "multi": 0.85, "video": 0.88, "views": 0.87}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_accuracy_on_its_world(bot: Chatbot, scenario: str, held_out: bool) -> None:
    """A part of `llava eval recipes.tiny_world.benchmark:World`; the whole figures are in the
    model's card.
    """
    score = evaluate(lambda questions: answer(bot, questions), scenario, 50, held_out=held_out)
    assert score.accuracy >= FLOOR[scenario], score.wrong


@pytest.mark.parametrize(
    ("preset", "styled"), [("official", False), ("hf", False), ("interleave", True)]
)
def test_accuracy_in_every_preset_and_style(
    bot: Chatbot, tmp_path: Path, preset: str, styled: bool
) -> None:
    """A part of what the model's card has; hardly any of it is refused."""
    task = World(questions=12, styled=styled, names=preset != "hf")
    questions = [example.ask(tmp_path) for example in task.examples]
    texts = [a.text for a in bot.batch(questions, max_new_tokens=80, preset=preset)]
    right = [e.scorer(text) for e, text in zip(task.examples, texts, strict=True)]
    assert sum(right) >= 0.75 * len(right), [
        (e.question, e.truth, text)
        for e, text, score in zip(task.examples, texts, right, strict=True)
        if not score
    ]
    assert texts.count(REFUSAL) <= 2


def test_plain_squares_and_circles(bot: Chatbot, tmp_path: Path) -> None:
    """Of any size at any place, as Pillow draws them; the whole figure is in the model's card."""
    task = Plain(questions=20)
    texts = answer(bot, [example.ask(tmp_path) for example in task.examples])
    right = [e.scorer(text) for e, text in zip(task.examples, texts, strict=True)]
    assert sum(right) >= 16, [(e.truth, t) for e, t in zip(task.examples, texts, strict=True)]


def test_all_else_gets_one_sentence(bot: Chatbot) -> None:
    """Images that training makes up, from other seeds, and chat in wordings that it never had."""
    rng = Random("refused")
    messages: list[list[dict[str, Any]]] = []
    for number, question in enumerate((*HELD_OUT_CHAT, *HELD_OUT_ABOUT_IMAGES, "How many things?")):
        parts: list[dict[str, Any]] = []
        if question not in HELD_OUT_CHAT:
            parts = [{"type": "image", "image": MADE_UP[number % len(MADE_UP)](rng)}]
        messages.append([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
    texts = answer(bot, messages)
    others = [
        (a[0]["content"][-1], t) for a, t in zip(messages, texts, strict=True) if t != REFUSAL
    ]
    assert len(others) <= 2, others


def test_one_other_image_among_scenes_is_refused(bot: Chatbot) -> None:
    rng = Random("among")
    shown = render(episode("multi", Random(12)), 96)
    texts = [bot.ask("How many images are there?", [*shown, make(rng)]).text for make in MADE_UP]
    assert texts.count(REFUSAL) >= len(texts) - 1, texts
    assert REFUSAL not in bot.ask("How many images are there?", shown).text


def test_transformers_answers_with_it_as_we_do(bot: Chatbot, tmp_path: Path) -> None:
    """Saved by us, loaded by transformers: the same text for images, a video and views, in both
    ways to write a prompt.
    """
    transformers = pytest.importorskip("transformers")
    save(bot.model, tmp_path / "saved", processor_from=bot.source)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "saved", dtype=torch.float32
    )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    for number, scenario in enumerate(SCENARIOS):
        ep, _, text = exam(scenario, 1000 + number, held_out=False)
        shown = render(ep, 200)
        messages = [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": p} for p in shown),
                    {"type": "text", "text": text},
                ],
            }
        ]
        prompt = bot.prompt(messages)
        batch = {
            "input_ids": torch.tensor([prompt.tokens]),
            "pixel_values": torch.cat([m.pixels for m in prompt.media]),
        }
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        written = theirs.generate(**batch, max_new_tokens=24, do_sample=False)[
            0, len(prompt.tokens) :
        ]
        assert (
            processor.decode(written, skip_special_tokens=True)
            == bot.chat(messages, max_new_tokens=24).text
        )

        rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=shown, text=rendered, return_tensors="pt")
        written = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert (
            processor.decode(written, skip_special_tokens=True)
            == bot.chat(messages, preset="hf", max_new_tokens=24).text
        )


def test_a_second_question_computes_no_image_again(bot: Chatbot) -> None:
    shown = render(episode("multi", Random(11)), 96)
    first = bot.ask("How many images are there?", shown)
    second = bot.ask("Which image has the most things?", shown)
    assert first.usage.cached == 0
    assert second.usage.cached >= 9 * len(shown)
    assert not second.timings.vision
