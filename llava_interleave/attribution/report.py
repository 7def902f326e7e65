"""An attribution as one HTML page: images under their attention maps, shares, the answer."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import reports

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attribution import Attribution, ImageAttribution

SIDE = 384
"""Most pixels of an image's side in the page."""
HARDLY = 0.2
"""Nats: below, the answer is about as likely without the image."""
VEIL, GRAY = 0.85, 128
"""Opacity and gray of the veil over regions without attention, on dark and light images."""


def write(path: str | os.PathLike[str], result: Attribution) -> None:
    """Write the page. All maps share one scale. Raises `DataError`."""
    highest = max(float(image.heat.max()) for image in result.images) or 1.0
    reports.write(
        path,
        "attribution.html",
        title="Which image the answer used",
        question=result.question,
        answer=result.answer,
        logprob=result.logprob,
        probability=math.exp(result.logprob),
        layers=result.layers,
        left_out=result.images[0].change is not None,
        images=[_image(image, highest) for image in result.images],
    )


def _image(image: ImageAttribution, highest: float) -> dict[str, Any]:
    frames = [
        (reports.data_url(Image.fromarray(pixels), SIDE, quality=85), _veil(heat / highest))
        for pixels, heat in zip(image.pixels, image.heat, strict=True)
    ]
    return {
        "name": image.name,
        "change": image.change,
        "effect": "" if image.change is None else _effect(image.change),
        "share": image.share,
        "attention": image.attention,
        "frames": frames,
    }


def _effect(change: float) -> str:
    """How likely the answer is without an image, in words, as in the web UI."""
    if abs(change) < HARDLY:
        return "about as likely"
    times = math.exp(min(abs(change), 10))
    number = "over 1,000" if times > 1000 else f"{times:.0f}" if times >= 10 else f"{times:.1f}"
    return f"{number} times {'less' if change > 0 else 'more'} likely"


def _veil(heat: NDArray[np.float32]) -> str:
    """A map `[grid, grid]` of 0..1 as a veil, thinner for more attention.

    By the square root, or peaks would hide the rest.
    """
    veil = np.full((*heat.shape, 4), GRAY, np.uint8)
    veil[..., 3] = np.rint(255 * VEIL * (1 - np.sqrt(heat)))
    return reports.data_url(Image.fromarray(veil), SIDE, "PNG")
