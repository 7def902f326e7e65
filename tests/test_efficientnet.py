"""An EfficientNet-Lite as the tower: equal to the network of efficientnet-lite-pytorch, with a
projector that begins as its classifier; the rest of the package works with it as with SigLIP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llava_interleave import config_json, load
from llava_interleave.checkpoints import load as load_network
from llava_interleave.checkpoints import save
from llava_interleave.compose import compose
from llava_interleave.config import EfficientNetConfig, LlavaConfig
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.flops import training_flops, vision_flops
from llava_interleave.model import Llava
from llava_interleave.model.efficientnet import EfficientNet
from llava_interleave.testing import tiny_checkpoint, tiny_config

efficientnet_lite_pytorch = pytest.importorskip("efficientnet_lite_pytorch")
NAMES = ["cat", "dog", "red circle", "blue square", "house"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Lite0 with random weights and five classes, as the published package saves it."""
    torch.manual_seed(0)
    override = {"num_classes": len(NAMES)}
    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0", **override)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.8, 1.6)
            module.bias.data.uniform_(-0.2, 0.4)
    path = tmp_path_factory.mktemp("lite0") / "lite0.pth"
    torch.save(network.state_dict(), path)
    return path, network.eval()


@pytest.fixture(scope="module")
def composed(
    published: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LlavaConfig]:
    folder = tmp_path_factory.mktemp("composed")
    (folder / "names.json").write_text(json.dumps(NAMES))
    config = compose(
        published[0],
        _decoder(folder / "decoder"),
        folder / "out",
        class_names=folder / "names.json",
        dtype=torch.float32,
    )
    return folder / "out", config


def _decoder(folder: Path) -> Path:
    """A Qwen2 alone: the decoder of a tiny checkpoint."""
    tiny_checkpoint(folder)
    values = json.loads((folder / "config.json").read_text())
    network = load_network(folder)
    tensors = {
        name.replace("language_model.", "model."): tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if name.startswith("language_model.")
    }
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values["text_config"]))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@torch.no_grad()
def test_features_equal_the_published_network(
    published: tuple[Path, Any], composed: tuple[Path, LlavaConfig]
) -> None:
    network = load_network(composed[0])
    c = network.config.vision
    assert isinstance(c, EfficientNetConfig)
    assert network.config == composed[1] and (c.image_size, c.width, c.depth) == (224, 1.0, 1.0)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    whole = EfficientNet(replace(c, pool_size=1, pool_stride=1))
    whole.load_state_dict(network.vision_tower.state_dict())
    right = published[1].extract_features(pixels)  # [2, 1280, 7, 7]
    assert right.std() > 0.1
    torch.testing.assert_close(
        whole(pixels), right.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-3
    )
    pooled = [right[:, :, y : y + 5, x : x + 5].mean((2, 3)) for y in (0, 2) for x in (0, 2)]
    features = network.vision_tower(pixels)
    torch.testing.assert_close(features, torch.stack(pooled, 1), atol=1e-4, rtol=1e-3)
    assert network.config.image_layout.length == 4


@torch.no_grad()
def test_the_projector_begins_as_the_classifier(
    published: tuple[Path, Any], composed: tuple[Path, LlavaConfig]
) -> None:
    network = load_network(composed[0])
    features = torch.rand(3, 1280) * 4
    logits = published[1]._fc(features)
    inner = network.multi_modal_projector.linear_1(features)
    torch.testing.assert_close(inner, logits - 7, atol=1e-4, rtol=1e-4)
    words = load(composed[0]).processor.tokenizer
    embeddings = network.language_model.embed_tokens.weight
    one = network.multi_modal_projector.linear_2.weight[:, 2] * 7
    mean = embeddings[words.encode(" red circle")].mean(0)
    assert torch.cosine_similarity(one, mean, 0) > 0.999
    assert abs(one.norm() - embeddings[:387].norm(dim=-1).mean()) < 0.05 * one.norm()


def test_config_and_weights_are_written_and_read(tmp_path: Path) -> None:
    config = _tiny()
    assert config_json.from_dict(config_json.to_dict(config)) == config
    network = _network(config)
    assert config.num_parameters == sum(p.numel() for p in network.parameters())
    source = tiny_checkpoint(tmp_path / "a", config)
    before = load_network(source)
    save(before, tmp_path / "b", processor_from=source)
    after = load_network(tmp_path / "b").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())
    with pytest.raises(OptionError, match="SigLIP towers only"):
        config_json.to_dict(config, original=True)
    wrong = config_json.to_dict(config)
    wrong["vision_config"]["pool_size"] = 3
    with pytest.raises(CheckpointError, match="pool_size is 3, larger"):
        config_json.from_dict(wrong)


def test_operations_are_counted() -> None:
    """Against PyTorch's own counter."""
    config = _tiny()
    network = _network(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.encode(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() == vision_flops(config)
    trained = training_flops(network.requires_grad_(False), [4], 2, 0)
    decoder = training_flops(network, [4], 0, 0)
    assert trained - decoder == 2 * vision_flops(config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_it_answers_and_attributes_in_every_precision(precision: str, tmp_path: Path) -> None:
    """Another image gives another answer's log-probability; caches change none."""
    source = tiny_checkpoint(tmp_path / "a", _tiny())
    save(_network(_tiny()), tmp_path / "b", processor_from=source)
    bot = load(tmp_path / "b", precision=precision, device="cpu")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (50, 70, 3), np.uint8)) for _ in range(3)]
    first = bot.ask("What?", images[:2], max_new_tokens=4, ignore_eos=True, logprobs=0)
    again = bot.ask("What?", images[:2], max_new_tokens=4, ignore_eos=True, logprobs=0)
    other = bot.ask("What?", images[1:], max_new_tokens=4, ignore_eos=True, logprobs=0)
    one, two, three = ([t.logprob for t in x.logprobs] for x in (first, again, other))
    tolerance = 1e-4 if precision == "float32" else 0.1
    assert one == pytest.approx(two, abs=tolerance)
    assert one != pytest.approx(three, abs=2 * tolerance)
    if precision != "float32":
        return
    parts = [{"type": "image", "image": image} for image in images[:2]]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    assert len(bot.attribute(messages, "cat").images) == 2


def test_files_of_another_kind_are_refused(published: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    for state, message in (
        ({"a.weight": torch.zeros(2)}, "EfficientNet-Lite"),
        (_without(published[1].state_dict(), "_bn1.running_mean"), "_bn1.running_mean"),
        (published[1].state_dict() | {"_conv_head.weight": torch.zeros(8, 8, 1, 1)}, "Lite"),
        ([1, 2], "EfficientNet-Lite"),
    ):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message):
            compose(path, tmp_path, tmp_path / "out")
    path.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"PyTorch weights: it holds something else$"):
        compose(path, tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot be read.*No such file"):
        compose(tmp_path / "none.pth", tmp_path, tmp_path / "out")
    with pytest.raises(OptionError, match="tower_layers"):
        compose(published[0], tmp_path, tmp_path / "out", tower_layers=3)
    names = tmp_path / "names.json"
    names.write_text(json.dumps(NAMES[:4]))
    with pytest.raises(CheckpointError, match="list of the 5"):
        compose(published[0], _decoder(tmp_path / "d"), tmp_path / "out", class_names=names)


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


def _network(config: LlavaConfig) -> Llava:
    """Weights whose outputs are as large as their inputs, so that images make a difference."""
    torch.manual_seed(0)
    network = Llava(config)
    for weight in network.parameters():
        if weight.dim() > 1:
            torch.nn.init.kaiming_normal_(weight.data)
    return network


def _tiny() -> LlavaConfig:
    """Two tokens a side of 64 pixels; the projector is wider than the decoder."""
    tower = EfficientNetConfig(48, 64, width=0.2, depth=0.5, pool_size=1, pool_stride=1)
    return replace(tiny_config(), vision=tower, projector_size=80)
