"""Shared by tests: see tests/test_batch.py."""

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any


def shard(path: Path, *members: tuple[str, bytes], **more: Any) -> None:
    with tarfile.open(path, "w", **more) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def openai(number: int, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{number}"}]
    return {
        "custom_id": f"r-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }
