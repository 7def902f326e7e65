"""What the built-in model learns beside its world: other drawing styles, and what to refuse."""

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from llava_interleave.chat import BUILTIN
from llava_interleave.checkpoints import Checkpoint, load
from llava_interleave.train.data import formats
from recipes.tiny_world import SCENARIOS, episode, out_of_domain, refusal
from recipes.tiny_world.benchmark import Refusals, World, scored
from recipes.tiny_world.draw import Background, Scene, Thing
from recipes.tiny_world.episodes import cell_of, in_cell
from recipes.tiny_world.feature_distillation import FeatureDistillation, StyledScenes
from recipes.tiny_world.lessons import VISION, WidenedExamples
from recipes.tiny_world.other_images import Source, found
from recipes.tiny_world.patch_pretraining import NAMES, LabeledPatchesDataset, scale
from recipes.tiny_world.refusal import REFUSAL
from recipes.tiny_world.styles import LARGE, Style, draw_styled, resized, restyled, scaled
from recipes.tiny_world.training import adopt

pytestmark = pytest.mark.slow


def photo(seed: int, side: int = 120) -> Image.Image:
    """Something without shapes: smooth coloured noise."""
    grid = np.random.default_rng(seed).uniform(0, 255, (7, 7, 3)).astype(np.uint8)
    return Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for source in ("a", "b"):
        (tmp_path / "images" / source).mkdir(parents=True)
        for number in range(3):
            photo(number).save(tmp_path / "images" / source / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("seed", range(60))
def test_a_thing_is_where_it_was_and_has_its_colour(seed: int) -> None:
    rng = Random(seed)
    kind, colour = rng.choice(("circle", "square", "triangle", "star", "cross")), "green"
    thing = in_cell(rng, rng.randrange(9), kind, colour, rng.random() < 0.5)
    style = replace(Style.sample(rng, {colour}), hollow=0.0, quality=0, noise=0.0)
    (moved,) = resized(rng, [scaled(thing, style)])
    image = draw_styled(rng, Scene((moved,), Background.sample(rng)), style)
    assert image.size == (style.width, style.height)
    at = round(moved.x * style.width), round(moved.y * style.height)
    assert image.getpixel(at) == style.hues[colour]
    assert cell_of(moved) == cell_of(thing)
    assert (moved.radius >= LARGE) == thing.large
    pixels = np.asarray(image.convert("RGB"), int)
    same = (np.abs(pixels - style.hues[colour]).sum(-1) < 40).mean()
    round_area = np.pi * moved.radius**2 * min(image.size) ** 2 / (image.width * image.height)
    assert 0.12 * round_area < same < 1.3 * round_area  # and nothing else has it


def test_things_that_grow_leave_each_other_visible() -> None:
    for seed in range(200):
        rng = Random(seed)
        ep = episode("single", rng)
        things = resized(rng, list(ep.scenes[0].things))
        for i, a in enumerate(things):
            for b in things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.9 * max(a.radius, b.radius)
    big = [resized(Random(i), [Thing("circle", "red", True, 0.5, 0.5, 0.13)])[0] for i in range(60)]
    assert max(t.radius for t in big) > 0.35 > 0.2 > min(t.radius for t in big)


def test_the_images_of_an_episode_are_drawn_alike() -> None:
    """What does not change between two images has the same pixels in both."""
    for seed in range(30):
        rng = Random(f"alike {seed}")
        ep = episode("video", rng)
        still = replace(ep, scenes=(ep.scenes[0], ep.scenes[0]))
        one, two = restyled(rng, still)
        if np.asarray(one).std() < 60:  # without noise, which differs
            assert np.abs(np.asarray(one, int) - np.asarray(two, int)).mean() < 7


def test_refused_images_are_never_empty(folder: Path) -> None:
    rng = Random(5)
    made = [out_of_domain.image(rng, folder) for _ in range(80)]
    assert all(image.mode == "RGB" and min(image.size) >= 64 for image in made)
    assert all(np.asarray(image, float).std() > 3 for image in made)
    assert len({image.tobytes() for image in made}) == len(made)


def test_images_of_a_package_are_distinct_whole_and_not_empty(tmp_path: Path) -> None:
    photo(1).save(tmp_path / "photo.png")
    photo(1).save(tmp_path / "again.png")
    photo(2, 40).save(tmp_path / "icon.png")
    photo(3).convert("L").save(tmp_path / "grey.jpg")
    Image.new("RGB", (99, 99), "red").save(tmp_path / "empty.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "text.txt").write_text("no image")
    images = list(found(tmp_path, Source("p", debian=True)))
    assert len(images) == 2
    assert all(held_out and image.mode == "RGB" for held_out, image in images)
    assert not any(held_out for held_out, _ in found(tmp_path, Source("p", True, held_out=0)))
    assert not list(found(tmp_path, Source("p", True, where="elsewhere")))


def test_samples_answer_about_scenes_and_refuse_the_rest(folder: Path) -> None:
    examples = WidenedExamples(BUILTIN, folder, 1)
    tokenizer = formats.processor(BUILTIN).tokenizer
    refused = answered = 0
    for index in range(60):
        sample = examples(index)
        prompt = sample.prompt
        assert prompt.loss_mask is not None
        text = tokenizer.decode(
            [t for t, in_loss in zip(prompt.tokens, prompt.loss_mask, strict=True) if in_loss]
        )
        if not sample.targets:
            assert text.startswith(REFUSAL)
            refused += text == REFUSAL * (len(text) // len(REFUSAL))
        elif REFUSAL not in text:
            assert prompt.media
            answered += 1
    assert refused > 10
    assert answered > 20


def test_questions_are_filled_in() -> None:
    rng = Random(3)
    questions = [ask(rng) for ask in (refusal.chat, refusal.about_image, refusal.describe) * 200]
    assert not any(re.search(r"\{(word|digits)\}|\[[^]]*\|", text) for text in questions)
    assert len(set(questions)) > 250
    assert not {*refusal.HELD_OUT_CHAT, *refusal.HELD_OUT_ABOUT_IMAGES} & set(questions)


def test_scaling_keeps_what_tower_and_projector_compute() -> None:
    model = load(Checkpoint.open(BUILTIN), dtype=torch.float32)
    pixels = torch.rand(2, 3, VISION.image_size, VISION.image_size) * 2 - 1
    with torch.no_grad():
        before = model.encode(pixels)
        scale(model, residual=5.0, features=32.0)
        torch.testing.assert_close(model.encode(pixels), 32 * before, rtol=1e-3, atol=1e-3)


def test_distillation_keeps_scenes_and_marks_the_rest() -> None:
    model = load(Checkpoint.open(BUILTIN), dtype=torch.float32)
    probe = LabeledPatchesDataset(VISION, 1, 1)[0]
    loss = FeatureDistillation(model, 1, [probe])
    scenes, labels = probe.pixels[:2], probe.labels[:18]
    unnamed, misnamed = torch.full_like(labels, -1), labels.clone()
    misnamed[:, 0] = (labels[:, 0] + 1) % len(NAMES[0])
    same = loss(model, StyledScenes(scenes, scenes, unnamed))
    assert same.total < 1e-6
    assert same.correct == same.count == 18
    assert loss(model, StyledScenes(scenes, scenes, labels)).total < 1
    assert loss(model, StyledScenes(scenes, scenes, misnamed)).total > 18
    other = loss(model, StyledScenes(torch.cat([scenes, -scenes]), scenes, unnamed))
    # Features and the mark are orthogonal, more or less: the error of each is about twice its size.
    assert 0.5 < other.total / 18 < 6
    assert other.correct == 18


def test_a_new_vocabulary_leaves_answers_as_they_were(tmp_path: Path) -> None:
    model, source = adopt(BUILTIN, tmp_path)
    old = load(Checkpoint.open(BUILTIN), dtype=torch.float32)
    for scenario in SCENARIOS:
        ep = episode(scenario, Random(7))
        text = ep.caption
        logits = []
        for network, where in ((model, source), (old, BUILTIN)):
            tokenizer = formats.processor(where).tokenizer
            tokens = tokenizer.encode(text)
            assert tokenizer.decode(tokens) == text
            rows = network.embed(torch.tensor(tokens), [])
            assert rows.shape == (len(tokens), 192)
            logits.append(rows)
        torch.testing.assert_close(*logits)


def test_the_exam_in_other_styles_asks_the_same(tmp_path: Path) -> None:
    plain, styled = World(questions=3), World(questions=3, styled=True, names=False)
    assert [e.question for e in plain.examples] == [e.question for e in styled.examples]
    for example in styled.examples:
        (message,) = example.ask(tmp_path)
        assert {part["type"] for part in message["content"]} <= {"image", "video", "text"}


def test_refusals_are_counted(tmp_path: Path, folder: Path) -> None:
    (folder / "b").rename(folder / "new-b")
    task = Refusals(images=str(folder), count=4)
    groups = [example.group for example in task.examples]
    assert [groups.count(g) for g in dict.fromkeys(groups)] == [2, 2, 30, 30]
    for example in task.examples:
        assert example.scorer(REFUSAL) == 1
        assert example.scorer("2") == 0
        assert example.ask(tmp_path)[0]["content"][-1]["text"] == example.question
    row = {"id": "single/0", "kind": "count", "question": "?", "truth": "2", "score": 0.0}
    assert scored([{**row, "answer": REFUSAL}, {**row, "answer": "3"}]).refused == 1
