"""Data URLs (RFC 2397), base64 only."""

import binascii

import pybase64

CHUNK = 1 << 16
"""Characters that are decoded at a time: the interpreter's lock is held for that long, and a copy
of 27 MB would stop every other thread for a fiftieth of a second."""
WHITE = " \t\r\n\f\v"
PLAIN = str.maketrans("-_", "+/", WHITE)
"""The URL-safe alphabet as the plain one, without white space."""
ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
"""What percent-encoding may stand for in base64. `unquote` takes 20 times the memory of its text.
"""


def encode(data: bytes, mime: str) -> str:
    """`data` as a data URL."""
    return f"data:{mime};base64,{pybase64.b64encode_as_string(data)}"


def decode(url: str) -> bytes:
    """The bytes of a data URL. Raises ValueError for another form and for invalid base64.

    White space, percent-encoding, the URL-safe alphabet and missing padding are accepted.
    """
    comma = url.find(",")
    if comma < 0 or not url[:comma].lower().rstrip().endswith(";base64"):
        raise ValueError("a data URL must be of the form data:image/png;base64,...")
    start = comma + 1
    if url.find("%", start) >= 0:
        url, start = url[start:], 0
        for escaped, plain in ESCAPED.items():
            url = url.replace(escaped, plain).replace(escaped.lower(), plain)
    padding = url.find("=", start)
    end = len(url) if padding < 0 else padding
    if url[end:].strip("=" + WHITE):
        raise binascii.Error("there is data after the padding")
    decoded, rest = [], ""
    for at in range(start, end, CHUNK):
        rest += url[at : min(at + CHUNK, end)]
        whole = len(rest) // 4 * 4
        try:
            decoded.append(pybase64.b64decode(rest[:whole], validate=True))
        except ValueError:  # not plain; to replace characters takes twenty times as long
            rest = rest.translate(PLAIN)
            whole = len(rest) // 4 * 4
            decoded.append(pybase64.b64decode(rest[:whole], validate=True))
        rest = rest[whole:]
    rest = rest.translate(PLAIN)
    decoded.append(pybase64.b64decode(rest + "=" * (-len(rest) % 4), validate=True))
    return b"".join(decoded)
