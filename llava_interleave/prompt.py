"""What a request or a training example is: all that processing hands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .image_layout import ImageTokenLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Media:
    """One image or video, ready for the tower.

    crops: `[crops, S, S, 3]` uint8 with a `table`, which take a quarter of the memory, or without
        one the pixels themselves.
    layout: how the crops' features become tokens; `layout.length` placeholders stand for it.
    key: hash of the crops' bytes with their number and size, the normalisation and the layout:
    equal keys, equal features.
    start: index of its first placeholder in `Prompt.tokens`.
    name: "image 1", "video 2" or "view front". label: with its source, "video 2: clip.mp4 (8
    frames)".
    table: `[3, 256]` float32, the normalized value of each byte by channel.
    """

    crops: Tensor
    layout: ImageTokenLayout
    key: bytes
    start: int
    name: str = ""
    label: str = ""
    table: Tensor | None = None

    @property
    def pixels(self) -> Tensor:
        """The tower's input, `[crops, 3, S, S]` float32, normalized."""
        return self.pixels_of(0, self.layout.crops)

    def pixels_of(self, start: int, stop: int) -> Tensor:
        """`pixels` of some crops."""
        crops = self.crops[start:stop]
        if self.table is None:
            return crops
        side = crops.shape[1]
        out = self.table.new_empty(len(crops), 3, side, side)
        for channel in range(3):
            values = crops[..., channel].flatten().int()
            out[:, channel] = self.table[channel].index_select(0, values).view(-1, side, side)
        return out


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every placeholder already expanded, and the media that the placeholders stand
    for, in order.

    loss_mask: training only, one number a token: the weight of its loss; False, or 0, for none.
    """

    tokens: list[int]
    media: tuple[Media, ...] = ()
    loss_mask: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.tokens)
