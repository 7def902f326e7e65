"""The count that processing writes and the order that the network lays out are one thing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_interleave.image_layout import INTERLEAVE, ImageTokenLayout, anyres, best_pinpoint
from llava_interleave.model import arrange_features

SIDES = st.integers(1, 5000)


@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, st.integers(1, 9))
def test_network_lays_out_as_many_features_as_there_are_placeholders(
    width: int, height: int, grid: int
) -> None:
    """729 placeholders against 728 features is this family's best-known bug: two functions each
    counted for themselves.
    """
    layout = anyres(width, height, 384, grid)
    features = torch.arange(layout.crops * grid**2).view(layout.crops, grid**2, 1)
    assert len(arrange_features(features, layout)) == layout.length


def test_a_very_narrow_image_keeps_something() -> None:
    """100 x 1 pixels are less than half a feature high: the original's window is then empty."""
    assert anyres(100, 1, 384, 27).keep == (26, 0, 2, 27)


@pytest.mark.parametrize(
    ("size", "pinpoint", "tokens"),
    [
        ((768, 768), (768, 768), 729 + 54 * 54),
        ((1000, 1000), (768, 768), 729 + 54 * 54),
        ((384, 768), (384, 768), 729 + 54 * 27),
        ((1920, 1080), (768, 768), 729 + 54 * 30),
        ((300, 3000), (384, 1152), 729 + 81 * 9),
    ],
)
def test_anyres_counts_of_the_original(
    size: tuple[int, int], pinpoint: tuple[int, int], tokens: int
) -> None:
    assert best_pinpoint(*size, 384, INTERLEAVE.pinpoints) == pinpoint
    assert anyres(*size, 384, 27).length == tokens


def test_tiles_lie_row_by_row_behind_the_whole() -> None:
    layout = anyres(800, 400, 384, 2)  # two tiles side by side
    features = torch.arange(12).view(3, 4, 1)
    assert layout == ImageTokenLayout(2, 3, (1, 2), (0, 0, 2, 4))
    assert arrange_features(features, layout).flatten().tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        8,
        9,
        6,
        7,
        10,
        11,
    ]
