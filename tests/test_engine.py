"""The engine against the naive loop of whole forwards: batched, cut, cached, pre-empted or aborted,
the answers are the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from llava_interleave.engine import Engine, Request, SamplingParams
from llava_interleave.errors import ContextError, OptionError, PromptError
from llava_interleave.model import PackedAttention, arrange_features
from llava_interleave.prompt import Prompt
from tests.helpers.engine import (
    EOS,
    GREEDY,
    GRID,
    IMAGE,
    MIXED,
    PARTS,
    SAMPLED,
    TOKEN,
    VOCAB,
    Counting,
    Failing,
    answers,
    counted,
    engine,
    expected,
    failing,
    finish,
    media,
    naive,
    network,
    prompt,
    stream,
    text,
)


def test_batched_equals_alone_equals_the_naive_loop() -> None:
    assert [answers(engine().generate([p], GREEDY))[0] for p in MIXED] == expected()
    together = engine()
    assert answers(together.generate(MIXED, GREEDY)) == expected()
    together.check()


@pytest.mark.parametrize(("tokens", "crops"), [(1, 1), (3, 2), (7, 3), (16, 1), (64, 100)])
def test_chunked_equals_whole(tokens: int, crops: int) -> None:
    e = engine(max_num_batched_tokens=tokens, max_batched_images=crops, max_num_seqs=min(tokens, 4))
    assert answers(e.generate(MIXED, GREEDY)) == expected()
    e.check()


def test_prefix_hit_equals_miss_for_a_second_question_on_the_same_images() -> None:
    images: tuple[Any, ...] = (text(0, 10), (0, 1), (1, 3))
    first, second = prompt(*images, text(1, 6)), prompt(*images, text(2, 50))
    e = engine()
    e.generate([first], GREEDY)
    (request,) = e.generate([second], GREEDY)
    assert request.usage.cached == 46
    assert request.generated == naive(second, 12)
    (again,) = e.generate([second], GREEDY)
    assert again.usage.cached == len(second) - 1  # the last token is always computed
    assert again.generated == request.generated


def test_a_follow_up_turn_reuses_the_answer_too() -> None:
    e = engine()
    (first,) = e.generate([prompt((0, 1), text(0, 30))], GREEDY)
    turn = Prompt([*first.tokens, *text(1, 5)], first.prompt.media)
    (second,) = e.generate([turn], GREEDY)
    assert second.usage.cached == len(first.tokens) - 1
    assert second.generated == naive(turn, 12)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_changed_image_keeps_everything_before_it_and_nothing_after(changed: int) -> None:
    """Keys by placeholder ids alone would take one image's keys for another's: the same tokens,
    another answer.
    """

    def prompt_with(numbers: list[int]) -> Prompt:
        return prompt(text(0, 40), *((n, 1) for n in numbers), text(1, 6))

    numbers = [10, 11, 12]
    e = engine()
    (before,) = e.generate([prompt_with(numbers)], GREEDY)
    numbers[changed] = 20
    (after,) = e.generate([prompt_with(numbers)], GREEDY)
    assert after.usage.cached == 40 + 9 * changed
    assert after.generated == naive(prompt_with(numbers), 12) != before.generated


def test_an_added_image_keeps_everything_before_it() -> None:
    e = engine()
    e.generate([prompt(text(0, 40), (0, 1), text(1, 5))], GREEDY)
    more = prompt(text(0, 40), (0, 1), (1, 1), text(1, 5))
    (request,) = e.generate([more], GREEDY)
    assert request.usage.cached == 49
    assert request.generated == naive(more, 12)


def test_other_salts_share_nothing() -> None:
    p = prompt((0, 1), text(0, 50))
    e = engine()
    cached = [
        e.generate([p], GREEDY, salt=salt)[0].usage.cached for salt in (b"a", b"b", b"a", b"")
    ]
    assert cached == [0, 0, len(p) - 1, 0]


def test_cached_features_equal_fresh_ones() -> None:
    e, model = counted()
    for lead in (0, 1):  # another beginning, so no common prefix: only the features are reused
        p = prompt(text(lead, 5), (0, 1), (1, 3), text(2, 5))
        assert e.generate([p], GREEDY)[0].generated == naive(p, 12)
    assert model.calls == [4]


def test_images_inside_a_cached_prefix_are_not_encoded() -> None:
    e, model = counted(feature_bytes=0)
    e.generate([prompt(text(0, 30), (0, 1), (1, 1), text(1, 5))], GREEDY)
    model.calls.clear()
    e.generate([prompt(text(0, 30), (0, 1), (2, 1), text(1, 5))], GREEDY)
    assert model.calls == [1]
    assert e.load().feature_bytes == 0


def test_images_of_several_requests_are_encoded_together() -> None:
    e, model = counted(max_batched_images=8)
    e.generate([prompt((n, 1), text(n, 4)) for n in range(5)], GREEDY)
    assert model.calls == [5]


def test_a_video_longer_than_the_feature_cache_and_a_tower_call() -> None:
    crop = GRID**2 * 32 * 4
    e, model = counted(
        feature_bytes=2 * crop, max_batched_images=3, max_num_batched_tokens=20, max_num_seqs=4
    )
    p = prompt(text(0, 3), (0, 16), text(1, 3))
    assert e.generate([p], GREEDY)[0].generated == naive(p, 12)
    assert sum(model.calls) == 16  # a frame that is prefilled in two steps is kept between them
    assert max(model.calls) <= 3
    assert e.load().feature_bytes <= 2 * crop
    e.check()


def test_only_last_positions_reach_the_output_head() -> None:
    e, model = counted(max_num_batched_tokens=10, max_num_seqs=4)
    e.generate([prompt(text(0, 35))], SamplingParams(max_new_tokens=1))
    assert (model.rows, model.heads) == (35, 1)


def test_samples_of_one_prompt_compute_it_once() -> None:
    p = prompt((0, 3), text(0, 150))
    e, model = counted(max_num_batched_tokens=64, max_num_seqs=8)
    requests = e.generate(
        [p] * 4,
        [
            SamplingParams(max_new_tokens=5, temperature=1, seed=n, ignore_eos=True)
            for n in range(4)
        ],
    )
    assert [request.usage.cached for request in requests] == [0] + [len(p) - 1] * 3
    assert model.rows == len(p) + 3 + 4 * 4
    assert len({tuple(request.generated) for request in requests}) > 1


def test_preempted_equals_undisturbed() -> None:
    """Three answers grow until the memory has no room for all; the last to start is computed again
    from the start.
    """
    prompts = [prompt((n, 1), text(n, 40)) for n in range(3)]
    e, model = counted(tokens=330)
    sampling = SamplingParams(max_new_tokens=120, ignore_eos=True)
    assert answers(e.generate(prompts, sampling)) == [naive(p, 120) for p in prompts]
    assert model.rows > 3 * (49 + 119)  # it did happen
    e.check()


def test_preemption_keeps_random_numbers_penalties_and_usage() -> None:
    prompts = [prompt((n, 1), text(n, 40)) for n in range(2)]
    sampling = [
        SamplingParams(
            max_new_tokens=80, temperature=1.0, repetition_penalty=1.2, seed=n, ignore_eos=True
        )
        for n in range(2)
    ]
    roomy, (tight, model) = engine(), counted(tokens=215)
    undisturbed, disturbed = roomy.generate(prompts, sampling), tight.generate(prompts, sampling)
    assert model.rows > 2 * (49 + 79)
    assert answers(disturbed) == answers(undisturbed)
    assert [r.usage for r in disturbed] == [r.usage for r in undisturbed]


def test_stream_folded_equals_generate() -> None:
    e = engine()
    for p, answer in zip(MIXED, expected(), strict=True):
        events = stream(e, p, GREEDY)
        assert [event.token for event in events] == answer
        assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
        assert events[-1].usage is not None
        assert events[-1].usage.generated == 12


@pytest.mark.parametrize("steps", range(8))
def test_abort_frees_everything_and_changes_no_other_answer(steps: int) -> None:
    e = engine(max_num_batched_tokens=20, max_batched_images=2, max_num_seqs=3)
    requests = [e.add(p, GREEDY) for p in MIXED]
    for _ in range(steps):
        e.step()
    for request in requests[::2]:
        event = e.abort(request)
        assert event is not None
        assert (event.token, event.finish_reason) == (None, "abort")
        assert e.abort(request) is None
        e.check()
    finish(e)
    assert answers(requests)[1::2] == expected()[1::2]
    assert (e.load().kv_running, e.load().running, e.load().waiting) == (0, 0, 0)
    e.clear()
    assert (e.load().kv_cached, e.load().feature_bytes) == (0, 0)
    e.check()


def test_an_error_fails_the_requests_of_its_step_only() -> None:
    e, model = failing(max_num_seqs=2)
    requests = [e.add(p, GREEDY) for p in MIXED]
    e.step()
    model.error = torch.OutOfMemoryError("no memory left")
    events = e.step()
    assert [(event.request, event.finish_reason, str(event.error)) for event in events] == [
        (request, "error", "no memory left") for request in requests[:2]
    ]
    e.check()
    finish(e)
    assert answers(requests)[2:] == expected()[2:]
    assert answers(e.generate(MIXED, GREEDY)) == expected()


def test_generate_keeps_the_events_of_other_requests() -> None:
    e = engine()
    queued = e.add(MIXED[3], GREEDY)
    assert answers(e.generate(MIXED[:3], GREEDY)) == expected()[:3]
    events = finish(e)
    assert [event.token for event in events] == expected()[3]
    assert {event.request for event in events} == {queued}


def test_generate_raises_an_error_and_an_interrupt_reaches_the_caller() -> None:
    e, model = failing()
    model.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        e.generate(MIXED[:2], GREEDY)
    assert not e.busy
    waiting = e.add(MIXED[1], GREEDY)
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        e.step()
    assert waiting.finish_reason == "error"
    e.check()
    assert not e._scheduler.running
    assert answers(e.generate(MIXED, GREEDY)) == expected()


def test_a_failed_step_leaves_no_half_computed_prefix_behind() -> None:
    e, model = failing()
    p = prompt((0, 1), text(0, 60))
    model.error = RuntimeError("broken")
    e.add(p, GREEDY)
    e.step()
    assert e.load().kv_cached == 0
    (request,) = e.generate([p], GREEDY)
    assert (request.usage.cached, request.generated) == (0, naive(p, 12))


def test_seeded_samples_do_not_depend_on_the_batch() -> None:
    alone = [engine().generate([p], s)[0].generated for p, s in zip(MIXED, SAMPLED, strict=True)]
    assert answers(engine().generate(MIXED, SAMPLED)) == alone
    tight = engine(max_num_batched_tokens=5, max_num_seqs=3)
    assert answers(tight.generate(MIXED, SAMPLED)) == alone
    unseeded = replace(SAMPLED[0], seed=None)
    assert (
        engine().generate([MIXED[0]], unseeded)[0].generated
        != engine().generate([MIXED[0]], unseeded)[0].generated
    )


def test_meaningless_ids_and_the_placeholder_are_never_generated() -> None:
    model = Counting()
    model.lm_head.weight[VOCAB:] *= 50
    e = Engine(model, eos_ids={EOS}, vocab=VOCAB, kv_bytes=4000 * TOKEN)
    hot = SamplingParams(max_new_tokens=200, temperature=5.0, seed=0, ignore_eos=True)
    tokens = {
        token
        for r in e.generate([MIXED[0], MIXED[1]], [hot, replace(hot, temperature=0)])
        for token in r.generated
    }
    assert max(tokens) < VOCAB
    wide = Engine(model, eos_ids={EOS}, vocab=64, kv_bytes=4000 * TOKEN)
    tokens = {
        token
        for r in wide.generate([MIXED[0], MIXED[1]], [hot, replace(hot, temperature=0)])
        for token in r.generated
    }
    assert max(tokens) >= VOCAB
    assert IMAGE not in tokens


def test_log_probabilities_on_events() -> None:
    p = MIXED[0]
    events = stream(engine(), p, SamplingParams(max_new_tokens=3, logprobs=4, ignore_eos=True))
    model = network()
    tokens = Prompt(
        [*p.tokens, *(event.token for event in events if event.token is not None)], p.media
    )
    with torch.inference_mode():
        x = model.embed(
            torch.tensor(tokens.tokens),
            [(m.start, arrange_features(model.encode(m.pixels), m.layout)) for m in p.media],
        )
        logits = model.logits(
            model.forward(x, torch.arange(len(tokens)), PackedAttention([len(tokens)]))
        )[:, :VOCAB]
    for at, event in enumerate(events, len(p) - 1):
        logs = logits[at].log_softmax(-1)
        assert [token for token, _ in event.top_logprobs] == logs.topk(4).indices.tolist()
        assert event.logprob == pytest.approx(float(logs.max()), abs=1e-5)
        assert event.top_logprobs[0] == (event.token, event.logprob)


def test_stop_ids_and_eos_end_an_answer() -> None:
    answer = expected()[1]
    stop = next(token for token in answer[3:] if token not in answer[:3])
    at = answer.index(stop)
    events = stream(
        engine(), MIXED[1], SamplingParams(max_new_tokens=12, stop_ids=(stop,), ignore_eos=True)
    )
    assert [event.token for event in events] == answer[: at + 1]
    assert events[-1].finish_reason == "stop"
    e = Engine(network(), eos_ids={stop}, vocab=VOCAB, kv_bytes=4000 * TOKEN)
    assert (
        e.generate([MIXED[1]], SamplingParams(max_new_tokens=12))[0].generated == answer[: at + 1]
    )
    assert e.generate([MIXED[1]], GREEDY)[0].generated == answer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow(Counting):
    """Takes three seconds for a call of the tower and one for the decoder, by the clock it is
    given.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def encode(self, pixels: Tensor) -> Tensor:
        self.clock.now += 3
        return super().encode(pixels)

    def forward(self, x: Tensor, positions: Tensor, attend: Any) -> Tensor:
        self.clock.now += 1
        return super().forward(x, positions, attend)


def test_usage_and_timings() -> None:
    clock = Clock()
    e = Engine(
        Slow(clock),
        eos_ids={EOS},
        vocab=VOCAB,
        kv_bytes=4000 * TOKEN,
        max_num_batched_tokens=15,
        max_num_seqs=1,
        clock=clock,
    )
    first, second = (e.add(p, replace(GREEDY, max_new_tokens=5)) for p in (MIXED[0], MIXED[1]))
    last = {event.request: event for event in finish(e) if event.finish_reason}
    usage, timings = last[first].usage, last[first].timings
    assert usage is not None
    assert timings is not None
    assert (usage.prompt, usage.cached, usage.generated) == (32, 0, 5)
    # three steps for 32 tokens with one tower call each in the first two, then a step a token
    assert (timings.queue, timings.vision, timings.prefill, timings.first_token, timings.total) == (
        0,
        6,
        3,
        9,
        13,
    )
    assert timings.tokens_per_second == pytest.approx(1.0)
    waited = last[second].timings
    assert waited is not None
    assert (waited.queue, waited.vision, waited.prefill) == (13, 0, 3)
    request = e.add(MIXED[2])
    event = e.abort(request)
    assert event is not None
    assert event.timings is not None
    assert (event.timings.first_token, event.timings.tokens_per_second) == (None, None)


class Costly(Slow):
    """Takes two seconds for a crop, one for a call of the decoder and a twentieth for each of its
    tokens.
    """

    def encode(self, pixels: Tensor) -> Tensor:
        self.clock.now += 2 * len(pixels) - 3
        return super().encode(pixels)

    def forward(self, x: Tensor, positions: Tensor, attend: Any) -> Tensor:
        self.clock.now += len(x) / 20
        return super().forward(x, positions, attend)


def waits(patience: float) -> tuple[list[float], float]:
    """Seconds between the tokens of an answer while other requests arrive; and until all have
    their first token.
    """
    clock, new = Clock(), replace(GREEDY, max_new_tokens=80)
    e = Engine(Costly(clock), eos_ids={EOS}, vocab=VOCAB, kv_bytes=4000 * TOKEN, clock=clock)
    prompts = [
        prompt(text(20, 5), (20, 1)),
        prompt((21, 4), (22, 4)),
        prompt(text(21, 300)),
        prompt(text(22, 200), (23, 1)),
    ]
    requests = [e.add(prompts[0], new)]
    times = []
    while requests[0].finish_reason is None:
        events = e.step(patience)
        times += [clock.now for event in events if event.request is requests[0]]
        if len(times) == 3 and len(requests) == 1:
            requests += [e.add(p, GREEDY) for p in prompts[1:]]
    finish(e)
    assert answers(requests) == [naive(prompts[0], 80), *(naive(p, 12) for p in prompts[1:])]
    return [b - a for a, b in pairwise(times)], max(r.first_token or 0.0 for r in requests) - 100.0


def test_answers_wait_for_prompts_no_longer_than_they_have_patience() -> None:
    eager, early = waits(math.inf)
    patient, late = waits(4.0)
    assert max(eager) > 40, "all prompts in one step"
    assert max(patient) < 1.5 + 2 * 4.0, "two crops or eighty tokens at a time, or both"
    assert early < late < 2.5 * early
    waited = [(index, gap - 1.05) for index, gap in enumerate(patient) if gap > 1.5]
    assert all(
        sum(gap for _, gap in waited[:n]) < 1.2 * index for n, (index, _) in enumerate(waited)
    ), "as much time for itself"


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    e = engine(tokens=100)
    with pytest.raises(ContextError, match=r"70 tokens and 40 more .* \(100 tokens\)"):
        e.add(prompt(text(0, 70)), SamplingParams(max_new_tokens=40))
    assert (
        len(
            e.generate([prompt(text(0, 70))], SamplingParams(max_new_tokens=31, ignore_eos=True))[
                0
            ].generated
        )
        == 31
    )
    assert (
        len(
            e.generate([prompt(text(1, 70))], SamplingParams(max_new_tokens=None, ignore_eos=True))[
                0
            ].generated
        )
        == 31
    )
    wide = engine(tokens=2000)
    with pytest.raises(
        ContextError,
        match=r"995 tokens and max_new_tokens is 6, .* context is 1000: ask for at most 5",
    ):
        wide.add(prompt(text(0, 995)), SamplingParams(max_new_tokens=6))
    with pytest.raises(ContextError, match=r"1010 tokens .* use 11 fewer"):
        wide.add(prompt(text(0, 1010)), SamplingParams(max_new_tokens=None))
    assert (
        len(
            wide.generate(
                [prompt(text(0, 995))], SamplingParams(max_new_tokens=None, ignore_eos=True)
            )[0].generated
        )
        == 5
    )
    assert (e.load().waiting, wide.load().waiting) == (0, 0)


def test_prompts_and_options_that_contradict_the_model_are_refused() -> None:
    e = engine()
    with pytest.raises(PromptError, match="no tokens"):
        e.add(Prompt([]))
    with pytest.raises(PromptError, match="between 0 and 63"):
        e.add(Prompt([1, 64]))
    with pytest.raises(PromptError, match="8 image placeholders, but its 1 media take 9"):
        e.add(Prompt([IMAGE] * 8, (media(0, 0),)))
    with pytest.raises(PromptError, match="at the places"):
        e.add(Prompt([1, *[IMAGE] * 9], (media(0, 0),)))
    with pytest.raises(OptionError, match="logit_bias names token 58"):
        e.add(MIXED[1], SamplingParams(logit_bias={58: 1.0}))
    with pytest.raises(OptionError, match="max_num_batched_tokens"):
        engine(max_num_batched_tokens=4, max_num_seqs=8)
    with pytest.raises(OptionError, match="vocab"):
        Engine(network(), eos_ids={EOS}, vocab=65, kv_bytes=TOKEN)


@cache
def oracle(parts: tuple[int, ...], new: int) -> list[int]:
    return naive(prompt(*(PARTS[part] for part in parts)), new, stops=frozenset({EOS}))


class Anything(RuleBasedStateMachine):
    """Requests come, go and fail in any order in too little memory; every answer is the naive
    loop's, or its beginning.
    """

    @initialize(
        memory=st.integers(250, 600),
        tokens=st.integers(4, 80),
        crops=st.integers(1, 6),
        features=st.sampled_from([0, 3000, 10**6]),
        block=st.sampled_from([0, 4, 32]),
    )
    def begin(self, memory: int, tokens: int, crops: int, features: int, block: int) -> None:
        self.model = Failing()
        self.engine = Engine(
            self.model,
            eos_ids={EOS},
            vocab=VOCAB,
            kv_bytes=(memory + block) * TOKEN,
            kv_block_size=block,
            feature_bytes=features,
            max_num_batched_tokens=tokens,
            max_batched_images=crops,
            max_num_seqs=4,
        )
        self.prompts: dict[Request, tuple[tuple[int, ...], int]] = {}

    @rule(
        parts=st.lists(st.integers(0, len(PARTS) - 1), min_size=1, max_size=5),
        new=st.sampled_from([1, 3, 20, 60]),
    )
    def add(self, parts: list[int], new: int) -> None:
        p = prompt(*(PARTS[part] for part in parts))
        self.prompts[self.engine.add(p, SamplingParams(max_new_tokens=new))] = (tuple(parts), new)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        """A sequel to what was answered, or to what is being answered."""
        request = data.draw(st.sampled_from(list(self.prompts)))
        parts, _ = self.prompts[request]
        self.add([*parts, 1][:6], 3)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.check()

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(list(self.prompts))))

    @rule()
    def fail(self) -> None:
        self.model.error = RuntimeError("broken")

    @rule()
    def clear(self) -> None:
        self.engine.clear()

    @invariant()
    def accounts(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.model.error = None
        finish(self.engine)
        for request, (parts, new) in self.prompts.items():
            answer = oracle(parts, new)
            if request.finish_reason in ("stop", "length"):
                assert request.generated == answer
            else:
                assert request.generated == answer[: len(request.generated)]
        assert self.engine.load().kv_running == 0


TestAnything = pytest.mark.slow(Anything.TestCase)
TestAnything.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
