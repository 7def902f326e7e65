"""Pixels equal SiglipImageProcessor's bit for bit, and every mode becomes RGB by its documented
rule.
"""

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_interleave.errors import CheckpointError, MediaError
from llava_interleave.image_layout import ImageTokenLayout, anyres
from llava_interleave.processing import Loader
from llava_interleave.processing.images import ImageSettings, from_array
from llava_interleave.prompt import Media


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pixels(settings: ImageSettings, image: Image.Image) -> torch.Tensor:
    crops, key = settings.stack([settings.fit(image)], ImageTokenLayout(1))
    return Media(crops, ImageTokenLayout(1), key, 0, table=settings.table).pixels


@pytest.mark.parametrize("size", [(640, 480), (384, 384), (37, 900), (1, 1), (1500, 700)])
@pytest.mark.parametrize("settings", [
    ImageSettings(384),
    ImageSettings(56, (0.48, 0.45, 0.4), (0.26, 0.27, 0.28), 1 / 127.5, Image.Resampling.BILINEAR),
])  # fmt: skip
def test_rgb_pixels_equal_transformers_bit_for_bit(
    size: tuple[int, int], settings: ImageSettings
) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(
        size={"height": settings.size, "width": settings.size},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        rescale_factor=settings.rescale,
        resample=settings.resample,
        do_convert_rgb=None,
    )
    image = noise(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels(settings, image), expected)


def test_every_byte_normalises_as_in_transformers() -> None:
    """(x/255 - 0.5) / 0.5 in another order differs in the last bit for some bytes."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    assert torch.equal(
        pixels(ImageSettings(16), ramp), theirs(ramp, return_tensors="pt")["pixel_values"]
    )


def png_16bit_grey(values: list[int]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"\0" + struct.pack(f">{len(values)}H", *values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colours(data: object) -> list[tuple[int, ...]]:
    image = Loader().image(data)
    assert image.mode == "RGB"
    return [tuple(row) for row in np.asarray(image).reshape(-1, 3).tolist()]


def test_transparency_is_composed_on_white() -> None:
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8))
    half = 127
    assert colours(saved(rgba, "PNG")) == [(255, 0, 0), (255, 255, 255), (half, half, half)]
    assert colours(saved(rgba.convert("LA"), "PNG"))[1] == (255, 255, 255)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert colours(saved(palette, "PNG")) == [(255, 0, 0), (0, 255, 0)]
    assert colours(saved(palette, "PNG", transparency=1)) == [(255, 0, 0), (255, 255, 255)]
    grey = Image.fromarray(np.array([[0, 9]], np.uint8))
    assert colours(saved(grey, "PNG", transparency=0)) == [(255, 255, 255), (9, 9, 9)]


def test_sixteen_bits_are_scaled_not_cut() -> None:
    """Pillow's convert("RGB") clips 16-bit grey at 255: nearly every such image came out
    white.
    """
    assert colours(png_16bit_grey([0, 128, 129, 32768, 65535])) == [
        (v, v, v) for v in (0, 0, 1, 128, 255)
    ]
    assert colours(Image.fromarray(np.array([[65535, 257]], np.int32)))[:2] == [
        (255, 255, 255),
        (1, 1, 1),
    ]


def test_other_modes_go_through_pillow() -> None:
    for mode in ("1", "L", "CMYK", "YCbCr", "HSV"):
        image = noise(5, 4).convert(mode)
        assert colours(image) == [
            tuple(row) for row in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()
        ]
    cmyk = saved(noise(8, 8).convert("CMYK"), "JPEG")
    assert colours(cmyk) == [
        tuple(r)
        for r in np.asarray(Image.open(BytesIO(cmyk)).convert("RGB")).reshape(-1, 3).tolist()
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(noise(16, 8), "PNG", exif=exif)
    turned = Loader().image(data)
    assert turned.size == ((8, 16) if orientation > 4 else (16, 8)) == Loader().image_size(data)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert set(colours(data)) == {(255, 0, 0)}


def test_arrays() -> None:
    image = noise(6, 5)
    array = np.asarray(image)
    for same in (
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        array.astype(np.float64) / 255,
        np.asfortranarray(array),
    ):
        assert np.array_equal(np.asarray(from_array(same)), array)
    assert from_array(array[..., 0]).mode == from_array(array[..., :1]).mode == "L"
    for wrong in (array.astype(np.float32), array.astype(np.int64), np.zeros((2, 5, 7), np.uint8), np.zeros((0, 3, 3), np.uint8),
                  np.full((3, 3), np.nan)):  # fmt: skip
        with pytest.raises(MediaError):
            from_array(wrong)


def test_padding_of_the_original() -> None:
    settings = ImageSettings(8)
    wide = np.asarray(settings.fit(Image.new("RGB", (8, 4), "red"), pad=True))
    assert (wide[:2] == 127).all()
    assert (wide[6:] == 127).all()
    assert (wide[2:6] == (255, 0, 0)).all()


def test_anyres_tiles_of_the_original() -> None:
    """Ratio kept, centred on black, tiles row by row behind the squashed whole."""
    settings = ImageSettings(16)
    image = noise(60, 60)
    crops = settings.anyres_tiles(image)
    assert len(crops) == anyres(60, 60, 16, 2).crops == 5
    assert crops[0].tobytes() == settings.fit(image).tobytes()
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    tiled = np.vstack([np.hstack([np.asarray(crops[i]), np.asarray(crops[i + 1])]) for i in (1, 3)])
    assert np.array_equal(tiled, whole)
    bars = np.asarray(
        settings.anyres_tiles(Image.new("RGB", (90, 10), "white"))[1]
    )  # 48 x 16 holds 48 x 6
    assert (bars[:5] == 0).all()
    assert (bars[5:11] == 255).all()
    assert (bars[11:] == 0).all()


def test_keys_differ_where_features_differ() -> None:
    """A key without size or mode let one user's cached features answer for another's image
    (CVE-2025-46722).
    """
    settings, image = ImageSettings(8), noise(8, 8)
    key = settings.stack([image], ImageTokenLayout(2))[1]
    assert key == ImageSettings(8).stack([image.copy()], ImageTokenLayout(2))[1]
    changed = image.copy()
    changed.putpixel((0, 0), tuple(255 - v for v in image.getpixel((0, 0))))  # type: ignore[union-attr]
    others = [
        settings.stack([changed], ImageTokenLayout(2))[1],
        settings.stack([image], ImageTokenLayout(1))[1],
        settings.stack([image, image], ImageTokenLayout(2, 2))[1],
        ImageSettings(8, mean=(0.4, 0.5, 0.5)).stack([image], ImageTokenLayout(2))[1],
        ImageSettings(4).stack([noise(4, 4)] * 4, ImageTokenLayout(2, 4))[1],
    ]
    assert len({key, *others}) == 6


def test_settings_of_another_preprocessing_are_refused(tmp_path: Path) -> None:
    good = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 8, "width": 8},
        "resample": 2,
        "image_mean": [0.1, 0.2, 0.3],
    }

    def read(values: dict[str, Any], name: str = "preprocessor_config.json") -> ImageSettings:
        (tmp_path / name).write_text(json.dumps(values))
        return ImageSettings.from_folder(tmp_path, 8)

    assert ImageSettings.from_folder(tmp_path, 8) == ImageSettings(8)
    assert read(good) == ImageSettings(8, mean=(0.1, 0.2, 0.3), resample=Image.Resampling.BILINEAR)
    for change, message in (
        ({"size": {"height": 9, "width": 8}}, "takes 8 x 8"),
        ({"size": {"shortest_edge": 8}, "do_center_crop": True}, "do_center_crop=True"),
        ({"do_resize": False}, "do_resize=False"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"image_std": [0, 1, 1]}, "cannot normalize"),
        ({"image_mean": [1, 2]}, "malformed"),
        ({"resample": 77}, "malformed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(good | change)
    read(good)
    with pytest.raises(CheckpointError, match="disagree about resample"):
        read({"image_processor": {"resample": 3}}, "processor_config.json")
