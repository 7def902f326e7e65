"""Quantized linears as a GPU computes them. PyTorch's operators for it exist on a GPU only;
here they are written out from their source, number by number, or are those that it has for a CPU.
"""

import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from llava_interleave import checkpoints, kernels
from llava_interleave.chat import load
from llava_interleave.checkpoints.adapters import read_adapter
from llava_interleave.config import LoraConfig
from llava_interleave.errors import OptionError, Unsupported
from llava_interleave.lora import attach
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.quantization import linear_cuda
from llava_interleave.quantization.linear_cpu import QuantizedLinear, QuantizedLinearBase
from llava_interleave.quantization.linear_cuda import (
    Float8Linear,
    NF4Linear,
    TritonLinear,
    float8,
)
from llava_interleave.quantization.packing import pack
from llava_interleave.quantization.precision import CUDA_ONLY, RECIPES
from llava_interleave.quantization.replace import quantized_precision
from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train import run
from llava_interleave.train.recipe import QUANTIZED, Recipe

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
CLASSES = {"fp8": Float8Linear, "nf4": NF4Linear}


def made(features: int, out: int, bits: int) -> QuantizedLinear:
    torch.manual_seed(0)
    module = QuantizedLinear(features, out, bits, bias=True)
    module.weight, module.scale = pack(torch.randn(out, features) / 8, bits)
    assert module.bias is not None
    module.bias.data = torch.randn(out).to(BF16)
    return module


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("features", "out"), [(128, 16), (200, 33), (64, 8), (269, 40)])
def test_weights_packed_for_a_gpu_equal_those_of_the_cpu(
    bits: int, features: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And take as much memory."""
    monkeypatch.setattr(linear_cuda, "PACK_ROWS", 16)  # several blocks of outputs
    module = made(features, out, bits)
    packed = TritonLinear.repack(module)
    assert torch.equal(packed.dequantize(), module.dequantize())
    nbytes = (sum(value.nbytes for value in one.buffers()) for one in (packed, module))
    assert next(nbytes) == next(nbytes)
    x = torch.randn(2, 3, features).to(BF16)
    assert module.bias is not None
    right = linear(x.float(), module.dequantize(), module.bias.float()).to(BF16)
    assert torch.equal(packed(x), right)


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_linears_share_their_weights(bits: int) -> None:
    parts = [TritonLinear.repack(made(200, out, bits)) for out in (32, 16, 33)]
    x = torch.randn(3, 200).to(BF16)
    right = torch.cat([part(x) for part in parts], 1)
    merged = TritonLinear.merge(parts)
    assert merged is not None and torch.equal(merged(x), right)
    assert torch.equal(torch.cat([part(x) for part in parts], 1), right)
    stores = {value.untyped_storage().data_ptr() for part in parts for value in part.state_dict().values()}  # fmt: skip
    assert stores == {v.untyped_storage().data_ptr() for v in merged.state_dict().values()}
    assert TritonLinear.merge(parts[::-1]) is None  # 33 outputs do not end a panel
    assert TritonLinear.merge([parts[0], TritonLinear.repack(made(200, 16, 12 - bits))]) is None


def test_elsewhere_the_weight_is_unpacked() -> None:
    """On a card without the operator: floats, and inputs that nothing rounds. Here another device
    is one without kernels.
    """
    module, x = made(96, 40, 8), torch.randn(7, 96)
    assert module.bias is not None
    module.bias.data = module.bias.float()
    right = linear(x, module.dequantize(), module.bias)
    assert not torch.allclose(module(x), right, atol=1e-4)
    module.train()
    assert torch.equal(module(x), right)  # the same as gradients go through
    shapes = module.eval().to("meta")(x.to("meta"))
    assert shapes.shape == right.shape


@pytest.mark.parametrize("kind", ["packed", "fp8"])
def test_gradients_go_through(kind: str) -> None:
    module: QuantizedLinearBase = TritonLinear.repack(made(64, 24, 4))
    if kind == "fp8":
        module = float8_linear(64, 24)
    x = torch.randn(5, 64, dtype=BF16, requires_grad=True)
    y = module.train()(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, (torch.ones(5, 24, dtype=BF16) @ module.dequantize().to(BF16))
    )


def float8_linear(features: int, out: int) -> Float8Linear:
    torch.manual_seed(0)
    module = Float8Linear(features, out, bias=True)
    module.weight, module.scale = module.pack(torch.randn(out, features).to(BF16))
    assert module.bias is not None
    module.bias.data = torch.randn(out).to(BF16)
    return module


def test_float8_rounds_to_four_bits() -> None:
    """One before the point that is not stored and three behind it; below 2^-6 of e4m3 steps are
    even.
    """
    torch.manual_seed(0)
    x = torch.randn(50, 300) * torch.rand(50, 1) * 1e4
    x[3] = 0
    x[4] = torch.linspace(-1e-38, 1e-38, 300)
    q, scale = float8(x)
    assert (
        q.dtype == torch.float8_e4m3fn and scale.shape == (50, 1) and scale.dtype == torch.float32
    )
    back = q.float() * scale
    assert torch.equal(q.float()[:3].abs().amax(1), torch.full((3,), 448.0)) and torch.equal(
        back[3], x[3]
    )
    step = torch.maximum(x.abs() / 16, scale * 2**-10) * 1.0001
    assert bool(((back - x).abs() <= step).all())


@pytest.mark.parametrize(("features", "out"), [(64, 48), (200, 33), (1, 1)])
def test_float8_products(features: int, out: int) -> None:
    """PyTorch's scaled product against both sides as floats, and its shapes as a card asks for
    them.
    """
    module = float8_linear(features, out)
    assert module.weight.shape == (out + -out % 16, features + -features % 16)
    for shape in ((1, features), (2, 3, features), (131, features)):
        x = torch.randn(shape).to(BF16)
        q, scale = float8(x.reshape(-1, features))
        assert module.bias is not None
        right = linear(q.float() * scale, module.dequantize(), module.bias.float()).view(
            *shape[:-1], out
        )
        torch.testing.assert_close(
            module(x).float(), right, rtol=0.01, atol=0.01 * float(right.abs().max())
        )


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def nf4_linear(features: int, out: int) -> tuple[NF4Linear, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(out, features).to(BF16)
    module = NF4Linear(features, out, bias=True)
    shapes = module.weight.shape, module.scale.shape
    module.weight, module.scale = module.pack(rows)
    assert (module.weight.shape, module.scale.shape) == shapes
    assert module.bias is not None
    module.bias.data = torch.randn(out).to(BF16)
    return module, rows


@pytest.mark.usefixtures("bitsandbytes")
def test_nf4_is_the_papers() -> None:
    """The nearest of 16 numbers by the largest of 64; the numbers are of appendix E of arXiv
    2305.14314.
    """
    code = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    )
    code = torch.cat(
        [code, torch.tensor([-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534])]
    )
    code = torch.cat(
        [
            code,
            torch.tensor(
                [0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434]
            ),
        ]
    )
    code = torch.cat([code, torch.tensor([0.5626170039176941, 0.7229568362236023, 1.0])])
    module, rows = nf4_linear(96, 40)
    blocks = torch.nn.functional.pad(rows.float(), (0, 32)).view(
        -1, 64
    )  # no block is of two outputs
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = code[(blocks[..., None] / largest[..., None] - code).abs().argmin(-1)] * largest
    torch.testing.assert_close(
        module.dequantize(), nearest.view(40, 128)[:, :96], rtol=1e-5, atol=1e-6
    )


@pytest.mark.usefixtures("bitsandbytes")
def test_nf4_products() -> None:
    module, _ = nf4_linear(96, 40)
    for shape in ((1, 96), (2, 3, 96), (70, 96)):
        x = torch.randn(shape).to(BF16)
        assert module.bias is not None
        right = linear(x.float(), module.dequantize(), module.bias.float())
        torch.testing.assert_close(
            module(x).float(), right, rtol=0.02, atol=0.02 * float(right.abs().max())
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", dtype=BF16)


def logits(network: Llava) -> Tensor:
    ids = torch.arange(40)
    with torch.inference_mode():
        pixels = torch.linspace(-1, 1, 3 * 30 * 30).view(1, 3, 30, 30).to(BF16)
        x = network.embed(ids, [(3, network.encode(pixels)[0])])
        return network.logits(network(x, torch.arange(40), PackedAttention([40]))).float()


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_network_is_put_in_order_as_it_is_loaded(
    precision: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = checkpoints.load(folder, precision=precision)
    for module in network.modules():
        if isinstance(module, QuantizedLinear):  # as on a card, where inputs are not rounded
            monkeypatch.setattr(
                module, "product", lambda x, m=module: linear(x, m.dequantize().to(x.dtype), m.bias)
            )
    right = logits(network)
    monkeypatch.setattr(kernels.triton, "unavailable_reason", lambda *_: None)
    packed = checkpoints.load(folder, precision=precision)
    assert {type(m) for m in packed.modules() if isinstance(m, QuantizedLinearBase)} == {
        TritonLinear
    } and quantized_precision(packed) == precision
    assert float((logits(packed) - right).norm() / right.norm()) < 0.02
    counted = checkpoints.weight_bytes(packed.config, BF16, precision)
    assert counted == sum(value.nbytes for value in (*packed.parameters(), *packed.buffers()))
    with pytest.raises(OptionError, match=f"{precision} weights on a GPU are not written"):
        checkpoints.save(packed, tmp_path / "out", processor_from=folder)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_floats_are_quantized_as_they_are_read(
    precision: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All linears but the output head; what is loaded is what `pack` makes of the floats, and the
    whole chatbot runs on it.
    """
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    floats = checkpoints.load(folder)
    monkeypatch.setattr(linear_cuda, "check_supported", lambda *_: None)
    bot = load(folder, precision=precision, device="cpu")
    model, kinds = checkpoints.load(folder, precision=precision), CLASSES[precision]
    few = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert few.keys() == {
        name for name, m in floats.named_modules() if isinstance(m, torch.nn.Linear)
    } - {"lm_head"}
    for name, module in few.items():
        weight, scale = module.pack(floats.get_submodule(name).weight)
        assert torch.equal(
            module.weight.view(torch.uint8), weight.view(torch.uint8)
        ) and torch.equal(module.scale, scale), name
    right = logits(floats)
    assert float((logits(model) - right).norm() / right.norm()) < 0.3
    assert checkpoints.weight_bytes(model.config, BF16, precision) == sum(
        v.nbytes for v in (*model.parameters(), *model.buffers())
    )
    assert bot.ask("Hm?", max_new_tokens=3).tokens
    assert bot.info()["precision"] == precision
    with pytest.raises(OptionError, match=f"{precision} weights on a GPU are not written"):
        checkpoints.save(model, folder.parent / precision, processor_from=folder)


WHOLE = LoraConfig(
    rank=3, dropout=0.0, targets=("language_model.*", "vision_tower.*", "multi_modal_projector.*")
)


@pytest.fixture(params=["fp8", "nf4"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if this were a device that has it."""
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(linear_cuda, "check_supported", lambda *_: None)
    return str(request.param)


def counted_as(few: Llava, folder: Path) -> Llava:
    """A network of floats whose weights are those that the linears of another count as."""
    whole = checkpoints.load(folder)
    for name, module in few.named_modules():
        if isinstance(module, QuantizedLinearBase):
            old = whole.get_submodule(name)
            assert isinstance(old, torch.nn.Linear)
            old.weight = torch.nn.Parameter(module.dequantize(), requires_grad=False)
    return whole


@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_of_an_adapter_equal_those_over_floats(
    precision: str, bfloat16: bool, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    few, found = checkpoints.load(folder, precision=precision), []
    for network in (counted_as(few, folder), few):
        adapter = attach(network.train(), WHOLE, 1)
        for part in adapter.parts.values():
            part.b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        with torch.autocast("cpu", BF16, enabled=bfloat16):
            pixels = torch.linspace(-1, 1, 3 * 30 * 30).view(1, 3, 30, 30)
            x = network.embed(torch.arange(40), [(3, network.encode(pixels)[0])])
            said = network.logits(network.forward(x, torch.arange(40), PackedAttention([40])))
            torch.nn.functional.cross_entropy(said[:-1].float(), torch.arange(1, 40)).backward()
        found.append(
            {
                f"{name} {kind}": p.grad
                for name, part in adapter.parts.items()
                for kind, p in part.named_parameters()
            }
        )
    sure, ours = found
    assert len(ours) == 2 * len([m for m in few.modules() if isinstance(m, QuantizedLinearBase)])
    for name, grad in ours.items():
        assert grad is not None and float(grad.norm()) > 0, name
        assert float((grad - sure[name]).norm() / sure[name].norm()) < (
            0.05 if bfloat16 else 1e-4
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_over_quantized_weights_equals_training_over_the_dequantized(
    precision: str, bfloat16: bool, tmp_path: Path
) -> None:
    """From a checkpoint of floats; its adapter goes with that. What is measured is what quantized weights
    answer.
    """
    folder, floats = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "floats"
    checkpoints.save(
        counted_as(checkpoints.load(folder, precision=precision), folder),
        floats,
        processor_from=folder,
    )
    rows = []
    for number in range(8):
        Image.frombytes("RGB", (50, 40), Random(number).randbytes(6000)).save(
            tmp_path / f"{number}.png"
        )
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": f"Noise, number {number}."},
        ]
        rows.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "some.json").write_text(json.dumps(rows))
    given = Recipe(
        source=tmp_path / "some.json",
        steps=4,
        lr=0.01,
        workers=0,
        held_out=0.3,
        tokens=300,
        bfloat16=bfloat16,
    )
    given = given.but({"adapter.rank": 2, "adapter.dropout": 0.0, "device": "cpu"})
    gradients = []
    for name, how in {
        "few": {"model": str(folder), "precision": precision},
        "floats": {"model": str(floats)},
    }.items():
        done = run.run(given.but(how), tmp_path / name, log=lambda _: None)
        lines = [
            json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        losses = [line["held_out"]["loss"] for line in lines if "held_out" in line]
        gradients.append((losses, read_adapter(done, checkpoints.load(folder))))
    (losses, ours), (sure, others) = gradients
    assert losses[-1] < losses[0] and losses == pytest.approx(sure, rel=0.02)
    for name, part in ours.parts.items():
        apart = float(
            (part.product() - others.parts[name].product()).norm()
            / others.parts[name].product().norm()
        )
        assert apart < (0.2 if bfloat16 else 1e-3), name


def test_parts_that_cannot_be_trained_over_quantized_weights(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    given = Recipe(source=tmp_path / "none.json", steps=1, device="cpu").but({"adapter.rank": 2})
    checkpoints.save(
        checkpoints.load(folder, precision="int8"), tmp_path / "int8", processor_from=folder
    )
    with pytest.raises(Unsupported, match="nf4 is not supported on cpu: it needs a CUDA GPU"):
        run.run(given.but({"model": str(folder), "precision": "nf4"}), tmp_path / "out")
    with pytest.raises(
        OptionError, match="has int8 weights: leave out precision int4, or name the checkpoint"
    ):
        run.run(given.but({"model": str(tmp_path / "int8"), "precision": "int4"}), tmp_path / "out")
    with pytest.raises(
        OptionError, match="precision nf4 is for the frozen weights under an adapter: train one"
    ):
        given.but({"precision": "nf4", "adapter": None})
    with pytest.raises(OptionError, match="unknown precision 'nf5'; did you mean 'nf4'"):
        given.but({"precision": "nf5"})
    assert set(QUANTIZED) == {*RECIPES, *CUDA_ONLY}


def test_what_devices_have(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    linear_cuda.check_supported("int4", cpu)
    linear_cuda.check_supported("int4", cuda)
    for precision in CUDA_ONLY:
        with pytest.raises(
            Unsupported,
            match=f"{precision} is not supported on cpu: it needs a CUDA GPU; use int8 or int4",
        ):
            linear_cuda.check_supported(precision, cpu)
    with pytest.raises(
        Unsupported,
        match=r"Old Card has compute capability 7.5, and 8.9 is needed; use int8 or int4",
    ):
        linear_cuda.check_supported("fp8", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    linear_cuda.check_supported("fp8", cuda)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Unsupported, match="pip install bitsandbytes, or use int4"):
        linear_cuda.check_supported("nf4", cuda)
