"""Attention supervision: targets are the patches of the words, and the loss is about attention."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from random import Random

import pytest
import torch

from llava_interleave.model import PackedAttention
from llava_interleave.processing import Processor
from llava_interleave.testing import tiny_checkpoint, tiny_config
from llava_interleave.train.data import formats
from recipes.tiny_world import SCENARIOS, episode
from recipes.tiny_world.attention_supervision import (
    ANSWER_LAYERS,
    NOWHERE,
    QUESTION_LAYERS,
    AttendedSample,
    AttentionSupervision,
    AttentionTargets,
    collate,
    with_targets,
)
from recipes.tiny_world.data import Turn, conversation, render, talk
from recipes.tiny_world.draw import Background, Scene
from recipes.tiny_world.episodes import Episode, in_cell
from recipes.tiny_world.lessons import VISION
from recipes.tiny_world.questions import Question


def shown(
    *images: Sequence[tuple[int, str, str, bool]], scenario: str = "multi"
) -> AttentionTargets:
    """Images with things at (cell, kind, colour, large)."""
    background = Background.sample(Random(1))
    scenes = tuple(
        Scene(tuple(in_cell(Random(2), *thing) for thing in things), background)
        for things in images
    )
    return AttentionTargets(Episode(scenario, scenes, "", ()), 96, 32)


FIRST = [(0, "star", "red", False), (5, "circle", "red", True), (8, "star", "blue", True)]
SECOND = [(0, "star", "red", False), (4, "circle", "green", True)]


@pytest.mark.parametrize(
    ("question", "spots"),
    [
        (Question("shape", "star", colour="blue"), [{(0, 8)}]),
        (Question("size", "small", thing="red star", where="image 2"), [{(1, 0)}]),
        (Question("at", "nothing", place="top right", where="image 1"), [{(0, 2)}]),
        (Question("at", "nothing", place="top right"), [{(0, 2), (1, 2)}]),
        (
            Question("count_colour", "2", "top left, middle right", colour="red", where="image 1"),
            [{(0, 0)}, {(0, 5)}, {NOWHERE}],
        ),
        (Question("count_colour", "0", colour="green", where="image 1"), [{NOWHERE}]),
        (
            Question(
                "relation",
                "no",
                "top left and bottom right, above",
                a="red star",
                b="blue star",
                where="image 1",
            ),
            [{(0, 0)}, {(0, 8)}, {NOWHERE}],
        ),
        (
            Question("same_at", "no", "nothing and large green circle", place="middle centre"),
            [{(0, 4)}, {(1, 4)}, {NOWHERE}],
        ),
        (Question("exists", "yes", thing="blue star"), [{(0, 8)}]),
        (Question("exists", "no", thing="blue cross"), [{NOWHERE}]),
        (Question("which", "image 2", thing="green circle"), [{(1, 4)}]),
        (Question("changed", "nothing changed"), [{NOWHERE}]),
        (
            Question(
                "changed",
                "at the middle centre a large green circle was added",
                "middle centre nothing and large green circle different",
            ),
            [{(1, 4)}, {(0, 4)}, {(1, 4)}, {(1, 4)}, {(1, 4)}, {NOWHERE}],
        ),
        (
            Question(
                "order_events",
                "the green circle",
                "frame 1: red star. frame 2: red star, green circle; green circle",
            ),
            [{(0, 0)}, {(1, 0)}, {(1, 4)}, {(1, 4)}, {(1, 4)}, {NOWHERE}],
        ),
        (
            Question(
                "appears",
                "the green circle",
                "top left red star, then top left red star; nothing, then middle centre green "
                "circle",
            ),
            [*[{(0, 0), (1, 0)}] * 4, {NOWHERE}, {(1, 4)}, {(1, 4)}, {(1, 4)}, {NOWHERE}],
        ),
        (Question("count", "3", where="image 1"), []),
    ],
)
def test_an_answer_looks_at_what_it_names(
    question: Question, spots: list[set[tuple[int, int]]]
) -> None:
    assert [
        where for _, where in shown(FIRST, SECOND).of_answer(question.full_answer, question)
    ] == spots


def test_a_description_attends_to_the_image_that_it_describes() -> None:
    text = (
        "image 1: 1 thing. top left: small red star. image 2: 2 things. top left: small red star."
    )
    spots = [where for _, where in shown(FIRST, SECOND).of_answer(text, None)]
    assert spots == [{(0, 0)}, {(0, 0)}, {(1, 0)}, {(1, 0)}]


def test_a_question_looks_at_what_it_mentions() -> None:
    targets, text = (
        shown(FIRST, SECOND),
        "Is the red star small or large, or is it at the bottom right of 2 things?",
    )
    assert [(text[: end + 1].split()[-1], where) for end, where in targets.of_question(text)] == [
        ("star", {(0, 0), (1, 0)}),
        ("right", {(0, 8), (1, 8)}),
    ]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_answers_say_about_episodes_is_true(scenario: str) -> None:
    """Things and places in answers have a patch; a hidden thing may have none in that image."""
    named = missing = 0
    for number in range(40):
        ep = episode(scenario, Random(number))
        targets = AttentionTargets(ep, 96, 32)
        for question in ep.questions:
            for span, where in targets.of_answer(question.full_answer, question):
                if question.full_answer[span.start : span.stop] not in ("no", "nothing"):
                    named, missing = named + 1, missing + (not where)
    assert named > 100
    assert missing < (0.1 if scenario in ("video", "views") else 0.01) * named


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    config = replace(tiny_config(), vision=VISION)
    return Processor.from_folder(tiny_checkpoint(tmp_path_factory.mktemp("model"), config))


def sample(
    processor: Processor, scenario: str, number: int
) -> tuple[AttendedSample, AttentionTargets, list[Turn]]:
    rng = Random(f"{scenario}{number}")
    ep = episode(scenario, rng)
    turns, targets = talk(ep, rng, questions=3, caption=0.5), AttentionTargets(ep, 96, 32)
    said = {
        "conversations": conversation(ep, turns),
        "video" if ep.clip else "image": render(ep, 96),
    }
    prompt = processor.example(*formats.messages(said, Path()))
    return with_targets(prompt, processor.tokenizer, targets, turns), targets, turns


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_look_at_the_patches_of_their_images(processor: Processor, scenario: str) -> None:
    """Tokens with targets, spelt out again, are the phrases of answers and the last words of
    questions'.
    """
    for number in range(6):
        attended, targets, turns = sample(processor, scenario, number)
        tokens, media = attended.prompt.tokens, attended.prompt.media
        keys = [
            m.start + n for m in media for n in range(m.layout.length)
        ]  # of all images' patches, in order
        assert all(tokens[key] == processor.config.image_token_id for key in keys)
        answers = [(row, key) for row, key, mention in attended.targets if not mention]
        spelt = {
            row: processor.tokenizer.decode([tokens[row + 1]])
            for row, key in answers
            if key in keys
        }
        spans = [
            (t.answer[s.start : s.stop], where)
            for t in turns
            for s, where in targets.of_answer(t.answer, t.source)
        ]
        wanted = [text for text, where in spans if where - {NOWHERE}]
        assert "".join(spelt[row] for row in sorted(spelt)).replace(" ", "") == "".join(
            wanted
        ).replace(" ", "")
        meant = {spot for _, where in spans for spot in where}
        assert {divmod(keys.index(key), 9) for _, key in answers if key in keys} == meant - {
            NOWHERE
        }
        assert any(key == 0 for _, key in answers) == (NOWHERE in meant)
        claims = [t.source for t in turns if t.source and t.source.relation]
        assert sum(key > keys[-1] for _, key in answers) == len(claims)
        before = {row: key for row, key, mention in attended.targets if mention and row in keys}
        follow = keys[9:] if scenario in ("multi", "video") else []
        assert before == dict(zip(follow, keys, strict=False))
        ends = [
            t.question[: end + 1]
            for t in turns
            for end, where in targets.of_question(t.question)
            for _ in where
        ]
        rows = [row for row, _, mention in attended.targets if mention and row not in keys]
        assert len(rows) == len(ends)
        for row, text in zip(rows, ends, strict=True):
            assert text.endswith(processor.tokenizer.decode([tokens[row]]).strip())


def test_the_loss_is_the_share_of_attention_elsewhere(processor: Processor) -> None:
    """It attends as `PackedAttention`; its loss is a loop's over rows, and falls along its
    gradient.
    """
    batch = collate([sample(processor, scenario, 1)[0] for scenario in SCENARIOS])
    lengths, total = batch.batch.lengths, sum(batch.batch.lengths)
    torch.manual_seed(1)
    q, k, v = (torch.randn(total, 2, 8, requires_grad=True) for _ in range(3))
    attend = AttentionSupervision(lengths, batch.targets)
    expected = 0.0
    for layer in range(6):
        assert torch.equal(attend(layer, q, k, v), PackedAttention(lengths)(layer, q, k, v))
        starts = list(accumulate([0, *lengths]))
        for row in batch.targets[:, 0].unique().tolist():
            start = max(s for s in starts if s <= row)
            shares = torch.softmax(q[row, 0] @ k[start : row + 1, 0].T / math.sqrt(8), 0)
            for mention, layers in ((True, QUESTION_LAYERS), (False, ANSWER_LAYERS)):
                keys = [
                    key - start
                    for r, key, m in batch.targets.tolist()
                    if r == row and bool(m) == mention
                ]
                if keys and layer in layers:
                    expected -= math.log(float(shares[keys].sum().detach()) + 1e-6)
    assert float(attend.loss.detach()) == pytest.approx(expected, rel=1e-5)
    attend.loss.backward()
    assert q.grad is not None and not q.grad[:, 1].any()  # only the first head is taught
    better = AttentionSupervision(lengths, batch.targets)
    for layer in range(6):
        better(layer, (q - 0.1 * q.grad).detach(), k.detach(), v.detach())
    assert float(better.loss) < expected


def test_a_batch_without_looks_costs_nothing(processor: Processor) -> None:
    plain = replace(sample(processor, "single", 2)[0], targets=[])
    attend = AttentionSupervision([len(plain)], collate([plain]).targets)
    attend(QUESTION_LAYERS[0], *(torch.randn(len(plain), 2, 8) for _ in range(3)))
    assert float(attend.loss) == 0
