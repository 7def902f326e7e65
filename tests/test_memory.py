"""KV memory: attention over slabs == attention over whole sequences, however they were cut, copied and moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_interleave.config import TextConfig
from llava_interleave.engine.cache import KV, Keys
from llava_interleave.engine.memory import Slabs, Span, bytes_per_token
from llava_interleave.model import Packed

CPU = torch.device("cpu")


def config(heads: int = 4, kv_heads: int = 2, layers: int = 2) -> TextConfig:
    return TextConfig(num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=8)


def room(capacity: int) -> KV:
    return KV(Keys.of([]), 0, capacity)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_steps_equal_whole_sequences(cuts: list[list[int]], kv_heads: int) -> None:
    """Each sequence arrives in its own chunks, several sequences a step, while the slabs grow."""
    torch.manual_seed(0)
    c = config(kv_heads=kv_heads)
    slabs = Slabs(c, torch.float32, CPU)
    lengths = [sum(cut) for cut in cuts]
    q = [torch.randn(n, 4, 8) for n in lengths]
    k, v = ([torch.randn(n, kv_heads, 8) for n in lengths] for _ in range(2))
    whole = Packed(lengths)(0, torch.cat(q), torch.cat(k), torch.cat(v)).split(lengths)
    kvs = [room(0) for _ in lengths]
    for step in range(max(map(len, cuts))):
        spans, parts = [], []
        for i, cut in enumerate(cuts):
            if step < len(cut):
                start, stop = sum(cut[:step]), sum(cut[: step + 1])
                kvs[i].capacity = stop + step % 2
                slabs.prepare(kvs[i])
                kvs[i].length = stop
                spans.append(Span(kvs[i], start, stop))
                parts.append((i, start, stop))
        attend = slabs.attend(spans)
        for layer in (0, 1):
            out = attend(layer, *(torch.cat([x[i][a:b] for i, a, b in parts]) for x in (q, k, v)))
            torch.testing.assert_close(out, torch.cat([whole[i][a:b] for i, a, b in parts]))


def test_a_copied_prefix_goes_on_alone() -> None:
    c = config()
    slabs = Slabs(c, torch.float32, CPU)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    source, target = room(6), room(12)
    slabs.prepare(source)
    slabs.prepare(target)
    attend = slabs.attend([Span(source, 0, 6)])
    for layer in range(2):
        attend(layer, q[:6], k[:6], v[:6])
    slabs.copy(source, target, 5)
    other = slabs.attend([Span(source, 5, 6)])
    for layer in range(2):  # what happens to the source afterwards is its own affair
        other(layer, q[:1], torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
    rest = slabs.attend([Span(target, 5, 9)])
    for layer in range(2):
        torch.testing.assert_close(rest(layer, q[5:], k[5:], v[5:]), Packed([9])(0, q, k, v)[5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slab_takes_the_bytes_it_is_charged(dtype: torch.dtype) -> None:
    c = config(layers=3)
    kv = room(10)
    slabs = Slabs(c, dtype, CPU)
    slabs.prepare(kv)
    assert kv.slab is not None
    held = sum(t.untyped_storage().nbytes() for t in [*kv.slab.keys, *kv.slab.values])
    assert held == 10 * bytes_per_token(c, dtype) == 10 * slabs.bytes_per_token


def test_bfloat16_is_within_its_error() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    exact = Packed([20])(0, q, k, v)
    slabs, kv = Slabs(config(layers=1), torch.bfloat16, CPU), room(20)
    slabs.prepare(kv)
    for a, b in ((0, 7), (7, 19), (19, 20)):
        out = slabs.attend([Span(kv, a, b)])(0, *(x[a:b].bfloat16() for x in (q, k, v)))
        torch.testing.assert_close(out.float(), exact[a:b], atol=0.03, rtol=0.03)
