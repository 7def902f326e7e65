"""Clients share the engine by virtual token counters; no answer changes by it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from llava_interleave.engine.prompt_lookup import PromptLookupDrafter
from llava_interleave.engine.request import Request
from llava_interleave.engine.scheduler import (
    MEASURED_EVERY,
    SAVED_STEPS,
    Scheduler,
    SchedulerOutput,
    StepTimeModel,
)
from llava_interleave.engine.virtual_tokens import SavedTime, VirtualTokenCounters
from tests.helpers.engine import GREEDY, MIXED, answers, engine, expected, finish
from tests.helpers.scheduler import request, scheduler, step


def computed(s: Scheduler, steps: int) -> Counter[str]:
    """The tokens that each client got in so many steps."""
    tokens: Counter[str] = Counter()
    for _ in range(steps):
        for one in step(s)[0].scheduled:
            tokens[one.request.client] += one.stop - one.start
    return tokens


def test_a_prompt_does_not_wait_for_the_prompts_of_another_client() -> None:
    s = scheduler(tokens=20, total=5000, running=32)
    for i in range(8):
        s.add(request(300, first=1000 * i, client="many"))
    step(s)
    s.add(short := request(30, first=9000, client="one"))
    for _ in range(4):  # two of them for this client; in order of arrival it would be 122
        step(s)
    assert short.first_token is not None


def test_one_client_is_served_in_order_of_arrival() -> None:
    s = scheduler(tokens=20)
    first, second = request(50, client="a"), request(5, first=300, client="a")
    s.add(first)
    s.add(second)
    assert [step(s)[1] for _ in range(3)][2] == [(first.id, 40, 50), (second.id, 0, 5)]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_prompt_tokens_are_shared_by_weight(weight: float) -> None:
    s = scheduler(tokens=20, total=20_000, running=64)
    for i in range(40):
        s.add(request(200, first=1000 * i, client="many"))
    for i in range(10):
        s.add(request(200, first=1000 * i + 500, client="few", weight=weight))
    tokens = computed(s, 80)
    assert tokens["few"] / tokens["many"] == pytest.approx(weight, rel=0.2)


def test_time_without_requests_is_not_saved_up() -> None:
    counters = VirtualTokenCounters()
    counters.enter("a")
    counters.charge("a", 100)
    counters.enter("b")
    assert counters["b"] == 100
    counters.charge("b", 50)
    counters.leave("b")
    counters.charge("a", 20)
    counters.enter("b")  # back at once: what it had more than others still counts
    assert counters["b"] == 150
    counters.leave("b")
    counters.leave("a")
    counters.enter("c")
    assert counters["c"] == 0


def test_names_of_clients_that_left_do_not_pile_up() -> None:
    counters = VirtualTokenCounters()
    counters.enter("stays")
    for i in range(1000):
        counters.enter(f"c{i}")
        counters.leave(f"c{i}")
        counters.charge("stays", 1)
    assert len(counters._tokens) < 5


def timed(s: Scheduler, seconds: Callable[[int], float], steps: int) -> list[float]:
    """The times between the tokens of the client "one", with a step of n decodes taking
    `seconds(n)`.
    """
    now, times = 0.0, []
    for _ in range(steps):
        output, _ = step(s)
        took = seconds(len(output.scheduled))
        now += took
        s.record_time(output, took, 0.0, now)
        if any(one.request.client == "one" for one in output.scheduled):
            times.append(now)
    return [b - a for a, b in itertools.pairwise(times)]


def decoding(clients: dict[str, int]) -> Scheduler:
    s = scheduler(tokens=2000, total=100_000, running=64)
    for client, count in clients.items():
        for i in range(count):
            s.add(request(5, new=2000, first=1000 * i + 10 * len(client), client=client))
    step(s)
    return s


def test_a_short_request_is_preferred_to_a_client_that_always_has_some() -> None:
    """Until it has spent the time that it saved up: then it has half of the speed."""
    s = decoding({"many": 16})
    s.step_times.decodes[1] = 3.0
    timed(s, lambda n: 2 + n, SAVED_STEPS)
    before = min(len(r.generated) for r in s.running)
    s.add(request(5, new=1000, first=90_000, client="one"))
    prompt = [{one.request.client for one in step(s)[0].scheduled} for _ in range(2)]
    assert {"one"} in prompt  # without the other client's answers
    gaps = timed(s, lambda n: 2 + n, SAVED_STEPS + 500)
    preferred = SAVED_STEPS * 3 // (3 + 1)  # every sixteenth step takes 19 instead of 3 seconds
    soon, later = gaps[: preferred - 10], gaps[preferred + 10 :]
    assert sum(soon) / len(soon) < 3 * 1.6  # 15 steps alone, one with more
    assert sum(sorted(soon)[: len(soon) // 2]) / (len(soon) // 2) == 3
    assert sum(later) / len(later) < 2 * 3 * 1.1
    assert min(len(r.generated) for r in s.running if r.client == "many") > before + 30


def test_time_is_saved_up_to_a_limit_and_by_weight() -> None:
    saved = SavedTime(4.0)
    saved.enter("busy", 1.0, 0)
    saved.enter("batch", 0.1, 0)
    assert saved.preferred() == set()  # both
    saved.spend(1, ["busy", "batch"], 1)
    assert saved.preferred() == {"busy"}
    saved.spend(3, ["busy"], 4)
    assert saved.preferred() == set()
    saved.enter("new", 1.0, 4)
    saved.spend(3, ["new"], 7)
    assert saved.preferred() == {"new"}
    saved.leave("new")
    saved.spend(0.5, ["batch"], 7.5)
    saved.enter("new", 1.0, 8)  # it has 1 left, and 1 for the time without it
    saved.spend(1.5, ["busy", "new"], 9.5)
    assert saved.preferred() == {"new"}
    saved.spend(1.5, ["busy", "new"], 11)
    assert saved.preferred() == set()


def test_short_requests_are_preferred_to_long_prompts_by_their_time() -> None:
    """One step counted as much as another: two short requests at a time had spent what they saved,
    though their steps took a twentieth of those with another client's images, and then each of
    their tokens waited for one of these.
    """
    s = scheduler(tokens=400, total=100_000, running=64)
    first = itertools.count(1000, 10_000)
    short, gaps = list[Request](), list[float]()
    now = last = 0.0
    for i in range(3000):
        while len(s.waiting) + len(s.running) < 8:
            s.add(request(3000, new=1, first=next(first), client="images"))
        short = [one for one in short if one.finish_reason is None]
        if not short and i % 8 == 0:
            short = [request(5, new=12, first=next(first), client="short")]
            s.add(short[0])
            last = now
        tokens = [one.num_generated for one in short]
        output, _ = step(s)
        took = sum(0.05 if one.request.client == "images" else 0.002 for one in output.scheduled)
        now += took
        s.record_time(output, took, 0.0, now)
        if [one.num_generated for one in short] != tokens:
            gaps.append(now - last)
            last = now
    assert len(gaps) > 1000
    assert sorted(gaps[100:])[int(0.9 * len(gaps[100:]))] < 0.01


def test_a_single_answer_keeps_half_its_speed_next_to_sixteen() -> None:
    """Where each answer of a step takes time of its own, as on a CPU."""
    gaps = timed(s := decoding({"many": 16, "one": 1}), lambda n: 2 + n, 600)[20:]
    assert sum(gaps) / len(gaps) < 2 * 3 * 1.1
    lengths = [len(r.generated) for r in s.running if r.client == "many"]
    assert min(lengths) > 50 and max(lengths) - min(lengths) <= 2


def test_where_a_step_takes_as_long_for_many_all_answers_are_in_it() -> None:
    """As on a GPU: to leave some out would help no one."""
    s = decoding({"many": 16, "one": 1})
    timed(s, lambda _: 3.0, 2 * MEASURED_EVERY)
    lengths = [len(r.generated) for r in s.running]
    assert min(lengths) > 2 * MEASURED_EVERY - 10


def test_clients_with_as_many_answers_all_decode() -> None:
    s = decoding({"many": 8, "one": 8})
    timed(s, lambda n: 1.0 + n, 100)
    assert min(len(r.generated) for r in s.running) > 95


def test_a_step_that_took_long_once_is_tried_again() -> None:
    s = decoding({"many": 16, "one": 1})
    spikes = iter([3.0] * 3 + [400.0] * 3)
    timed(s, lambda _: next(spikes, 3.0), 500)
    before = {r.id: len(r.generated) for r in s.running}
    timed(s, lambda _: 3.0, 100)
    assert min(len(r.generated) - before[r.id] for r in s.running) > 90


def test_memory_is_taken_from_the_client_that_had_most() -> None:
    """The request that started last was preempted again and again by a client with many."""
    s = scheduler(total=420, tokens=400, running=16)
    for i in range(6):
        s.add(request(40, new=200, first=1000 * i, client="many"))
    step(s)
    s.add(one := request(40, new=60, first=9000, client="one"))
    for _ in range(200):
        step(s)
        if one.finish_reason:
            break
        assert not one.generated or one.kv is not None
    assert one.finish_reason == "length"


def test_a_client_without_an_answer_does_not_wait_for_the_memory_of_many() -> None:
    """Sixteen endless answers held all memory, and another client's question waited for one of
    them to end. The last answer of a client is never preempted for it.
    """
    s = scheduler(total=400, tokens=400, running=16)
    for i in range(8):
        s.add(request(40, new=60, first=1000 * i, client="many"))
    for _ in range(5):
        step(s)
    assert len(s.running) > 1
    s.add(one := request(150, new=5, first=9000, client="one"))
    for _ in range(10):
        step(s)
    assert one.finish_reason == "length"
    for i in range(20):
        s.add(request(300, new=5, first=20_000 + 1000 * i, client="one"))
    step(s)
    assert Counter(r.client for r in s.running)["many"] >= 1


@pytest.mark.parametrize(
    ("total", "prompt", "new"), [(2500, 30, 1500), (4096, 30, 1500), (4096, 2000, 100)]
)
@pytest.mark.parametrize("seed", range(2))
def test_short_questions_do_not_wait_for_memory_that_another_client_fills(
    seed: int, total: int, prompt: int, new: int
) -> None:
    """Next to endless answers one waited 1,472 steps, next to long prompts 106. A short answer was
    preempted because more had been computed for its client lately, and then its client was held
    back until an endless answer had ended. A long prompt without room let no short one start.
    """
    chance, s = random.Random(seed), scheduler(total=total, tokens=256, running=32)
    first = itertools.count(1000, 100_000)
    endless: list[Request] = []
    short: list[Request | None] = [None] * 4
    due, born = [0] * 4, dict[int, int]()
    answered = longest = 0
    for now in range(2000):
        endless = [one for one in endless if one.finish_reason is None]
        while len(endless) < 16:
            endless.append(request(prompt, new=new, first=next(first), client="endless"))
            s.add(endless[-1])
        for i, one in enumerate(short):
            if one is not None and one.finish_reason:
                answered, short[i], due[i] = answered + 1, None, now + chance.randrange(30)
            elif one is None and now >= due[i]:
                length = chance.randrange(20, 150)
                short[i] = one = request(length, new=12, first=next(first), client="short")
                born[one.id] = now
                s.add(one)
        s.record_time(step(s)[0], 0.01, 0.0, 0.01 * now)
        waiting = (one for one in short if one is not None and one.first_token is None)
        longest = max([longest, *(now - born[one.id] for one in waiting)])
    assert longest < 25
    assert answered > 90
    assert sum(one.num_generated for one in endless) > 20


def test_a_client_without_an_answer_does_not_wait_for_a_place() -> None:
    s = scheduler(tokens=400, total=10_000, running=4)
    for i in range(8):
        s.add(request(5, new=300, first=1000 * i, client="many"))
    step(s)
    s.add(one := request(5, new=3, first=9000, client="one"))
    for _ in range(6):
        step(s)
    assert one.finish_reason == "length"


def test_places_are_shared_between_clients() -> None:
    """The second client had one place until answers of the first ended."""
    s = scheduler(tokens=400, total=10_000, running=8)
    for name in ("first", "second"):
        for i in range(20):
            s.add(request(5, new=300, first=1000 * i + len(name), client=name))
        for _ in range(20):
            step(s)
    assert Counter(r.client for r in s.running) == {"first": 4, "second": 4}


def test_a_long_prompt_does_not_delay_its_answer() -> None:
    s = decoding({"many": 16})
    s.add(one := request(1500, new=20, first=50_000, client="one"))
    timed(s, lambda n: 2.0 + n, 30)
    assert one.num_generated >= 18


@pytest.mark.parametrize("clients", [{"many": 3}, {"many": 2, "one": 1}])
def test_draft_tokens_are_for_a_client_by_itself(clients: dict[str, int]) -> None:
    """Next to another client's answer they made the steps of both longer."""
    s = decoding(clients)
    for _ in range(5):
        step(s)
    for running in s.running:
        running.drafter = PromptLookupDrafter(8, ())
    assert (s.schedule().decode_tokens > 3) == (len(clients) == 1)


def test_a_prompt_alone_is_in_short_chunks_once_there_was_another_client() -> None:
    """The step of a long prompt is what a request that comes meanwhile waits for."""
    s = scheduler(tokens=2000, total=100_000)
    s.step_times.decode, s.step_times.token = 0.001, 0.0001
    s.add(request(5000, client="many"))
    assert s.schedule(0.2).scheduled[0].stop == 2000
    s.add(one := request(5, new=1, first=9000, client="one"))
    while one.finish_reason is None:
        step(s)
    s.add(request(5000, first=20_000, client="many"))
    assert [w.stop - w.start for w in s.schedule(0.2).scheduled] == [100]


def test_the_time_of_a_token_is_not_learned_from_a_few() -> None:
    def update(tokens: int, seconds: float) -> float:
        s = scheduler(tokens=tokens)
        s.add(request(tokens))
        times.update(s.schedule(), seconds, 0.0)
        return times.token

    times = StepTimeModel()
    assert update(100, 0.1) == pytest.approx(0.001)
    assert update(10, 0.0) == pytest.approx(0.001)
    assert update(100, 1.0) == pytest.approx(0.01), "at once, or the next chunk takes too long"
    assert update(100, 0.0) == pytest.approx(0.005)


def test_one_slow_step_lets_no_more_answers_in() -> None:
    """The thread may have waited for a core: 100 ms of one answer are no reason for all nine."""
    whole, times = decoding({"many": 9}).schedule(), StepTimeModel()
    for size, seconds in ((1, 0.001), (9, 0.003), (1, 0.1)):
        output = SchedulerOutput(whole.scheduled[:size], decode_tokens=size)
        times.update(output, seconds, 0.0)
    assert times.max_decodes(1.1, 1, 9) == 1
    for _ in range(20):
        times.update(output, 0.1, 0.0)
    assert times.decodes[1] > 0.008, "but one that stays slow is believed"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("invariant", [False, True])
def test_answers_are_those_without_clients(seed: int, invariant: bool) -> None:
    """Whatever else runs, whoever it belongs to, and in whatever order it arrives."""
    chance = random.Random(seed)
    e = engine(
        max_num_batched_tokens=20,
        max_batched_images=2,
        max_num_seqs=chance.choice([3, 8]),
        batch_invariant=invariant,
    )
    requests = {}
    order = list(range(len(MIXED))) * 2
    chance.shuffle(order)
    for number, index in enumerate(order):
        client = chance.choice(["a", "b", "c"])
        requests[number] = e.add(
            MIXED[index], GREEDY, client=client, weight={"a": 1, "b": 2, "c": 0.5}[client]
        )
        for _ in range(chance.randrange(3)):
            e.step()
            e.check()
    finish(e)
    assert answers(requests.values()) == [expected()[index] for index in order]
    assert not e._scheduler.virtual_tokens._requests
