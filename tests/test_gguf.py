"""GGUF files of a checkpoint: read back, within the type's bounds, and computed by llama.cpp."""

import dataclasses
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from llava_interleave.chat import BUILTIN
from llava_interleave.checkpoints import load
from llava_interleave.compose import compose
from llava_interleave.compose.gguf_decoder import GgufDecoder
from llava_interleave.compose.gguf_files import DECODER, MMPROJ, GgufTower, write_gguf
from llava_interleave.errors import CheckpointError, Unsupported
from llava_interleave.model import Llava
from llava_interleave.processing import Processor
from tests.helpers.cli import llava

BOUNDS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q4_0": 1 / 7}
"""Largest rounding error of a number, as a share of the largest one of its block."""


@pytest.fixture(scope="module")
def model() -> Llava:
    return load(BUILTIN)


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of both files by the network's names."""
    decoder, tower = GgufDecoder(folder / DECODER), GgufTower(folder / MMPROJ)
    found = {name: decoder.tensor(name) for name in decoder.tensors}
    return found | {name: tower.tensor(name) for name in tower.tensors}


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_tensors_are_within_the_types_bound(model: Llava, tmp_path: Path, dtype: str) -> None:
    """None is missing, none is surplus; what stays in float32 is exact."""
    write_gguf(model, tmp_path / "g", BUILTIN, dtype)  # type: ignore[arg-type]
    found, expected = read(tmp_path / "g"), dict(model.state_dict())
    expected.pop("lm_head.weight")  # tied
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        true, got = values.float(), found[name]
        assert got.shape == true.shape, name
        if true.ndim != 2 or "position" in name:
            assert torch.equal(got, true), name
            continue
        kind = dtype if name.startswith("language_model") else "bf16" if dtype == "bf16" else "f16"
        blocks = true.reshape(-1, 32)
        errors = (got.reshape(-1, 32) - blocks).abs().amax(1)
        assert (errors <= BOUNDS[kind] * blocks.abs().amax(1) + 1e-7).all(), name


def test_back_and_forth_is_the_same_checkpoint(model: Llava, tmp_path: Path) -> None:
    """bfloat16 to GGUF to bfloat16: the same tensors to the bit, and the same ids."""
    write_gguf(model, tmp_path / "g", BUILTIN, "bf16")
    config = compose(tmp_path / "g" / MMPROJ, tmp_path / "g" / DECODER, tmp_path / "back")
    assert (config.vision, config.text) == (model.config.vision, model.config.text)
    back = load(tmp_path / "back").state_dict()
    for name, values in model.state_dict().items():
        assert torch.equal(back[name], values), name
    ours, theirs = (Processor.from_folder(f).tokenizer for f in (BUILTIN, tmp_path / "back"))
    for number in range(1000):
        text = f"Is the {number}th star red? <|im_end|>\n\tnaïve 图 {number * 7919 % 9973}"
        assert ours.encode(text) == theirs.encode(text)


def test_heads_are_rotated_as_llama_does(model: Llava, tmp_path: Path) -> None:
    """A decoder without biases is written as llama, whose rows of q and k are in another order."""
    text = dataclasses.replace(model.config.text, attention_bias=False)
    plain = Llava(dataclasses.replace(model.config, text=text)).to(torch.bfloat16)
    with torch.no_grad():
        for weight in plain.parameters():
            weight.normal_()
    write_gguf(plain, tmp_path / "g", BUILTIN, "bf16")
    name = "language_model.layers.1.self_attn.k_proj.weight"
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "g" / DECODER).tensors}
    raw = gguf.dequantize(stored["blk.1.attn_k.weight"].data, gguf.GGMLQuantizationType.BF16)
    true = plain.state_dict()[name].float()
    assert not torch.equal(torch.from_numpy(raw.copy()), true)
    assert torch.equal(read(tmp_path / "g")[name], true)


def test_files_that_are_refused(model: Llava, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "g", BUILTIN, "q8_0")
    with pytest.raises(CheckpointError, match="is not an mmproj file"):
        GgufTower(tmp_path / "g" / DECODER)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_gguf(model, tmp_path / "g", BUILTIN, "f16")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "g" / MMPROJ).read_bytes()[:3000])
    with pytest.raises(CheckpointError):
        GgufTower(cut)
    newline = dataclasses.replace(model.config.arrangement, newline=True)
    model_of_tiles = Llava(dataclasses.replace(model.config, arrangement=newline))
    with pytest.raises(Unsupported, match="SigLIP tower with an image in one piece"):
        write_gguf(model_of_tiles, tmp_path / "o", BUILTIN, "f16")
    refused = llava("convert", BUILTIN, tmp_path / "x", "--layout", "gguf", "--dtype", "float32")
    assert refused.code == 2 and "f16" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_llama_cpp_answers_as_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    """llama.cpp's own build on these files: features, the first token, greedy tokens."""
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    done = llava("convert", "builtin", tmp_path / "g", "--layout", "gguf", "--dtype", dtype)
    assert done.code == 0, done.err
    compared = llava("verify", tmp_path / "g")
    assert compared.code == 0, compared.out + compared.err
    assert compared.out.count("32 of 32") == 4
