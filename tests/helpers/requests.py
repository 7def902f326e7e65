"""Requests that a server must refuse and go on, and the small images and messages that requests
are made of.
"""

import base64
import io
import json
import zlib
from typing import Any

from PIL import Image


def png(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


RED, BLUE, GREEN = (data_url(png(colour)) for colour in ("red", "blue", "green"))


def user(*content: dict[str, Any] | str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def image_part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


WHAT = user(image_part(RED), "What is this?")
STILLS = {"type": "video", "video": [RED, BLUE, GREEN]}


def bomb() -> bytes:
    """A PNG of 60 KB whose header promises 20,000 x 20,000 pixels."""

    def block(kind: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    size = (20_000).to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", size + size + b"\x08\x02\0\0\0")
        + block(b"IDAT", zlib.compress(bytes(10**7)))
    )


def nested(depth: int) -> str:
    return '{"model": "tiny", "messages": ' + "[" * depth + "]" * depth + "}"


HOSTILE: dict[str, bytes | str | dict[str, Any]] = {
    "nothing": b"",
    "no JSON": b"\x00\xff\xfe garbage",
    "half": b'{"model": "tiny", "messages": [{"role": "us',
    "a number": b"5",
    "a list": b"[]",
    "null": b"null",
    "twice": b"{}{}",
    "not UTF-8": b'{"model": "\xff\xff"}',
    "deep": nested(50),
    "deeper": nested(100_000),
    "deepest": nested(2_000_000),
    "wide": '{"model": "tiny", "messages": [' + "[]," * 200_000 + "[]]}",
    "long list": '{"model": "tiny", "messages": [' + "5," * 80_000 + "5]}",
    "long object": json.dumps(
        {"model": "tiny", "messages": WHAT, "logit_bias": {f"x{i}": "y" for i in range(80_000)}}
    ),
    "many fields": json.dumps(
        {"model": "tiny", "messages": WHAT} | {f"x{i}": 1 for i in range(4000)}
    ),
    "long number": '{"model": "tiny", "n": ' + "9" * 10_000 + "}",
    "NaN": '{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    "infinity": '{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
    "surrogate": '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "surrogate field": '{"model": "tiny", "\\ud800": 1, "messages": [{"role": "user", "content": "x"}]}',
    "long text": {"messages": [{"role": "user", "content": "x" * 600_000}]},
    "long role": {"messages": [{"role": "x" * 2_000_000, "content": "x"}]},
    "long name": {"messages": user({"type": "views", "views": {"x" * 600_000: RED}})},
    "deep view": {"messages": user({"type": "views", "views": [[[[[RED]]]]]})},
    "times": {"messages": user({**STILLS, "times": [float(i) for i in range(1000)]})},
    "no speed": {"messages": user({**STILLS, "fps": 1e-300})},
    "late": {"messages": user({**STILLS, "start": 1e300})},
    "bomb": {"messages": user(image_part(data_url(bomb())))},
    "cut": {"messages": user(image_part(data_url(png("red")[:60])))},
    "thin": {"messages": user(image_part(data_url(png("red", (3000, 1)))))},
    "no base64": {"messages": user(image_part("data:image/png;base64,%%%"))},
    "not base64": {"messages": user(image_part("data:text/html,<b>"))},
    "svg": {"messages": user(image_part(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")))},
    "polyglot": {"messages": user(image_part(data_url(b"GIF89a/*" + b"\0" * 100 + b"*/=1;")))},
    "tiff": {"messages": user(image_part(data_url(b"II*\0" + bytes(100))))},
    "video": {
        "messages": user(
            {
                "type": "video_url",
                "video_url": {"url": data_url(b"\0\0\0\x18ftypisom" + bytes(3000))},
            }
        )
    },
    "playlist": {
        "messages": user(
            {"type": "video_url", "video_url": {"url": data_url(b"#EXTM3U\nhttp://127.0.0.1/\n")}}
        )
    },
    "number": {"messages": user({"type": "image", "image": 5})},
    "numbers": {"messages": user({"type": "image", "image": [[1, 2], [3, 4]]})},
    "empty video": {"messages": user({"type": "video", "video": []})},
    "many images": {"messages": user(*[image_part(RED)] * 33)},
    "many frames": {"messages": user(*[{**STILLS, "video": [RED] * 64, "frames": 64}] * 20)},
    "metadata": {"messages": user(image_part("http://169.254.169.254/latest/meta-data/"))},
    "gopher": {"messages": user(image_part("gopher://127.0.0.1:25/"))},
    "backslash": {"messages": user(image_part("http:\\\\127.0.0.1\\a.png"))},
    "passwd": {"messages": user({"type": "image", "path": "/etc/passwd"})},
    "path in path": {"messages": user({"type": "image", "path": {"path": 5}})},
}


def sent(case: bytes | str | dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """A case as it goes to a route of a server whose model is called tiny: to be answered, counted,
    or attributed.
    """
    if isinstance(case, dict):
        more = {"max_tokens": 2} if path.endswith("completions") else {}
        answer = [{"role": "assistant", "content": "Red."}] if path.endswith("attribution") else []
        case = json.dumps({"model": "tiny", "messages": [*case["messages"], *answer], **more})
    return case.encode() if isinstance(case, str) else case
