"""How many kernels a GPU's step launches, counted on the meta device: operators of PyTorch that
compute, and the launches of the Triton kernels. docs/gpu.md has the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_interleave.checkpoints import meta_network
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine.device_stream import DeviceStream
from llava_interleave.engine.encoder_cache import EncoderCache
from llava_interleave.engine.kv_contiguous import Span, bytes_per_token
from llava_interleave.engine.kv_paged import PagedBatch, PagedKVCache
from llava_interleave.engine.model_runner import ModelRunner
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.engine.request import Request
from llava_interleave.engine.sampler import Sampler
from llava_interleave.kernels import triton as kt
from llava_interleave.kernels.triton.launch import Launch
from llava_interleave.lora import AdapterRouting
from llava_interleave.options import SamplingParams
from llava_interleave.prompt import Prompt
from llava_interleave.quantization.replace import pack_for_cuda, replace_linears
from tests.helpers.gpu import MAY_COPY, kernels_on_cpu

META, BF16 = torch.device("meta"), torch.bfloat16
FREE = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "resolve_conj",
    "resolve_neg",
    "lift_fresh",
}
"""Operators that launch nothing, besides views."""


def config(layers: int) -> LlavaConfig:
    """The layers of 0.5B."""
    text = TextConfig(1024, 2816, layers, 16, 16, 64, 1024, 4096, 1e6, 1e-6, True)
    return LlavaConfig(VisionConfig(num_layers=layers), text, image_token_id=1023)


class Operators(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, found = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        free = func.is_view or name in FREE
        if name == "to":
            free = found.dtype == args[0].dtype
        elif name in MAY_COPY:
            free = args[0].is_contiguous()
        if not free:
            self.counts[name] += 1
        return found


class FlashAttention(TorchFunctionMode):
    """SDPA is one launch: the meta device would compute it by matrices."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.counts["sdpa"] += 1
            return torch.empty_like(args[0].transpose(1, 2)).transpose(1, 2)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The launches in this context."""
    counts: Counter[str] = Counter()
    with (
        torch.inference_mode(),
        kt.record_launches() as ours,
        FlashAttention(counts),
        Operators(counts),
    ):
        yield counts
    counts.update(launch.name for launch in ours)


def runner(layers: int, precision: str, *, int8: bool = False) -> ModelRunner:
    model = meta_network(config(layers))
    dtype = torch.float16 if precision == "float16" else BF16
    if precision in ("int4", "int8", "fp8"):
        replace_linears(model, precision)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False).eval()
    if precision in ("int4", "int8"):
        pack_for_cuda(model)
    text = model.config.text
    return ModelRunner(
        model,
        EncoderCache(0),
        AdapterRouting(),
        vocab=1000,
        max_batched_images=8,
        max_num_seqs=8,
        kv_bytes=40 * 256 * bytes_per_token(text, dtype, int8=int8),
        kv_block_size=256,
        kv_int8=int8,
        batch_invariant=False,
        clock=lambda: 0.0,
    )


def numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


def decode(made: ModelRunner) -> None:
    """One token of each of eight sequences."""
    batch = PagedBatch(8, numbers(8), numbers(8), numbers(8, 16), numbers(8))
    made._decode_step(numbers(8), batch)


def mixed(made: ModelRunner) -> None:
    """Three answers, and prompts of 300 and 20 tokens."""
    assert made.gpu_decoder is not None
    lengths, others, cu = numbers(3), numbers(2), numbers(3)
    batch = PagedBatch(3, numbers(323), numbers(323), numbers(5, 16), lengths, others, cu, 300)
    made.gpu_decoder(made.model.embed(numbers(323)), batch)


def prompts(made: ModelRunner) -> None:
    assert made.gpu_decoder is not None
    none, lengths, cu = numbers(0), numbers(2), numbers(3)
    batch = PagedBatch(0, numbers(320), numbers(320), numbers(2, 16), none, lengths, cu, 300)
    made.gpu_decoder(made.model.embed(numbers(320)), batch)


def images(made: ModelRunner) -> None:
    assert made.tower_graphs is not None
    made.tower_graphs.encode(made.tower_graphs.pixels[:2])


def launches(
    step: Callable[[ModelRunner], None], precision: str, *, int8: bool = False
) -> tuple[float, float, Counter[str]]:
    """Of a layer, and of the rest of a step."""
    found = []
    for layers in (2, 4):
        made = runner(layers, precision, int8=int8)
        with counted() as counts:
            step(made)
        found.append(counts)
    few, many = (sum(counts.values()) for counts in found)
    layer = (many - few) / 2
    return layer, few - 2 * layer, found[1]


BUDGET = {
    (decode, "bfloat16"): (10, 8),
    (mixed, "bfloat16"): (12, 2),
    (prompts, "bfloat16"): (9, 2),
    (decode, "float16"): (11, 8),
    (decode, "int4"): (10, 9),
    (decode, "int8"): (10, 9),
    (decode, "fp8"): (43, 8),
    (prompts, "int4"): (13, 2),
    (images, "int8"): (12, 9),
    (images, "bfloat16"): (8, 7),
}
"""Launches of a layer, and of the rest, at most."""


@pytest.mark.parametrize("case", BUDGET, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_launches_of_a_step(
    case: tuple[Callable[[ModelRunner], None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels_on_cpu(monkeypatch)
    layer, rest, counts = launches(*case)
    assert layer <= BUDGET[case][0] and rest <= BUDGET[case][1], (layer, rest, counts)


class Captures(DeviceStream):
    """A stream whose graphs are the steps as they were captured."""

    no_capture = None

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        return step, step()


def compiled(launches: list[Launch]) -> set[tuple[object, ...]]:
    """The kernels that Triton compiles for launches."""
    return {
        (one.name, one.num_warps, one.num_stages, *one.constants.values(), *known.items())
        for one in launches
        for known in [kt.specialization(one)]
    }


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int4", "int8"])
def test_all_kernels_are_compiled_while_a_model_is_loaded(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever numbers of prompts, answers and samples a step has: no request waits for that."""
    pytest.importorskip("triton")
    kernels_on_cpu(monkeypatch)
    monkeypatch.setattr("llava_interleave.engine.model_runner.stream_of", Captures)
    with kt.record_launches() as loading:
        made = runner(2, precision)
    assert isinstance(made.kv_cache, PagedKVCache) and made.gpu_decoder and made.gpu_sampler
    kv = SequenceKV(CacheKey.of([]), blocks=[0] * 3)
    with kt.record_launches() as serving, torch.inference_mode():
        for answers, tokens in ((0, 7), (0, 32), (1, 16), (3, 61), (8, 200), (2, 700)):
            spans = [Span(kv, 9, 10)] * answers + [Span(kv, 0, tokens)]
            batch, (ids,) = made.kv_cache.batch(spans, made.stream, [0] * (answers + tokens))
            hidden = made.gpu_decoder(made.model.embed(ids), batch)
        for rows in range(1, 8):
            logits, _ = made._best(made.model.logits(hidden[:rows]))
            bias = {1: 1.0} if rows % 2 else {}
            how = SamplingParams(temperature=1.0, logit_bias=bias, seed=0)
            requests = [Request(n, Prompt([0]), how, CacheKey.of([0]), 1, 0.0) for n in range(rows)]
            samplers = [Sampler(how, [0], made.vocab, META) for _ in requests]
            made.gpu_sampler(requests, samplers, logits.index_select(0, numbers(rows)))
    late = compiled(serving) - compiled(loading)
    assert not late


def test_an_int8_kv_cache_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_on_cpu(monkeypatch)
    assert launches(decode, "bfloat16")[:2] == launches(decode, "bfloat16", int8=True)[:2]
