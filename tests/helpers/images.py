"""Images of random content."""

from __future__ import annotations

import numpy as np
from PIL import Image


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, so that resizing keeps its content."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
