"""How many tokens an image, an anyres image or a video becomes, and in what order. Knows no tensors.

`Layout.length` is the single source of "how many tokens": processing writes that many placeholders, the network lays out
that many feature vectors.
"""

from dataclasses import dataclass

PINPOINTS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
"""Anyres resolutions of the published original configs, (width, height) in pixels at a crop size of 384."""


@dataclass(frozen=True, slots=True)
class TokenReduction:
    """Visual token reduction of images and video frames; the names are those of `Options`, 1 is off.

    pool: side of the average-pooling window, in features. ratio: share of the tokens that DivPrune keeps.
    """

    image_token_pool: int = 1
    video_token_pool: int = 1
    image_token_ratio: float = 1.0
    video_token_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageTokenLayout:
    """Crops of `grid` x `grid` features and how they become tokens.

    Without `tiles` the crops follow each other (an image is one crop, a video one a frame). With `tiles` the first crop is
    the whole image, and the others, row by row, form one large grid of which the window `keep` remains (the
    letterbox is cut away). The mean of each square of `pool` x `pool` features of a crop is a token, at its right and lower edge
    that of what is left: 27 x 27 become 14 x 14, or 9 x 9. Of the tokens of each crop, or with `tiles` of all, the `share` that
    differ most from each other are kept, in their order.
    """

    grid: int
    crops: int = 1
    tiles: tuple[int, int] | None = None  # rows, columns
    keep: tuple[int, int, int, int] | None = (
        None  # top, left, height, width in tokens of the tiled grid
    )
    pool: int = 1
    share: float = 1.0

    def __post_init__(self) -> None:
        assert self.crops > 0 and 0 < self.pool <= self.grid and 0 < self.share <= 1
        assert (self.tiles is None) == (self.keep is None)
        if self.tiles and self.keep:
            rows, columns = self.tiles
            top, left, height, width = self.keep
            assert self.crops == 1 + rows * columns
            assert 0 <= top and top + height <= rows * self.side and height > 0
            assert 0 <= left and left + width <= columns * self.side and width > 0

    @property
    def side(self) -> int:
        """How many tokens a crop has on a side, before some are left out."""
        return -(-self.grid // self.pool)

    @property
    def length(self) -> int:
        """How many tokens, which is how many `<image>` placeholders stand in the prompt."""
        if self.keep is None:
            return self.crops * self._kept(self.side**2)
        return self._kept(self.side**2 + self.keep[2] * self.keep[3])

    def _kept(self, tokens: int) -> int:
        return max(1, round(tokens * self.share))


def best_pinpoint(width: int, height: int, crop: int) -> tuple[int, int]:
    """The anyres resolution (width, height) that keeps most of an image, then wastes least.

    Source: LLaVA-NeXT `llava/mm_utils.py` select_best_resolution.
    """
    best, best_key = (crop, crop), (-1, 0)
    for pin_w, pin_h in ((w * crop // 384, h * crop // 384) for w, h in PINPOINTS):
        scale = min(pin_w / width, pin_h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, -(pin_w * pin_h - effective))
        if key > best_key:
            best, best_key = (pin_w, pin_h), key
    return best


def anyres(width: int, height: int, crop: int, grid: int, pool: int = 1) -> ImageTokenLayout:
    """The layout of an image of `width` x `height` pixels cut into tiles of `crop` pixels, `grid` features a side.

    Source of the cut: LLaVA-NeXT `llava/model/llava_arch.py` unpad_image. The original's newline vector is not part of
    this family's Hugging Face checkpoints and is left out. Of a very narrow image, of which the original keeps nothing, the
    innermost features remain.
    """
    pin_w, pin_h = best_pinpoint(width, height, crop)
    rows, columns = pin_h // crop, pin_w // crop
    side = ImageTokenLayout(grid, pool=pool).side
    full_h, full_w = rows * side, columns * side
    if width / height > full_w / full_h:
        padding = (full_h - max(1, int(height * (full_w / width)))) // 2
        keep = (padding, 0, full_h - 2 * padding, full_w)
    else:
        padding = (full_w - max(1, int(width * (full_h / height)))) // 2
        keep = (0, padding, full_h, full_w - 2 * padding)
    return ImageTokenLayout(grid, 1 + rows * columns, (rows, columns), keep, pool)
