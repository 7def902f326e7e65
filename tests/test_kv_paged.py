"""KV cache in blocks == contiguous == the naive loop; steps of fixed shape == as they are; kernels
are asked for what is meant.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from llava_interleave.config import LoraConfig
from llava_interleave.engine import SamplingParams, kv_budget
from llava_interleave.engine.block_allocator import BlockAllocator
from llava_interleave.engine.cuda_graphs import CudaGraphDecoder, DecodeRow, capture_sizes
from llava_interleave.engine.kv_contiguous import Span, bytes_per_token
from llava_interleave.engine.kv_paged import PagedKVCache
from llava_interleave.engine.prefix_cache import CacheKey, PrefixCache, SequenceKV
from llava_interleave.errors import OptionError
from llava_interleave.lora import attach
from llava_interleave.model import PackedAttention, varlen
from tests.helpers.cuda_graphs import graphs_of
from tests.helpers.engine import (
    MIXED,
    SAMPLED,
    VOCAB,
    Counting,
    answers,
    counted,
    engine,
    expected,
    failing,
    finish,
    naive,
    prompt,
    text,
)
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
)
def test_steps_equal_whole_sequences(
    cuts: list[list[int]], kv_heads: int, block: int, int8: bool
) -> None:
    """Each sequence arrives in its own chunks, several sequences a step."""
    torch.manual_seed(0)
    lengths = [sum(cut) for cut in cuts]
    memory = pool(3 * 85, block, kv_heads=kv_heads, int8=int8)
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
        attend = memory.attend([Span(kvs[i], a, b) for i, a, b in parts])
        for layer in (0, 1):
            out = attend(layer, *(torch.cat([x[i][a:b] for i, a, b in parts]) for x in (q, k, v)))
            torch.testing.assert_close(out, torch.cat([whole[i][a:b] for i, a, b in parts]))


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"tokens": 150}, {"max_num_seqs": 5}],
    ids=str,
)
@pytest.mark.parametrize("block", [4, 32])
def test_answers_are_those_of_the_naive_loop(block: int, options: dict[str, int]) -> None:
    """With room, in pieces, with room for one or two at a time, and filled up to another number."""
    e = engine(kv_block_size=block, **options)
    requests = [e.add(p, GREEDY) for p in MIXED]
    finish(e)
    assert answers(requests) == expected()
    assert e.load().kv_running == 0
    assert answers(e.generate(MIXED, GREEDY)) == expected()  # of which much is cached now


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 8}, {"logprobs": 2}], ids=str)
@pytest.mark.parametrize("kv_precision", ["auto", "int8"])
def test_answers_are_those_from_slabs(how: dict[str, Any], kv_precision: str) -> None:
    """Greedy and sampled, with draft tokens, with an int8 KV cache, and from prefixes."""
    told = []
    for block in (0, 16):
        e = engine(kv_block_size=block, kv_precision=kv_precision)
        for _ in range(2):
            requests = e.generate(MIXED, [replace(one, **how) for one in SAMPLED])
            told.append((answers(requests), [r.usage for r in requests]))
            e.check()
    assert told[:2] == told[2:]


def test_answers_through_adapters_are_those_from_slabs() -> None:
    adapter = attach(Counting(), LoraConfig(rank=3, dropout=0.0, targets=("language_model.*",)), 1)
    for part in adapter.parts.values():
        part.b.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    told = []
    for block in (0, 16):
        e, _ = counted(kv_block_size=block)
        e.adapters.add("a", adapter)
        requests = [e.add(p, GREEDY, adapter=name) for p in MIXED[:3] for name in (None, "a")]
        finish(e)
        told.append(answers(requests))
    assert told[0] == told[1]
    assert told[0][::2] == expected()[:3] != told[0][1::2]


def test_a_pre_empted_answer_is_the_undisturbed_one() -> None:
    prompts = [prompt((n, 1), text(n, 40)) for n in range(3)]
    e, model = counted(tokens=336, kv_block_size=16)
    asked = SamplingParams(max_new_tokens=120, ignore_eos=True)
    assert answers(e.generate(prompts, asked)) == [naive(p, 120) for p in prompts]
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
    told = []
    for e in (blocks, third):
        e.restore(kept)
        e.check()
        back = e.save(e.cache_key(LONG, request.generated))
        assert back is not None and back.metadata == kept.metadata
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in kept.tensors.items())
        e.restore(kept)  # once more, where it is already
        e.check()
        (sequel,) = e.generate([more], GREEDY)
        told.append((sequel.usage.cached, sequel.generated))
    assert told[0] == told[1] and told[0][0] == 100


def test_deterministic_answers_from_blocks() -> None:
    """To the last bit: batched, from a cache and with little memory."""
    how = replace(GREEDY, logprobs=3)

    def told(asked: Sequence[int], **options: Any) -> list[list[Any]]:
        e = engine(
            kv_block_size=8,
            batch_invariant=True,
            max_num_batched_tokens=32,
            max_num_seqs=4,
            **options,
        )
        numbers = {e.add(MIXED[number], how).id: at for at, number in enumerate(asked)}
        found: list[list[Any]] = [[] for _ in asked]
        for event in finish(e):
            found[numbers[event.request.id]].append(
                (event.token, event.logprob, event.top_logprobs)
            )
        return found

    alone = [told([number])[0] for number in range(len(MIXED))]
    assert [[token for token, *_ in one] for one in alone] == expected()
    assert told(range(6)) == alone
    assert told([*range(6), *range(6)]) == [*alone, *alone]
    assert told(range(6), tokens=170) == alone


def test_the_sizes_that_steps_are_filled_up_to() -> None:
    assert capture_sizes(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert capture_sizes(5) == [1, 2, 4, 5]
    assert capture_sizes(1) == [1]


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_step_that_is_filled_up_computes_the_same_numbers(count: int) -> None:
    """Against the same sequences step by step; a smaller step after a larger one finds nothing of
    it.
    """
    model = Counting()
    c = model.config.text
    memories = [
        PagedKVCache(
            c, torch.float32, CPU, 40 * 8 * bytes_per_token(c, torch.float32), block_size=8
        )
        for _ in range(2)
    ]
    fixed = CudaGraphDecoder(model, memories[0], vocab=VOCAB, max_num_seqs=7)
    lengths = [
        8 * n + 7 * (n % 2) + 1 for n in range(count)
    ]  # so that some begin a block, and some end one
    random_tokens = torch.randint(
        0, VOCAB, (count, 80), generator=torch.Generator().manual_seed(0)
    ).tolist()
    kvs = dealt([length + 3 for length in lengths], memories[0])
    for memory in memories:
        for row, kv, length in zip(random_tokens, kvs, lengths, strict=True):
            model.forward(
                model.embed(torch.tensor(row[:length])),
                torch.arange(length),
                memory.attend([Span(kv, 0, length)]),
            )
    scratch = memories[0].pool[:, :, -1].clone()
    for turn in range(3):
        here = range(count) if turn < 2 else range(1)
        at = [lengths[i] + turn for i in here]
        step = fixed(
            [DecodeRow(kvs[i], n, random_tokens[i][n]) for i, n in zip(here, at, strict=True)]
        )
        tokens = torch.tensor([random_tokens[i][n] for i, n in zip(here, at, strict=True)])
        attend = memories[1].attend([Span(kvs[i], n, n + 1) for i, n in zip(here, at, strict=True)])
        right = model.logits(model.forward(model.embed(tokens), torch.tensor(at), attend))[
            :, :VOCAB
        ]
        assert step.logits.shape == right.shape
        torch.testing.assert_close(step.logits, right)
        assert step.tokens(kvs[i] for i in here) == right.argmax(-1).tolist()
    torch.testing.assert_close(memories[0].pool[:, :, :-1], memories[1].pool[:, :, :-1])
    filled_up = next(size for size in capture_sizes(7) if size >= count) > count
    assert (
        torch.equal(memories[0].pool[:, :, -1], scratch) != filled_up
    )  # what fills up writes there, and there alone


def test_captured_steps_are_run_again_by_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of(monkeypatch)
    e = engine(kv_block_size=16)
    assert answers(e.generate(MIXED, GREEDY)) == expected()
    assert e.attention == "sdpa over a paged KV cache, 16 tokens per block; CUDA graphs"
    assert (
        len({graph.size for graph in graphs}) == len(graphs)
        and sum(graph.replays for graph in graphs) >= 10
    )


def test_without_cuda_graphs_it_continues_and_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr("llava_interleave.engine.cuda_graphs.unavailable_reason", lambda _: None)
    monkeypatch.setattr(CudaGraphDecoder, "_capture", capture)
    e = engine(kv_block_size=16)
    assert answers(e.generate(MIXED, GREEDY)) == expected()
    assert e.attention.endswith(
        "no CUDA graphs (capturing a step of 8 failed: operation not permitted)"
    )


def test_the_attention_backend_is_named() -> None:
    assert engine().attention == "matmul and sdpa over a contiguous KV cache"
    assert (
        engine(kv_block_size=16).attention
        == "sdpa over a paged KV cache, 16 tokens per block; no CUDA graphs (no CUDA device)"
    )
    told = engine(kv_block_size=16, kv_precision="int8").attention
    assert told.endswith("no CUDA graphs (the int8 KV cache is dequantized)")
    assert engine(kv_block_size=16, batch_invariant=True).attention.endswith(
        "no CUDA graphs (batch-invariant)"
    )


def asked_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    seen: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    bounds: tuple[int, int],
) -> Tensor:
    """Causal attention as the documentation of the kernels has it, query by query."""
    assert starts.dtype == seen.dtype == torch.int32 and (
        table is None or table.dtype == torch.int32
    )
    assert int(starts.diff().max()) <= bounds[0] and int(lengths.max()) <= bounds[1]
    out = torch.empty_like(q)
    for n, (a, b) in enumerate(pairwise(starts.tolist())):
        for i in range(a, b):
            stop = int(lengths[n]) - (b - 1 - i)
            rows = [int(seen[n]) + t for t in range(stop)]
            if table is not None:
                rows = [
                    int(table[n, t // k.shape[1]]) * k.shape[1] + t % k.shape[1]
                    for t in range(stop)
                ]
            keys, values = (
                x.flatten(0, -3)[rows].repeat_interleave(q.shape[1] // x.shape[-2], 1)
                for x in (k, v)
            )
            share = (torch.einsum("hd,thd->ht", q[i], keys) * q.shape[-1] ** -0.5).softmax(-1)
            out[i] = torch.einsum("ht,thd->hd", share, values)
    return out


def pretend(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Have a kernel that computes on the CPU by the arguments it is given, under the real one's
    signature.
    """

    def varlen(*args: Any, **options: Any) -> Tensor:
        given = inspect.signature(varlen_attn).bind(*args, **options)
        given.apply_defaults()
        x = SimpleNamespace(**given.arguments)
        assert x.window_size == (-1, 0) and x.scale is None and x.num_splits == 1
        assert x.enable_gqa == (x.query.shape[1] != x.key.shape[-2]) and (x.seqused_k is None) == (
            x.block_table is None
        )
        lengths = x.cu_seq_k.diff() if x.seqused_k is None else x.seqused_k
        return asked_for(
            x.query,
            x.key,
            x.value,
            x.cu_seq_q,
            x.cu_seq_k,
            lengths,
            x.block_table,
            (x.max_q, x.max_k),
        )

    def flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: Tensor,
        seen: Tensor,
        most: int,
        most_seen: int,
        *,
        causal: bool,
        block_table: Any,
    ) -> Tensor:
        assert causal
        return asked_for(q, k, v, new, seen, seen.diff(), block_table, (most, most_seen))

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    for module in ("model.attention", "engine.kv_paged"):
        monkeypatch.setattr(f"llava_interleave.{module}.choose", lambda *_: kernel)


@pytest.mark.parametrize("kernel", ["varlen_attn", "flash-attn"])
@pytest.mark.parametrize("kv_precision", ["auto", "int8"])
def test_kernels_are_given_what_their_documentation_asks_for(
    kernel: str, kv_precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pool, by what is unpacked of it, by steps of fixed shape and by whole forwards."""
    right = answers(
        engine(kv_precision=kv_precision).generate(MIXED[:3], replace(GREEDY, max_new_tokens=4))
    )
    pretend(monkeypatch, kernel)
    e = engine(
        kv_block_size=16, kv_precision=kv_precision, max_num_batched_tokens=40, max_num_seqs=3
    )
    assert answers(e.generate(MIXED[:3], replace(GREEDY, max_new_tokens=4))) == right
    assert e.attention.startswith(f"{kernel} over a paged KV cache, 16 tokens per block")
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    packed = PackedAttention([2, 6, 1])(0, q, k, v)
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # as in training, where rotated queries are float32 and values are not
        assert PackedAttention([2, 6, 1])(0, q, k, v.bfloat16()).dtype == torch.bfloat16
    monkeypatch.undo()
    torch.testing.assert_close(packed, PackedAttention([2, 6, 1])(0, q, k, v))


def test_why_a_kernel_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    card, half = torch.device("cuda", 0), torch.bfloat16

    def told(dtype: torch.dtype = half, width: int = 64) -> list[str | None]:
        return [varlen.unavailable_reason(name, card, dtype, width) for name in varlen.KERNELS]

    assert (
        varlen.unavailable_reason("varlen_attn", CPU, half, 64) == "it needs CUDA"
        and varlen.choose(CPU, half, 64) == "sdpa"
    )
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert told()[0] is None and told()[2] is None
    assert "the package flash-attn cannot be imported" in (told()[1] or "")
    assert told(torch.float32)[:2] == ["it computes in float16 or bfloat16, not in float32"] * 2
    assert told(width=100)[0] == "it takes a head_dim that is a multiple of 8 up to 256, not 100"
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *_: None)
    assert told() == [f"in PyTorch {torch.__version__} it takes no block table", None, None]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    assert told()[0] == told()[1] == "it needs a GPU of compute capability 8.0, this one has 7.5"


def test_the_room_that_a_step_leaves() -> None:
    gib = 1 << 30
    assert kv_budget.kv_bytes_left(70 * gib, 80 * gib, 6 * gib, gib) == 59 * gib
    assert kv_budget.kv_bytes_left(5 * gib, 80 * gib, gib) == 0


def test_room_is_measured_by_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 40 tokens and 3 crops is computed between the question how much there was and how
    much it took.
    """
    model, seen = Counting(), []
    held, free = [1000, 51_000], [900_000, 1_000_000]

    def now(_: torch.device) -> int:
        seen.append((model.rows, model.heads, sum(model.calls)))
        return held[len(seen) - 1]

    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(f"torch.cuda.{name}", now)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: tuple(free))
    how: dict[str, Any] = {
        "feature_bytes": 10_000,
        "max_num_batched_tokens": 40,
        "max_batched_images": 3,
    }
    assert (
        kv_budget.profile_kv_bytes(model, **how, max_num_seqs=5)
        == 900_000 - 50_000 - 10_000 - 50_000
    )
    assert seen == [(0, 0, 0), (40, 5, 3)]
    seen.clear()
    free[:] = 10**12, 10**12
    assert kv_budget.profile_kv_bytes(model, **how, max_num_seqs=5) == 5 * 1000 * bytes_per_token(
        model.config.text, torch.float32
    )


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
