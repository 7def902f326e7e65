"""How many tokens an image, an anyres image or a video becomes, and in what order. No tensors here.

`ImageTokenLayout.length` is the single source of "how many tokens": processing writes that many
placeholders, and the network lays out that many feature vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

Newline = Literal["none", "end", "frame", "row"]
"""Where `image_newline` stands: nowhere, once after a media's last feature (one_token in the
original's configs), after each crop (frame), or after each row of features (grid)."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a family member arranges features, and its defaults. The defaults are Interleave's.

    pinpoints: resolutions of anyres, (columns, rows) of tiles.
    newline: the network has the parameter `image_newline`, which ends rows of an anyres image and
        an untiled image.
    max_tiles: N of anyres_max_N: a larger window of features is shrunk bilinearly to about N tiles.
    video_pool: features of a frame are shrunk bilinearly to half a side, 27 x 27 to 14 x 14.
    video_newline: where the newline stands in a video.
    anyres: one image in a conversation is tiled by default; pad: several are padded by default.
    num_frames: frames of a video by default.
    frame_times: the prompt has a sentence with the times of the frames by default.

    Sources: LLaVA-NeXT `llava/model/llava_arch.py`, prepare_inputs_labels_for_multimodal;
    transformers 5.23 `modeling_llava_onevision.py`, pack_image_features and apply_pooling.
    """

    pinpoints: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    newline: bool = False
    max_tiles: int | None = None
    video_pool: bool = False
    video_newline: Newline = "none"
    anyres: bool = False
    pad: bool = False
    num_frames: int = 16
    frame_times: bool = False


INTERLEAVE = Arrangement()
ONEVISION = Arrangement(
    pinpoints=tuple((columns, rows) for rows in range(1, 7) for columns in range(1, 7)),
    newline=True,
    max_tiles=9,
    video_pool=True,
    video_newline="end",
    anyres=True,
    pad=True,
    num_frames=32,
)
"""LLaVA-OneVision, as its published checkpoints say."""


@dataclass(frozen=True, slots=True)
class TokenReduction:
    """Visual token reduction of images and video frames; the names are those of `Options`.

    pool: side of the average-pooling window, in features; 1 is off.
    ratio: share of the tokens that DivPrune keeps; 1 is off.
    """

    image_token_pool: int = 1
    video_token_pool: int = 1
    image_token_ratio: float = 1.0
    video_token_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageTokenLayout:
    """Crops of `grid` x `grid` features and how they become tokens.

    Without `tiles` the crops follow each other (an image is one crop, a video one per frame). With
    `tiles` the first crop is the whole image, and the others, row by row, form one large grid of
    which the window `keep` remains (the letterbox is cut away), shrunk bilinearly to `shrink`.

    pool: each square of `pool` x `pool` features of a crop is averaged to a token, partial squares
        at its right and lower edge too: 27 x 27 become 14 x 14, or 9 x 9.
    bilinear: instead, a crop is shrunk bilinearly to half a side, rounded up: 27 x 27 to 14 x 14.
    share: of the tokens of each crop, or with `tiles` of all, the share that DivPrune keeps.
    newline: where `image_newline` stands; with `tiles` after each row of the window.
    """

    grid: int
    crops: int = 1
    tiles: tuple[int, int] | None = None  # rows, columns
    keep: tuple[int, int, int, int] | None = None  # top, left, height, width in the tiled grid
    pool: int = 1
    share: float = 1.0
    shrink: tuple[int, int] | None = None  # height, width
    bilinear: bool = False
    newline: Newline = "none"

    def __post_init__(self) -> None:
        assert self.crops > 0 and 0 < self.pool <= self.grid and 0 < self.share <= 1
        assert (self.tiles is None) == (self.keep is None)
        assert self.pool == 1 or not self.bilinear
        assert self.newline == "none" or (self.pool, self.share) == (1, 1.0)
        if self.tiles and self.keep:
            rows, columns = self.tiles
            top, left, height, width = self.keep
            assert self.crops == 1 + rows * columns
            assert 0 <= top and top + height <= rows * self.side and height > 0
            assert 0 <= left and left + width <= columns * self.side and width > 0
            assert self.newline in ("none", "row") and not self.bilinear
        assert self.shrink is None or (self.tiles is not None and min(self.shrink) > 0)

    @property
    def side(self) -> int:
        """How many tokens a crop has on a side, before some are left out."""
        return -(-self.grid // (2 if self.bilinear else self.pool))

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the tiled grid's window in tokens, newlines not counted."""
        assert self.keep is not None
        return self.shrink or self.keep[2:]

    @property
    def length(self) -> int:
        """How many tokens, which is how many `<image>` placeholders stand in the prompt."""
        if self.keep is not None:
            height, width = self.window
            return self._kept(self.side**2 + height * (width + (self.newline == "row")))
        newlines = {"none": 0, "end": 0, "frame": 1, "row": self.side}[self.newline]
        return self.crops * (self._kept(self.side**2) + newlines) + (self.newline == "end")

    def _kept(self, tokens: int) -> int:
        return max(1, round(tokens * self.share))


def best_pinpoint(
    width: int, height: int, crop: int, pinpoints: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The anyres resolution (width, height) that keeps most of an image, then wastes least.

    Source: LLaVA-NeXT `llava/mm_utils.py` select_best_resolution.
    """
    best, best_key = (crop, crop), (-1, 0)
    for columns, rows in pinpoints:
        pin_w, pin_h = columns * crop, rows * crop
        scale = min(pin_w / width, pin_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, -(pin_w * pin_h - effective))
        if key > best_key:
            best, best_key = (pin_w, pin_h), key
    return best


def anyres(
    width: int,
    height: int,
    crop: int,
    grid: int,
    pool: int = 1,
    arrangement: Arrangement = INTERLEAVE,
) -> ImageTokenLayout:
    """The layout of an image of `width` x `height` pixels in tiles of `crop` pixels.

    grid: features on a side of a tile.

    Sources: LLaVA-NeXT `llava/model/llava_arch.py` unpad_image. With a newline the lengths are
    rounded as transformers 5.23 does (`modeling_llava_onevision.py` unpad_image), which differs
    where a length is whole in exact arithmetic. Of a very narrow image, of which the original
    keeps nothing, the innermost features remain. Shrinking: the same file, pack_image_features.
    """
    pin_w, pin_h = best_pinpoint(width, height, crop, arrangement.pinpoints)
    rows, columns = pin_h // crop, pin_w // crop
    side = ImageTokenLayout(grid, pool=pool).side
    full_h, full_w = rows * side, columns * side
    digits = 7 if arrangement.newline else None

    def whole(length: float) -> int:
        return max(1, int(length if digits is None else round(length, digits)))

    if width / height > full_w / full_h:
        padding = (full_h - whole(height * (full_w / width))) // 2
        keep = (padding, 0, full_h - 2 * padding, full_w)
    else:
        padding = (full_w - whole(width * (full_h / height))) // 2
        keep = (0, padding, full_h, full_w - 2 * padding)
    shrink = None
    if arrangement.max_tiles is not None:
        times = math.sqrt(keep[2] * keep[3] / (arrangement.max_tiles * side**2))
        if times > 1.1:
            shrink = (int(keep[2] // times), int(keep[3] // times))
    newline: Newline = "row" if arrangement.newline else "none"
    tiles = (rows, columns)
    return ImageTokenLayout(
        grid, 1 + rows * columns, tiles, keep, pool, shrink=shrink, newline=newline
    )


@cache
def max_tokens_per_image(crop: int, grid: int, arrangement: Arrangement) -> int:
    """The most tokens of an image: tiled where the arrangement tiles by default, over all shapes.

    crop: pixels on a side of a tile. grid: features on a side of it.
    """
    one = ImageTokenLayout(grid, newline="end" if arrangement.newline else "none").length
    if not arrangement.anyres:
        return one
    sides = {(columns * grid, rows * grid) for columns, rows in arrangement.pinpoints}
    windows = {(w, h) for w, _ in sides for _, full in sides for h in range(1, full + 1)}
    windows |= {(w, h) for full, _ in sides for _, h in sides for w in range(1, full + 1)}
    sizes = {(math.ceil(w * crop / grid), math.ceil(h * crop / grid)) for w, h in windows}
    return max(anyres(w, h, crop, grid, arrangement=arrangement).length for w, h in sizes)
