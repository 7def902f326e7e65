"""Data URLs (RFC 2397), base64 only."""

import base64
from urllib.parse import unquote

URL_SAFE = str.maketrans("-_", "+/")


def encode(data: bytes, mime: str) -> str:
    """`data` as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def payload(url: str) -> str:
    """The base64 text of a data URL. Raises ValueError for another form."""
    header, comma, text = url.partition(",")
    if not comma or not header.lower().rstrip().endswith(";base64"):
        raise ValueError("a data URL must be of the form data:image/png;base64,...")
    return text


def decode(url: str) -> bytes:
    """The bytes of a data URL. Raises ValueError for another form and for invalid base64.

    White space, percent-encoding, the URL-safe alphabet and missing padding are accepted.
    """
    text = "".join(unquote(payload(url)).split()).translate(URL_SAFE).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
