"""An explanation as one HTML page: pictures, maps laid over them, shares, the answer. Needs no script and no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .attribution import Attribution, ImageAttribution

SIDE = 384
"""Most pixels of a picture's side in the page."""
VEIL, GREY = 0.85, 128
"""How much what nothing attends to is veiled, and in which grey: seen on dark pictures and on light ones."""
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>What the answer leaned on</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #8884}
td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere}pre{white-space:pre-wrap;font:inherit;margin:.3rem 0}
figure{margin:1.5rem 0}figcaption{overflow-wrap:anywhere}.frame{position:relative;display:inline-block;margin:.2rem}
.frame img{display:block;width:15rem;height:15rem}.frame .map{position:absolute;inset:0;image-rendering:pixelated}
#bare:checked~figure .map{display:none}small{opacity:.7}</style></head><body>
"""


def page(explanation: Attribution) -> str:
    """The whole page. All maps are on one scale, so that images can be compared."""
    return "".join(_parts(explanation))


def _parts(e: Attribution) -> Iterator[str]:
    left_out = e.images[0].change is not None
    yield f"{HEAD}<h1>What the answer leaned on</h1><h2>Question</h2><pre>{escape(e.question)}</pre>"
    yield f"<h2>Answer</h2><pre>{escape(e.answer)}</pre><p><small>log-probability {e.logprob:.3f} nats</small></p><table><tr><th>"
    yield ("<th>without it<th>share" if left_out else "") + "<th>attention</tr>\n"
    for look in e.images:
        changed = (
            f"<td>{-(look.change or 0.0):+.3f} nats<td>{_meter(look.share or 0.0)}"
            if left_out
            else ""
        )
        yield f"<tr><td>{escape(look.name)}{changed}<td>{_meter(look.attention)}</tr>\n"
    yield "</table><p><small>"
    if left_out:
        yield "Without it: how the answer's log-probability changes when nothing may attend to this image; falls make shares. "
    yield f"Attention: what the answer's words attend to in the images, in layers {', '.join(map(str, e.layers))}; what they "
    yield "leave is veiled. The pictures are as the model was given them.</small></p>\n"
    yield '<input type="checkbox" id="bare"><label for="bare"> pictures without maps</label>\n'
    most = max(float(look.heat.max()) for look in e.images) or 1.0
    yield from (_figure(look, most) for look in e.images)
    yield "</body></html>\n"


def _meter(share: float) -> str:
    return f'<meter min="0" max="1" value="{share:.4f}"></meter> {share:.1%}'


def _figure(look: ImageAttribution, most: float) -> str:
    name, count = escape(look.name), len(look.pictures)
    frames = "".join(
        f'<span class="frame"><img alt="{name}{f", frame {number}" if count > 1 else ""}" src="{_picture(picture)}">'
        f'<img class="map" alt="" src="{_shade(heat / most)}"></span>'
        for number, (picture, heat) in enumerate(zip(look.pictures, look.heat, strict=True), 1)
    )
    return f"<figure><figcaption>{name}</figcaption>{frames}</figure>\n"


def _picture(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    return _data_url(image, "JPEG", quality=85)


def _shade(heat: NDArray[np.float32]) -> str:
    """A map `[grid, grid]` of 0..1 as a veil that is the thinner, the more is attended to; its root, or peaks hide the rest."""
    shade = np.full((*heat.shape, 4), GREY, np.uint8)
    shade[..., 3] = np.rint(255 * VEIL * (1 - np.sqrt(heat)))
    return _data_url(Image.fromarray(shade), "PNG")


def _data_url(image: Image.Image, form: str, **how: int) -> str:
    file = BytesIO()
    image.save(file, form, **how)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
