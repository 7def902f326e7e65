"""Lessons: which samples the decoder is trained on, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import EllipsisType
from typing import Any

from PIL import Image

from llava_interleave.config import VisionConfig
from llava_interleave.processing.processor import DEFAULT
from llava_interleave.train.data import formats

from . import out_of_domain, refusal
from .attention_supervision import AttendedSample, AttentionTargets, with_targets
from .data import Turn, conversation, render, talk
from .episodes import NORMAL, SCENARIOS, Episode, changed, episode
from .refusal import REFUSAL
from .styles import plain, restyled

VISION = VisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_layers=4,
    num_heads=3,
    image_size=96,
    patch_size=32,
    layer_norm_eps=1e-6,
)


@dataclass(frozen=True, slots=True)
class Lesson:
    """`samples` in a row, drawn from `scenarios`.

    questions: at most, of a sample. caption: fraction with a description. hard: fraction with
    `HARD` questions only. comparison: fraction with two images and one question about their
    difference.
    """

    samples: float
    scenarios: tuple[str, ...]
    questions: int
    caption: float
    hard: float = 0.0
    comparison: float = 0.0


HARD = (
    "changed", "same_at", "order_up", "order_down", "order_events", "still", "moving", "appears",
    "disappears", "first_appears", "last_appears", "first_disappears", "last_disappears",
    "faster", "slower", "seen", "hidden", "behind", "in_front", "side_of", "total",
    "count_shape", "count_colour",
)  # fmt: skip
DESCRIBING = (Lesson(2000, ("single",), 1, 1.0), Lesson(math.inf, SCENARIOS, 3, 1.0))
# Questions about one image are also asked about several, and about the frames of a video: a mix of
# all scenarios from the start is learnt far slower.
PRACTISING = (
    Lesson(6000, ("single",), 6, 0.1),
    Lesson(7000, ("single", "multi", "multi"), 6, 0.1),
    Lesson(8000, ("single", "multi", "video", "video"), 6, 0.1),
    Lesson(math.inf, ("single", *("multi", "video") * 2, *("views",) * 3), 6, 0.1, 0.3),
)
SHARPENING = (
    Lesson(math.inf, ("single", *("multi",) * 4, *("video",) * 3, "views"), 6, 0.03, 0.65),
)
# In a conversation the first answer says whether anything differs, and later answers repeat it:
# only first answers teach comparison.
COMPARING = (Lesson(math.inf, ("single", *("multi", "video", "views") * 2), 6, 0.03, 0.5, 0.45),)


@dataclass(frozen=True, slots=True)
class WorldExamples:
    """Sample number i of the training set, drawn and tokenized on demand."""

    folder: Path
    seed: int
    lessons: tuple[Lesson, ...]

    def __call__(self, index: int) -> AttendedSample:
        rng = Random(f"train/{self.seed}/{index}")
        ep, lesson = self.episode(rng, index)
        turns = talk(ep, rng, questions=lesson.questions, caption=lesson.caption)
        # Some images are resized, as images from files are.
        images = render(ep, VISION.image_size * rng.choice((1, 1, 1, 2)))
        sample = {"conversations": conversation(ep, turns), "video" if ep.clip else "image": images}
        processor = formats.processor(self.folder)
        prompt = processor.example(*formats.messages(sample, Path()))
        return with_targets(
            prompt,
            processor.tokenizer,
            AttentionTargets(ep, VISION.image_size, VISION.patch_size),
            turns,
        )

    def episode(self, rng: Random, index: int) -> tuple[Episode, Lesson]:
        """The episode of a sample with the questions that may be asked, and how many."""
        for lesson in self.lessons:
            if index < lesson.samples:
                break
            index -= int(lesson.samples)
        if lesson.comparison and rng.random() < lesson.comparison:
            ep, about = changed(rng, NORMAL), rng.choice(("changed",) * 3 + ("same_at",) * 2)
            ep, lesson = (
                replace(ep, questions=tuple(q for q in ep.questions if q.about == about)),
                Lesson(0, (), 1, 0.0),
            )
        else:
            ep = episode(
                lesson.scenarios[0] if len(lesson.scenarios) == 1 else rng.choice(lesson.scenarios),
                rng,
            )
        if lesson.hard and rng.random() < lesson.hard:
            ep = replace(
                ep, questions=tuple(q for q in ep.questions if q.about in HARD) or ep.questions
            )
        return ep, lesson


# Shares of samples in the last stage: as in the one before; about scenes, most of them in other
# styles; refusals with images that are not of the world; refusals without an image, or next to a
# scene.
SHARES = (0.36, 0.34, 0.14, 0.16)
STYLED = 0.6
PLAIN = 0.3  # of the samples about scenes: shapes of any size at any place of a plain canvas
WIDENING = (Lesson(math.inf, SCENARIOS, 6, 0.03, 0.5, 0.3),)
# Around questions about scenes, in a fifth of the samples.
LEADS = (
    "Hi! ", "Hello, ", "Question: ", "I would like to know: ", "Next question. ", "OK. ", "Hmm, ",
    "And now: ", "Say: ", "I wonder: ", "Thanks. ", "To be sure: ", "Have a look: ", "Quickly: ",
    "My friend wants to know: ", "Answer me this. ", "Nice picture! ", "Good. ", "",
)  # fmt: skip
TAILS = (" Thanks!", " Please answer.", " I am curious.", " Be brief.", " Take your time.", "", "")
SYSTEM_PROMPTS = (
    None,
    "You are a friendly assistant. Answer in one sentence.",
    "You are an expert for images.",
    "Answer the question about the image.",
    "You are a helpful AI assistant who answers questions truthfully and briefly.",
)


@dataclass(frozen=True, slots=True)
class WidenedExamples:
    """Sample number i of the last stage: scenes in all styles and presets, and refusals.

    images: a folder of images that are not of the world.
    """

    folder: Path
    images: Path
    seed: int

    def __call__(self, index: int) -> AttendedSample:
        rng = Random(f"widen/{self.seed}/{index}")
        world = WorldExamples(self.folder, self.seed, WIDENING)
        kind = rng.choices(("world", "scene", "image", "text"), SHARES)[0]
        if kind == "world":
            return world(index)
        if kind == "image" and rng.random() < 0.9:
            return self.sample(rng, None, self.refused_images(rng), refusals(rng))
        if kind == "image":  # and then a scene
            images, turns = [out_of_domain.image(rng, self.images)], refusals(rng)[:1]
            ep = episode("single", rng)
            turns += talk(ep, rng, questions=3, caption=0.03)
            return self.sample(rng, None, images, turns, render(ep, VISION.image_size))
        if kind == "text" and rng.random() < 0.4:
            texts = [refusal.chat(rng) if rng.random() < 0.7 else refusal.of_the_world(rng)]
            texts += [refusal.chat(rng) for _ in range(rng.choice((0, 0, 1)))]
            return self.sample(rng, None, [], [Turn(text, REFUSAL, None) for text in texts])
        image = None
        if kind == "scene" and rng.random() < PLAIN:
            ep, image = plain(rng)
            lesson = Lesson(0, (), 3, 0.2)
        else:
            ep, lesson = world.episode(rng, index)
        turns = talk(ep, rng, questions=lesson.questions, caption=lesson.caption)
        if lesson.caption and rng.random() < (0.12 if image is None else 0.4):
            turns[0] = Turn(refusal.describe(rng), ep.caption, None)
        if rng.random() < 0.2:
            turns = [reworded(rng, turn) for turn in turns]
        if kind == "text":  # half of the time among questions about the scene
            turns = turns[: rng.choice((0, 0, 1, 2))]
            turns.insert(rng.randint(0, len(turns)), Turn(refusal.chat(rng), REFUSAL, None))
        styled = rng.random() < STYLED
        if image is not None:
            images = [image]
        else:
            images = restyled(rng, ep) if styled else render(ep, VISION.image_size)
        return self.sample(rng, ep, images, turns)

    def refused_images(self, rng: Random) -> list[Image.Image]:
        """One, several, or one among images of scenes."""
        count = rng.choice((1, 1, 1, 1, 1, 1, 2, 2, 3, 4))
        images = [out_of_domain.image(rng, self.images) for _ in range(count)]
        if rng.random() < 0.3:
            scenes = restyled(rng, episode(rng.choice(("single", "multi", "video")), rng))
            images = [*images[:1], *scenes[: rng.choice((1, 2, 3))]]
            rng.shuffle(images)
        return images

    def sample(
        self,
        rng: Random,
        ep: Episode | None,
        images: list[Image.Image],
        turns: Sequence[Turn],
        later: Sequence[Image.Image] = (),
    ) -> AttendedSample:
        """A conversation in one of the presets, in a seventh of them with another system prompt.

        later: images before the second question.
        """
        preset = rng.choices(("interleave", "hf", "official"), (0.4, 0.35, 0.25))[0]
        system: str | EllipsisType | None = DEFAULT
        if rng.random() < 1 / 7:
            system = rng.choice(SYSTEM_PROMPTS)
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        if len(images) > 1 and (ep.clip is not None if ep else rng.random() < 0.3):
            parts = [{"type": "video", "video": images}]
        elif ep and ep.names and preset != "hf":  # which has no names of views
            parts = [{"type": "views", "views": dict(zip(ep.names, images, strict=True))}]
        messages: list[dict[str, Any]] = []
        for turn in turns:
            messages += [
                {"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]},
                {"role": "assistant", "content": turn.answer},
            ]
            parts = [{"type": "image", "image": image} for image in later]
            later = ()
        processor = formats.processor(self.folder)
        prompt = processor.example(messages, preset=preset, system=system)
        if ep is None:
            return AttendedSample(prompt, [])
        targets = AttentionTargets(ep, VISION.image_size, VISION.patch_size)
        return with_targets(prompt, processor.tokenizer, targets, turns)


def reworded(rng: Random, turn: Turn) -> Turn:
    text = turn.question
    if lead := rng.choice(LEADS):
        text = lead + (text[0].lower() + text[1:] if rng.random() < 0.5 else text)
    if tail := rng.choice(TAILS):
        text += tail
    elif rng.random() < 0.5:
        text = text.rstrip("?.")
    return replace(turn, question=text)


def refusals(rng: Random) -> list[Turn]:
    """One to three questions about images that are not of the world."""
    count = rng.choice((1, 1, 1, 2, 3))
    return [Turn(refusal.about_image(rng), REFUSAL, None) for _ in range(count)]
