"""Quantized linears, as a network is loaded with them, against products with their weights
unpacked.
"""

from pathlib import Path

import pytest
import torch

from llava_interleave import checkpoints
from llava_interleave.config import LoraConfig
from llava_interleave.errors import Unsupported
from llava_interleave.lora import attach
from llava_interleave.model import PackedAttention
from llava_interleave.quantization import linear_cuda
from llava_interleave.quantization.linear_cpu import QuantizedLinear, QuantizedLinearBase
from llava_interleave.quantization.linear_cuda import TritonLinear
from llava_interleave.quantization.precision import CUDA_ONLY
from llava_interleave.testing import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that are no multiples of what products ask for among them."""
    sizes = tiny_config(
        vision={"intermediate_size": 60}, text={"hidden_size": 256, "intermediate_size": 400}
    )
    return tiny_checkpoint(tmp_path_factory.mktemp("linears") / "model", sizes)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 5, 17, 300])
@pytest.mark.parametrize("precision", ["int8", "int4", "fp8", "nf4"])
def test_products_are_those_of_the_weights(
    folder: Path, device: str, precision: str, rows: int
) -> None:
    place, dtype = torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16
    try:
        linear_cuda.check_supported(precision, place)
    except Unsupported as error:
        pytest.skip(str(error))
    network, floats = (
        checkpoints.load(folder, dtype=dtype, device=device, precision=how)
        for how in (precision, None)
    )
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, QuantizedLinearBase)
    }
    assert len(found) == len([m for m in floats.modules() if isinstance(m, torch.nn.Linear)]) - (
        precision in CUDA_ONLY
    )
    for name, module in found.items():
        x = torch.randn(rows, module.in_features, generator=torch.Generator().manual_seed(rows)).to(
            place, dtype
        )
        bias = 0 if module.bias is None else module.bias.float()
        sure = x.float() @ module.dequantize().float().t() + bias
        rounded = (
            0.05 if precision == "fp8" else 0.02
        )  # inputs to 4 bits there; to 8, or bfloat16, elsewhere
        assert float((module(x).float() - sure).norm() / sure.norm()) < rounded, name
        original = floats.get_submodule(name).weight.float()
        apart = float((module.dequantize().float() - original).norm() / original.norm())
        assert apart < {"int8": 0.01, "fp8": 0.04}.get(precision, 0.12), name


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("precision", ["int8", "int4", "fp8", "nf4"])
def test_an_adapter_over_quantized_weights_trains_as_over_the_dequantized(
    folder: Path, device: str, precision: str, bfloat16: bool
) -> None:
    """On the device where a run puts them; the gradients of all its parts."""
    try:
        linear_cuda.check_supported(precision, torch.device(device))
    except Unsupported as error:
        pytest.skip(str(error))
    few = checkpoints.load(
        folder, precision=precision, device=device if precision in CUDA_ONLY else "cpu"
    ).to(device)
    whole, found = checkpoints.load(folder, device=device), []
    for name, module in few.named_modules():
        if isinstance(module, QuantizedLinearBase):
            linear = whole.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            linear.weight = torch.nn.Parameter(module.dequantize(), requires_grad=False)
    for network in (whole, few):
        adapter = attach(network.train(), LoraConfig(rank=4, dropout=0.0, targets=("*layers*",)), 1)
        for part in adapter.parts.values():
            part.b.data = (
                torch.randn(part.b.shape, generator=torch.Generator().manual_seed(2)).to(device)
                / 10
            )
        random, side = torch.Generator().manual_seed(3), network.config.vision.image_size
        pixels = torch.randn(1, 3, side, side, generator=random).to(device)
        ids = torch.arange(40, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            said = network.logits(
                network.forward(
                    network.embed(ids, [(3, network.encode(pixels)[0])]), ids, PackedAttention([40])
                )
            )
            torch.nn.functional.cross_entropy(said[:-1].float(), ids[1:]).backward()
        found.append(
            {
                f"{name} {kind}": p.grad
                for name, part in adapter.parts.items()
                for kind, p in part.named_parameters()
            }
        )
    for name, grad in found[1].items():
        assert grad is not None and float((grad - found[0][name]).norm() / grad.norm()) < (
            0.05 if bfloat16 else 1e-3
        ), name


@pytest.mark.usefixtures("card")
@torch.inference_mode()
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_gpu_has_the_numbers_that_a_cpu_has(folder: Path, precision: str) -> None:
    """In another order."""
    here = checkpoints.load(folder, dtype=torch.bfloat16, precision=precision)
    there = checkpoints.load(folder, dtype=torch.bfloat16, precision=precision, device="cuda")
    for name, module in here.named_modules():
        if isinstance(module, QuantizedLinear):
            other = there.get_submodule(name)
            assert isinstance(other, TritonLinear)
            assert torch.equal(other.dequantize().cpu(), module.dequantize()), name
