"""LLaVA-OneVision and LLaVA-Video against transformers 5.23 and the published numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from llava_interleave import load
from llava_interleave.checkpoints import LAYOUTS, Checkpoint, save
from llava_interleave.checkpoints import load as load_network
from llava_interleave.config import LlavaConfig
from llava_interleave.config_json import from_dict
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.image_layout import INTERLEAVE, ONEVISION, ImageTokenLayout, anyres
from llava_interleave.model import Llava, PackedAttention, arrange_features
from llava_interleave.processing import FrameSampling, Processor
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_onevision_config
from tests.helpers.cli import llava
from tests.helpers.images import random_image

SIZE = 35
"""The tiny tower's image size; its tiles stand for 384 pixels."""


def user(*content: object) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, list):
            parts.append({"type": "video", "video": part})
        else:
            parts.append({"type": "image", "image": part})
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_onevision_config(text={"tie_word_embeddings": request.param == "tied"})
    return tiny_checkpoint(tmp_path_factory.mktemp("onevision") / "tiny", config)


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    """The checkpoint in transformers, which must find nothing missing or surplus in it."""
    model, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def image_processor() -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=[[SIZE * a, SIZE * b] for a, b in product(range(1, 7), range(1, 7))],
    )


@torch.inference_mode()
def logits(model: Llava, prompt: Prompt) -> Tensor:
    spans = [(m.start, model.arrange(model.encode(m.pixels), m.layout)) for m in prompt.media]
    x = model.embed(torch.tensor(prompt.tokens), spans)
    return model.logits(model(x, torch.arange(len(prompt)), PackedAttention([len(prompt)])))


def inputs(prompt: Prompt, config: LlavaConfig, images: list[Any]) -> dict[str, Tensor]:
    """What transformers' model takes for the prompt; its images go through its own processor."""
    tokens = torch.tensor(prompt.tokens)
    videos = [m for m in prompt.media if m.name.startswith("video")]
    for video in videos:
        tokens[video.start : video.start + video.layout.length] = config.video_token_id
    made: dict[str, Tensor] = {"input_ids": tokens[None]}
    if images:
        features = image_processor()(images=images, return_tensors="pt")
        made |= {key: features[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    if videos:
        made["pixel_values_videos"] = torch.stack([video.pixels for video in videos])
    return made


FRAMES = [[random_image(40, 30, seed) for seed in range(count)] for count in (1, 3, 5)]
PROMPTS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "text": (user("Hello"), []),
    **{
        f"{width} x {height}": (
            user(random_image(width, height), "What?"),
            [random_image(width, height)],
        )
        for width, height in [
            (20, 20),  # one tile
            (58, 44),  # 2 x 2
            (93, 82),  # 3 x 3, an unpadded edge
            (92, 111),  # 4 x 3 with times between 1 and 1.1: not shrunk
            (175, 98),  # 3 x 5, shrunk
            (210, 210),  # 6 x 6, shrunk
            (182, 6),  # a strip
            (6, 182),
            (75, 67),  # whole in exact arithmetic
            (31, 47),
        ]
    },
    "two images": (
        user("First", random_image(50, 90), "second", random_image(33, 20, 1), "?"),
        [[random_image(50, 90), random_image(33, 20, 1)]],
    ),
    "two turns": (
        [
            *user(random_image(50, 90), "What?"),
            {"role": "assistant", "content": "A thing."},
            *user(random_image(33, 20, 1), "And this?"),
        ],
        [[random_image(50, 90), random_image(33, 20, 1)]],
    ),
    **{f"video of {len(frames)}": (user(frames, "What moves?"), []) for frames in FRAMES},
    "image and video": (user(random_image(58, 44), FRAMES[1], "?"), [random_image(58, 44)]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_logits_equal_transformers(folder: Path, hf: Any, case: str) -> None:
    messages, images = PROMPTS[case]
    model, processor = load_network(folder), Processor.from_folder(folder)
    prompt = processor.prompt(messages)
    with torch.inference_mode():
        theirs = hf(**inputs(prompt, model.config, images)).logits[0]
    torch.testing.assert_close(logits(model, prompt), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["175 x 98", "two images", "video of 3", "image and video"])
def test_greedy_answers_equal_transformers(folder: Path, hf: Any, case: str) -> None:
    """Through the engine, in chunks, with its caches and without the placeholders' ids."""
    messages, images = PROMPTS[case]
    bot = load(folder, device="cpu")
    prompt = bot.prompt(messages)
    made = inputs(prompt, bot.model.config, images)
    config = transformers.GenerationConfig(
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=list(bot.model.config.placeholder_ids)
        + list(range(bot.processor.tokenizer.size, bot.model.config.text.vocab_size)),
    )
    out = hf.generate(
        **made, attention_mask=torch.ones_like(made["input_ids"]), generation_config=config
    )
    answer = bot.chat(messages, max_new_tokens=32, ignore_eos=True)
    assert list(answer.tokens) == out[0, len(prompt) :].tolist()
    again = bot.chat(messages, max_new_tokens=32, ignore_eos=True)
    assert (again.tokens, again.usage.cached) == (answer.tokens, len(prompt) - 1)


@pytest.mark.parametrize("case", [name for name, (_, images) in PROMPTS.items() if images])
def test_pixels_equal_transformers(folder: Path, case: str) -> None:
    messages, images = PROMPTS[case]
    media = Processor.from_folder(folder).prompt(messages).media
    ours = [m.pixels for m in media if m.name.startswith("image")]
    theirs = image_processor()(images=images, return_tensors="pt")["pixel_values"]
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its[: len(mine)])
        assert not its[len(mine) :].any()


# Tokens at the published size: docs of transformers' processor, measured. (height, width): tokens.
REFERENCE = {
    (10, 10): 1485, (336, 336): 1485, (384, 384): 1485, (480, 640): 2929, (768, 768): 3699,
    (720, 1280): 5967, (899, 1024): 6551, (1152, 1152): 7371, (1217, 1004): 8765,
    (1080, 1920): 7269, (3000, 4000): 7309, (2304, 2304): 7371, (64, 2000): 1544,
    (100, 10000): 892, (738, 820): 4077, (750, 1375): 6183, (188, 423): 2104, (375, 1750): 4185,
}  # fmt: skip


@pytest.mark.parametrize(("size", "tokens"), REFERENCE.items())
def test_tokens_of_an_image(size: tuple[int, int], tokens: int) -> None:
    height, width = size
    assert anyres(width, height, 384, 27, arrangement=ONEVISION).length == tokens


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_tokens_equal_the_processors(width: int, height: int) -> None:
    layout = anyres(width, height, 384, 27, arrangement=ONEVISION)
    assert layout.tiles is not None
    stub: Any = SimpleNamespace(vision_aspect_ratio="anyres_max_9")
    features, newlines = LlavaOnevisionProcessor._get_unpadded_features(
        stub, height, width, 27, 27, *layout.tiles
    )
    assert layout.length == 729 + features + newlines


def test_estimate_counts_what_the_prompt_has(folder: Path) -> None:
    processor = Processor.from_folder(folder)
    for messages, _ in PROMPTS.values():
        assert processor.estimate(messages).total == len(processor.prompt(messages))
    long = user([random_image(40, 30, seed) for seed in range(250)], "word " * 800)
    counted = processor.estimate(long, frames=FrameSampling(frames=250))
    assert counted.left < 0
    assert str(counted).endswith("fit in the rest of the context; ask for fewer frames")
    (fit,) = re.findall(r"at most (\d+) frames", counted.excess)
    for frames, fits in ((int(fit), True), (int(fit) + 1, False)):
        counted = processor.estimate(long, frames=FrameSampling(frames=frames))
        assert (counted.left >= 0, counted.excess == "") == (fits, fits)


def test_the_number_of_images_decides(folder: Path) -> None:
    """One image of a conversation is tiled, more are padded; the message part and options win."""
    processor = Processor.from_folder(folder)
    image, pad = random_image(58, 44), replace(ImageTokenLayout(5), newline="end")
    one, two = user(image, "?"), user(image, image, "?")

    def layouts(*arguments: Any, **options: Any) -> list[ImageTokenLayout]:
        return [m.layout for m in processor.prompt(*arguments, **options).media]

    tiled = anyres(58, 44, SIZE, 5, arrangement=ONEVISION)
    assert layouts(one) == [tiled]
    assert layouts(two) == [pad, pad]
    assert layouts(two, anyres=True) == [tiled, tiled]
    assert layouts(one, anyres=False) == [pad]
    assert layouts(one, pad=True) == [pad]
    bars = processor.prompt(one, pad=True).media[0].pixels
    squashed = processor.prompt(one, anyres=False).media[0].pixels
    assert not torch.equal(bars, squashed)
    with pytest.raises(OptionError, match="image_newline"):
        processor.prompt(one, reduction=replace(processor_reduction(), image_token_pool=2))


def processor_reduction() -> Any:
    from llava_interleave.image_layout import TokenReduction

    return TokenReduction()


# LLaVA-Video has no form in transformers: a plain re-implementation on small integers.
@pytest.mark.parametrize(
    ("newline", "expected"),
    [
        ("none", [[0, 1, 2, 3], [10, 11, 12, 13]]),
        ("end", [[0, 1, 2, 3], [10, 11, 12, 13], [-1]]),
        ("frame", [[0, 1, 2, 3, -1], [10, 11, 12, 13, -1]]),
        ("row", [[0, 1, -1, 2, 3, -1], [10, 11, -1, 12, 13, -1]]),
    ],
)
def test_newlines_of_a_video(newline: Any, expected: list[list[int]]) -> None:
    layout = ImageTokenLayout(2, crops=2, newline=newline)
    features = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13]])[..., None]
    found = arrange_features(features, layout, torch.tensor([-1.0]))
    assert found[:, 0].tolist() == [number for line in expected for number in line]
    assert layout.length == len(found)


def test_bilinear_pooling_is_not_average_pooling() -> None:
    """27 -> 14 by the formula: feature i is read at (i + 1/2) * 27 / 14 - 1/2."""
    ramp = torch.arange(27.0).repeat(27, 1).reshape(1, 729, 1)
    pooled = arrange_features(ramp, ImageTokenLayout(27, bilinear=True))[:14, 0]
    expected = (torch.arange(14) + 0.5) * 27 / 14 - 0.5
    torch.testing.assert_close(pooled, expected)
    average = arrange_features(ramp, ImageTokenLayout(27, pool=2))[:14, 0]
    assert not torch.allclose(pooled, average)


def test_llava_video_pools_and_ends_rows(tmp_path: Path) -> None:
    config = tiny_onevision_config()
    arrangement = replace(ONEVISION, video_newline="row", num_frames=64, frame_times=True)
    video = replace(config, arrangement=arrangement, video_token_id=None)
    folder = tiny_checkpoint(tmp_path / "video", video, layout="original")
    assert Checkpoint.open(folder).config.arrangement == arrangement
    processor = Processor.from_folder(folder)
    prompt = processor.prompt(user([random_image(40, 30, seed) for seed in range(4)], "?"))
    assert prompt.media[0].layout.length == 4 * 3 * (3 + 1)
    assert "4 frames are uniformly sampled" in processor.tokenizer.decode(prompt.tokens)
    bot = load(folder, device="cpu")
    assert bot.ask("?", [[random_image(40, 30)] * 2], max_new_tokens=3).usage.generated == 3
    with pytest.raises(CheckpointError, match="layout original"):
        save(load_network(folder), tmp_path / "hub", processor_from=folder, layout="hub")
    save(load_network(folder), tmp_path / "again", processor_from=folder)
    assert load_network(tmp_path / "again").config == load_network(folder).config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_newline(folder: Path, tmp_path: Path, layout: Any) -> None:
    network = load_network(folder)
    save(network, tmp_path / layout, processor_from=folder, layout=layout)
    again = load_network(tmp_path / layout)
    assert again.config.arrangement == network.config.arrangement
    for (name, a), (_, b) in zip(network.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_transformers_saves_is_read(folder: Path, hf: Any, tmp_path: Path) -> None:
    hf.save_pretrained(tmp_path / "saved")
    again, network = load_network(tmp_path / "saved"), load_network(folder)
    for (name, a), (_, b) in zip(network.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_missing_newline_is_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["image_newline"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="image_newline"):
        load_network(tmp_path)


HUB = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "model_type": "llava_onevision",
    "ignore_index": -100,
    "image_grid_pinpoints": [[384 * a, 384 * b] for a, b in product(range(1, 7), range(1, 7))],
    "image_token_index": 151646,
    "video_token_index": 151647,
    "projector_hidden_act": "gelu",
    "vision_aspect_ratio": "anyres_max_9",
    "use_image_newline_parameter": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "text_config": {
        "_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 152000,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 26,
        "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
ORIGINAL = {
    "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava",
    "image_aspect_ratio": "anyres_max_9", "image_crop_resolution": None,
    "image_grid_pinpoints": "(1x1),...,(6x6)", "image_token_index": 151646,
    "mm_hidden_size": 1152, "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None, "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_vision_tower_lr": 2e-6,
    "pos_skipping_range": 4096, "use_pos_skipping": False, "rope_scaling": None,
    "sliding_window": 131072, "tie_word_embeddings": False, "tokenizer_model_max_length": 32768,
    "vision_tower_pretrained": None, "vocab_size": 152064, "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "hidden_act": "silu", "use_sliding_window": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
}  # fmt: skip
FLAT = {key: value for key, value in ORIGINAL.items() if not key.startswith("mm_spatial")} | {
    "mm_newline_position": None, "mm_patch_merge_type": "flat",
}  # fmt: skip
VIDEO = ORIGINAL | {
    "mm_newline_position": "grid", "mm_spatial_pool_stride": 2, "add_faster_video": False,
    "faster_token_stride": 10, "add_time_instruction": True, "force_sample": True,
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336},
}  # fmt: skip


def test_published_configs_are_told_apart() -> None:
    hub, original, video = (from_dict(c) for c in (HUB, ORIGINAL, VIDEO))
    assert hub.arrangement == original.arrangement == ONEVISION
    assert (hub.video_token_id, original.video_token_id) == (151647, None)
    assert hub.text.tie_word_embeddings
    assert hub.vision == replace(original.vision, spare_layers=0)
    assert video.arrangement == replace(
        ONEVISION, video_newline="row", num_frames=64, frame_times=True
    )
    plain = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[384, 768]],
        "mm_newline_position": None,
        "mm_spatial_pool_mode": None,
        "mm_patch_merge_type": "flat",
    }
    assert from_dict(ORIGINAL | plain).arrangement == replace(INTERLEAVE, pinpoints=((1, 2),))
    four = [[384 * a, 384 * b] for a, b in product(range(1, 5), range(1, 5))]
    reward = {"image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": four}
    assert from_dict(ORIGINAL | reward).arrangement == replace(
        ONEVISION, max_tiles=4, pinpoints=tuple((a // 384, b // 384) for b, a in four)
    )


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        (HUB, "vision_aspect_ratio", "pad"),
        (HUB, "image_grid_pinpoints", [[384, 400]]),
        (HUB, "image_grid_pinpoints", []),
        (HUB, "video_token_index", 10**6),
        (ORIGINAL, "mm_newline_position", "diagonal"),
        (ORIGINAL, "mm_spatial_pool_mode", "average"),
        (ORIGINAL, "mm_spatial_pool_stride", 3),
        (ORIGINAL, "add_faster_video", True),
        (ORIGINAL, "use_pos_skipping", True),
        (ORIGINAL, "mm_patch_merge_type", "flat"),
        (ORIGINAL, "mm_patch_merge_type", None),
        (ORIGINAL, "image_grid_pinpoints", "(1x1),(2x2)"),
        (ORIGINAL | {"image_aspect_ratio": "anyres"}, "mm_newline_position", "grid"),
        (ORIGINAL | {"image_aspect_ratio": "anyres"}, "mm_newline_position", "one_token"),
        (ORIGINAL | {"image_aspect_ratio": "pad"}, "mm_newline_position", "no_token"),
        (
            ORIGINAL | {"image_aspect_ratio": "square", "mm_newline_position": None},
            "mm_spatial_pool_stride",
            2,
        ),
        (ORIGINAL, "image_aspect_ratio", "anyres_max_"),
        # A mid-stage checkpoint: plain anyres, whose newlines no key but this one says.
        (FLAT | {"image_aspect_ratio": "anyres"}, "mm_patch_merge_type", "spatial_unpad"),
        (FLAT | {"image_aspect_ratio": None}, "mm_patch_merge_type", "spatial_unpad"),
        (FLAT | {"image_aspect_ratio": "pad"}, "mm_spatial_pool_mode", "bilinear"),
    ],
)
def test_other_networks_are_refused_by_name(
    values: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=key):
        from_dict(values | {key: value})


def test_frames_by_default(folder: Path, tmp_path: Path) -> None:
    """As the files of transformers 4.52 and 5 say, else those of training."""
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "video_preprocessor_config.json"
    for text, frames in (('{"num_frames": null}', 32), ('{"num_frames": 8}', 8)):
        settings.write_text(text)
        assert Processor.from_folder(tmp_path).num_frames == frames
    settings.unlink()
    own = json.loads((tmp_path / "processor_config.json").read_text())
    own["video_processor"] = {"num_frames": 4}
    (tmp_path / "processor_config.json").write_text(json.dumps(own))
    assert Processor.from_folder(tmp_path).num_frames == 4


def test_gradients_reach_the_newline(folder: Path, hf: Any) -> None:
    messages, images = PROMPTS["175 x 98"]
    model, processor = load_network(folder).requires_grad_(True), Processor.from_folder(folder)
    prompt = processor.prompt(messages)
    hf.zero_grad()
    hf(**inputs(prompt, model.config, images)).logits[0, -1].logsumexp(0).backward()
    spans = [(m.start, model.arrange(model.encode(m.pixels), m.layout)) for m in prompt.media]
    x = model.embed(torch.tensor(prompt.tokens), spans)
    hidden = model(x, torch.arange(len(prompt)), PackedAttention([len(prompt)]))
    model.logits(hidden[-1]).logsumexp(0).backward()
    assert model.image_newline is not None
    torch.testing.assert_close(
        model.image_newline.grad, hf.model.image_newline.grad, atol=1e-5, rtol=1e-3
    )


@pytest.mark.slow
def test_verify_compares_with_transformers(folder: Path) -> None:
    from llava_interleave.verify import verify

    cases = verify(folder, tokens=8)
    assert all(case.passed for case in cases), [case for case in cases if not case.passed]
    assert all(case.has("pixels") for case in cases if case.name != "text only")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onevision", "video"])
def test_files_of_lmms_lab(tmp_path: Path, kind: str) -> None:
    """Without chat template, processor files and placeholders: verified, and converted with them.
    LLaVA-Video's images and texts are verified as OneVision's."""
    from llava_interleave.verify import verify

    config = replace(tiny_onevision_config(), video_token_id=None)
    if kind == "video":
        arrangement = replace(ONEVISION, video_newline="row", num_frames=64, frame_times=True)
        config = replace(config, arrangement=arrangement)
    folder = tiny_checkpoint(tmp_path / "bare", config, layout="original")
    for name in ("chat_template.json", "processor_config.json"):
        (folder / name).unlink()
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "")):
        words = json.loads((folder / name).read_text())
        words.pop("added_tokens_decoder", None)
        if key:
            words[key] = [token for token in words[key] if token["content"] != "<image>"]
        (folder / name).write_text(json.dumps(words))
    cases = verify(folder, tokens=4)
    assert all(case.passed for case in cases), [case.name for case in cases if not case.passed]
    target = tmp_path / "converted"
    assert llava("convert", folder, target).code == 0
    assert Checkpoint.open(target).config.arrangement == config.arrangement
    if kind == "onevision":
        from llava_interleave import hf

        assert all(case.passed for case in verify(target, tokens=4))
        processor = hf.AutoProcessor.from_pretrained(target)
        assert "<video>" in processor.apply_chat_template(user(FRAMES[1], "What?"))
        transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(target)


def test_verify_shows_published_answers(folder: Path) -> None:
    from llava_interleave.processing.images import ImageSettings
    from llava_interleave.verify import published

    rows = published.published_answers("MODEL", HUB)
    assert [row[0] for row in rows] == ["0.5b-si", "0.5b-ov"]
    assert [row[0] for row in published.published_answers("MODEL", ORIGINAL)] == ["7b-si", "7b-ov"]
    assert anyres(1024, 899, 384, 27, arrangement=ONEVISION).length == published.IMAGE_TOKENS
    assert len(ImageSettings(384).anyres_tiles(random_image(1024, 899), ONEVISION)) == 10
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text("utf-8")
    assert all(f"| {name} | {answer} |" in page for name, answer in published._ANSWERS.items())
    tiny = json.loads((folder / "config.json").read_text())
    for other in (VIDEO, tiny):
        assert not published.published_answers("MODEL", other)


def test_attribution_maps_show_images_and_not_newlines(folder: Path) -> None:
    bot = load(folder, device="cpu")
    for case in ("175 x 98", "two images", "video of 3"):
        messages, _ = PROMPTS[case]
        answer = bot.chat(messages, max_new_tokens=4, ignore_eos=True)
        images = bot.attribute(messages, answer).images
        assert sum(image.share or 0 for image in images) == pytest.approx(1)
        assert all(np.isfinite(image.heat).all() for image in images)
        side = 3 if case.startswith("video") else 5
        assert images[0].heat.shape[1:] == (side, side)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_answer(folder: Path, tmp_path: Path, precision: str) -> None:
    """The newline stays as it is; batched answers are those alone."""
    save(load_network(folder, precision=precision), tmp_path / "small", processor_from=folder)
    network = load_network(tmp_path / "small")
    assert network.image_newline is not None
    assert torch.equal(network.image_newline.float(), load_network(folder).image_newline)
    bot = load(tmp_path / "small", device="cpu", kv_precision="int8")
    chats = [PROMPTS[case][0] for case in ("58 x 44", "two images", "video of 5")]
    together = bot.batch(chats, max_new_tokens=8, ignore_eos=True)
    alone = [load(tmp_path / "small", device="cpu", kv_precision="int8") for _ in chats]
    for answer, one, chat in zip(together, alone, chats, strict=True):
        assert one.chat(chat, max_new_tokens=8, ignore_eos=True).text == answer.text


def test_training_moves_the_newline(folder: Path, tmp_path: Path) -> None:
    from llava_interleave.train.recipe import Recipe
    from llava_interleave.train.run import run

    random_image(58, 44).save(tmp_path / "a.png")
    rows = [
        {
            "id": "1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A thing."},
            ],
        }
    ] * 4
    rows = [row | {"id": str(number)} for number, row in enumerate(rows)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    recipe = Recipe(
        model=str(folder), source=tmp_path / "data.json", steps=2, lr=0.01, tokens=500, workers=0
    )
    trained = load_network(run(recipe, tmp_path / "out", log=lambda _: None))
    before = load_network(folder)
    assert trained.image_newline is not None and before.image_newline is not None
    assert not torch.equal(trained.image_newline, before.image_newline)
