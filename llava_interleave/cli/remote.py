"""An OpenAI-compatible server as something that answers: messages over HTTP, several at once."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import LlavaError, MediaError, RemoteError
from ..evals.task import Messages

AT_ONCE, TRIES, SECONDS = 8, 5, 600
BUSY = (429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)
"""The server's verdict on one sample, kept beside it; any other status ends the run, which can be resumed."""


def answerer(
    url: str, model: str, key: str | None, **body: Any
) -> Callable[[Sequence[Messages]], list[str | LlavaError]]:
    """Answers from the server whose API begins at `url` (…/v1)."""

    def one(messages: Messages) -> str | LlavaError:
        try:
            sent = {
                "model": model,
                "messages": [_portable(message) for message in messages],
                **body,
            }
            reply = request(f"{url.rstrip('/')}/chat/completions", key, sent)
        except (MediaError, Refused) as error:
            return error
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise RemoteError(f"{url} answered without choices: {str(reply)[:200]}") from error

    def answer(asked: Sequence[Messages]) -> list[str | LlavaError]:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(one, asked))

    return answer


class Refused(LlavaError):
    """The server does not take this sample."""


def only_model(url: str, key: str | None) -> str:
    """The name of the one model that the server offers."""
    names = [
        str(model.get("id"))
        for model in request(f"{url.rstrip('/')}/models", key, None).get("data", [])
    ]
    if len(names) != 1:
        raise RemoteError(
            f"{url} offers {len(names)} models ({', '.join(names[:8])}); name one with -m"
        )
    return names[0]


def request(url: str, key: str | None, body: dict[str, Any] | None) -> dict[str, Any]:
    """The JSON that the server answers with. Where it is busy it is asked again, five times in all."""
    if not url.startswith(("http://", "https://")):
        raise RemoteError(f"{url} is no http or https URL")
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, headers), timeout=SECONDS
            ) as reply:
                value = json.load(reply)
                if isinstance(value, dict):
                    return value
                raise RemoteError(f"{url} answered with something that is no JSON object")
        except urllib.error.HTTPError as error:
            told = error.read(2000).decode("utf-8", "replace")
            if error.code in REFUSED:
                raise Refused(f"status {error.code}: {told[:500]}") from error
            if error.code not in BUSY or attempt == TRIES - 1:
                raise RemoteError(
                    f"{url} answered with status {error.code}: {told[:500]}"
                ) from error
            wait = error.headers.get("Retry-After") or ""
            time.sleep(min(float(wait), 60.0) if wait.isdigit() else 2.0**attempt)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, LlavaError):
                raise
            raise RemoteError(f"{url} cannot be asked: {error}") from error
    raise AssertionError("the last try returns or raises")


def _portable(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form: files become data URLs, views their names and pictures, frames pictures."""
    if isinstance(message["content"], str):
        return message
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        if part["type"] == "views":
            for name, path in part["views"].items():
                parts += [{"type": "text", "text": f"{name}: "}, _media("image_url", Path(path))]
        elif part["type"] == "image":
            parts.append(_media("image_url", Path(part["path"])))
        elif part["type"] == "video" and "video" in part:
            parts += [_media("image_url", Path(path)) for path in part["video"]]
        elif part["type"] == "video":
            chosen = {key: part[key] for key in ("frames", "start", "end") if key in part}
            parts.append(_media("video_url", Path(part["path"])) | chosen)
        else:
            parts.append(part)
    return {**message, "content": parts}


def _media(kind: str, path: Path) -> dict[str, Any]:
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        return {
            "type": kind,
            kind: {"url": f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"},
        }
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
