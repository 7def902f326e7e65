"""Layers of decoder and tower in one call: the same as layer by layer, nearer to exact, the same to
the bit in any company.
"""

from collections.abc import Iterable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llava_interleave import checkpoints, kernels
from llava_interleave.config import TextConfig, VisionConfig
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.engine.kv_contiguous import ContiguousKVCache, Span, fused_sequence
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.model.qwen2 import Qwen2
from llava_interleave.model.siglip import SigLIP
from llava_interleave.prompt import Prompt
from llava_interleave.quantization.fused import (
    FUSED_TOKENS,
    FusedDecoder,
    FusedTower,
    can_fuse_decoder,
    can_fuse_tower,
)
from llava_interleave.quantization.linear_cpu import QuantizedLinear
from llava_interleave.quantization.packing import pack
from llava_interleave.testing import tiny_checkpoint, tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        kernels.unavailable_reason() is not None,
        reason=f"no kernels: {kernels.unavailable_reason()}",
    ),
    pytest.mark.usefixtures("instructions"),
]
SHAPES = {
    "grouped": TextConfig(128, 272, 3, 4, 2, 32, 512, 4096, 1e4, 1e-6, True),
    "OneVision 0.5B": TextConfig(128, 272, 2, 14, 2, 64, 512, 4096, 1e6, 1e-6, True),
    "OneVision 7B": TextConfig(128, 272, 1, 28, 4, 128, 512, 4096, 1e6, 1e-6, True),
    "wide heads": TextConfig(64, 96, 2, 3, 3, 64, 512, 4096, 1e6, 1e-6, True),
}
SPANS = [
    (37, 1),
    (5, 3),
    (700, 14),
    (1, 1),
    (0, 1),
    (0, FUSED_TOKENS),
    (9, 70),
]  # place of the first new token, how many


def decoder(c: TextConfig, bits: int) -> Qwen2:
    torch.manual_seed(0)
    made = Qwen2(c).to(torch.bfloat16).eval().requires_grad_(False)
    for name, p in made.named_parameters():
        p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(
            0, 0.1 if p.dim() == 1 else 0.7 * p.shape[-1] ** -0.5
        )
    quantize(made.layers, bits)
    return made


def tower(c: VisionConfig) -> SigLIP:
    torch.manual_seed(0)
    made = SigLIP(c).to(torch.bfloat16).eval().requires_grad_(False)
    for name, p in made.named_parameters():
        p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(
            0, 0.1 if p.dim() == 1 else 0.7 * p.shape[-1] ** -0.5
        )
    quantize(made.encoder.layers, 8)
    return made


def quantize(layers: Iterable[nn.Module], bits: int) -> None:
    for layer in layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                q = QuantizedLinear(
                    linear.in_features, linear.out_features, bits, bias=linear.bias is not None
                )
                q.weight, q.scale = pack(linear.weight, bits)
                q.bias = linear.bias
                setattr(part, name, q)


def sequences(cache: ContiguousKVCache, spans: list[tuple[int, int]]) -> list[Span]:
    """Memories with the same contents at every call."""
    torch.manual_seed(1)
    made = [Span(SequenceKV(CacheKey.of([]), at, at + new + 3), at, at + new) for at, new in spans]
    for span in made:
        cache.prepare(span.kv)
        assert span.kv.contiguous is not None
        for tensor in (tensor for tensors, _ in span.kv.contiguous.tensors() for tensor in tensors):
            if tensor.dtype == torch.int8:
                tensor.random_(-100, 101)
            else:
                tensor.copy_(
                    torch.rand(tensor.shape) * 0.01
                    if tensor.dtype == torch.float16
                    else torch.randn(tensor.shape)
                )
    return made


def contents(spans: list[Span]) -> list[Tensor]:
    return [
        tensor
        for span in spans
        if span.kv.contiguous
        for tensors, _ in span.kv.contiguous.tensors()
        for tensor in tensors
    ]


def step(c: TextConfig, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    positions = torch.cat([torch.arange(at, at + new) for at, new in spans])
    return torch.randn(len(positions), c.hidden_size).bfloat16(), positions


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("in_8_bits", [False, True])
@torch.inference_mode()
def test_it_is_what_the_layers_make_one_by_one(shape: str, bits: int, in_8_bits: bool) -> None:
    """To bfloat16's rounding, with which the layers differ from themselves in float32 more than the
    call does.
    """
    c = SHAPES[shape]
    network, cache = (
        decoder(c, bits),
        ContiguousKVCache(c, torch.bfloat16, torch.device("cpu"), int8=in_8_bits),
    )
    x, positions = step(c, SPANS)
    one, other = sequences(cache, SPANS), sequences(cache, SPANS)
    by_layer = network(x, positions, cache.attend(one))
    fused = FusedDecoder(network)(x, positions, [fused_sequence(span) for span in other])
    assert float((fused - by_layer).norm() / by_layer.norm()) < 0.01
    for ours, theirs in zip(contents(other), contents(one), strict=True):
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.02
    for p in network.parameters():  # what is quantized is a buffer and stays
        p.data = p.float()
    exact = sequences(
        ContiguousKVCache(c, torch.float32, torch.device("cpu"), int8=in_8_bits), SPANS
    )
    for a, b in zip(contents(exact), contents(sequences(cache, SPANS)), strict=True):
        a.copy_(b)
    right = network(
        x.float(),
        positions,
        ContiguousKVCache(c, torch.float32, torch.device("cpu"), int8=in_8_bits).attend(exact),
    )
    assert float((fused.float() - right).norm()) < float((by_layer.float() - right).norm())


@pytest.mark.parametrize("in_8_bits", [False, True])
@torch.inference_mode()
def test_neither_batch_nor_threads_change_a_bit(in_8_bits: bool) -> None:
    c = SHAPES["grouped"]
    fused, cache = (
        FusedDecoder(decoder(c, 4)),
        ContiguousKVCache(c, torch.bfloat16, torch.device("cpu"), int8=in_8_bits),
    )
    x, positions = step(c, SPANS)
    threads = torch.get_num_threads()
    found, memories = [], []
    try:
        for several in (1, 2, 5):
            torch.set_num_threads(several)
            spans = sequences(cache, SPANS)
            found.append(fused(x, positions, [fused_sequence(span) for span in spans]))
            memories.append(contents(spans))
    finally:
        torch.set_num_threads(threads)
    alone = sequences(cache, SPANS)
    tokens = [Span(span.kv, at, at + 1) for span in alone for at in range(span.start, span.stop)]
    found.append(
        torch.cat(
            [
                fused(x[i : i + 1], positions[i : i + 1], [fused_sequence(span)])
                for i, span in enumerate(tokens)
            ]
        )
    )
    memories.append(contents(alone))
    cut = sequences(cache, SPANS)
    for width in (7, 100):  # pieces of each sequence, one after another
        pieces, first = [], 0
        for span in cut:
            stops = range(span.start, span.stop, width)
            for at in stops:
                rows = slice(
                    first + at - span.start, first + min(at + width, span.stop) - span.start
                )
                piece = Span(span.kv, at, min(at + width, span.stop))
                pieces.append(fused(x[rows], positions[rows], [fused_sequence(piece)]))
            first += span.stop - span.start
        found.append(torch.cat(pieces))
        memories.append(contents(cut))
    for other, memory in zip(found[1:], memories[1:], strict=True):
        assert torch.equal(found[0], other)
        assert all(torch.equal(a, b) for a, b in zip(memories[0], memory, strict=True))


@pytest.mark.parametrize("in_8_bits", [False, True])
@torch.inference_mode()
def test_returned_rows_equal_those_of_all_rows(in_8_bits: bool) -> None:
    """Of each sequence the last so many rows, to the bit; the KV cache gets all."""
    c = SHAPES["grouped"]
    fused, cache = (
        FusedDecoder(decoder(c, 4)),
        ContiguousKVCache(c, torch.bfloat16, torch.device("cpu"), int8=in_8_bits),
    )
    x, positions = step(c, SPANS)
    whole = sequences(cache, SPANS)
    every = fused(x, positions, [fused_sequence(span) for span in whole]).split(
        [new for _, new in SPANS]
    )
    threads = torch.get_num_threads()
    try:
        for several, returned in (
            (1, [1, 0, 14, 1, 0, 5, 70]),
            (2, [0, 3, 1, 0, 1, FUSED_TOKENS, 2]),
            (5, [0] * 6 + [1]),
            (2, [0] * 7),
        ):
            torch.set_num_threads(several)
            spans = sequences(cache, SPANS)
            found = fused(
                x,
                positions,
                [fused_sequence(span, some) for span, some in zip(spans, returned, strict=True)],
            )
            assert torch.equal(
                found,
                torch.cat(
                    [rows[len(rows) - some :] for rows, some in zip(every, returned, strict=True)]
                ),
            )
            assert all(
                torch.equal(a, b) for a, b in zip(contents(whole), contents(spans), strict=True)
            )
    finally:
        torch.set_num_threads(threads)


CROPS = {
    "odd": VisionConfig(
        96, 112, 2, 4, 126, 14
    ),  # heads of 24, an MLP that is no whole group, 81 tokens
    "plain": VisionConfig(64, 128, 3, 2, 42, 14),
}


@pytest.mark.parametrize("shape", list(CROPS))
@torch.inference_mode()
def test_a_tower_is_what_its_layers_make_one_by_one(shape: str) -> None:
    """Nearer to float32 than they are, and the same for a crop in any batch, with any number
    of threads.
    """
    c = CROPS[shape]
    made = tower(c)
    pixels, threads = (
        torch.rand(3, 3, c.image_size, c.image_size).bfloat16() * 2 - 1,
        torch.get_num_threads(),
    )
    fused, by_layer = FusedTower(made, c)(pixels), made(pixels)
    assert (
        fused.shape == by_layer.shape and float((fused - by_layer).norm() / by_layer.norm()) < 0.02
    )
    try:
        for several in (1, 3):
            torch.set_num_threads(several)
            assert torch.equal(
                torch.cat([FusedTower(made, c)(one) for one in pixels.split(1)]), fused
            )
    finally:
        torch.set_num_threads(threads)
    for p in made.parameters():
        p.data = p.float()
    right = made(pixels.float())
    assert float((fused.float() - right).norm()) < float((by_layer.float() - right).norm())


def test_where_it_is_possible() -> None:
    assert can_fuse_decoder(decoder(SHAPES["grouped"], 8))
    assert not can_fuse_decoder(decoder(SHAPES["grouped"], 8).float())
    assert not can_fuse_decoder(Qwen2(SHAPES["grouped"]).to(torch.bfloat16))
    assert not can_fuse_decoder(
        decoder(TextConfig(64, 96, 2, 4, 4, 16, 512, 4096, 1e4, 1e-6, True), 8)
    )
    shape = CROPS["odd"]
    assert can_fuse_tower(tower(shape), shape) and not can_fuse_tower(tower(shape).float(), shape)
    assert not can_fuse_tower(SigLIP(shape).to(torch.bfloat16), shape)
    assert not can_fuse_tower(
        nn.Sequential(tower(shape)), shape
    )  # as one whose crops are dealt to several processes
    uneven = VisionConfig(96, 100, 1, 4, 28, 14)
    assert not can_fuse_tower(tower(uneven), uneven)


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_answers_are_the_same_in_any_batch(kv: str, tmp_path: Path) -> None:
    """To the last bit of their log-probabilities: alone, with draft tokens, batched with other answers, and
    next to prompts that are prefilled.
    """
    shape = tiny_config(text={"num_heads": 2, "num_kv_heads": 2, "head_dim": 32})
    model = checkpoints.load(
        tiny_checkpoint(tmp_path / "tiny", shape), dtype=torch.bfloat16, precision="int4"
    )
    how = [
        SamplingParams(
            max_new_tokens=30, ignore_eos=True, logprobs=3, prompt_lookup_num_tokens=most
        )
        for most in (0, 8)
    ]
    prompts = [Prompt([5, 6, 7, 8] * 9), Prompt([9, 8, 7] * 5), Prompt(list(range(3, 250)))]

    def answers(
        batch: list[Prompt], sampling: SamplingParams, late: int = 0, most: int = 1024
    ) -> list[list[tuple[object, ...]]]:
        """`late`: steps before the last one is asked; `most`: tokens a step."""
        e = Engine(
            model,
            eos_ids={300},
            vocab=300,
            kv_bytes=1 << 24,
            kv_precision=kv,
            max_num_batched_tokens=most,
        )
        assert e._runner.fused is not None
        added = [e.add(prompt, sampling) for prompt in batch[: len(batch) - bool(late)]]
        tokens: dict[int, list[tuple[object, ...]]] = {}
        for turn in count():
            if turn == late > 0:
                added.append(e.add(batch[-1], sampling))
            for event in e.step():
                tokens.setdefault(id(event.request), []).append(
                    (event.token, event.logprob, event.top_logprobs)
                )
            if not e.busy and turn >= late:
                return [tokens[id(request)] for request in added]
        raise AssertionError

    alone = [answers([batch], how[0])[0] for batch in prompts]
    assert answers(prompts, how[0]) == alone == answers(prompts, how[1], late=5)
    assert answers(prompts, how[0], most=64) == alone  # prompts in other pieces
    assert answers([*prompts, prompts[2]], how[0], late=60)[2:] == [
        alone[2],
        alone[2],
    ]  # what the second begins with is cached
