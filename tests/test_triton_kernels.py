"""Triton's kernels against their formulas in float64, run by its interpreter, or on a GPU where there
is one; and the formulas against the modules and the sampler that they replace.

Results that a kernel does not write are NaN, and so are the pages of a cache that are not used.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import LayerNorm
from torch.nn.functional import silu

from llava_interleave.engine.kv_contiguous import quantize_kv
from llava_interleave.engine.sampler import Sampler
from llava_interleave.kernels import triton as kt
from llava_interleave.kernels.triton import checks, ops
from llava_interleave.kernels.triton.checks import Random, cases, error
from llava_interleave.model.qwen2 import RMSNorm, rotary, rotate
from llava_interleave.options import SamplingParams

CPU, META = torch.device("cpu"), torch.device("meta")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 0.006, torch.float16: 8e-4}
"""A rounding to the type, relative to the norm; the interpreter rounds bfloat16 towards 0."""


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_every_kernel_equals_its_formula(dtype: torch.dtype) -> None:
    for name, case in cases(DEVICE, dtype).items():
        if not ("packed_linear" in name and dtype == torch.float32):
            assert error(case) <= LIMITS[dtype], name


HEADS = [(7, 1, 64), (2, 2, 72), (3, 3, 80), (2, 2, 128)]
"""Query heads, KV heads and head_dim: GQA of 7:1 and MHA."""


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), HEADS)
def test_attention_of_every_head_size(heads: int, kv_heads: int, d: int, int8: bool) -> None:
    r = Random(DEVICE, torch.float32)
    limit = LIMITS[torch.float32]
    assert error(r.decode([1, 257, 256, 0], heads, kv_heads, d, int8=int8)) < limit
    assert error(r.prefill([1, 65, 3], [1, 70, 33], heads, kv_heads, d, int8=int8)) < limit
    if not int8:
        for causal in (False, True):
            assert error(r.varlen([1, 65, 2], heads, kv_heads, d, causal=causal)) < limit


@pytest.mark.usefixtures("interpreted")
def test_one_row_and_sixty_four() -> None:
    r, limit = Random(DEVICE, torch.float32), LIMITS[torch.float32]
    for rows in (1, 64):
        assert error(r.decode([1 + row % 19 for row in range(rows)], 1, 1, 64)) < limit
        assert error(r.norm(rows, 1152, layer_norm=True)) < limit
        assert error(r.norm(rows, 1025, layer_norm=False)) < limit
        assert error(r.silu_mul(rows, 1025)) < limit
        assert error(r.rotary(rows + 1, 9, 3, 80, int8=True)) < limit
    assert error(r.sample(9000)) == 0  # more than one block of the vocabulary
    assert error(r.sample(1, rows=2)) == 0


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_few_and_many_rows(bits: int) -> None:
    """Over one group of inputs, a part of one, and several splits of them."""
    r = Random(DEVICE, torch.bfloat16)
    for rows, inputs, outputs in ((1, 128, 16), (64, 60, 33), (65, 1100, 70), (257, 130, 24)):
        assert error(r.linear(rows, inputs, outputs, bits)) < 0.006, (rows, inputs, outputs)


@pytest.mark.usefixtures("interpreted")
def test_an_answer_does_not_depend_on_the_batch() -> None:
    r = Random(DEVICE, torch.bfloat16)
    lengths = [300, 5, 517]
    kv, table = r.paged(lengths, 2, 64, int8=False)
    q, seqlens = r.floats(3, 4, 64), r.ints(lengths)
    together = kt.paged_decode(q, kv, table, seqlens)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(kt.paged_decode(q[one], kv, table[one], seqlens[one]), together[one])
    starts, whole = r.ints([0, 300]), r.floats(300, 4, 64)
    first = kt.paged_attention(whole, kv, table[:1], starts, seqlens[:1], 300)
    last = kt.paged_attention(whole[290:], kv, table[:1], r.ints([0, 10]), seqlens[:1], 10)
    assert torch.equal(first[290:], last)  # nor on the chunks of a prompt


def test_formulas_are_those_of_the_modules() -> None:
    x, residual, weight, bias = torch.randn(2, 5, 96), torch.randn(5, 96), *torch.randn(2, 96)
    rms, layer_norm = RMSNorm(96, 1e-6), LayerNorm(96, 1e-6)
    rms.weight.data, layer_norm.weight.data, layer_norm.bias.data = weight, weight, bias
    h = x[0] + residual
    for got, right in (
        (kt.add_rms_norm(x[0], weight, 1e-6, residual), (rms(h), h)),
        (kt.add_layer_norm(x[0], weight, bias, 1e-6, residual), (layer_norm(h), h)),
        ((kt.silu_mul(x[0]),), (silu(x[0, :, :48]) * x[0, :, 48:],)),
    ):
        torch.testing.assert_close(got, right)
    qkv, positions = torch.randn(5, 6, 64), torch.tensor([0, 3, 4, 5, 17])
    kv = Random(CPU, torch.float32).cache(1, 16, 1, 64, int8=True)
    slots = torch.tensor([7, 3, 0, -1, 2], dtype=torch.int32)
    table = kt.rope_table(20, 64, 1e4, CPU)
    q = kt.rotary_kv_write(qkv.flatten(1), positions.int(), slots, table, kv, 4)
    rope = rotary(positions, 64, 1e4, torch.float32)
    torch.testing.assert_close(q, rotate(qkv[:, :4], *rope))
    at, new = torch.tensor([7, 3, 0, 2]), torch.tensor([0, 1, 2, 4])
    written = (kv.keys, kv.key_scales, rotate(qkv[:, 4:5], *rope)), (*kv[1::2], qkv[:, 5:])
    for pool, scales, rows in written:
        integers, right = quantize_kv(rows[new])
        assert (pool[0, at].int() - integers.int()).abs().max() <= 1
        torch.testing.assert_close(scales[0, at], right)
        assert scales[0].isnan().sum() == 12


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.5},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "min_p": 0.1},
        {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 0.7, "frequency_penalty": -1.0},
    ],
)
def test_sampling_is_that_of_one_request(settings: dict[str, float]) -> None:
    """Token by token, by the same random numbers; logits of bfloat16 have many equals."""
    vocab, prompt = 400, [1, 5, 5, 399]
    params = SamplingParams(seed=11, **settings)
    sampler, generator = Sampler(params, prompt, vocab, CPU), torch.Generator().manual_seed(11)
    state = torch.zeros(2, vocab, dtype=torch.int32)
    state[1, prompt] = kt.PROMPT_TOKEN
    values = [params.temperature, params.top_k, params.top_p, params.min_p]
    values += [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
    for _ in range(12):
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(2)).bfloat16() * 2
        uniform = torch.rand(1, dtype=torch.float64, generator=generator) if values[0] else None
        each = [torch.tensor([v], dtype=torch.float32, device=DEVICE) for v in values]
        p = kt.SamplingTensors(
            *(each[0], each[1].int(), each[2], each[3], each[4], each[5], each[6]),
            uniform=torch.zeros(1).double() if uniform is None else uniform.to(DEVICE),
            state_rows=torch.tensor([1], dtype=torch.int32, device=DEVICE),
            state=state.to(DEVICE),
        )
        assert kt.sample(logits.to(DEVICE), p).tolist() == [sampler.pick(logits[0]).token]
        assert p.state is not None
        state = p.state.cpu()
    assert int((state[1] & ~kt.PROMPT_TOKEN).sum()) == 12 and not state[0].any()


def test_launches_are_counted_without_a_gpu() -> None:
    r = Random(META, torch.bfloat16)
    kv = r.cache(9, 256, 2, 64, int8=False)
    with kt.record_launches() as launches:
        three = r.ints([0, 1, 2])
        q = kt.rotary_kv_write(r.floats(3, 8 * 64), three, three, r.floats(9, 64), kv, 4)
        y = kt.paged_decode(q, kv, r.ints([0] * 6).view(3, 2), r.ints([1, 2, 3]))
    assert [one.name for one in launches] == [
        "elementwise.rotary_kv_write",
        "attention.decode_parts",
        "attention.decode_reduce",
    ]
    assert y.shape == (3, 4, 64) and y.is_meta


@pytest.mark.usefixtures("interpreted")
def test_a_probe_finds_wrong_and_failing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(checks.probe(DEVICE, torch.bfloat16).values()) == {None}
    few = {name: cases(DEVICE, torch.float32)[name] for name in ("silu_mul", "add_rms_norm")}
    monkeypatch.setattr(checks, "cases", lambda *_: few)
    monkeypatch.setattr(ops, "_norm", lambda *_: 1 / 0)
    monkeypatch.setattr(ops, "launch", lambda *_, **__: None)  # the result stays as allocated
    assert checks.probe(DEVICE, torch.bfloat16) == {
        "add_rms_norm": "ZeroDivisionError: division by zero",
        "silu_mul": "the results are off by nan",
    }


def test_devices_that_cannot_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, find = torch.device("cuda:0"), checks.unavailable_reason.__wrapped__
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert find(CPU, torch.bfloat16) == "they need a CUDA GPU of NVIDIA"
    assert "and this network in float32" in find(cuda, torch.float32)
    assert find(cuda, torch.float16) == "Old Card has compute capability 7.5, and 8.0 is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(checks, "probe", lambda *_: {"one": None, "two": "off", "three": "raised"})
    assert find(cuda, torch.float16) == "two: off; three: raised"
    monkeypatch.setattr(checks, "probe", lambda *_: dict.fromkeys("ab", "no C compiler"))
    assert find(cuda, torch.float16) == "no C compiler"
    monkeypatch.setattr(checks, "probe", lambda *_: dict.fromkeys("ab"))
    assert find(cuda, torch.float16) is None
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    assert find(cuda, torch.float16) == "the package triton is not installed"
