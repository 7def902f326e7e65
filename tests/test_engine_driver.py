"""Jobs, deltas and threads of `Chatbot` on one engine: see
llava_interleave/chat/engine_driver.py.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_interleave import Chatbot, load
from llava_interleave.chat.engine_driver import EngineDriver, GenerationJob
from llava_interleave.errors import OptionError
from llava_interleave.options import Options
from llava_interleave.testing import tiny_checkpoint

LONG: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def bot(folder: Path) -> Iterator[Chatbot]:
    bot = load(folder)
    yield bot
    assert not bot.engine.busy
    bot.engine.check()


def test_streams_read_in_turn_are_computed_together(bot: Chatbot) -> None:
    questions = ["What?", "Who is it?", "Where?"]
    alone = [bot.ask(question, **LONG).tokens for question in questions]
    bot.engine.clear()
    streams = [bot.stream(bot.turn(question), **LONG) for question in questions]
    assert bot.engine.load().waiting == 3
    answers = {}
    expected = bot.ask("And when?", **LONG)
    for _ in range(100):
        for index, stream in enumerate(streams):
            delta = next(stream, None)
            if delta is not None and delta.answer:
                answers[index] = delta.answer.tokens
    assert [answers[index] for index in range(3)] == alone
    assert bot.ask("And when?", **LONG).tokens == expected.tokens


@pytest.mark.parametrize("started", [False, True])
def test_closing_or_forgetting_a_stream_aborts(bot: Chatbot, started: bool) -> None:
    for closes in (True, False):
        stream = bot.stream(bot.turn("What?"), n=2, **LONG)
        if started:
            next(stream)
            assert bot.engine.load().running == 2
        assert bot.engine.busy
        if closes:
            stream.close()
        del stream
        assert not bot.engine.busy
        assert bot.engine.load().kv_running == 0


def test_errors_are_raised_by_the_call_and_leave_nothing(bot: Chatbot) -> None:
    with pytest.raises(OptionError, match="logit_bias"):
        bot.stream(bot.turn("What?"), logit_bias={10**6: 1.0})
    prompts = [bot.prompt(bot.turn(word)) for word in ("a", "b")]
    with pytest.raises(OptionError, match="adapter"):
        bot.answer_prompts(prompts, Options(adapter="none"))


class Broken:
    """The model's forward, which raises `error` once."""

    def __init__(self, bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = None
        self.run = bot.engine._run
        monkeypatch.setattr(bot.engine, "_run", self)

    def __call__(self, plan: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.run(plan)


def test_an_error_of_a_step_ends_its_answers_and_the_next_are_given(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bot.ask("What?", **LONG).tokens
    broken = Broken(bot, monkeypatch)
    mine, other = (bot.stream(bot.turn(word), **LONG) for word in ("What?", "Who?"))
    next(mine)
    broken.error = RuntimeError("broken")
    for stream in (mine, other):
        with pytest.raises(RuntimeError, match="broken"):
            list(stream)
    assert bot.ask("What?", **LONG).tokens == expected


def test_an_interrupt_reaches_the_caller_and_ends_the_others(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bot.ask("What?", **LONG).tokens
    broken = Broken(bot, monkeypatch)
    mine, other = (bot.stream(bot.turn(word), **LONG) for word in ("What?", "Who?"))
    broken.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(mine)
    with pytest.raises(RuntimeError, match="the step was interrupted: KeyboardInterrupt"):
        list(other)
    assert bot.ask("What?", **LONG).tokens == expected


def test_threads_compute_for_each_other(bot: Chatbot) -> None:
    """Answers of several threads share steps, and no thread is left behind."""
    alone = {f"Question {n}?": bot.ask(f"Question {n}?", **LONG).tokens for n in range(6)}
    before, steps, step = threading.active_count(), [], bot.engine.step
    bot.engine.step = lambda *budget: steps.append(1) or step(*budget)  # type: ignore[method-assign,func-returns-value]
    found: dict[str, tuple[int, ...]] = {}
    start = threading.Barrier(len(alone))

    def ask(question: str) -> None:
        start.wait()
        found[question] = bot.ask(question, **LONG).tokens

    threads = [threading.Thread(target=ask, args=(question,)) for question in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len(steps) < 6 * 40
    assert threading.active_count() == before


def test_one_job_that_fails_ends_alone(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EngineDriver(bot.engine, bot.processor.tokenizer)
    jobs = [GenerationJob(bot.prompt(bot.turn(word)), Options(n=2, **LONG)) for word in ("a", "b")]
    for job in jobs:
        driver.add(job)
    driver.step()
    for builder in jobs[0].running.values():
        monkeypatch.setattr(builder, "push", lambda _: 1 / 0)
    errors, answers = [], []
    while driver.jobs:
        for job, item in driver.step():
            if isinstance(item, Exception):
                errors.append((job, type(item)))
            elif item.answer:
                answers.append((job, item.index))
    assert errors == [(jobs[0], ZeroDivisionError)]
    assert sorted(index for _, index in answers) == [0, 1]
    assert {job for job, _ in answers} == {jobs[1]}
