"""Quantized weights: the packing against its definition, folders, precisions, and what an answer
loses.
"""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from llava_interleave import checkpoints, kernels
from llava_interleave.chat import Chatbot, estimate, load
from llava_interleave.checkpoints import safetensors_file
from llava_interleave.cli import app
from llava_interleave.config import LoraConfig
from llava_interleave.errors import CheckpointError, OptionError, Unsupported
from llava_interleave.lora import Adapters, attach, linears
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.placement import pick_precision
from llava_interleave.quantization.linear_cpu import QuantizedLinear
from llava_interleave.quantization.packing import pack
from llava_interleave.quantization.precision import bits_per_linear, parse_precision
from llava_interleave.quantization.replace import quantized_precision
from llava_interleave.testing import tiny_checkpoint, tiny_config
from recipes.tiny_world.data import exam, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def int4(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder."""
    target = tmp_path_factory.mktemp("quantized") / "int4"
    checkpoints.save(checkpoints.load(folder, precision="int4"), target, processor_from=folder)
    return target


def unpacked(rows: torch.Tensor, bits: int) -> torch.Tensor:
    module = QuantizedLinear(rows.shape[1], rows.shape[0], bits, bias=False)
    module.weight, module.scale = pack(rows, bits)
    return module.dequantize()


@pytest.mark.parametrize(("out", "features"), [(16, 128), (1, 1), (50, 100), (33, 320)])
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_multiples_of_a_scale_come_back(out: int, features: int, bits: int) -> None:
    """Every number that can be stored, at every place: nothing is exchanged, and nothing is lost at
    the edges.
    """
    least, most = (-8, 7) if bits == 4 else (-127, 127)
    q = torch.randint(least, most + 1, (out, features)).float()
    q[:, :: 32 if bits == 4 else 128] = least  # the largest of those that share a step or a scale
    scale = 2.0 ** torch.randint(-6, 3, (out, 1))
    if bits == 4:  # steps of the scale, and halves of parts whose largest is 8 instead of -8
        steps = torch.randint(-15, 16, (out, -(-features // 32)))
        steps[:, ::4] = 15
        scale = scale * steps.repeat_interleave(32, 1)[:, :features]
    assert torch.equal(unpacked(q * scale, bits), q * scale)


@pytest.mark.parametrize(("bits", "most"), [(4, 1 / 12), (8, 1 / 250)])
def test_rounding_is_half_a_step_at_most(bits: int, most: float) -> None:
    """Of the largest that shares the step; with 4 bits a little more, for steps and scale are
    fitted to all of the group.
    """
    torch.manual_seed(0)
    rows, beside = torch.randn(64, 384) * torch.rand(64, 1), 32 if bits == 4 else 128
    groups = rows.unflatten(1, (-1, beside))
    off = (unpacked(rows, bits) - rows).unflatten(1, (-1, beside)).abs().amax(
        -1
    ) / groups.abs().amax(-1)
    assert off.max() < most * 2
    assert off.mean() < most


def test_four_bits_are_fitted_better_than_by_the_largest_alone() -> None:
    """Although a step has 4 bits and the scale is shared by four of them."""
    torch.manual_seed(0)
    rows = torch.randn(256, 512)
    groups = rows.unflatten(1, (-1, 32))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().mean()
    assert (unpacked(rows, 4) - rows).square().mean() < 0.98 * plain


def test_groups_of_noughts_and_of_almost_nothing() -> None:
    rows = torch.zeros(16, 384)
    rows[:, 128:256] = 1e-9  # below what a scale in float16 can say
    rows[3, 256] = 2.0
    for bits in (4, 8):
        right = torch.zeros_like(rows)
        right[3, 256] = 2.0
        torch.testing.assert_close(unpacked(rows, bits), right, rtol=1e-3, atol=1e-8)


def test_which_tensors_are_quantized(folder: Path) -> None:
    network = checkpoints.load(folder)
    assert {
        name for name, module in network.named_modules() if isinstance(module, nn.Linear)
    } == bits_per_linear(network, "int4").keys()
    bits = bits_per_linear(network, "int4")
    assert bits["language_model.layers.1.mlp.down_proj"] == 4
    assert (
        bits["lm_head"]
        == bits["vision_tower.encoder.layers.0.mlp.fc1"]
        == bits["multi_modal_projector.linear_1"]
        == 8
    )
    assert set(bits_per_linear(network, "int8").values()) == {8}


@pytest.mark.parametrize(
    ("setting", "name", "bits"),
    [
        ("int4,head=int4", "int4,head=int4", (8, 4, 4)),
        ("int8,decoder=int4", "int4", (8, 4, 8)),
        ("int8,tower=float", "int8,tower=float", (0, 8, 8)),
        ("int4,decoder=float,tower=int4", "int8,tower=int4,decoder=float", (4, 0, 8)),
        ("int4,head=float,tower=float", "int4,tower=float,head=float", (0, 4, 0)),
    ],
)
def test_parts_apart(
    setting: str, name: str, bits: tuple[int, ...], folder: Path, tmp_path: Path
) -> None:
    """One name for each, stored with the weights, which the engine answers by and which are asked
    for by any of its spellings.
    """
    dtype, precision = pick_precision(setting, folder, "cpu")
    assert precision == name
    network = checkpoints.load(folder, dtype=dtype, precision=precision)
    assert quantized_precision(network) == name
    ends = (
        "vision_tower.encoder.layers.0.mlp.fc1",
        "language_model.layers.1.mlp.down_proj",
        "lm_head",
    )
    found = [network.get_submodule(end) for end in ends]
    assert tuple(getattr(module, "bits", 0) for module in found) == bits
    checkpoints.save(network, tmp_path / "out", processor_from=folder)
    assert checkpoints.Checkpoint.open(tmp_path / "out").precision == name
    again = load(tmp_path / "out", precision=setting, device="cpu")
    assert again.info()["precision"] == name
    assert torch.equal(logits(again.model), logits(network))
    with pytest.raises(OptionError, match=f"has {name} weights"):
        load(
            tmp_path / "out", precision="int4,head=int4" if name == "int4" else "int4", device="cpu"
        )


@pytest.mark.parametrize(
    "odd", ["int4,head", "int4,head=int3", "int4,neck=int4", "fp8,head=int4", "int4,", "head=int4"]
)
def test_unknown_components(odd: str, folder: Path) -> None:
    assert parse_precision(odd) is None
    with pytest.raises(
        OptionError,
        match=r"unknown precision .* set to int4, int8 or float, as in int4,head=int4",
    ):
        pick_precision(odd, folder, "cpu")
    assert (
        parse_precision("int8,tower=float,decoder=float,head=float") is None
    )  # nothing is left of it


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_loading_quantizes_a_few_rows_at_a_time(
    precision: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(
        tmp_path / "source", tiny_config(text={"tie_word_embeddings": tied}), dtype=torch.bfloat16
    )
    floats = checkpoints.load(source)
    monkeypatch.setattr(safetensors_file, "_CHUNK", 5000)  # 16 rows and a little
    ours = checkpoints.load(source, precision=precision)
    assert quantized_precision(ours) == precision and quantized_precision(floats) is None
    state = ours.state_dict()
    for name, bits in bits_per_linear(floats, precision).items():
        weight, scale = pack(floats.get_submodule(name).weight, bits)
        assert torch.equal(state.pop(f"{name}.weight"), weight), name
        assert torch.equal(state.pop(f"{name}.scale"), scale), name
    others = floats.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in state.items())
    assert checkpoints.weight_bytes(ours.config, torch.bfloat16, precision) == sum(
        v.nbytes for v in ours.state_dict().values()
    )


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 30_000])
def test_a_folder_is_mapped_as_it_is(folder: Path, max_shard_bytes: int, tmp_path: Path) -> None:
    network = checkpoints.load(folder, precision="int4")
    checkpoints.save(
        network, tmp_path / "out", processor_from=folder, max_shard_bytes=max_shard_bytes
    )
    again = checkpoints.load(tmp_path / "out")
    assert quantized_precision(again) == "int4"
    right = network.state_dict()
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        n: v.shape for n, v in right.items()
    }
    for name, value in again.state_dict().items():
        assert torch.equal(value, right[name]), name
    files = {path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    packed = again.language_model.layers[0].mlp.up_proj.weight
    assert packed.untyped_storage().nbytes() in files  # the file itself
    assert packed.data_ptr() % 64 == 0


def logits(network: Llava) -> torch.Tensor:
    ids = torch.arange(40)
    with torch.inference_mode():
        return network.logits(network(network.embed(ids), torch.arange(40), PackedAttention([40])))


def test_the_network_computes_nearly_the_same(folder: Path) -> None:
    right = logits(checkpoints.load(folder))
    off = {
        p: float((logits(checkpoints.load(folder, precision=p)) - right).norm() / right.norm())
        for p in ("int8", "int4")
    }
    assert off["int8"] < 0.02 < off["int4"] < 0.2


def test_with_and_without_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = checkpoints.load(folder, precision="int4")
    if kernels.unavailable_reason():
        pytest.skip(str(kernels.unavailable_reason()))
    compiled = logits(network)
    monkeypatch.setattr(kernels.binding, "library", lambda: "none for this test")
    assert (
        float((logits(network) - compiled).norm() / compiled.norm()) < 3e-3
    )  # a last bit can decide how an input is rounded
    with pytest.warns(
        UserWarning,
        match=r"no compiled kernels for int4 \(none for this test\): it is many times slower",
    ):
        load(folder, precision="int4")


def test_what_is_refused(folder: Path, int4: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError,
        match="unknown precision 'int3'; choose auto, float32, bfloat16, float16, int8, int4, fp8, nf4",
    ):
        load(folder, precision="int3")
    for precision in ("int8", "bfloat16"):
        with pytest.raises(
            OptionError, match=f"has int4 weights; for {precision} name the checkpoint"
        ):
            load(int4, precision=precision)
    with pytest.raises(OptionError, match="has int4 weights"):
        checkpoints.load(int4, precision="int8")
    config = json.loads((int4 / "config.json").read_text("utf-8"))
    config["quantization_config"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by another release"):
        checkpoints.load(tmp_path)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(int4 / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoints.load(tmp_path)


def test_other_devices_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("llava_interleave.checkpoints.load"), "get_device", torch.device
    )
    with pytest.raises(
        Unsupported,
        match="int8 is not supported on mps: int4 and int8 need a CPU or a CUDA GPU; use precision float16",
    ):
        checkpoints.load(folder, precision="int8", device="mps")


def test_adapters_wrap_quantized_linears(folder: Path) -> None:
    network, floats = checkpoints.load(folder, precision="int4"), checkpoints.load(folder)
    assert linears(network).keys() == linears(floats).keys()
    before = logits(network)
    adapter = attach(floats, LoraConfig(rank=2, targets=("*.q_proj",)))
    for part in adapter.parts.values():
        nn.init.ones_(part.b)
    adapters = Adapters(network)
    adapters.add("mine", adapter)
    assert torch.equal(logits(network), before) and quantized_precision(network) == "int4"
    with adapters.whole("mine"):
        assert not torch.allclose(logits(network), before, atol=1e-2)


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return load(precision="int8")


def test_answers_of_the_built_in_model(bot: Chatbot) -> None:
    """With 8 bits it says what it says in float32."""
    floats = load()
    for number in range(20_000, 20_006):
        episode, _, text = exam("single", number, held_out=False)
        turn = bot.turn(text, render(episode, 96))
        assert bot.chat(turn, max_new_tokens=24).text == floats.chat(turn, max_new_tokens=24).text
    assert bot.info()["precision"] == "int8"
    reason = kernels.unavailable_reason()
    assert bot.info()["linears"] == (
        "compiled kernels"
        if reason is None
        else f"PyTorch, which dequantizes the weights at every call: {reason}"
    )
    assert floats.info()["linears"] == "PyTorch"
    assert bot.info()["parameters"] == floats.info()["parameters"]


def test_estimates_count_the_weights(bot: Chatbot) -> None:
    counted = bot.estimate([{"role": "user", "content": "Hello"}])
    assert counted.weight_bytes == sum(value.nbytes for value in bot.model.state_dict().values())
    assert estimate("Hello", precision="int8") == counted
    assert (
        estimate("Hello").weight_bytes > 2.3 * counted.weight_bytes
    )  # 192 inputs fill up two groups of 128


def test_command(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    done = CliRunner().invoke(app, ["quantize", str(folder), str(target), "--precision", "int8"])
    assert (done.exit_code, done.stdout) == (0, f"{target}\n")
    right = checkpoints.load(folder, precision="int8").state_dict()
    assert all(
        torch.equal(value, right[name])
        for name, value in checkpoints.load(target).state_dict().items()
    )
