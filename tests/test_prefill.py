"""Prompts that are prefilled without an answer: what a question then computes, and who goes first."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_interleave import Chatbot, load
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.engine.prefix_cache import HASH_BLOCK
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.engine import (
    GREEDY,
    MIXED,
    TOKEN,
    VOCAB,
    answers,
    counted,
    engine,
    expected,
    finish,
    naive,
    network,
    prompt,
    text,
)

BEGIN = prompt((0, 2), text(0, 60), (1, 1))
WHOLE = prompt((0, 2), text(0, 60), (1, 1), text(1, 7))


def test_a_question_computes_only_the_new_tokens() -> None:
    e, model = counted()
    read = e.add(BEGIN, prefill_only=True)
    events = finish(e)
    assert [(event.request, event.token, event.finish_reason) for event in events] == [
        (read, None, "prefill")
    ]
    assert events[0].usage is not None
    assert (events[0].usage.cached, events[0].usage.generated) == (0, 0)
    assert (model.heads, sum(model.calls)) == (0, 3)
    rows = model.rows
    (request,) = e.generate([WHOLE], GREEDY)
    assert request.usage.cached == len(BEGIN)
    assert model.rows - rows == 7 + 11
    assert sum(model.calls) == 3
    assert request.generated == naive(WHOLE, 12)


def test_answers_are_equal_bit_for_bit() -> None:
    how = SamplingParams(max_new_tokens=12, logprobs=3, ignore_eos=True)

    def logprobs(prefill: bool) -> list[Any]:
        e = Engine(
            network(), eos_ids=(), vocab=VOCAB, kv_bytes=4000 * TOKEN, batch_invariant=True,
            max_num_batched_tokens=64,
        )  # fmt: skip
        if prefill:
            e.add(BEGIN, prefill_only=True)
            finish(e)
        request = e.add(WHOLE, how)
        events = [event for event in finish(e) if event.request is request]
        assert (request.usage.cached > 0) == prefill
        return [(event.token, event.logprob, event.top_logprobs) for event in events]

    assert logprobs(True) == logprobs(False)


@pytest.mark.parametrize("steps", range(7))
def test_answers_go_first_and_keep_what_was_computed(steps: int) -> None:
    e = engine(max_num_batched_tokens=20, max_num_seqs=3)
    read = e.add(BEGIN, prefill_only=True)
    for _ in range(steps):
        e.step()
    ended = read.finish_reason is not None
    request = e.add(WHOLE, GREEDY)
    other = e.add(MIXED[1], GREEDY)
    while not (request.finish_reason and other.finish_reason):
        before = read.kv
        e.step()
        e.check()
        assert ended or (read.finish_reason, read.kv) == (None, None), before
    assert request.generated == naive(WHOLE, 12)
    assert request.usage.cached >= min(20 * steps, len(BEGIN)) - HASH_BLOCK
    finish(e)
    assert read.finish_reason == "prefill"


def test_prefills_take_no_memory_from_answers_and_end_when_there_is_time() -> None:
    """Even where they fill the memory: what they computed is a cache like any other."""
    e = engine(tokens=260, max_num_batched_tokens=64)
    reads = [e.add(prompt(text(40 + n, 200)), prefill_only=True) for n in range(3)]
    e.step()
    right = [naive(p, 12) for p in (MIXED[0], MIXED[1])]
    requests = [e.add(p, GREEDY) for p in (MIXED[0], MIXED[1])]
    order = [event.request for event in finish(e) if event.finish_reason]
    assert answers(requests) == right
    assert set(order) == {*reads, *requests}
    assert {read.finish_reason for read in reads} == {"prefill"}
    assert max(map(order.index, requests)) < max(map(order.index, reads))


def test_random_prefills_answers_and_aborts() -> None:
    chance = random.Random(0)
    e = engine(tokens=400, max_num_batched_tokens=30, max_num_seqs=3)
    running: list[tuple[Any, int]] = []
    reads: list[Any] = []
    for _ in range(300):
        action = chance.random()
        number = chance.randrange(len(MIXED))
        if action < 0.15:
            reads.append(e.add(MIXED[number], prefill_only=True))
        elif action < 0.3:
            running.append((e.add(MIXED[number], GREEDY), number))
        elif action < 0.4 and reads:
            e.abort(chance.choice(reads))
        elif e.busy:
            e.step(chance.choice([0.001, 1.0, float("inf")]))
        e.check()
    finish(e)
    for request, number in running:
        assert request.generated == expected()[number]
    assert {read.finish_reason for read in reads} <= {"prefill", "abort"}
    assert (e.load().running, e.load().kv_running) == (0, 0)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def test_a_chatbot_and_a_conversation_prefill(bot: Chatbot, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.png" for n in range(2)]
    for n, file in enumerate(files):
        Image.fromarray(np.full((30, 30, 3), 90 * n, np.uint8)).save(file)
    right = bot.ask("What changed?", files, max_new_tokens=8).tokens
    bot.engine.clear()
    images = [{"type": "image", "path": str(file)} for file in files]
    begin = [{"role": "user", "content": images}]
    usage = bot.prefill(begin, n=3)
    assert (usage.prompt, usage.cached, usage.generated) == (len(bot.prompt(begin)), 0, 0)
    assert bot.prefill(begin).cached == usage.prompt - 1
    crops = bot.engine.load().crops_encoded
    answer = bot.ask("What changed?", files, max_new_tokens=8)
    whole = bot.prompt(bot.turn("What changed?", files)).tokens
    pairs = zip(whole, bot.prompt(begin).tokens, strict=False)
    common = next(n for n, (a, b) in enumerate(pairs) if a != b)
    assert (answer.tokens, answer.usage.cached) == (right, common)
    assert bot.engine.load().crops_encoded == crops
    bot.engine.clear()
    talk = bot.conversation()
    talk.attach(*files)
    assert talk.prefill().prompt == usage.prompt
    assert talk.ask("What changed?", max_new_tokens=8).usage.cached == common
    assert replace(answer.usage, cached=0).prompt == len(whole)
