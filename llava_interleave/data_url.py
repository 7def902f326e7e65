"""Data URLs (RFC 2397), base64 only."""

import base64


def encode(data: bytes, mime: str) -> str:
    """`data` as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def payload(url: str) -> str:
    """The base64 text of a data URL. Raises ValueError for another form."""
    header, comma, text = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError("a data URL must be of the form data:image/png;base64,...")
    return text


def decode(url: str) -> bytes:
    """The bytes of a data URL. Raises ValueError for another form and for invalid base64."""
    return base64.b64decode(payload(url), validate=True)
