"""Images that the model refuses to answer about: cut, mixed and distorted from a folder of images,
or made up."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from .episodes import SCENARIOS, episode
from .styles import restyled

SIDE = 128  # pixels of the shorter side, at least, before the processor makes 96
LEAST_SPREAD = 10.0  # standard deviation in levels: a piece of sky is an empty background


@cache
def files(folder: Path) -> tuple[tuple[Path, ...], ...]:
    """The image files of each source in a folder."""
    sources = sorted(path for path in folder.iterdir() if path.is_dir())
    return tuple(tuple(sorted(source.iterdir())) for source in sources)


@cache
def opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def image(rng: Random, folder: Path) -> Image.Image:
    """An image that is not of the world."""
    while True:
        lot = rng.random()
        if lot < 0.68:
            made = piece(rng, folder)
        elif lot < 0.78:
            made = mosaic(rng, [piece(rng, folder) for _ in range(rng.choice((2, 4, 9)))])
        elif lot < 0.86:
            made = framed(rng, piece(rng, folder))
        elif lot < 0.90:
            made = beside_a_scene(rng, piece(rng, folder))
        else:
            made = rng.choice(MADE_UP)(rng)
        made = distorted(rng, made)
        if np.asarray(made.resize((24, 24)), float).std(axis=(0, 1)).max() > LEAST_SPREAD:
            return made


def piece(rng: Random, folder: Path) -> Image.Image:
    """A file of a random source, whole or a part of it, squashed to another shape."""
    sources = files(folder)
    weights = [min(len(source), 250) ** 0.5 for source in sources]
    picture = opened(rng.choice(rng.choices(sources, weights)[0]))
    if rng.random() < 0.65:
        share = rng.uniform(0.3, 1) if rng.random() < 0.8 else rng.uniform(0.12, 0.4)
        w, h = (max(24, round(side * share * rng.uniform(0.8, 1))) for side in picture.size)
        w, h = min(w, picture.width), min(h, picture.height)
        left, top = rng.randint(0, picture.width - w), rng.randint(0, picture.height - h)
        picture = picture.crop((left, top, left + w, top + h))
    way = rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX))
    picture = picture.resize((SIDE, round(SIDE * rng.choice((1.0, 1.0, 0.75, 1.33)))), way)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.12:
        picture = picture.transpose(
            rng.choice(
                (
                    Image.Transpose.ROTATE_90,
                    Image.Transpose.ROTATE_180,
                    Image.Transpose.ROTATE_270,
                )
            )
        )
    return picture


def distorted(rng: Random, picture: Image.Image) -> Image.Image:
    """Other brightness, contrast and saturation; grey, inverted, blurred or with noise."""
    if rng.random() < 0.6:
        picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.6, 1.5))
        picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.6, 1.5))
        picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.0, 2.0))
    lot = rng.random()
    if lot < 0.05:
        picture = ImageOps.grayscale(picture).convert("RGB")
    elif lot < 0.08:
        picture = ImageOps.invert(picture)
    elif lot < 0.12:
        picture = ImageOps.posterize(picture, rng.randint(2, 4))
    elif lot < 0.20:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    elif lot < 0.26:
        pixels = np.asarray(picture, float)
        lots = np.random.default_rng(rng.randrange(2**31))
        pixels = pixels + lots.normal(0, rng.uniform(3, 25), pixels.shape)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    elif lot < 0.30:
        # Colours of one channel in another's place.
        bands = list(picture.split())
        rng.shuffle(bands)
        picture = Image.merge("RGB", bands)
    return picture


def mosaic(rng: Random, pieces: list[Image.Image]) -> Image.Image:
    columns = {2: rng.choice((1, 2)), 4: 2, 9: 3}[len(pieces)]
    rows = len(pieces) // columns
    w, h, gap = SIDE // columns, SIDE // rows, rng.choice((0, 0, 4, 8))
    canvas = Image.new("RGB", (SIDE, SIDE), plain(rng))
    for index, part in enumerate(pieces):
        at = (index % columns * w + gap, index // columns * h + gap)
        canvas.paste(part.resize((w - 2 * gap, h - 2 * gap)), at)
    return canvas


def framed(rng: Random, part: Image.Image) -> Image.Image:
    """A photograph on a plain page, or between the bars of a film."""
    share = rng.uniform(0.45, 0.95)
    w, h = round(SIDE * share), round(SIDE * min(0.98, share * rng.uniform(0.6, 1.4)))
    canvas = Image.new("RGB", (SIDE, SIDE), plain(rng))
    canvas.paste(part.resize((w, h)), (rng.randint(0, SIDE - w), rng.randint(0, SIDE - h)))
    return canvas


def beside_a_scene(rng: Random, part: Image.Image) -> Image.Image:
    """A drawn scene and a photograph in one image, or things drawn on the photograph."""
    scene = restyled(rng, episode(rng.choice(SCENARIOS), rng))[0].resize((SIDE, SIDE))
    if rng.random() < 0.4:
        return Image.blend(part.resize((SIDE, SIDE)), scene, rng.uniform(0.3, 0.6))
    canvas = Image.new("RGB", (2 * SIDE, SIDE))
    parts = [scene, part.resize((SIDE, SIDE))]
    rng.shuffle(parts)
    for index, half in enumerate(parts):
        canvas.paste(half, (index * SIDE, 0))
    return canvas if rng.random() < 0.5 else canvas.transpose(Image.Transpose.ROTATE_90)


def plain(rng: Random) -> tuple[int, int, int]:
    grey = rng.choice((0, 255, 255, rng.randint(0, 255)))
    return rng.choice(((grey, grey, grey), any_colour(rng)))


def any_colour(rng: Random) -> tuple[int, int, int]:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def noise(rng: Random) -> Image.Image:
    """White or smooth noise, grey or coloured."""
    lots = np.random.default_rng(rng.randrange(2**31))
    side = rng.choice((3, 4, 6, 10, 24, 96, SIDE))
    grid = lots.uniform(0, 255, (side, side, rng.choice((1, 3)))).repeat(3, 2)[:, :, :3]
    return Image.fromarray(grid.astype(np.uint8)).resize((SIDE, SIDE))


def gradient(rng: Random) -> Image.Image:
    """From one colour to another that is far from it."""
    a, b = np.array(any_colour(rng), float), np.array(any_colour(rng), float)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle = rng.uniform(0, 6.28)
    share = x * np.cos(angle) + y * np.sin(angle)
    if rng.random() < 0.3:
        share = np.hypot(x - rng.random(), y - rng.random())
    share = (share - share.min()) / np.ptp(share)
    return Image.fromarray((a + (b - a) * share[..., None]).astype(np.uint8))


WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "with", "as", "was", "on", "are",
    "be", "this", "by", "at", "from", "or", "have", "an", "they", "which", "one", "you", "were",
    "all", "her", "there", "been", "their", "we", "him", "about", "time", "file", "name", "total",
    "price", "date", "invoice", "error", "warning", "settings", "open", "close", "menu", "search",
    "results", "email", "table", "figure", "chapter",
)  # fmt: skip


def written(rng: Random) -> Image.Image:
    """Lines of text, as of a page, a terminal or a slide."""
    dark = rng.random() < 0.35
    ground, ink = ((20, 20, 24), (225, 225, 225)) if dark else ((255, 255, 255), (20, 20, 20))
    side = rng.choice((SIDE, 2 * SIDE, 3 * SIDE))
    canvas = Image.new("RGB", (side, side), rng.choice((ground, ground, plain(rng))))
    pen, size = ImageDraw.Draw(canvas), rng.uniform(9, 30)
    font, y = ImageFont.load_default(size=size), rng.uniform(2, 30)
    while y < side * rng.uniform(0.5, 1.2):
        words = " ".join(rng.choices(WORDS, k=rng.randint(2, 14)))
        colour = any_colour(rng) if rng.random() < 0.15 else ink
        pen.text((rng.choice((8, 8, 24)), y), words.capitalize(), colour, font)
        y += size * rng.uniform(1.1, 1.6)
    return canvas


def scribble(rng: Random) -> Image.Image:
    """Lines, curves and many-cornered areas of any colour."""
    canvas = Image.new("RGB", (SIDE, SIDE), plain(rng))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(4, 40)):
        points = [(rng.uniform(0, SIDE), rng.uniform(0, SIDE)) for _ in range(rng.randint(3, 6))]
        if rng.random() < 0.5:
            pen.line(points, any_colour(rng), rng.randint(1, 9), joint="curve")
        else:
            pen.polygon(points, any_colour(rng))
    return canvas


MADE_UP: tuple[Callable[[Random], Image.Image], ...] = (noise, gradient, written, scribble)
