"""A decoded image becomes RGB by one rule for each mode, and then the crops of the tower.

Opens no files.

To RGB (`to_rgb`), in this order:
- An animation is its first frame; color profiles are not applied.
- Gray modes of more than 8 bits (I;16 and its byte orders, I, F) have no range of their own, so the
  values decide: if the smallest is below 0 it becomes 0, and the values are scaled by
  255 / (2^n - 1) and rounded, with the smallest n from 8 on that holds the largest value. So 8-bit
  values in a wide mode stay, 12- and 16-bit values use their whole range, and no image becomes
  black. Floats up to 1 are scaled by 255; values that are not finite become 0. Of 16-bit color the
  decoder keeps the high byte, and 10- and 12-bit AVIF and HEIC are decoded to 8 bits.
- Modes with transparency (RGBA, LA, PA, RGBa, La, and modes with a transparent color or palette)
  are composited on white.
- 1, L, P, CMYK, YCbCr, HSV and RGBX go through Pillow's `convert("RGB")`, LAB through its color
  management (D50 white, relative colorimetric).
- EXIF orientation is applied.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms

from ..config_json import read_json
from ..errors import CheckpointError, MediaError
from ..image_layout import INTERLEAVE, Arrangement, ImageTokenLayout, best_pinpoint

if TYPE_CHECKING:
    from torch import Tensor

TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
ORIENTATION = 0x0112
"""The EXIF tag of the camera's orientation; values from 5 on swap the sides."""
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ACTIONS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
}
KNOWN = {"size", "image_mean", "image_std", "resample", "rescale_factor", *ACTIONS}
PLAIN = ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, by the rules of this module. Raises MediaError for a mode that has none."""
    turn = TRANSPOSITIONS.get(orientation(image))
    rgb = _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, which is upright, where it is missing or damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  Pillow's parsers raise anything
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_rgb(image)
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode not in PLAIN:
        raise MediaError(
            f"images of mode {image.mode} have no defined way to RGB; convert to L, RGB or RGBA"
        )
    return image.convert("RGB")


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, posinf=0, neginf=0)
    low = min(float(values.min()), 0.0)
    high = float(values.max()) - low
    scale = 1.0 if image.mode == "F" and high <= 1 else 2 ** max(int(high).bit_length(), 8) - 1
    clear = image.info.get("transparency")
    gray = np.empty(values.shape, np.uint8)
    for row, line in zip(gray, values, strict=True):  # by rows, for float64 takes much memory
        row[:] = ((line - low) * (255 / scale)).round()
        if isinstance(clear, int | float):
            row[line == clear] = 255
    return Image.fromarray(gray).convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB", intent)
    rgb = ImageCms.applyTransform(image, transform)
    assert rgb is not None
    return rgb


def from_array(array: Any) -> Image.Image:
    """An array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]` with C in 1, 3, 4; uint8, or floats
    in 0..1.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu().numpy()
    shape = array.shape
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if (
        array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
        or 0 in shape
    ):
        raise MediaError(
            f"an array of shape {tuple(shape)} is not an image: [H, W], [H, W, C] or "
            "[C, H, W] with C in 1, 3, 4"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise MediaError("an image of floats must lie in 0..1; pass uint8 for 0..255")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise MediaError(f"an image array must be uint8 or floats in 0..1, not {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


@dataclass(frozen=True)
class ImageSettings:
    """preprocessor_config.json: crops of `size` pixels a side become (x * rescale - mean) / std."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @classmethod
    def from_folder(
        cls, folder: Path, size: int, arrangement: Arrangement = INTERLEAVE
    ) -> ImageSettings:
        """Settings of a checkpoint whose tower takes `size` pixels; without a file, the defaults.

        Raises CheckpointError for another kind of preprocessing, another size or other pinpoints
        than those of config.json.
        """
        values: dict[str, Any] = {}
        for name, key in (
            ("preprocessor_config.json", None),
            ("processor_config.json", "image_processor"),
        ):
            file = read_json(folder / name, optional=True)
            file = (file.get(key) or {}) if key else file
            if clash := sorted(
                k for k in KNOWN & file.keys() & values.keys() if file[k] != values[k]
            ):
                raise CheckpointError(
                    f"{name} and preprocessor_config.json disagree about {', '.join(clash)}"
                )
            values |= file
        kind = values.get("image_processor_type", "SiglipImageProcessor")
        onevision = arrangement.newline and kind.startswith("LlavaOnevision")
        if not (kind.startswith("Siglip") or onevision):
            raise CheckpointError(
                f"the checkpoint's images are prepared by {kind}, this family's by "
                f"SiglipImageProcessor{' or LlavaOnevisionImageProcessor' * arrangement.newline}"
            )
        if onevision:
            _check_onevision(values, size, arrangement)
        actions = ACTIONS | ({"do_pad": True} if onevision else {})
        if wrong := [
            k
            for k, value in actions.items()
            if values.get(k) is not None and bool(values[k]) != value
        ]:
            raise CheckpointError(
                f"preprocessing with {', '.join(f'{k}={values[k]}' for k in wrong)} is not of "
                "this family"
            )
        sides = values.get("size", size)
        sides = set(sides.values()) if isinstance(sides, dict) else {sides}
        if sides != {size}:
            raise CheckpointError(
                f"images are prepared at {values['size']} but the vision tower takes {size} x "
                f"{size} pixels"
            )
        try:
            mean, std = (_triple(values.get(k, 0.5)) for k in ("image_mean", "image_std"))
            resample = Image.Resampling(values.get("resample", 3))
            rescale = float(values.get("rescale_factor", 1 / 255))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                "image_mean, image_std, resample or rescale_factor of the preprocessing is "
                "malformed"
            ) from error
        if not (all(std) and all(map(math.isfinite, (*mean, *std, rescale)))):
            raise CheckpointError(
                f"image_mean {mean}, image_std {std} and rescale_factor {rescale} cannot "
                "normalize an image"
            )
        return cls(size, mean, std, rescale, resample)

    @cached_property
    def table(self) -> Tensor:
        """Normalized value of each byte, `[3, 256]` float32, in SiglipImageProcessor's order."""
        import torch

        scaled = (np.arange(256, dtype=np.float64) * self.rescale).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return torch.from_numpy(np.asarray((scaled - mean) / std, np.float32))

    def fit(self, image: Image.Image, pad: bool = False) -> Image.Image:
        """An RGB image as one crop: squashed, or with `pad` made square with bars of the mean.

        Source of the bars: LLaVA-NeXT `llava/mm_utils.py` expand2square.
        """
        width, height = image.size
        if pad and width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in self.mean))
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        return (
            image
            if image.size == (self.size, self.size)
            else image.resize((self.size, self.size), self.resample)
        )

    def anyres_tiles(
        self, image: Image.Image, arrangement: Arrangement = INTERLEAVE
    ) -> list[Image.Image]:
        """An RGB image for anyres: the squashed whole, then tiles of it letterboxed in black.

        The tiles go row by row.
        Source: LLaVA-NeXT `llava/mm_utils.py` process_anyres_image, resize_and_pad_image,
        divide_to_patches.
        """
        pin_w, pin_h = best_pinpoint(*image.size, self.size, arrangement.pinpoints)
        scale_w, scale_h = pin_w / image.width, pin_h / image.height
        if scale_w < scale_h:
            width, height = pin_w, min(math.ceil(image.height * scale_w), pin_h)
        else:
            width, height = min(math.ceil(image.width * scale_h), pin_w), pin_h
        canvas = Image.new("RGB", (pin_w, pin_h))
        canvas.paste(
            image.resize((width, height), self.resample),
            ((pin_w - width) // 2, (pin_h - height) // 2),
        )
        corners = [(x, y) for y in range(0, pin_h, self.size) for x in range(0, pin_w, self.size)]
        return [self.fit(image)] + [
            canvas.crop((x, y, x + self.size, y + self.size)) for x, y in corners
        ]

    def stack(self, crops: Iterable[Image.Image], layout: ImageTokenLayout) -> tuple[Tensor, bytes]:
        """Crops of the right size as `Media.crops` `[crops, S, S, 3]` uint8, and their key.

        The key hashes the bytes of the crops with their number and size, the normalization and the
        layout: all that decides the features and their order, so equal keys mean equal features.
        """
        import torch

        digest = hashlib.sha256(
            repr((self.size, self.mean, self.std, self.rescale, layout)).encode()
        )
        out = np.empty((layout.crops, self.size, self.size, 3), np.uint8)
        for index, crop in enumerate(crops):
            assert crop.size == (self.size, self.size) and crop.mode == "RGB"
            out[index] = np.asarray(crop)
            digest.update(out[index].data)
        return torch.from_numpy(out), digest.digest()


def _check_onevision(values: Mapping[str, Any], size: int, arrangement: Arrangement) -> None:
    """What LlavaOnevisionImageProcessor's file must say. Raises CheckpointError."""
    if missing := [key for key in ("image_mean", "image_std") if key not in values]:
        raise CheckpointError(
            f"preprocessor_config.json has no {' and '.join(missing)}; the class's own are CLIP's, "
            "which are not of this family"
        )
    pairs = values.get("image_grid_pinpoints")
    pixels = {(rows * size, columns * size) for columns, rows in arrangement.pinpoints}
    if pairs is not None and {tuple(pair) for pair in pairs} != pixels:
        raise CheckpointError(
            f"image_grid_pinpoints of preprocessor_config.json has {len(pairs)} pairs that are not "
            f"the {len(pixels)} of config.json"
        )


def _triple(value: float | list[float]) -> tuple[float, float, float]:
    a, b, c = value if isinstance(value, list) else [value] * 3
    return float(a), float(b), float(c)
