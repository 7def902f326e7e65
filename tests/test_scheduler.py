"""The scheduler and the caches without a network: who gets what, and that every token of memory is
accounted for.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from llava_interleave.engine import SamplingParams
from llava_interleave.engine.encoder_cache import EncoderCache
from llava_interleave.engine.prefix_cache import (
    HASH_BLOCK,
    CacheKey,
    MediaId,
    PrefixCache,
    SequenceKV,
)
from llava_interleave.engine.request import Request
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.prompt import Media, Prompt
from tests.helpers.scheduler import GRID, IDS, request, scheduler, step


def test_a_long_prompt_is_chunked_while_others_decode() -> None:
    s = scheduler(tokens=20)
    short, long = request(5), request(50, first=300)
    s.add(short)
    s.add(long)
    assert step(s)[1] == [(short.id, 0, 5), (long.id, 0, 15)]
    assert step(s)[1] == [(short.id, 5, 6), (long.id, 15, 34)]
    assert step(s)[1] == [(short.id, 6, 7), (long.id, 34, 50)]
    assert step(s)[1] == [(short.id, 7, 8), (long.id, 50, 51)]


def test_images_are_encoded_within_the_bound_and_the_prompt_waits_for_them() -> None:
    s = scheduler(crops=2)
    r = request(30, crops=(1, 3))  # tokens 0-4 one image, 4-16 a video of three frames
    s.add(r)
    output, done = step(s)
    assert (len(output.encoder_inputs), done) == (2, [(r.id, 0, 8)])
    output, done = step(s)
    assert (len(output.encoder_inputs), done) == (2, [(r.id, 8, 30)])


def test_images_of_several_requests_share_a_call_and_equal_ones_are_encoded_once() -> None:
    s = scheduler(crops=4)
    a, b = request(10, crops=(1, 1)), request(10, crops=(1, 2), first=300)
    s.add(a)
    s.add(b)
    output, done = step(s)
    assert [unit.key for unit in output.encoder_inputs.values()] == [
        (b"\0\1", 0),
        (b"\1\1", 0),
        (b"\1\2", 0),
        (b"\1\2", 1),
    ]
    assert [id_ for id_, *_ in done] == [a.id, b.id]


def test_without_memory_requests_wait_in_order() -> None:
    s = scheduler(total=60)
    big, small = request(40, new=8), request(5, new=2, first=300)
    s.add(request(20, new=3, first=500))
    s.add(big)
    s.add(small)
    assert len(step(s)[1]) == 1
    step(s)
    step(s)  # the first ends
    assert [id_ for id_, *_ in step(s)[1]] == [big.id, small.id]


def test_the_last_to_start_is_preempted_and_waits_until_another_ends() -> None:
    """Started again at once, with the room it left, it would be computed from the start every few
    tokens of the others.
    """
    s = scheduler(total=368, tokens=368)
    s.add(before := request(281, new=20, first=700))
    s.add(grows := request(30, new=73))
    while before.finish_reason is None:
        step(s)
    s.add(victim := request(30, new=300, first=300))
    step(s)
    assert victim.kv is not None
    while victim.kv is not None:
        step(s)
    assert 0 < len(victim.generated) < 300
    assert s.prefix_cache.total - s.prefix_cache.used > len(victim.tokens) + HASH_BLOCK
    while grows.finish_reason is None:
        assert list(s.waiting) == [victim]
        step(s)
    while victim.finish_reason is None:
        step(s)
    assert (len(grows.generated), len(victim.generated)) == (73, 300)


def test_caches_go_before_anybody_is_preempted() -> None:
    s = scheduler(total=100, tokens=100)
    s.add(request(40, new=2))
    step(s)
    step(s)
    assert s.prefix_cache.idle_tokens > 0
    s.add(later := request(40, new=50, first=300))
    while later.finish_reason is None:
        step(s)
        assert not s.waiting
    assert len(s.prefix_cache.idle) == 1


def test_a_short_continuation_takes_the_cache_and_a_long_one_copies_it() -> None:
    """A second question about eight images took a second, nearly all of it copying what was
    there.
    """
    s = scheduler(total=10000, tokens=2000)
    shared = list(range(100, 1700))

    def ask(own: int) -> tuple[int, int, int]:
        """Ask with tokens of its own behind what all share: where computing begins, the tokens
        copied, the caches after that.
        """
        prompt = Prompt([*shared, *([own] * own)])
        s.add(
            Request(
                next(IDS),
                prompt,
                SamplingParams(max_new_tokens=1),
                CacheKey.of(prompt.tokens),
                1,
                0.0,
            )
        )
        (work,) = step(s)[0].scheduled
        return work.start, work.copied, len(s.prefix_cache.idle)

    assert ask(90) == (0, 0, 1)
    assert ask(300) == (1600, 0, 1)  # 90 tokens were lost, 1,600 not copied
    assert ask(301) == (1600, 1600, 2)  # 300 would have been


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    s = scheduler(total=5000, tokens=100)
    same = [request(250, first=1000) for _ in range(4)]
    for r in same:
        s.add(r)
    steps = [step(s)[1] for _ in range(4)]
    assert [len(done) for done in steps] == [1, 1, 1, 4]
    assert steps[3][1:] == [(r.id, 249, 250) for r in same[1:]]
    assert [r.cached for r in same] == [0, 249, 249, 249]


def test_a_short_common_beginning_is_not_waited_for() -> None:
    s = scheduler(tokens=500)
    s.add(request(100, first=1000))
    s.add(request(110, first=1000))
    assert len(step(s)[1]) == 2


def test_the_end_of_the_one_waited_for_frees_the_others() -> None:
    s = scheduler(tokens=100)
    first, second = request(250, first=1000), request(250, first=1000)
    s.add(first)
    s.add(second)
    step(s)
    s.end(first, "error", 1.0)
    assert step(s)[1] == [(second.id, 0, 100)]


def test_a_branch_copies_the_cache_and_a_continuation_takes_it() -> None:
    s = scheduler(tokens=500)
    s.add(first := request(100, new=50))
    while first.finish_reason is None:
        step(s)
    (kv,) = s.prefix_cache.idle
    s.add(branch := request(100))
    output, _ = step(s)
    assert (branch.cached, output.scheduled[0].source) == (99, kv)
    assert branch.kv is not kv
    prompt = Prompt([*first.tokens, *range(500, 520)])
    s.add(sequel := Request(99, prompt, SamplingParams(), CacheKey.of(prompt.tokens), 8, 0.0))
    output, _ = step(s)
    assert (sequel.cached, output.scheduled[-1].source) == (149, None)
    assert sequel.kv is kv


def test_a_cache_used_in_a_step_is_not_dropped_in_it() -> None:
    """Two requests start in one step; room for the second must not come from the cache that the
    first copies.
    """
    s = scheduler(total=400, tokens=300)
    s.add(old := request(150, new=2))
    step(s)
    step(s)
    (kv,) = s.prefix_cache.idle
    assert old.finish_reason == "length"
    branch = request(100, first=100, new=100)
    s.add(branch)
    s.add(request(120, first=5000, new=100))
    output = s.schedule()
    work = output.scheduled[0]
    assert (work.source, work.copied) == (kv, 99)
    assert kv in s.prefix_cache.idle
    assert len(output.scheduled) == 1


def test_a_start_that_only_copies_is_still_planned() -> None:
    """With the tower busy a request may start with nothing but its copied prefix, which must be
    copied all the same.
    """
    s = scheduler(total=2000, tokens=500, crops=1)
    s.add(request(64, new=40))
    step(s)
    new = Media(torch.zeros(1, 3, 1, 1), ImageTokenLayout(GRID), b"new", 63)
    prompt = Prompt([*range(100, 163), 7, 7, 7, 7, 8], (new,))
    follow = Request(
        98, prompt, SamplingParams(), CacheKey.of(prompt.tokens, [(63, 4, MediaId(5))]), 8, 0.0
    )
    s.add(request(20, crops=(1,), first=900))
    s.add(follow)
    output, _ = step(s)
    work = output.scheduled[-1]
    assert (work.request, work.start, work.stop, work.copied) == (follow, 63, 63, 63)
    assert work.source is not None
    assert (follow.id, 63, 68) in step(s)[1]


def test_prefixes_of_different_salts_do_not_meet() -> None:
    s = scheduler(tokens=500)
    for salt in (b"a", b"b", b"a"):
        s.add(r := request(100, new=1, salt=salt))
        step(s)
    assert r.cached == 99
    assert s.prefix_cache.find(request(100, salt=b"c").cache_key, 99).source is None


def test_a_hash_that_collides_is_found_out_by_content() -> None:
    p = PrefixCache(100)
    stored, looked_up = CacheKey.of(range(64)), CacheKey.of(range(1000, 1064))
    forged = CacheKey(looked_up.ids, looked_up.salt, looked_up.media_ids, stored.block_hashes)
    kv = SequenceKV(stored, 64)
    assert p.reserve(kv, 64)
    p.start(kv)
    assert p.find(stored, 63).cached == 63
    assert p.find(forged, 63).cached == 0


def test_image_numbers_never_meet_tokens_or_each_other() -> None:
    one, two = MediaId(0), MediaId(1)
    keys = CacheKey.of([7] * 12, [(0, 4, one), (4, 4, two), (8, 4, one)])
    assert (keys.ids < 0).all()
    assert keys.ids[:4].tolist() == keys.ids[8:].tolist()
    assert len(set(keys.ids.tolist())) == 8


def test_prefixes_end_at_the_first_other_image() -> None:
    images = [MediaId(n) for n in range(4)]
    tokens = [1, 2] + [7] * 150 + [3]
    p = PrefixCache(1000)
    kv = SequenceKV(CacheKey.of(tokens, [(2 + 50 * i, 50, images[i]) for i in range(3)]), 153)
    assert p.reserve(kv, 153)
    p.start(kv)
    changed = CacheKey.of(tokens, [(2, 50, images[0]), (52, 50, images[1]), (102, 50, images[3])])
    assert p.find(changed, 152).cached == 102
    assert p.find(CacheKey.of(tokens[:120] + [9] * 30), 149).source is None


def test_features_are_evicted_oldest_first_unless_in_use() -> None:
    f = EncoderCache(max_bytes=3 * 8)
    rows = torch.zeros(1, 2)  # 8 bytes
    keys = [(bytes([i]), 0) for i in range(6)]
    f.hold(keys[0])
    for key in keys[:3]:
        f.put(key, rows)
    f[keys[1]]
    f.put(keys[3], rows)
    assert [key in f for key in keys[:4]] == [True, True, False, True]
    f.check(Counter([keys[0]]))
    f.hold(keys[4])
    f.max_bytes = 8
    f.put(keys[4], rows)
    assert [key in f for key in keys[:5]] == [
        True,
        False,
        False,
        False,
        True,
    ]  # over the limit, but both are in use
    f.release(keys[0])
    f.release(keys[4])
    assert [key in f for key in keys[:5]] == [False, False, False, False, True]
    f.check(Counter())
    f.clear()
    assert f.bytes == 0


def test_covered_caches_are_not_kept_twice() -> None:
    p = PrefixCache(1000)
    for length in (64, 96, 80):
        kv = SequenceKV(CacheKey.of(range(length)), length)
        assert p.reserve(kv, length)
        p.start(kv)
        p.retire(kv, kv.key)
        p.check()
    assert [kv.length for kv in p.idle] == [96]


@pytest.mark.parametrize(
    ("token", "ignore", "reason"), [(9, False, "stop"), (9, True, "length"), (6, True, "stop")]
)
def test_what_ends_an_answer(token: int, ignore: bool, reason: str) -> None:
    s = scheduler()
    prompt = Prompt([1, 2, 3])
    r = Request(
        0,
        prompt,
        SamplingParams(stop_ids=(6,), ignore_eos=ignore),
        CacheKey.of(prompt.tokens),
        2,
        0.0,
    )
    s.add(r)
    step(s, token)
    if r.finish_reason is None:
        step(s, token)
    assert r.finish_reason == reason
    assert len(r.generated) == (2 if reason == "length" else 1)
