"""The network against transformers on random weights: same features, same logits, same
continuations.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llava_interleave.checkpoints import load, save
from llava_interleave.config import LlavaConfig
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import Llava, PackedAttention, arrange_features
from llava_interleave.testing import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.slow

IMAGE = -1  # in the token lists below: one image

# A 7B-like network: as many key-value heads as heads, untied, an own width of heads; the others
# differ in one thing each.
SHAPES = {
    "as 0.5B": tiny_config(),
    "as 7B": tiny_config(
        text={
            "tie_word_embeddings": False,
            "num_layers": 3,
            "hidden_size": 96,
            "num_heads": 6,
            "num_kv_heads": 6,
        }
    ),
    "GQA": tiny_config(text={"num_kv_heads": 2}),
    "one key-value head, untied": tiny_config(
        text={"num_kv_heads": 1, "tie_word_embeddings": False}
    ),
    "wide heads": tiny_config(text={"head_dim": 24, "num_kv_heads": 2}),
    "one patch": tiny_config(vision={"image_size": 14, "patch_size": 14}),
    "many patches": tiny_config(
        vision={"image_size": 54, "patch_size": 5, "num_layers": 3, "num_heads": 2}
    ),
    "other constants": tiny_config(
        vision={"layer_norm_eps": 1e-3}, text={"rms_norm_eps": 1e-3, "rope_theta": 5e3}
    ),
}
PROMPTS = {
    "text only": [5, 6, 7, 8, 9, 10, 11],
    "one image": [3, IMAGE, 4, 5],
    "image first and last": [IMAGE, 9, IMAGE],
    "interleaved in several turns": [3, IMAGE, 4, 5, IMAGE, IMAGE, 6, 7, 384, 8, IMAGE, 9],
    "nine images": [1, *[IMAGE] * 9, 2, 3],
}


def expand(prompt: list[int], config: LlavaConfig) -> tuple[list[int], list[int]]:
    """Token ids with each image's placeholders, and where each image starts."""
    tokens: list[int] = []
    starts: list[int] = []
    for token in prompt:
        if token == IMAGE:
            starts.append(len(tokens))
        tokens += [config.image_token_id] * config.vision.grid**2 if token == IMAGE else [token]
    return tokens, starts


def pixels_of(count: int, config: LlavaConfig, seed: int = 0) -> Tensor:
    size = config.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def our_logits(model: Llava, tokens: list[int], starts: list[int], pixels: Tensor) -> Tensor:
    features = (
        [
            arrange_features(f[None], ImageTokenLayout(model.config.vision.grid))
            for f in model.encode(pixels)
        ]
        if starts
        else []
    )
    x = model.embed(torch.tensor(tokens), zip(starts, features, strict=True))
    return model.logits(model(x, torch.arange(len(tokens)), PackedAttention([len(tokens)])))


@torch.inference_mode()
def their_logits(hf: Any, tokens: list[int], pixels: Tensor) -> Tensor:
    images = {"pixel_values": pixels} if len(pixels) else {}
    logits: Tensor = hf(input_ids=torch.tensor([tokens]), **images).logits[0]
    return logits


def our_greedy(
    model: Llava, tokens: list[int], starts: list[int], pixels: Tensor, count: int
) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        logits = our_logits(model, tokens + written, starts, pixels)[-1].clone()
        logits[model.config.image_token_id] = -torch.inf
        written.append(int(logits.argmax()))
    return written


def their_greedy(hf: Any, tokens: list[int], pixels: Tensor, count: int) -> list[int]:
    images = {"pixel_values": pixels} if len(pixels) else {}
    # No end, so that `count` tokens are compared; never <image>, for which transformers would then
    # miss an image.
    config = transformers.GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=[hf.config.image_token_id],
    )
    ids = torch.tensor([tokens])
    out = hf.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **images
    )
    return list(map(int, out[0, len(tokens) :]))


def hf_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in transformers, which must find nothing missing or surplus in it."""
    hf, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    return hf.eval()


@pytest.fixture(scope="module", params=SHAPES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Llava, Any]:
    """Our network and transformers' of one checkpoint."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a", SHAPES[request.param])
    return load(folder), hf_of(folder)


def test_tower_and_projector(pair: tuple[Llava, Any]) -> None:
    """hidden_states[-1] of transformers is before post_layernorm: the tower without it."""
    model, hf = pair
    pixels = pixels_of(3, model.config)
    with torch.inference_mode():
        tower = hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.vision_tower(pixels), tower, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            model.multi_modal_projector(tower),
            hf.model.multi_modal_projector(tower),
            rtol=0,
            atol=1e-5,
        )
        theirs = torch.stack(tuple(hf.get_image_features(pixels, return_dict=True).pooler_output))
        torch.testing.assert_close(model.encode(pixels), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(pair: tuple[Llava, Any], name: str) -> None:
    model, hf = pair
    tokens, starts = expand(PROMPTS[name], model.config)
    pixels = pixels_of(len(starts), model.config)
    ours, theirs = our_logits(model, tokens, starts, pixels), their_logits(hf, tokens, pixels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 0.1, "degenerate logits would agree whatever the network does"


@pytest.mark.parametrize("name", ["text only", "interleaved in several turns"])
def test_greedy_continuation(pair: tuple[Llava, Any], name: str) -> None:
    model, hf = pair
    tokens, starts = expand(PROMPTS[name], model.config)
    pixels = pixels_of(len(starts), model.config)
    written = our_greedy(model, tokens, starts, pixels, 32)
    assert len(written) == 32
    assert written == their_greedy(hf, tokens, pixels, 32)


def test_images_matter_and_their_order(tmp_path: Path) -> None:
    """What the comparisons above rest on: other images, or the same ones swapped, give other
    logits.
    """
    model = load(tiny_checkpoint(tmp_path / "a"))
    tokens, starts = expand([1, IMAGE, 2, IMAGE, 3], model.config)
    pixels = pixels_of(2, model.config)
    swapped = our_logits(model, tokens, starts, pixels.flip(0))
    assert (our_logits(model, tokens, starts, pixels) - swapped)[-1].abs().max() > 0.01


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 3])
def test_feature_layer(tmp_path: Path, layer: int) -> None:
    """vision_feature_layer indexes the embeddings, then each layer's output."""
    folder = tiny_checkpoint(tmp_path / "a", tiny_config(vision={"num_layers": 3}))
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"vision_feature_layer": -1', f'"vision_feature_layer": {layer}')
    )
    model, hf = load(folder), hf_of(folder)
    pixels = pixels_of(2, model.config)
    with torch.inference_mode():
        theirs = torch.stack(tuple(hf.get_image_features(pixels, return_dict=True).pooler_output))
        torch.testing.assert_close(model.encode(pixels), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["as 0.5B", "GQA", "one key-value head, untied", "wide heads"])
@pytest.mark.parametrize("layout", ["hub", "transformers-4.52", "transformers-5"])
def test_what_we_save_transformers_loads(tmp_path: Path, name: str, layout: Any) -> None:
    source = tiny_checkpoint(tmp_path / "a", SHAPES[name], seed=1)
    model = load(source)
    save(model, tmp_path / "b", processor_from=source, layout=layout, max_shard_bytes=100_000)
    tokens, starts = expand(PROMPTS["one image"], model.config)
    pixels = pixels_of(1, model.config)
    theirs = their_logits(hf_of(tmp_path / "b"), tokens, pixels)
    assert torch.equal(theirs, their_logits(hf_of(source), tokens, pixels))
    torch.testing.assert_close(our_logits(model, tokens, starts, pixels), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["as 0.5B", "one key-value head, untied"])
def test_what_transformers_saves_we_load(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "a", SHAPES[name])
    hf_of(folder).save_pretrained(tmp_path / "b")
    ours, again = load(folder), load(tmp_path / "b")
    assert again.config == ours.config
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True)
    )


def test_processor_files(tmp_path: Path) -> None:
    """The folder is whole: transformers' processor finds its tokenizer, template, image size and
    placeholder count in it.
    """
    config = tiny_config()
    processor = transformers.AutoProcessor.from_pretrained(tiny_checkpoint(tmp_path / "a"))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What differs?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert (
        text == "<|im_start|>user\n<image><image>\nWhat differs?<|im_end|>\n<|im_start|>assistant\n"
    )
    images = [torch.zeros(3, 40, 50, dtype=torch.uint8).numpy()] * 2
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 30, 30)
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 2 * config.vision.grid**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Both err from float32 by the type's rounding; neither errs much more than the other."""
    folder = tiny_checkpoint(tmp_path / "a", SHAPES["GQA"])
    exact, half, hf = load(folder), load(folder, dtype=dtype), hf_of(folder, dtype)
    tokens, starts = expand(PROMPTS["interleaved in several turns"], exact.config)
    pixels = pixels_of(len(starts), exact.config)
    reference = our_logits(exact, tokens, starts, pixels)
    ours = our_logits(half, tokens, starts, pixels.to(dtype)).float() - reference
    theirs = their_logits(hf, tokens, pixels.to(dtype)).float() - reference
    assert ours.std() < 1.5 * theirs.std()
    assert ours.std() < 20 * torch.finfo(dtype).eps * reference.std()
