"""The engine of a GPU on a CPU: its decoder, tower and sampler by Triton's interpreter, on a network
that is small enough for it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine import Engine, SamplingParams, bytes_per_token
from llava_interleave.engine.gpu_layers import GpuTower, merge
from llava_interleave.kernels import triton as kt
from llava_interleave.model import Llava
from llava_interleave.model.siglip import SigLIP
from llava_interleave.quantization.linear_cuda import Float8Linear
from tests.helpers.gpu import kernels_on_cpu, prompt

pytestmark = pytest.mark.usefixtures("interpreted")
CONFIG = LlavaConfig(
    VisionConfig(32, 48, 1, 2, image_size=12, patch_size=4),
    TextConfig(64, 96, 1, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=64, context=200),
    image_token_id=60,
)
GREEDY = SamplingParams(max_new_tokens=2, ignore_eos=True)
SAMPLED = [
    replace(GREEDY, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=1),
    replace(GREEDY, repetition_penalty=1.5, frequency_penalty=0.5, logprobs=2),
    replace(GREEDY, temperature=1.2, presence_penalty=1.0, logit_bias={4: 2.0}, seed=3),
]


@cache
def network() -> Llava:
    torch.manual_seed(0)
    model = Llava(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.25)
    return model


PROMPTS = [prompt(1, 5, 1), prompt(2, 20, 0), prompt(3, 2, 1)]


def engine(block: int, **options: Any) -> Engine:
    kv_bytes = 400 * bytes_per_token(CONFIG.text, torch.float32)
    return Engine(
        network(), eos_ids=(), vocab=58, kv_bytes=kv_bytes, kv_block_size=block, **options
    )


def answers(made: Engine, how: SamplingParams | list[SamplingParams]) -> list[Any]:
    requests = made.generate(PROMPTS, how)
    made.check()
    return [(request.generated, request.usage) for request in requests]


@pytest.mark.parametrize("kv_precision", ["auto", "int8"])
def test_answers_through_the_kernels(kv_precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in pieces beside answers, images, and a prefix that is found again."""
    kernels_on_cpu(monkeypatch)
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 3, "kv_precision": kv_precision}
    ours, alone = engine(16, **options), engine(0, **options)
    with kt.record_launches() as launches:
        assert answers(ours, GREEDY) == answers(alone, GREEDY)
        assert answers(ours, GREEDY) == answers(alone, GREEDY)
    names = {launch.name for launch in launches}
    assert {"attention.attention", "attention.decode_parts"} <= names and len(names) >= 6


def test_samples_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole batch, by each request's own random numbers."""
    kernels_on_cpu(monkeypatch)
    ours, alone = engine(16), engine(0)
    with kt.record_launches() as launches:
        assert answers(ours, SAMPLED) == answers(alone, SAMPLED)
    assert any(launch.name.startswith("sampling.") for launch in launches)


def test_features_through_the_kernels() -> None:
    tower, pixels = network().vision_tower, torch.randn(3, 3, 12, 12)
    assert isinstance(tower, SigLIP) and isinstance(CONFIG.vision, VisionConfig)
    with torch.inference_mode():
        found = GpuTower(tower, CONFIG.vision)(pixels)
        torch.testing.assert_close(found, tower(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", ["float32", "fp8", "fp8, not in sixteens"])
def test_merged_linears_compute_what_each_does(kind: str, biased: bool) -> None:
    """And each still computes the same, from its part of the common weight."""
    outputs = (32, 16, 16) if kind != "fp8, not in sixteens" else (30, 16, 16)
    each: list[torch.nn.Module] = []
    for n in outputs:
        plain = torch.nn.Linear(48, n, bias=biased).requires_grad_(False)
        if kind == "float32":
            each.append(plain)
            continue
        quantized = Float8Linear(48, n, bias=biased)
        quantized.weight, quantized.scale = quantized.pack(plain.weight)
        if quantized.bias is not None:
            quantized.bias.data = plain.bias.data.bfloat16()
        each.append(quantized)
    x = torch.randn(5, 48, dtype=torch.float32 if kind == "float32" else torch.bfloat16)
    with torch.inference_mode():
        right = [one(x) for one in each]
        merged = merge(each)
        torch.testing.assert_close(merged(x), torch.cat(right, -1))
        for one, expected in zip(each, right, strict=True):
            torch.testing.assert_close(one(x), expected)
