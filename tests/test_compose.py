"""`llava compose`: a tiny random tower and decoder become one checkpoint that computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from llava_interleave import config_json, load
from llava_interleave.checkpoints import Checkpoint
from llava_interleave.checkpoints import load as load_network
from llava_interleave.cli import app
from llava_interleave.compose import compose
from llava_interleave.compose.compose import sample_embeddings
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.processing.tokenizer import Tokenizer
from llava_interleave.testing import tiny_tokenizer

transformers = pytest.importorskip("transformers")
WORDS = 387  # of the tiny tokenizer without <image>
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 5e4,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"vocab_size": 448, "tie_word_embeddings": True},
    "qwen2 untied": {"vocab_size": 400, "tie_word_embeddings": False},
    "llama": {"vocab_size": WORDS, "tie_word_embeddings": True},
    "llama untied": {"vocab_size": WORDS, "tie_word_embeddings": False, "head_dim": 24},
}


def randomized(model: Any) -> Any:
    """Also norms and biases, which begin as ones and zeros."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data += noise * (0.2 if parameter.dim() == 1 else 0.05)
    return model.eval()


def decoder(kind: str, folder: Path) -> Any:
    """A decoder alone with the tiny tokenizer, written by transformers."""
    name = "Qwen2" if kind.startswith("qwen2") else "Llama"
    config = getattr(transformers, f"{name}Config")(**DECODER, **KINDS[kind])
    torch.manual_seed(1)
    model = randomized(getattr(transformers, f"{name}ForCausalLM")(config))
    model.save_pretrained(folder)
    tokenizer = json.loads(tiny_tokenizer().to_str())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A tower alone, and one within a SiglipModel, which has a text side."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    alone = randomized(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)))
    alone.save_pretrained(folder / "alone")
    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
    }
    whole = randomized(
        transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=TOWER))
    )
    whole.save_pretrained(folder / "whole")
    return {"alone": (folder / "alone", alone), "whole": (folder / "whole", whole.vision_model)}


@torch.no_grad()
def text_logits(network: Llava, ids: Tensor) -> Tensor:
    hidden = network(network.embed(ids), torch.arange(len(ids)), PackedAttention([len(ids)]))
    return network.logits(hidden)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_compute_what_they_do_alone(
    kind: str, towers: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    (tmp_path / "decoder").mkdir()
    right = decoder(kind, tmp_path / "decoder")
    tower_folder, tower = towers["whole" if kind == "llama" else "alone"]
    config = compose(tower_folder, tmp_path / "decoder", tmp_path / "out")
    old = KINDS[kind]["vocab_size"]
    assert config.text.vocab_size == -(-(old + 2) // 64) * 64
    assert config.image_token_id == WORDS and config.vision.num_layers == 3
    assert config.text.attention_bias == kind.startswith("qwen2")
    network = load_network(tmp_path / "out")
    assert network.config == config == Checkpoint.open(tmp_path / "out").config
    ids = torch.randint(0, WORDS, (40,), generator=torch.Generator().manual_seed(0))
    expected = right(ids[None]).logits[0]
    torch.testing.assert_close(text_logits(network, ids)[:, :old], expected, atol=1e-5, rtol=1e-4)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    states = tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(network.vision_tower(pixels), states[3], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2 untied", "llama"])
def test_transformers_loads_it(
    kind: str, towers: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    (tmp_path / "decoder").mkdir()
    decoder(kind, tmp_path / "decoder")
    out = tmp_path / "out"
    compose(towers["alone"][0], tmp_path / "decoder", out, tower_layers=4)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    network, random = load_network(out), torch.Generator().manual_seed(0)
    assert network.config.vision.num_layers == 4
    image, tokens = network.config.image_token_id, torch.randint(0, WORDS, (30,), generator=random)
    tokens[5:21] = image
    pixels = torch.randn(1, 3, 28, 28, generator=random)
    x = network.embed(tokens, [(5, network.encode(pixels)[0])])
    ours = network.logits(network(x, torch.arange(30), PackedAttention([30])))
    right = theirs.eval()(input_ids=tokens[None], pixel_values=pixels).logits[0]
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-3)
    text = "<|im_start|>user\nWhat is it?<image>\nCafé 123<|im_end|>"
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert auto(text).input_ids == Tokenizer.from_folder(out, image).encode(text)
    assert transformers.AutoProcessor.from_pretrained(out).image_token == "<image>"


@pytest.mark.slow
def test_it_answers_in_every_precision(towers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Also through the fused layers, which then have no biases."""
    (tmp_path / "decoder").mkdir()
    decoder("llama", tmp_path / "decoder")
    compose(towers["alone"][0], tmp_path / "decoder", tmp_path / "out", dtype=torch.bfloat16)
    for precision in ("float32", "int8", "int4"):
        bot = load(tmp_path / "out", precision=precision, device="cpu")
        assert len(bot.ask("What?", max_new_tokens=4, ignore_eos=True).tokens) == 4


def gguf_file(path: Path, model: Any, kind: str, quantized: bool) -> None:
    """As llama.cpp's converter writes it: rows of q and k in another order where it is a Llama.

    A quantized file does not name its split of text, as early files of Qwen1.5.
    """
    import gguf

    writer, c = gguf.GGUFWriter(path, kind), model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(5e4)
    tokens = sorted(tiny_tokenizer().get_vocab().items(), key=lambda pair: pair[1])[:WORDS]
    spec = json.loads(tiny_tokenizer().to_str())
    control = {token["content"] for token in spec["added_tokens"]}
    rows = [
        (t, gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL) for t, _ in tokens
    ]
    rows += [(f"[PAD{i}]", gguf.TokenType.UNUSED) for i in range(WORDS, c.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    if not (quantized and kind == "qwen2"):
        writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN2 if kind == "qwen2" else gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            half = c.hidden_size // c.num_attention_heads // 2
            values = (
                values.reshape(-1, 2, half, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            )
        base, _, suffix = name.rpartition(".")
        stored = gguf.GGMLQuantizationType.F32
        if quantized and values.ndim == 2:
            stored = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(np.ascontiguousarray(values), stored)
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_decoder_from_gguf(
    kind: str, quantized: bool, towers: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    (tmp_path / "decoder").mkdir()
    right = decoder(kind, tmp_path / "decoder")
    gguf_file(tmp_path / "model.gguf", right, kind, quantized)
    out = tmp_path / "out"
    config = compose(towers["alone"][0], tmp_path / "model.gguf", out, dtype=torch.float32)
    ids = torch.randint(0, WORDS, (40,), generator=torch.Generator().manual_seed(0))
    expected = right(ids[None]).logits[0]
    found = text_logits(load_network(out), ids)[:, : KINDS[kind]["vocab_size"]]
    assert (found - expected).norm() < (0.05 if quantized else 1e-5) * expected.norm()
    own, source = Tokenizer.from_folder(out, config.image_token_id), tiny_tokenizer()
    text = "<|im_start|>user\nWhat is the difference, in 2024?<|im_end|>\n"
    assert own.encode(text) == source.encode(text).ids and own.image_id == WORDS


def test_new_embeddings_are_sampled_around_the_mean_of_the_old() -> None:
    """With the mean, and 1e-5 of the covariance, of the old; the same for the same seed."""
    random = torch.Generator().manual_seed(0)
    old = torch.randn(50, 4, generator=random) @ torch.randn(4, 4, generator=random) + 3
    (new,) = sample_embeddings(old, 20_000, 1, random)
    assert (new.mean(0) - old.mean(0)).abs().max() < 1e-3
    right = torch.cov(old.T, correction=0) * 1e-5
    assert (torch.cov(new.T) - right).norm() < 0.05 * right.norm()
    again = [sample_embeddings(old, 3, 2, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert not torch.equal(*again[0])


@pytest.mark.slow
def test_user_errors(towers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    (tmp_path / "decoder").mkdir()
    decoder("llama", tmp_path / "decoder")
    tower, path = towers["alone"][0], tmp_path / "decoder" / "config.json"
    with pytest.raises(CheckpointError, match=r"config.json: model_type is 'siglip_vision_model'"):
        compose(tower, tower, tmp_path / "out")
    with pytest.raises(CheckpointError, match="takes 9 of the tower's 4 layers"):
        compose(tower, tmp_path / "decoder", tmp_path / "out", tower_layers=9)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"attention_bias": True}))
    with pytest.raises(CheckpointError, match="attention_bias is True"):
        compose(tower, tmp_path / "decoder", tmp_path / "out")
    path.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers.2.input_layernorm.weight is \[\] instead"):
        compose(tower, tmp_path / "decoder", tmp_path / "out")
    for kind in ("mistral", "gemma2", "phi3", "qwen3"):
        path.write_text(json.dumps(values | {"model_type": kind}))
        with pytest.raises(CheckpointError, match=f"model_type is '{kind}'; this network has"):
            compose(tower, tmp_path / "decoder", tmp_path / "out")
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    path.write_text(json.dumps(values | {"model_type": "qwen2"} | sliding))
    with pytest.raises(CheckpointError, match="sliding attention"):
        compose(tower, tmp_path / "decoder", tmp_path / "out")
    path.write_text(json.dumps(values))
    right = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "decoder")
    right.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match="without its head: take the LlamaForCausalLM"):
        compose(tower, tmp_path / "headless", tmp_path / "out")
    values = json.loads((tower / "config.json").read_text())
    other = tmp_path / "tower"
    shutil.copytree(tower, other)
    for kind in ("clip_vision_model", "siglip2_vision_model", "dinov2"):
        (other / "config.json").write_text(json.dumps(values | {"model_type": kind}))
        with pytest.raises(CheckpointError, match=f"model_type is '{kind}'; this network has"):
            compose(other, tmp_path / "decoder", tmp_path / "out")
    config = compose(tower, tmp_path / "decoder", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        compose(tower, tmp_path / "decoder", tmp_path / "out")
    with pytest.raises(OptionError, match="the original layout has Qwen2 decoders only"):
        config_json.to_dict(config, original=True)


@pytest.mark.slow
def test_command(towers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    (tmp_path / "decoder").mkdir()
    decoder("qwen2", tmp_path / "decoder")
    words = ["--tower", str(towers["whole"][0]), "--decoder", str(tmp_path / "decoder")]
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, ("0", "0", "1"), strict=True):
        more = ["-o", str(out), "--tower-layers", "2", "--seed", seed]
        done = CliRunner().invoke(app, ["compose", *words, *more])
        assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.output
    a, b, c = (load_network(out).state_dict() for out in outs)
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    changed = {name for name, value in a.items() if not torch.equal(value, c[name])}
    assert {name.split(".")[0] for name in changed} == {
        "multi_modal_projector",
        "language_model",
        "lm_head",
    }
