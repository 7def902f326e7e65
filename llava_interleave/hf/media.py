"""The tensors of transformers' processors as prompts of the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..config import LlavaConfig
from ..errors import PromptError
from ..image_layout import ImageTokenLayout, anyres
from ..prompt import Media, Prompt

MEDIA_ARGUMENTS = ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos")
"""Of OneVision's processor; that of Interleave has only the first."""
Crops = tuple[Tensor, ImageTokenLayout]
"""Pixels `[crops, 3, S, S]` of an image or video, and how their features become tokens."""


def prompts(
    rows: Sequence[list[int]],
    inputs: Mapping[str, Tensor | None],
    config: LlavaConfig,
    copies: int = 1,
) -> list[Prompt]:
    """Rows of `input_ids` without padding, with the media that their placeholders stand for.

    inputs: some of `MEDIA_ARGUMENTS`. copies: each row stands so often, its media once. Raises
    PromptError where placeholders and media do not match.
    """
    images, videos = _images(inputs, config), _videos(inputs, config)
    rest = {config.image_token_id: iter(images), config.video_token_id: iter(videos)}
    try:
        made = [Prompt(row, tuple(_media(row, rest))) for row in rows[::copies]]
        if any(next(media, None) is not None for media in rest.values()):
            raise PromptError
    except PromptError:
        needed = [sum(layout.length for _, layout in kind) for kind in (images, videos)]
        counts = [
            sum(row.count(token) for row in rows[::copies]) for token in config.placeholder_ids
        ]
        raise PromptError(
            f"input_ids have {sum(counts)} image tokens, but {len(images)} images in pixel_values "
            f"and {len(videos)} videos need {sum(needed)}; pass the processor's output"
        ) from None
    return [prompt for prompt in made for _ in range(copies)]


def _media(row: list[int], rest: Mapping[int | None, Iterator[Crops]]) -> Iterator[Media]:
    at = 0
    while at < len(row):
        token = row[at]
        if token not in rest:
            at += 1
            continue
        crops = next(rest[token], None)
        if crops is None or row[at : at + crops[1].length] != [token] * crops[1].length:
            raise PromptError
        pixels, layout = crops[0].contiguous(), crops[1]
        key = hashlib.sha256(repr((tuple(pixels.shape), layout)).encode() + pixels.numpy().data)
        yield Media(pixels, layout, b"pixel_values" + key.digest(), at)
        at += layout.length


def _images(inputs: Mapping[str, Tensor | None], config: LlavaConfig) -> list[Crops]:
    pixels, grid, arrangement = inputs.get("pixel_values"), config.vision.grid, config.arrangement
    if pixels is None:
        return []
    pixels = _checked(pixels, "pixel_values", 5 if arrangement.newline else 4, config)
    if not arrangement.newline:
        return [(one[None], config.image_layout) for one in pixels]
    sizes, counts = inputs.get("image_sizes"), inputs.get("batch_num_images")
    tiled = [True] * len(pixels)  # as transformers without batch_num_images
    if counts is not None:
        tiled = [n == 1 for n in counts.tolist() for _ in range(n)]
    if sizes is None or not len(sizes) == len(tiled) == len(pixels):
        raise PromptError("image_sizes and batch_num_images do not match pixel_values")
    images: list[Crops] = []
    for one, (height, width), alone in zip(pixels, sizes.tolist(), tiled, strict=True):
        layout = config.image_layout
        if alone:
            layout = anyres(width, height, config.vision.image_size, grid, arrangement=arrangement)
        if layout.crops > len(one):
            raise PromptError(
                f"pixel_values have {len(one)} crops, but an image of {width} x {height} pixels "
                f"has {layout.crops}"
            )
        images.append((one[: layout.crops], layout))
    return images


def _videos(inputs: Mapping[str, Tensor | None], config: LlavaConfig) -> list[Crops]:
    pixels = inputs.get("pixel_values_videos")
    if pixels is None:
        return []
    if config.video_token_id is None:
        raise PromptError("pixel_values_videos are OneVision's; give the frames as images")
    pixels = _checked(pixels, "pixel_values_videos", 5, config)
    return [(one, config.video_layout(len(one))) for one in pixels]


def _checked(pixels: Tensor, name: str, dim: int, config: LlavaConfig) -> Tensor:
    side = config.vision.image_size
    crop = (3, side, side)
    if pixels.dim() != dim or pixels.shape[-3:] != crop or not pixels.is_floating_point():
        raise PromptError(
            f"{name} {tuple(pixels.shape)} must be floats in {dim} dimensions, the last {crop}"
        )
    return pixels.to("cpu", torch.float32)
