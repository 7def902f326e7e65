"""KV cache in blocks == contiguous == the naive loop; steps of fixed shape == as they are; kernels
are asked for what is meant.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_interleave.config import LoraConfig
from llava_interleave.engine import SamplingParams, kv_budget
from llava_interleave.engine.block_allocator import BlockAllocator
from llava_interleave.engine.cuda_graphs import DecodeRow, capture_sizes
from llava_interleave.engine.device_stream import DeviceStream
from llava_interleave.engine.kv_contiguous import Span, bytes_per_token
from llava_interleave.engine.kv_paged import PagedKVCache
from llava_interleave.engine.model_runner import ModelRunner
from llava_interleave.engine.prefix_cache import CacheKey, PrefixCache, SequenceKV
from llava_interleave.errors import OptionError
from llava_interleave.lora import attach
from llava_interleave.model import PackedAttention
from tests.helpers.engine import (
    MIXED,
    SAMPLED,
    TOKEN,
    VOCAB,
    Counting,
    answers,
    counted,
    engine,
    expected,
    failing,
    finish,
    naive,
    network,
    prompt,
    text,
)
from tests.helpers.gpu import SimulatedDevice, kernels_on_cpu, simulated
from tests.helpers.kv import config, rounded

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
LONG = prompt(text(0, 20), (0, 1), text(1, 60))


def pool(
    blocks: int,
    block: int,
    *,
    kv_heads: int = 2,
    int8: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PagedKVCache:
    c = config(kv_heads=kv_heads)
    room = blocks * block * bytes_per_token(c, dtype, int8=int8)
    return PagedKVCache(c, dtype, CPU, room, block_size=block, int8=int8)


def dealt(lengths: Sequence[int], memory: PagedKVCache) -> list[SequenceKV]:
    """Sequences of so many tokens, in blocks from all over the pool."""
    blocks = random.Random(0).sample(range(memory.num_blocks), memory.num_blocks)
    return [
        SequenceKV(
            CacheKey.of([]), blocks=[blocks.pop() for _ in range(-(-n // memory.block_size))]
        )
        for n in lengths
    ]


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(
        st.lists(st.sampled_from([1, 2, 5, 9, 17]), min_size=1, max_size=5), min_size=1, max_size=3
    ),
    kv_heads=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([1, 4, 16]),
    int8=st.booleans(),
    kernels=st.booleans(),
)
def test_steps_equal_whole_sequences(
    cuts: list[list[int]], kv_heads: int, block: int, int8: bool, kernels: bool
) -> None:
    """Each sequence arrives in its own chunks, several sequences a step."""
    torch.manual_seed(0)
    lengths = [sum(cut) for cut in cuts]
    memory = pool(3 * 85, block, kv_heads=kv_heads, int8=int8)
    memory.no_kernels = None if kernels else memory.no_kernels
    q = [torch.randn(n, 4, 8) for n in lengths]
    k, v = ([torch.randn(n, kv_heads, 8) for n in lengths] for _ in range(2))
    kept = rounded if int8 else torch.Tensor.clone
    whole = PackedAttention(lengths)(0, torch.cat(q), kept(torch.cat(k)), kept(torch.cat(v))).split(
        lengths
    )
    kvs = dealt(lengths, memory)
    for step in range(max(map(len, cuts))):
        parts = [
            (i, sum(cut[:step]), sum(cut[: step + 1]))
            for i, cut in enumerate(cuts)
            if step < len(cut)
        ]
        parts.sort(key=lambda part: part[2] - part[1] != 1)
        spans = [Span(kvs[i], a, b) for i, a, b in parts]
        attend = memory.attend(memory.batch(spans, DeviceStream(CPU))[0])
        for layer in (0, 1):
            out = attend(layer, *(torch.cat([x[i][a:b] for i, a, b in parts]) for x in (q, k, v)))
            torch.testing.assert_close(out, torch.cat([whole[i][a:b] for i, a, b in parts]))


@pytest.fixture(params=["sdpa", "Triton"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of paged engines: PyTorch's, or the functions of the Triton kernels by their formulas."""
    if request.param == "Triton":
        kernels_on_cpu(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"tokens": 150}, {"max_num_seqs": 5}],
    ids=str,
)
@pytest.mark.parametrize("block", [4, 32])
def test_answers_are_those_of_the_naive_loop(
    block: int, options: dict[str, int], attention: str
) -> None:
    """With room, in pieces, with room for one or two at a time, and filled up to another number."""
    e = engine(kv_block_size=block, **options)
    assert e.attention.startswith(attention)
    requests = [e.add(p, GREEDY) for p in MIXED]
    finish(e)
    assert answers(requests) == expected()
    assert e.load().kv_running == 0
    assert answers(e.generate(MIXED, GREEDY)) == expected()  # of which much is cached now


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 8}, {"logprobs": 2}], ids=str)
@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("kv_precision", ["auto", "int8"])
def test_answers_are_those_from_slabs(how: dict[str, Any], kv_precision: str) -> None:
    """Greedy and sampled, with draft tokens, with an int8 KV cache, and from prefixes."""
    found = []
    for block in (0, 16):
        e = engine(kv_block_size=block, kv_precision=kv_precision)
        for _ in range(2):
            requests = e.generate(MIXED, [replace(one, **how) for one in SAMPLED])
            found.append((answers(requests), [r.usage for r in requests]))
            e.check()
    assert found[:2] == found[2:]


@pytest.mark.usefixtures("attention")
def test_answers_through_adapters_are_those_from_slabs() -> None:
    adapter = attach(Counting(), LoraConfig(rank=3, dropout=0.0, targets=("language_model.*",)), 1)
    for part in adapter.parts.values():
        part.b.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    found = []
    for block in (0, 16):
        e, _ = counted(kv_block_size=block)
        e.adapters.add("a", adapter)
        requests = [e.add(p, GREEDY, adapter=name) for p in MIXED[:3] for name in (None, "a")]
        finish(e)
        found.append(answers(requests))
    assert found[0] == found[1]
    assert found[0][::2] == expected()[:3] != found[0][1::2]


def test_a_pre_empted_answer_is_the_undisturbed_one() -> None:
    prompts = [prompt((n, 1), text(n, 40)) for n in range(3)]
    e, model = counted(tokens=336, kv_block_size=16)
    sampling = SamplingParams(max_new_tokens=120, ignore_eos=True)
    assert answers(e.generate(prompts, sampling)) == [naive(p, 120) for p in prompts]
    assert model.rows > 3 * (49 + 119)  # some was computed again
    e.check()


def test_whole_blocks_are_shared_and_the_rest_is_copied() -> None:
    """Four samples of a prompt of 179 tokens take its eleven whole blocks once, and whoever ends
    leaves them to the others.
    """
    p = prompt(text(0, 20), (0, 1), text(1, 150))
    e = engine(kv_block_size=16, max_num_seqs=4)
    how = [
        SamplingParams(max_new_tokens=40, temperature=1.0, seed=n, ignore_eos=True)
        for n in range(4)
    ]
    requests = [e.add(p, one) for one in how]
    while len(requests[3].generated) < 2:
        e.step()
        e.check()
    blocks = [request.kv.blocks for request in requests if request.kv]
    assert len(p) == 179 and [own[:11] for own in blocks] == [blocks[0][:11]] * 4
    assert len({block for own in blocks for block in own[11:]}) == sum(
        len(own) - 11 for own in blocks
    )
    assert [r.usage.cached for r in requests] == [0, 178, 178, 178]
    e.abort(requests[0])
    finish(e)
    alone = [engine().generate([p], one)[0].generated for one in how]
    assert answers(requests)[1:] == alone[1:]
    again = e.generate([p], how[0])
    assert answers(again) == alone[:1] and again[0].usage.cached == 178


def test_a_prefix_is_reused_when_memory_is_full() -> None:
    """The pool has 7 blocks of 16, the cache 6 of them: it goes, but its whole blocks stay with who
    goes on from them.
    """
    e = engine(tokens=7 * 16, kv_block_size=16)
    e.generate([LONG], SamplingParams(max_new_tokens=1))
    assert e.load().kv_cached == 6 * 16
    (request,) = e.generate([LONG], SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert request.usage.cached == 80
    assert request.generated == naive(LONG, 20)
    e.check()


def test_batch_invariant_answers_resume_from_whole_chunks() -> None:
    """Pieces are of 12 tokens, blocks of 16: where the 84 that were computed so cannot be copied,
    80 are of no use.
    """
    e = engine(
        tokens=7 * 16,
        kv_block_size=16,
        batch_invariant=True,
        max_num_batched_tokens=24,
        max_num_seqs=1,
    )
    e.generate([LONG], SamplingParams(max_new_tokens=1))
    (request,) = e.generate([LONG], GREEDY)
    assert (request.usage.cached, request.generated) == (0, naive(LONG, 12))


def test_an_image_token_at_the_end_of_a_prompt_is_no_generated_token() -> None:
    """The prompt's last piece is one token, a placeholder."""
    e = engine(kv_block_size=16, max_num_batched_tokens=len(MIXED[5]) - 1, max_num_seqs=1)
    assert answers(e.generate([MIXED[5]], GREEDY)) == expected()[5:]


def test_the_account_of_shared_blocks() -> None:
    pages = BlockAllocator(6, 10)
    p = PrefixCache(60, pages)
    first, second = SequenceKV(CacheKey.of(range(40)), 40), SequenceKV(CacheKey.of(range(100)), 25)
    assert p.reserve(first, 35) and first.capacity == 40 and p.used == 40
    p.start(first)
    p.retire(first, first.key)
    p.share(second, first, 25)
    assert second.blocks == first.blocks[:2] and p.used == 40 and p.idle_tokens == 20
    assert not p.reserve(second, 70)  # 5 more, where 2 are free and 2 would be
    assert first in p.idle
    assert p.reserve(second, 60) and first not in p.idle and p.used == 60
    p.start(second)
    p.check()
    p.drop(second)
    p.check()
    assert p.used == 0 and sorted(pages.free_blocks) == list(range(6))


@pytest.mark.parametrize("kv_precision", ["auto", "int8"])
def test_a_snapshot_goes_from_contiguous_to_paged_and_back(kv_precision: str) -> None:
    contiguous, blocks, third = (
        engine(kv_block_size=block, kv_precision=kv_precision) for block in (0, 16, 0)
    )
    (request,) = contiguous.generate([LONG], GREEDY)
    keys = contiguous.cache_key(LONG, request.generated)
    kept = contiguous.save(keys)
    assert kept is not None
    more = replace(LONG, tokens=[*LONG.tokens, *request.generated, *text(9, 5)])
    found = []
    for e in (blocks, third):
        e.restore(kept)
        e.check()
        back = e.save(e.cache_key(LONG, request.generated))
        assert back is not None and back.metadata == kept.metadata
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in kept.tensors.items())
        e.restore(kept)  # once more, where it is already
        e.check()
        (sequel,) = e.generate([more], GREEDY)
        found.append((sequel.usage.cached, sequel.generated))
    assert found[0] == found[1] and found[0][0] == 100


@pytest.mark.usefixtures("attention")
def test_deterministic_answers_from_blocks() -> None:
    """To the last bit: batched, from a cache and with little memory."""
    how = replace(GREEDY, logprobs=3)

    def generate(numbers_of: Sequence[int], **options: Any) -> list[list[Any]]:
        e = engine(
            kv_block_size=8,
            batch_invariant=True,
            max_num_batched_tokens=32,
            max_num_seqs=4,
            **options,
        )
        numbers = {e.add(MIXED[number], how).id: at for at, number in enumerate(numbers_of)}
        found: list[list[Any]] = [[] for _ in numbers_of]
        for event in finish(e):
            found[numbers[event.request.id]].append(
                (event.token, event.logprob, event.top_logprobs)
            )
        return found

    alone = [generate([number])[0] for number in range(len(MIXED))]
    assert [[token for token, *_ in one] for one in alone] == expected()
    assert generate(range(6)) == alone
    assert generate([*range(6), *range(6)]) == [*alone, *alone]
    assert generate(range(6), tokens=170) == alone


def test_the_sizes_that_steps_are_filled_up_to() -> None:
    assert capture_sizes(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert capture_sizes(5) == [1, 2, 4, 5]
    assert capture_sizes(1) == [1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_step_that_is_filled_up_computes_the_same_numbers(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same sequences step by step; a smaller step after a larger one finds nothing of
    it.
    """
    kernels_on_cpu(monkeypatch)
    runners = [engine(kv_block_size=8, max_num_seqs=7)._runner for _ in range(2)]
    memories = [runner.kv_cache for runner in runners]
    assert isinstance(memories[0], PagedKVCache) and isinstance(memories[1], PagedKVCache)
    fixed, stream = runners[0].graphs, DeviceStream(CPU)
    lengths = [
        8 * n + 7 * (n % 2) + 1 for n in range(count)
    ]  # so that some begin a block, and some end one
    random_tokens = torch.randint(
        0, VOCAB, (count, 80), generator=torch.Generator().manual_seed(0)
    ).tolist()
    kvs = dealt([length + 3 for length in lengths], memories[0])

    def step(number: int, spans: Sequence[Span], tokens: list[int]) -> torch.Tensor:
        batch, (ids,) = runners[number].kv_cache.batch(spans, stream, tokens)
        hidden = runners[number].gpu_decoder(runners[number].model.embed(ids), batch)
        return runners[number].model.logits(hidden)[:, :VOCAB]

    with torch.inference_mode():
        for number in range(2):
            for row, kv, length in zip(random_tokens, kvs, lengths, strict=True):
                step(number, [Span(kv, 0, length)], row[:length])
        unused = memories[0].pool[:, :, -1].clone()
        for turn in range(3):
            here = range(count) if turn < 2 else range(1)
            at = [lengths[i] + turn for i in here]
            tokens = [random_tokens[i][n] for i, n in zip(here, at, strict=True)]
            found = fixed(
                [DecodeRow(kvs[i], n, t) for i, n, t in zip(here, at, tokens, strict=True)]
            )
            right = step(1, [Span(kvs[i], n, n + 1) for i, n in zip(here, at, strict=True)], tokens)
            assert found.logits.shape == right.shape
            torch.testing.assert_close(found.logits, right)
            assert found.tokens(kvs[i] for i in here) == right.argmax(-1).tolist()
    torch.testing.assert_close(memories[0].pool[:, :, :-1], memories[1].pool[:, :, :-1])
    assert torch.equal(memories[0].pool[:, :, -1], unused)  # what fills up is written nowhere


def test_captured_steps_are_run_again_by_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes are captured before the first request, the largest first, and crops too."""
    devices = simulated(monkeypatch)
    e = engine(kv_block_size=16, max_num_seqs=8)
    (device,) = devices
    tower, decoder = device.graphs[:4], device.graphs[4:]
    assert [len(graph.found) for graph in tower] == [8, 4, 2, 1]
    assert [len(graph.found[1]) for graph in decoder] == [8, 4, 2, 1]
    assert answers(e.generate(MIXED, GREEDY)) == expected()
    assert e.attention == "Triton over a paged KV cache, 16 tokens per block; CUDA graphs"
    assert len(device.graphs) == 8 and sum(graph.replays for graph in decoder) >= 10
    assert [graph.replays > 0 for graph in tower] == [False, True, True, True]


def test_without_cuda_graphs_it_continues_and_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen capturing")

    simulated(monkeypatch)
    monkeypatch.setattr(SimulatedDevice, "capture", capture)
    e = engine(kv_block_size=16, max_num_seqs=8)
    assert answers(e.generate(MIXED, GREEDY)) == expected()
    assert e.attention.endswith(
        "no CUDA graphs (capturing a step of 8 failed: operation not permitted)"
    )


def test_the_attention_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine().attention == "matmul and sdpa over a contiguous KV cache"
    paged = "over a paged KV cache, 16 tokens per block; no CUDA graphs"
    backend = engine(kv_block_size=16).attention
    assert backend == f"sdpa (no CUDA device) {paged} (SDPA runs sequence by sequence)"
    kernels_on_cpu(monkeypatch)
    assert engine(kv_block_size=16).attention == f"Triton {paged} (no CUDA device)"
    assert engine(kv_block_size=16, batch_invariant=True).attention.endswith(
        "no CUDA graphs (batch-invariant)"
    )


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("how", [GREEDY, SAMPLED[0]], ids=["greedy", "sampled"])
def test_what_is_not_finite_ends_its_request_alone(
    how: SamplingParams, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16 may overflow; in a prompt's step and in a decode step."""
    kernels_on_cpu(monkeypatch)
    e, model = counted(kv_block_size=16, max_num_seqs=4)
    requests = [e.add(p, how) for p in MIXED[:3]]
    logits = model.logits

    def overflowing(hidden: Tensor) -> Tensor:
        out = logits(hidden)
        if len(requests[1].generated) == at and len(out) >= 3:
            out[1, 7] = torch.nan
        return out

    monkeypatch.setattr(model, "logits", overflowing)
    events = finish(e)
    assert [r.finish_reason for r in requests] == ["length", "error", "length"]
    assert len(requests[1].generated) == at
    assert ["use bfloat16" in str(event.error) for event in events if event.error] == [True]
    e.check()


def test_the_room_that_a_step_leaves() -> None:
    gib = 1 << 30
    left = kv_budget.kv_bytes_left
    assert left(70 * gib, 80 * gib, 7 * gib) == 59 * gib
    assert left(5 * gib, 80 * gib, gib) == 0
    assert left(70 * gib, 80 * gib, 7 * gib, 0.5, 10 * gib) == 23 * gib


def test_room_is_measured_by_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 40 tokens and 3 crops is computed between the question how much there was and how
    much it took; graphs and its pool are counted.
    """
    simulated(monkeypatch)
    model = network()
    steps: list[tuple[int, int]] = []
    largest = ModelRunner.largest_step

    def step(runner: ModelRunner, tokens: int, rows: int) -> None:
        steps.append((tokens, rows))
        largest(runner, tokens, rows)

    monkeypatch.setattr(ModelRunner, "largest_step", step)
    pool = 256 * TOKEN
    weights = sum(p.nbytes for p in model.parameters())
    graphs, peak, total = 30_000, 50_000, 1_000_000
    free = [total - weights, total - weights - graphs - pool]
    bytes_in_use = {"memory_allocated": [1000], "max_memory_allocated": [1000 + peak]}

    def room(**how: Any) -> int:
        values = {name: iter(numbers) for name, numbers in bytes_in_use.items()}
        frees = iter(free)
        for name, each in values.items():
            monkeypatch.setattr(f"torch.cuda.{name}", lambda _, each=each: next(each))
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (next(frees), total))
        return kv_budget.profile_kv_bytes(
            model,
            feature_bytes=10_000,
            max_num_batched_tokens=40,
            max_batched_images=3,
            max_num_seqs=5,
            **how,
        )

    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    assert room() == 2 * 1000 * TOKEN and steps == [(40, 5)]
    everything = room(gpu_memory=1.0)
    assert everything == total - weights - graphs - total // 20 - peak - 10_000
    assert room(gpu_memory=0.5) == total // 2 - weights - graphs - peak - 10_000
    free[1] = 0
    assert room() == 0


def test_a_step_without_memory_fails_its_requests_and_gives_all_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    e, model = failing(max_num_seqs=2, kv_block_size=16)
    requests = [e.add(p, GREEDY) for p in MIXED]
    e.step()
    model.error = torch.OutOfMemoryError("Tried to allocate 20.00 MiB")
    failed = e.step()
    assert [(event.request, str(event.error)) for event in failed] == [
        (request, "Tried to allocate 20.00 MiB") for request in requests[:2]
    ]
    assert emptied == [True] and all(
        event.error is not None and event.error.__traceback__ is None for event in failed
    )
    e.check()
    finish(e)
    assert answers(requests)[2:] == expected()[2:]
    assert answers(e.generate(MIXED, GREEDY)) == expected()


def test_a_pool_that_the_device_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")

    monkeypatch.setattr("llava_interleave.engine.kv_paged.torch.zeros", full)
    with pytest.raises(
        OptionError,
        match=r"1,024,000 bytes of KV cache do not fit on cpu: Tried to allocate 9.00 GiB",
    ):
        engine(kv_block_size=16)
