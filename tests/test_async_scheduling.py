"""An engine that launches the next step before it reads this one's tokens == one that never does:
events, caches, accounts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from llava_interleave.engine import Engine, Event, Request, SamplingParams
from llava_interleave.engine.cuda_graphs import CudaGraphDecoder, InFlightStep
from tests.helpers.engine import (
    EOS,
    GREEDY,
    MIXED,
    PARTS,
    TOKEN,
    VOCAB,
    answers,
    engine,
    expected,
    failing,
    finish,
    naive,
    network,
    prompt,
    text,
)
from tests.helpers.gpu import simulated


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch)


def behind(monkeypatch: pytest.MonkeyPatch, e: Engine) -> Engine:
    """That never launches a step before it has read the one before."""
    monkeypatch.setattr(e._runner, "_launch_next", lambda *_: None)
    return e


class Log:
    """Launches of steps, each with whether it was one ahead, and readings, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[tuple[str, int]] = []
        launch, read, steps = (
            CudaGraphDecoder.__call__,
            InFlightStep.tokens,
            dict[int, InFlightStep](),
        )

        def launched(
            captured: CudaGraphDecoder, rows: Any, before: InFlightStep | None = None
        ) -> InFlightStep:
            step = launch(captured, rows, before)
            self.said.append(("ahead" if before else "launched", len(steps)))
            steps[len(steps)] = step
            return step

        def tokens(step: InFlightStep, kvs: Any) -> list[int]:
            number = next(n for n, one in steps.items() if one.rows is step.rows)
            self.said.append(("read", number))
            return read(step, kvs)

        monkeypatch.setattr(CudaGraphDecoder, "__call__", launched)
        monkeypatch.setattr(InFlightStep, "tokens", tokens)

    def count(self, what: str) -> int:
        return sum(one == what for one, _ in self.said)


def test_a_step_is_launched_before_the_one_before_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token is a prompt's, and five are left. That the fifth is the last is known
    before.
    """
    log = Log(monkeypatch)
    (request,) = engine(kv_block_size=16).generate(
        [MIXED[1]], SamplingParams(max_new_tokens=6, ignore_eos=True)
    )
    assert request.generated == naive(MIXED[1], 6)
    rest = [pair for n in range(1, 5) for pair in (("ahead", n), ("read", n - 1))]
    assert log.said == [("launched", 0), *rest, ("read", 4)]


def test_an_answer_that_ended_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stop token: one step too many was launched, and the next question finds the prefix as
    far as it was counted.
    """
    log, e = Log(monkeypatch), engine(kv_block_size=16)
    answer = naive(MIXED[1], 12)
    at = next(at for at in range(4, 12) if answer[at] not in answer[:at])
    (request,) = e.generate(
        [MIXED[1]], SamplingParams(max_new_tokens=40, stop_ids=(answer[at],), ignore_eos=True)
    )
    assert request.generated == answer[: at + 1]
    assert (log.count("launched"), log.count("ahead"), log.count("read")) == (1, at, at)
    e.check()
    sequel = prompt([*MIXED[1].tokens, *answer[: at + 1], *text(1, 5)])
    (found,) = e.generate([sequel], GREEDY)
    assert (found.cached, found.generated) == (len(MIXED[1]) + at, naive(sequel, 12))


def test_a_later_request_joins_the_step_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is prefilled while answers decode whose next tokens are known by then: each is computed
    once.
    """
    log, e = Log(monkeypatch), engine(kv_block_size=16)
    first = [e.add(p, GREEDY) for p in MIXED[:3]]
    for _ in range(4):
        e.step()
    launched = len(log.said)
    later = [e.add(p, GREEDY) for p in MIXED[3:]]
    e.step()
    assert log.said[launched:] == [("read", 3)]
    assert [len(r.generated) for r in first] == [5, 5, 5] and [len(r.generated) for r in later] == [
        1,
        1,
        1,
    ]
    finish(e)
    assert answers([*first, *later]) == expected()


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 1, "logprobs": 1, "logit_bias": {3: 2.0}},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"prompt_lookup_num_tokens": 4},
    ],
    ids=str,
)
def test_steps_run_ahead_of_samples_but_not_of_drafts(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled on the device, the next step reads the tokens there."""
    log, e = Log(monkeypatch), engine(kv_block_size=16)
    how = [GREEDY, SamplingParams(max_new_tokens=12, ignore_eos=True, **other)]
    requests = e.generate(MIXED[:2], how)
    alone = engine(kv_block_size=0).generate(MIXED[:2], how)
    assert log.count("launched") and bool(log.count("ahead")) == (
        "temperature" in other or ("repetition_penalty" in other)
    )
    assert [r.generated for r in requests] == [r.generated for r in alone]


def test_no_step_runs_ahead_of_a_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask is the host's, which has to see the token before."""

    class OddTokens:
        def allowed(self) -> torch.Tensor:
            return torch.arange(VOCAB) % 2 == 1

        def take(self, token: int) -> None:
            assert token % 2

    log, e = Log(monkeypatch), engine(kv_block_size=16)
    requests = [e.add(MIXED[0], GREEDY), e.add(MIXED[1], GREEDY, constraint=OddTokens())]
    finish(e)
    assert log.count("launched") and not log.count("ahead")
    assert all(token % 2 for token in requests[1].generated)


def test_where_the_next_token_has_no_room_yet_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """31 tokens and one more fill a block; a sequence gets another one with the step that needs
    it.
    """
    log, e = Log(monkeypatch), engine(tokens=64, kv_block_size=32)
    p = prompt(text(1, 30))
    monkeypatch.setattr("llava_interleave.engine.scheduler.DECODE_RESERVE", 1)
    monkeypatch.setattr("llava_interleave.engine.scheduler.HASH_BLOCK", 1)
    (request,) = e.generate([p], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert request.generated == naive(p, 6)
    assert [what for what, _ in log.said if what != "read"] == [
        "launched",
        "ahead",
        "launched",
        "ahead",
        "ahead",
    ]


def test_a_step_ahead_that_fails_fails_alone() -> None:
    e, model = failing(kv_block_size=16, max_num_seqs=2)
    requests = [e.add(p, GREEDY) for p in MIXED]
    for _ in range(4):
        e.step()
    model.error = torch.OutOfMemoryError("no memory left")
    e.step()
    assert [r.finish_reason for r in requests] == ["error"] * 2 + [None] * 4
    e.check()
    finish(e)
    assert answers(requests)[2:] == expected()[2:]
    assert answers(e.generate(MIXED, GREEDY)) == expected()


def kinds(chance: random.Random) -> SamplingParams:
    """Mostly those that go ahead, some of which end by a token that is not known before."""
    new = chance.choice([1, 2, 5, 20, 60, 60])
    stops = tuple(chance.sample(range(VOCAB), 2)) if chance.random() < 0.5 else ()
    others: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 3},
        {"logprobs": 2},
        {"repetition_penalty": 1.3, "temperature": 0.5, "seed": 4},
    ]
    drafts = chance.random() < 0.03
    other = chance.choice(others) if chance.random() < 0.4 else {}
    other |= {"prompt_lookup_num_tokens": 4} if drafts else {}
    return SamplingParams(max_new_tokens=new, stop_ids=stops, **other)


class Pair:
    """Two engines that get the same requests."""

    def __init__(self, chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        block = chance.choice([4, 8, 32])
        options: dict[str, Any] = {
            "kv_bytes": (chance.randint(160, 260) + block) * TOKEN,
            "kv_block_size": block,
            "max_num_batched_tokens": chance.randint(6, 80),
            "max_batched_images": chance.randint(1, 6),
            "max_num_seqs": chance.randint(2, 6),
            "feature_bytes": chance.choice([0, 10**6]),
        }
        ahead, never = (Engine(network(), eos_ids={EOS}, vocab=VOCAB, **options) for _ in range(2))
        self.engines = ahead, behind(monkeypatch, never)
        self.pairs: list[tuple[Request, ...]] = []

    def add(self, chance: random.Random) -> None:
        parts, how = chance.choices(range(len(PARTS)), k=chance.randint(1, 3)), kinds(chance)
        tokens = (
            [chance.choice([0, 1])] if chance.random() < 0.3 else []
        )  # after which many begin alike
        p = prompt(tokens, *(PARTS[part] for part in parts))
        self.pairs.append(tuple(e.add(p, how) for e in self.engines))

    def abort(self, chance: random.Random) -> None:
        if self.pairs:
            ours, theirs = (
                e.abort(r) for e, r in zip(self.engines, chance.choice(self.pairs), strict=True)
            )
            assert summary(filter(None, [ours])) == summary(filter(None, [theirs]))

    def step(self, *_: Any) -> None:
        ours, theirs = (summary(e.step()) for e in self.engines)
        assert [one[:-1] for one in ours] == [one[:-1] for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one[-1] == pytest.approx(other[-1], abs=1e-4)

    def clear(self, *_: Any) -> None:
        for e in self.engines:
            e.clear()

    def compare(self) -> None:
        """The accounts, and of every cache what it is of, where it lies, and its numbers."""
        ahead, never = self.engines
        assert ahead.load() == never.load()
        for e in self.engines:
            e.check()
        ours, theirs = ([*e._prefix_cache.idle] for e in self.engines)
        assert [(kv.length, kv.blocks, kv.key.block_hashes) for kv in ours] == [
            (kv.length, kv.blocks, kv.key.block_hashes) for kv in theirs
        ]
        for kv, other in zip(ours, theirs, strict=True):
            assert kv.key.ids.tolist() == other.key.ids.tolist()
            stored = [
                e._runner.kv_cache.export_tensors(one, one.length)
                for e, one in zip(self.engines, (kv, other), strict=True)
            ]
            for name, tensor in stored[0].items():
                torch.testing.assert_close(tensor, stored[1][name], rtol=1e-3, atol=1e-4)


def summary(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    return [
        (
            e.request.id,
            e.token,
            e.finish_reason,
            e.usage,
            e.error,
            [token for token, _ in e.top_logprobs],
            e.logprob or 0.0,
        )
        for e in events
    ]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))]
)
def test_whatever_happens_both_say_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come, go and end, with and without images; in too little memory where they get it
    by the piece.
    """
    chance, log = random.Random(seed), Log(monkeypatch)
    for name in ("DECODE_RESERVE", "HASH_BLOCK") if seed % 2 else ():
        monkeypatch.setattr(f"llava_interleave.engine.scheduler.{name}", 8)
    pair = Pair(chance, monkeypatch)
    for _ in range(90):
        do = chance.choices([pair.add, pair.abort, pair.clear, pair.step], [8, 2, 1, 14])[0]
        for _ in range(chance.randint(1, 6) if do == pair.step else 1):
            do(chance)
        pair.compare()
    while any(e.busy for e in pair.engines):
        pair.step()
    pair.compare()
    assert all(
        r.finish_reason == s.finish_reason and r.generated == s.generated for r, s in pair.pairs
    )
    assert log.count("ahead") > 10
