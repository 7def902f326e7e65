"""KV cache: attention over contiguous memory == attention over whole sequences, however they were cut, copied
and moved.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_interleave.engine import SamplingParams
from llava_interleave.engine.kv_contiguous import (
    MAX_DECODE_TOKENS,
    ContiguousKVCache,
    Span,
    bytes_per_token,
)
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.errors import OptionError
from llava_interleave.model import PackedAttention, arrange_features
from llava_interleave.prompt import Prompt
from tests.helpers.engine import MIXED, VOCAB, answers, engine, expected, network
from tests.helpers.kv import config, rounded

CPU = torch.device("cpu")


def room(capacity: int) -> SequenceKV:
    return SequenceKV(CacheKey.of([]), 0, capacity)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(
        st.lists(
            st.sampled_from([1, 2, 5, 9, MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1]),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    ),
    kv_heads=st.sampled_from([1, 2, 4]),
    int8=st.booleans(),
)
def test_steps_equal_whole_sequences(cuts: list[list[int]], kv_heads: int, int8: bool) -> None:
    """Each sequence arrives in its own chunks, several sequences a step, while the cache grows. In 8
    bits all of it is rounded alike, wherever it is cut.
    """
    torch.manual_seed(0)
    c = config(kv_heads=kv_heads)
    cache = ContiguousKVCache(c, torch.float32, CPU, int8=int8)
    lengths = [sum(cut) for cut in cuts]
    q = [torch.randn(n, 4, 8) for n in lengths]
    k, v = ([torch.randn(n, kv_heads, 8) for n in lengths] for _ in range(2))
    kept = rounded if int8 else torch.Tensor.clone
    whole = PackedAttention(lengths)(0, torch.cat(q), kept(torch.cat(k)), kept(torch.cat(v))).split(
        lengths
    )
    kvs = [room(0) for _ in lengths]
    for step in range(max(map(len, cuts))):
        spans, parts = [], []
        for i, cut in enumerate(cuts):
            if step < len(cut):
                start, stop = sum(cut[:step]), sum(cut[: step + 1])
                kvs[i].capacity = stop + step % 2
                cache.prepare(kvs[i])
                kvs[i].length = stop
                spans.append(Span(kvs[i], start, stop))
                parts.append((i, start, stop))
        attend = cache.attend(spans)
        for layer in (0, 1):
            out = attend(layer, *(torch.cat([x[i][a:b] for i, a, b in parts]) for x in (q, k, v)))
            torch.testing.assert_close(out, torch.cat([whole[i][a:b] for i, a, b in parts]))


@torch.inference_mode()
def test_answers_from_keys_and_values_in_8_bits() -> None:
    """Against whole forwards in which every key and value is rounded: in pieces, several at once,
    from a cached prefix.
    """

    def slow(p: Prompt) -> list[int]:
        model, tokens = network(), list(p.tokens)
        features = [(m.start, arrange_features(model.encode(m.pixels), m.layout)) for m in p.media]
        for _ in range(12):
            whole = PackedAttention([len(tokens)])
            x = model.embed(torch.tensor(tokens), features)
            hidden = model(
                x,
                torch.arange(len(tokens)),
                lambda i, q, k, v, whole=whole: whole(i, q, rounded(k), rounded(v)),
            )
            tokens.append(int(model.logits(hidden)[-1, :VOCAB].argmax()))
        return tokens[len(p.tokens) :]

    right, how = [slow(p) for p in MIXED], SamplingParams(max_new_tokens=12, ignore_eos=True)
    assert right != expected()  # so that it is seen
    for options in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}):
        e = engine(kv_precision="int8", **options)
        assert e.bytes_per_token == 2 * 2 * 2 * (8 + 2)
        for _ in range(2):
            assert answers(e.generate(MIXED, how)) == right
            e.check()


def test_a_precision_of_keys_and_values_that_is_not_there() -> None:
    with pytest.raises(OptionError, match="unknown kv_precision 'int4'; choose auto or int8"):
        engine(kv_precision="int4")


def test_eight_bits_are_within_half_a_step() -> None:
    """Of the largest number of a token's head; zeros stay zeros, and the scale is rounded
    before it is used.
    """
    torch.manual_seed(0)
    x = torch.randn(50, 3, 24) * 10.0 ** torch.randint(-2, 3, (50, 3, 1))
    x[7, 1] = 0
    x[8, 1] = 1e-12  # the scale is none in float16
    off = (rounded(x) - x).abs().amax(-1) / x.abs().amax(-1)
    assert off[8, 1] == 1 and off[7, 1].isnan()
    off[7:9, 1] = 0
    assert float(off.max()) <= 0.5 / 127 * 1.05


@pytest.mark.parametrize("int8", [False, True])
def test_a_copied_prefix_is_independent(int8: bool) -> None:
    c = config()
    cache = ContiguousKVCache(c, torch.float32, CPU, int8=int8)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    if int8:
        k, v = rounded(k), rounded(v)  # which rounds to itself
    source, target = room(6), room(12)
    cache.prepare(source)
    cache.prepare(target)
    attend = cache.attend([Span(source, 0, 6)])
    for layer in range(2):
        attend(layer, q[:6], k[:6], v[:6])
    cache.copy(source, target, 5)
    other = cache.attend([Span(source, 5, 6)])
    for layer in range(2):  # what happens to the source afterwards is its own affair
        other(layer, q[:1], torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
    rest = cache.attend([Span(target, 5, 9)])
    for layer in range(2):
        torch.testing.assert_close(
            rest(layer, q[5:], k[5:], v[5:]), PackedAttention([9])(0, q, k, v)[5:]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_a_slab_takes_the_bytes_it_is_charged(dtype: torch.dtype, int8: bool) -> None:
    c = config(layers=3)
    kv = room(10)
    cache = ContiguousKVCache(c, dtype, CPU, int8=int8)
    cache.prepare(kv)
    assert kv.contiguous is not None
    held = sum(
        t.untyped_storage().nbytes() for tensors, _ in kv.contiguous.tensors() for t in tensors
    )
    assert held == 10 * bytes_per_token(c, dtype, int8=int8) == 10 * cache.bytes_per_token


def test_bfloat16_is_within_its_error() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    exact = PackedAttention([20])(0, q, k, v)
    cache, kv = ContiguousKVCache(config(layers=1), torch.bfloat16, CPU), room(20)
    cache.prepare(kv)
    for a, b in ((0, 7), (7, 19), (19, 20)):
        out = cache.attend([Span(kv, a, b)])(0, *(x[a:b].bfloat16() for x in (q, k, v)))
        torch.testing.assert_close(out.float(), exact[a:b], atol=0.03, rtol=0.03)
