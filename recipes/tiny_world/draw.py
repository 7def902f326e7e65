"""Scenes as pixels: flat things on a background, or solid things on a floor seen from one side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (245, 220, 60),
    "green": (40, 160, 70),
    "blue": (45, 90, 220),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SOLIDS = ("ball", "cube", "cone")
DIGITS = "0123456789"
LETTERS = "ACEFHKLPRTXY"  # distinct from digits and from each other in a few pixels
TEXTURES = ("plain", "plain", "stripes", "checks", "dots", "noise")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing; x, y and radius are in units of the image's side, y downwards."""

    kind: str
    colour: str
    large: bool
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{'large' if self.large else 'small'} {self.colour} {self.kind}"

    @property
    def short(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Background:
    texture: str
    light: int
    contrast: int
    tint: tuple[int, int, int]
    seed: int

    @classmethod
    def sample(cls, rng: Random) -> Background:
        light = rng.choice([rng.randint(20, 60), rng.randint(185, 235)])
        tint = (rng.randint(-8, 8), rng.randint(-8, 8), rng.randint(-8, 8))
        return cls(rng.choice(TEXTURES), light, rng.randint(8, 20), tint, rng.randrange(2**31))


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in painting order on a background."""

    things: tuple[Thing, ...]
    background: Background


@lru_cache(maxsize=4096)
def stamp(kind: str, radius: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coverage and shade of a thing, `[2 * radius, 2 * radius]`, averaged from 4 times the size."""
    n, over = 2 * radius, 4
    big = n * over
    mask, shade = Image.new("L", (big, big), 0), Image.new("L", (big, big), 200)
    pen, tone = ImageDraw.Draw(mask), ImageDraw.Draw(shade)
    unit = np.array([big / 2, big / 2])

    def points(
        angles: NDArray[np.float64], radii: NDArray[np.float64]
    ) -> list[tuple[float, float]]:
        return [
            tuple(unit + big / 2 * r * np.array([np.sin(a), -np.cos(a)]))
            for a, r in zip(angles, radii, strict=True)
        ]

    if kind in ("circle", "ball"):
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif kind in ("square", "cube"):
        pen.rectangle((0.1 * big, 0.1 * big, 0.9 * big, 0.9 * big), fill=255)
    elif kind in ("triangle", "cone"):
        pen.polygon(
            [(0.5 * big, 0.02 * big), (0.98 * big, 0.95 * big), (0.02 * big, 0.95 * big)], fill=255
        )
    elif kind == "star":
        pen.polygon(
            points(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2 == 0, 1.0, 0.42)), fill=255
        )
    elif kind == "cross":
        pen.rectangle((0.34 * big, 0.04 * big, 0.66 * big, 0.96 * big), fill=255)
        pen.rectangle((0.04 * big, 0.34 * big, 0.96 * big, 0.66 * big), fill=255)
    else:
        font = ImageFont.load_default(size=1.3 * big)
        pen.text((big / 2, big / 2), kind, fill=255, font=font, anchor="mm", stroke_width=big // 40)
    if kind == "ball":
        tone.ellipse((0.2 * big, 0.12 * big, 0.55 * big, 0.47 * big), fill=255)
    elif kind == "cube":
        tone.rectangle((0, 0, big, 0.32 * big), fill=255)
    elif kind == "cone":
        tone.polygon([(0.5 * big, 0), (0.5 * big, big), (0, big)], fill=255)
    small = [np.asarray(p.reduce(over), dtype=np.float32) for p in (mask, shade)]
    return small[0] / np.float32(255), small[1] / np.float32(200) if kind in SOLIDS else np.ones(
        (n, n), np.float32
    )


@lru_cache(maxsize=64)
def backdrop(b: Background, size: int) -> NDArray[np.float32]:
    """A muted background `[size, size, 3]`, plain or textured."""
    plain = b.light + np.array(b.tint, np.float32)
    if b.texture == "plain":
        return np.broadcast_to(plain, (size, size, 3))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    rng = np.random.default_rng(b.seed)
    turns = rng.integers(4, 9)
    if b.texture == "stripes":
        wave = np.sin(2 * np.pi * turns * (x * np.cos(b.seed) + y * np.sin(b.seed)))
    elif b.texture == "checks":
        wave = np.where((np.floor(x * turns) + np.floor(y * turns)) % 2 == 0, 1.0, -1.0)
    elif b.texture == "dots":
        wave = np.where((x * turns % 1 - 0.5) ** 2 + (y * turns % 1 - 0.5) ** 2 < 0.06, 1.0, -0.3)
    elif b.texture == "noise":
        grain = -(-size // 24)
        wave = rng.standard_normal((24, 24)).repeat(grain, 0).repeat(grain, 1)[:size, :size] / 2
    else:
        raise AssertionError(b.texture)
    return (plain + b.contrast * wave[..., None]).astype(np.float32)


def draw(scene: Scene, size: int) -> Pixels:
    """The image `[size, size, 3]` of a scene."""
    canvas = backdrop(scene.background, size).copy()
    for thing in scene.things:
        paste(canvas, thing, size)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def paste(canvas: NDArray[np.float32], thing: Thing, size: int) -> None:
    (rows, columns), cover, shade = place(thing, size)
    colour = np.array(COLOURS[thing.colour], np.float32) * shade[..., None]
    under = canvas[rows, columns]
    under += (np.minimum(colour, 255) - under) * cover[..., None]


def place(
    thing: Thing, size: int
) -> tuple[tuple[slice, slice], NDArray[np.float32], NDArray[np.float32]]:
    """Position of a thing in an image of `size` pixels, its coverage and its shade there."""
    radius = max(2, round(thing.radius * size))
    left, top = round(thing.x * size) - radius, round(thing.y * size) - radius
    cover, shade = stamp(thing.kind, radius)
    y0, y1, x0, x1 = (
        max(0, -top),
        min(2 * radius, size - top),
        max(0, -left),
        min(2 * radius, size - left),
    )
    inside = slice(y0, max(y0, y1)), slice(x0, max(x0, x1))
    return (
        (slice(top + y0, top + max(y0, y1)), slice(left + x0, left + max(x0, x1))),
        cover[inside],
        shade[inside],
    )


def owners(scene: Scene, size: int) -> NDArray[np.int64]:
    """`[size, size]`: the index of the thing that covers each pixel, -1 for the background."""
    owner = np.full((size, size), -1)
    for index, thing in enumerate(scene.things):
        where, cover, _ = place(thing, size)
        owner[where][cover > 0.5] = index
    return owner


def visible(scene: Scene, size: int = 96) -> list[float]:
    """For each thing the share of it that later things leave visible."""
    seen = np.bincount(owners(scene, size).ravel() + 1, minlength=len(scene.things) + 1)[1:]
    whole = [int((place(thing, size)[1] > 0.5).sum()) for thing in scene.things]
    return [int(part) / max(1, all_) for part, all_ in zip(seen, whole, strict=True)]


def patches(scene: Scene, size: int, patch: int) -> list[Thing | None]:
    """For each patch of an image, row by row, the thing that it represents.

    It is the thing that covers most of the patch, if it covers 3 % (a small star covers 6 %). A
    thing of which less than a fifth is visible has no patch. Any other thing that covers most of no
    patch gets the nearest patch that is empty or one of several of its thing.
    """
    grid = size // patch
    owner = (
        owners(scene, size)
        .reshape(grid, patch, grid, patch)
        .swapaxes(1, 2)
        .reshape(grid * grid, -1)
    )
    covers = np.stack(
        [np.bincount(pixels + 1, minlength=len(scene.things) + 1)[1:] for pixels in owner]
    )
    seen = np.array(visible(scene, size)) > 0.2
    large = covers * seen * (covers > 0.03 * patch**2)
    found = [int(counts.argmax()) if counts.any() else -1 for counts in large]
    for index in np.flatnonzero(seen):
        if index not in found and covers[:, index].any():
            at = int(covers[:, index].argmax())
            spare = [p for p, thing in enumerate(found) if thing < 0 or found.count(thing) > 1]
            steps = {p: (abs(p // grid - at // grid), abs(p % grid - at % grid)) for p in spare}
            if spare:
                found[
                    max(spare, key=lambda p: (covers[p, index], -max(steps[p]), -steps[p][1], -p))
                ] = int(index)
    return [scene.things[index] if index >= 0 else None for index in found]


def write_video(frames: list[Pixels], path: Path, fps: int = 8) -> None:
    """Frames `[size, size, 3]` as an H.264 file."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "14"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
