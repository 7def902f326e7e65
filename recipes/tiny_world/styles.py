"""Domain randomization (Tobin et al. 2017, arXiv 1703.06907): scenes in other drawing styles.

`draw.draw` has one style. Here colours, backgrounds, outlines, proportions, sizes and the shape of
the canvas vary, with and without anti-aliasing, and what a scene's questions ask stays the same.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from math import cos, pi, sin
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .draw import COLOURS, SHAPES, SOLIDS, Background, Scene, Thing, backdrop, draw
from .episodes import Episode, about, cell_of, in_cell, listing, lots

Colour = tuple[int, int, int]
# Other hues of the six colours: of CSS, of Matplotlib, of Material Design.
HUES: dict[str, tuple[Colour, ...]] = {
    "red": ((255, 0, 0), (214, 39, 40), (244, 67, 54), (200, 0, 0), (220, 20, 60)),
    "orange": ((255, 165, 0), (255, 127, 14), (255, 152, 0), (255, 140, 0)),
    "yellow": ((255, 255, 0), (255, 235, 59), (255, 225, 25), (240, 228, 66)),
    "green": ((0, 128, 0), (44, 160, 44), (76, 175, 80), (0, 200, 0), (0, 255, 0), (34, 139, 34)),
    "blue": ((0, 0, 255), (31, 119, 180), (33, 150, 243), (30, 60, 200), (65, 105, 225)),
    "purple": ((128, 0, 128), (148, 103, 189), (156, 39, 176), (160, 32, 240)),
}
LARGE = 0.11  # a thing with at least this radius is large
SMALL = 0.095  # one of at most this radius is small
OVERSAMPLING = 3


@dataclass(frozen=True, slots=True)
class Style:
    """How the scenes of an episode are drawn.

    hues: of each colour. background: a plain colour, or None for the scene's own. gradient: how
    much lighter the bottom is than the top. antialias: without it, edges have steps. outline: its
    width in radii, and its colour. hollow: width of the stroke in radii of flat shapes that are
    not filled; 0 is filled. bar: half the width of a cross's bars in radii. notch: inner radius of
    a star. scales: of small and large things. width, height: of the canvas in pixels. quality: of
    JPEG compression; 0 is none. noise: standard deviation in levels.
    """

    hues: dict[str, Colour]
    background: Colour | None
    gradient: int
    antialias: bool
    outline: float
    ink: Colour
    hollow: float
    bar: float
    notch: float
    scales: tuple[float, float]
    width: int
    height: int
    quality: int
    noise: float

    @classmethod
    def sample(cls, rng: Random, colours: set[str], *, aspect: bool = True) -> Style:
        """A style in which things of these colours are seen. aspect: also canvases that are not
        square, on which a circle is round; the processor squashes them."""
        hues = {name: jitter(rng, rng.choice((COLOURS[name], *HUES[name]))) for name in COLOURS}
        taken = [hues[name] for name in colours]
        background = None if rng.random() < 0.25 else ground(rng, taken)
        side = rng.choice((96, 96, 128, 160, 224))
        ratio = rng.choice((1.0, 1.0, 4 / 3, 3 / 4, 1.5, 16 / 9)) if aspect else 1.0
        return cls(
            hues=hues,
            background=background,
            gradient=rng.choice((0, 0, 0, rng.randint(-24, 24))),
            antialias=rng.random() < 0.5,
            outline=rng.choice((0.0, 0.0, rng.uniform(0.03, 0.16))),
            ink=rng.choice(((0, 0, 0), (0, 0, 0), (255, 255, 255), (60, 60, 60))),
            hollow=rng.uniform(0.16, 0.36) if rng.random() < 0.12 else 0.0,
            bar=rng.uniform(0.2, 0.42),
            notch=rng.uniform(0.34, 0.52),
            scales=(rng.uniform(0.72, 1.1), rng.uniform(0.88, 1.2)),
            width=round(side * max(1.0, ratio)),
            height=round(side * max(1.0, 1 / ratio)),
            quality=rng.randint(50, 95) if rng.random() < 0.25 else 0,
            noise=rng.uniform(1, 6) if rng.random() < 0.15 else 0.0,
        )


def jitter(rng: Random, colour: Colour, by: int = 10) -> Colour:
    r, g, b = (min(255, max(0, c + rng.randint(-by, by))) for c in colour)
    return r, g, b


def ground(rng: Random, taken: list[Colour], *, saturated: bool = False) -> Colour:
    """White, black, grey, or a pale or dark colour that is far from all that is drawn on it.

    saturated: a colour such as dark blue, teal or olive.
    """
    for _ in range(50):
        light = rng.choice((255, 255, 255, 0, 0, rng.randint(0, 70), rng.randint(150, 250)))
        tint = rng.choice((0, 0, rng.randint(5, 45)))
        r, g, b = (min(255, max(0, light + rng.randint(-tint, tint))) for _ in range(3))
        if saturated:
            r, g, b = (rng.choice((rng.randint(0, 50), rng.randint(80, 170))) for _ in range(3))
        if all(abs(r - c[0]) + abs(g - c[1]) + abs(b - c[2]) > 170 for c in taken):
            return r, g, b
    return (255, 255, 255) if max(sum(c) for c in taken) < 400 else (0, 0, 0)


def restyled(rng: Random, ep: Episode) -> list[Image.Image]:
    """The images of an episode in another style, its frames and views all in the same."""
    colours = {t.colour for scene in ep.scenes for t in scene.things}
    if ep.clip:
        colours |= set(COLOURS)  # it may turn into any
    style = Style.sample(rng, colours)
    if ep.scenario == "views" or any(t.kind in SOLIDS for s in ep.scenes for t in s.things):
        style = replace(style, scales=(1.0, 1.0), width=style.height, height=style.height)
    each = ep.scenario == "single" or len({s.background.seed for s in ep.scenes}) > 1
    images = []
    for scene in ep.scenes:
        things = [scaled(t, style) for t in scene.things]
        if each and rng.random() < 0.6:
            things = resized(rng, things)
        images.append(draw_styled(rng, Scene(tuple(things), scene.background), style))
    return images


def scaled(thing: Thing, style: Style) -> Thing:
    radius = thing.radius * style.scales[thing.large]
    if thing.kind not in SOLIDS:
        radius = max(LARGE, radius) if thing.large else min(SMALL, radius)
    return replace(thing, radius=radius)


def resized(rng: Random, things: list[Thing]) -> list[Thing]:
    """Large things up to half the image, wherever the others and the border leave room; all things
    somewhere else in their ninth of the image."""
    out: list[Thing] = []
    for number, thing in enumerate(things):
        cell = cell_of(thing)
        x, y = (
            (place + rng.uniform(0.25, 0.75)) / 3 if rng.random() < 0.5 else (place + 0.5) / 3
            for place in (cell % 3, cell // 3)
        )
        moved = replace(thing, x=x, y=y)
        others = out + things[number + 1 :]
        gap = min((max(abs(o.x - x), abs(o.y - y)) - o.radius for o in others), default=1.0)
        if gap < thing.radius * 1.05:
            moved, gap = thing, thing.radius
        room = min(gap, moved.x + 0.02, moved.y + 0.02, 1.02 - moved.x, 1.02 - moved.y)
        if thing.large and room > LARGE:
            moved = replace(moved, radius=rng.uniform(LARGE, room))
        elif not thing.large:
            moved = replace(moved, radius=rng.uniform(0.05, min(SMALL, max(room, 0.06))))
        out.append(moved)
    return out


def plain(rng: Random) -> tuple[Episode, Image.Image]:
    """One to three shapes of any size at any place of a plain canvas, mostly squares and circles.

    The episode's scene has them in the first style: in the middle of the ninth of their centre.
    """
    kinds = ("square", "circle") if rng.random() < 0.7 else SHAPES
    pairs = lots(rng, rng.choice((1, 1, 2, 2, 3)), kinds)
    while True:
        placed: list[Thing] = []
        for kind, colour in pairs:
            large = rng.random() < 0.7
            low, high = (LARGE, rng.choice((0.2, 0.35, 0.48))) if large else (0.04, SMALL)
            reach = rng.uniform(low, high)  # of a square half its side, 0.8 of its radius
            radius = reach / 0.8 if kind == "square" else reach
            x, y = (rng.uniform(0.95 * reach, 1 - 0.95 * reach) for _ in range(2))
            placed.append(Thing(kind, colour, large, x, y, radius))
        apart = all(
            max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius and cell_of(a) != cell_of(b)
            for i, a in enumerate(placed)
            for b in placed[:i]
        )
        if apart and all(0.01 < place * 3 % 1 < 0.99 for t in placed for place in (t.x, t.y)):
            break
    placed.sort(key=cell_of)
    things = [in_cell(rng, cell_of(t), t.kind, t.colour, t.large) for t in placed]
    background = Background("plain", 235, 8, (0, 0, 0), 0)
    scene = Scene(tuple(things), background)
    style = replace(
        Style.sample(rng, {t.colour for t in things}, aspect=rng.random() < 0.3),
        gradient=0,
        antialias=rng.random() < 0.3,
        outline=0.0 if rng.random() < 0.8 else rng.uniform(0.02, 0.1),
        hollow=0.0 if rng.random() < 0.95 else rng.uniform(0.08, 0.3),
        quality=0 if rng.random() < 0.9 else rng.randint(60, 95),
        noise=0.0,
    )
    if rng.random() < 0.5:  # most canvases are larger than the model's
        grow = rng.choice((1.5, 2.0, 3.0))
        style = replace(style, width=round(style.width * grow), height=round(style.height * grow))
    if rng.random() < 0.4:  # the names' colours in CSS, Pillow and Matplotlib
        pure = {name: hues[0] for name, hues in HUES.items()}
        style = replace(style, hues=pure, background=None)
    seen = [style.hues[t.colour] for t in things]
    if saturated := rng.random() < 0.2:
        style = replace(style, background=None)
    style = replace(style, background=style.background or ground(rng, seen, saturated=saturated))
    ep = Episode("single", (scene,), listing(things), tuple(about(rng, things)))
    return ep, draw_styled(rng, Scene(tuple(placed), background), style)


def draw_styled(rng: Random, scene: Scene, style: Style) -> Image.Image:
    width, height = style.width, style.height
    over = OVERSAMPLING if style.antialias else 1
    if style.background is None:
        side = max(width, height)
        base = Image.fromarray(backdrop(scene.background, side).clip(0, 255).astype(np.uint8))
        base = base.resize((width, height))
    else:
        rows = np.linspace(-style.gradient, style.gradient, height)[:, None, None] / 2
        plain = np.broadcast_to(np.array(style.background, float) + rows, (height, width, 3))
        base = Image.fromarray(plain.clip(0, 255).astype(np.uint8))
    canvas = base.resize((width * over, height * over), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        unit = min(width, height) * over
        shape(
            pen, thing, thing.x * width * over, thing.y * height * over, thing.radius * unit, style
        )
    image = canvas.reduce(over) if over > 1 else canvas
    if style.noise:
        noise = np.random.default_rng(rng.randrange(2**31)).normal(
            0, style.noise, (height, width, 3)
        )
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    if style.quality:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=style.quality)
        image = Image.open(file).convert("RGB")
    return image


def shape(
    pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float, style: Style
) -> None:
    """One thing around (x, y); in the proportions of `draw.stamp`, or the style's."""
    fill = style.hues[thing.colour]
    edge = round(style.outline * r)

    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x + r * u, y + r * v) for u, v in points]

    if thing.kind in SHAPES or thing.kind in SOLIDS:
        corners = outline_of(thing.kind, style)
        hollow = style.hollow if thing.kind in SHAPES else 0.0
        line = (fill, max(2, round(hollow * r))) if hollow else (style.ink, edge)
        inside = None if hollow else fill
        if corners is None:
            box = at([(-1, -1), (1, 1)])
            pen.ellipse(box, inside, line[0] if line[1] else None, line[1])
        else:
            pen.polygon(at(corners), inside)
            if line[1]:
                closed = at([*corners, *corners[:2]])
                pen.line(closed, line[0], line[1], joint="curve")
        if thing.kind in SOLIDS:
            bright = tuple(min(255, round(c * 255 / 200)) for c in fill)
            if thing.kind == "ball":
                pen.ellipse(at([(-0.6, -0.76), (0.1, -0.06)]), bright)
            elif thing.kind == "cube":
                pen.rectangle(at([(-0.8, -0.8), (0.8, -0.36)]), bright)
            else:
                pen.polygon(at([(0, -0.96), (0.96, 0.9), (0, 0.9)]), bright)
    else:
        font = ImageFont.load_default(size=max(4.0, 1.3 * 2 * r))
        weight = round(r * (0.05 + style.bar / 8))
        pen.text((x, y), thing.kind, fill, font, anchor="mm", stroke_width=weight)


def outline_of(kind: str, style: Style) -> list[tuple[float, float]] | None:
    """The corners of a shape of radius 1; None for a circle."""
    if kind in ("square", "cube"):
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if kind in ("triangle", "cone"):
        return [(0, -0.96), (0.96, 0.9), (-0.96, 0.9)]
    if kind == "star":
        radii = [1.0 if i % 2 == 0 else style.notch for i in range(10)]
        return [(r * sin(i * pi / 5), -r * cos(i * pi / 5)) for i, r in enumerate(radii)]
    if kind == "cross":
        b, e = style.bar, 0.92
        return [
            (-b, -e), (b, -e), (b, -b), (e, -b), (e, b), (b, b),
            (b, e), (-b, e), (-b, b), (-e, b), (-e, -b), (-b, -b),
        ]  # fmt: skip
    return None


def images(rng: Random, ep: Episode, size: int, *, styled: float) -> list[Image.Image]:
    """The images of an episode, with probability `styled` in another style."""
    if rng.random() < styled:
        return restyled(rng, ep)
    return [Image.fromarray(draw(scene, size)) for scene in ep.scenes]
