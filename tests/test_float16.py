"""float16 on a network whose activations exceed its largest number, 65,504: logits are those of
float32, and no value is infinite or NaN.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.distributed.process_group import ProcessGroup
from llava_interleave.distributed.tensor_parallel import RowParallelLinear, TensorParallelGroup
from llava_interleave.engine import Engine, SamplingParams, bytes_per_token
from llava_interleave.hf.model import LlavaForConditionalGeneration
from llava_interleave.hf.pipelines import pipeline
from llava_interleave.hf.processor import AutoProcessor
from llava_interleave.kernels import triton as kt
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.model.qwen2 import product
from llava_interleave.quantization.linear_cpu import QuantizedLinear
from llava_interleave.quantization.linear_cuda import TritonLinear
from llava_interleave.quantization.packing import pack
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.gpu import kernels_on_cpu, prompt

CONFIG = LlavaConfig(
    VisionConfig(32, 48, 1, 2, image_size=12, patch_size=4),
    TextConfig(64, 96, 2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=64, context=200),
    image_token_id=60,
)
LARGE = {"o_proj": 4e4, "gate_proj": 150.0, "up_proj": 150.0, "down_proj": 60.0}
"""Factors of weights: branches, their sum and the products of the gate overflow."""


@cache
def network(dtype: torch.dtype) -> Llava:
    """The same weights in any dtype."""
    torch.manual_seed(0)
    model = Llava(CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)
        parameter.mul_(LARGE.get(name.split(".")[-2], 1))
    return model.half().to(dtype)


def logits(model: Llava) -> Tensor:
    tokens = torch.randint(0, 57, (21,), generator=torch.Generator().manual_seed(1))
    attend = PackedAttention([21])
    return model.logits(model(model.embed(tokens), torch.arange(21), attend)).float()


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


class Watched:
    """Counts values that are not finite in the outputs of all modules, and the largest."""

    def __init__(self, model: nn.Module) -> None:
        self.not_finite, self.largest = 0, 0.0
        self.hooks = [module.register_forward_hook(self.see) for module in model.modules()]

    def see(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.not_finite += int((~output.isfinite()).sum())
        self.largest = max(self.largest, float(output.abs().max()))


def test_modules_equal_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = network(torch.float32), network(torch.float16)
    watched = [Watched(single), Watched(half)]
    with torch.inference_mode():
        right = logits(single)
        assert watched[0].largest > 1e6, "the case does not overflow"
        assert off(logits(half), right) < 0.01 and watched[1].not_finite == 0
        monkeypatch.setattr("llava_interleave.model.qwen2.product", lambda f, x, t: f(x.to(t)))
        assert not logits(half).isfinite().all()  # without the scales
    for hook in [*watched[0].hooks, *watched[1].hooks]:
        hook.remove()


@pytest.mark.usefixtures("interpreted")
def test_kernels_equal_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of a GPU through the interpreter: log-probabilities of prompts and answers."""
    how = SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=8)
    found = []
    for dtype, block in ((torch.float32, 0), (torch.float16, 0), (torch.float16, 16)):
        with monkeypatch.context() as patch, kt.record_launches() as launches:
            kernels_on_cpu(patch)
            engine = Engine(
                network(dtype),
                eos_ids=(),
                vocab=58,
                kv_bytes=300 * bytes_per_token(CONFIG.text, torch.float32),
                kv_block_size=block,
                max_num_seqs=2,
            )
            events: list[Any] = []
            requests = [engine.add(prompt(seed, 4, seed % 2), how) for seed in (1, 2)]
            while engine.busy:
                events += engine.step()
        assert [event.error for event in events if event.error] == []
        first = [next(e for e in events if e.request is request) for request in requests]
        tops = [dict(event.top_logprobs) for event in first]
        found.append([[(token, top[token]) for token in sorted(top)] for top in tops])
        assert {one.name for one in launches} >= ({"elementwise.scale_rows"} if block else set())
    for other in found[1:]:
        for mine, right in zip(other, found[0], strict=True):
            assert [token for token, _ in mine] == [token for token, _ in right]
            torch.testing.assert_close(
                torch.tensor([v for _, v in mine]), torch.tensor([v for _, v in right]),
                rtol=0.01, atol=0.05,
            )  # fmt: skip


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_products_of_scaled_rows(bits: int) -> None:
    weight = torch.randn(48, 256) * 100
    with torch.device("meta"):
        linear = QuantizedLinear(256, 48, bits, bias=False)
    linear.weight, linear.scale = pack(weight, bits)
    ours, gate_up = TritonLinear.repack(linear), torch.randn(2, 512).half() * 3000
    rows, scale = kt.scale_rows(gate_up, gated=True)
    assert rows.isfinite().all() and scale.max() > 65504
    finished = kt.packed_product(rows, ours.packed)._replace(scale=scale)
    y, h = kt.add_rms_norm(finished, torch.ones(48).half(), 1e-6, torch.randn(2, 48).half())
    gate, up = gate_up.double().chunk(2, 1)
    right = (torch.nn.functional.silu(gate) * up) @ ours.dequantize().double().t()
    assert h.dtype == torch.float32 and y.dtype == torch.float16 and h.abs().max() > 65504
    assert off(h.double(), right) < 0.002 and y.isfinite().all()


def test_ranks_scale_before_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks whose rows have other largest numbers, and so other scales."""
    weight, x = torch.randn(12, 40).half() * 50, torch.randn(3, 40) * 4e4
    x[:, :20] *= 100
    parts = []
    monkeypatch.setattr(ProcessGroup, "all_reduce_", lambda _, y: parts.append(y) or y)
    group = TensorParallelGroup(ProcessGroup())
    with group.lockstep():
        for half in (slice(0, 20), slice(20, 40)):
            linear = nn.Linear(20, 12, bias=False)
            linear.weight.data = weight[:, half]
            product(RowParallelLinear(linear, group), x[:, half], torch.float16)
    assert off(parts[0] + parts[1], x @ weight.float().t()) < 0.002


def test_transformers_classes(tmp_path: Path) -> None:
    """`generate` and the pipeline of the model card, in float16 as it loads them."""
    folder = tiny_checkpoint(tmp_path / "tiny", dtype=torch.float16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        tensor *= LARGE.get(name.split(".")[-2], 1)
    save_file(tensors, file, {"format": "pt"})
    image, processor = Image.new("RGB", (40, 30), "red"), AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=text, return_tensors="pt")
    found, said = [], []
    for dtype in (torch.float32, torch.float16):
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        found.append(model.generate(**inputs, max_new_tokens=3))
        pipe = pipeline("image-text-to-text", model=folder, dtype=dtype, device="cpu")
        said.append(pipe(text=text, images=[image], max_new_tokens=3))
    assert torch.equal(found[0], found[1]) and said[0] == said[1]
