"""Client of an OpenAI-compatible server: chat completions of many conversations in parallel."""

from __future__ import annotations

import http.client
import json
import mimetypes
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import data_url
from ..errors import LlavaError, MediaError, RemoteError
from ..evals.task import Messages, Reply

CONCURRENCY, TRIES, TIMEOUT = 8, 5, 600
TOP = 20
"""Alternatives of each token; the most that OpenAI's API gives."""
RETRY_STATUS = (429, 500, 502, 503, 504)
SAMPLE_STATUS = (400, 413)
"""The server rejects this sample alone; any other status ends the run, which can be resumed."""


def answerer(
    url: str, model: str, key: str | None, *, logprobs: bool = False, **body: Any
) -> Callable[[Sequence[Messages]], list[Reply | LlavaError]]:
    """Answers of `model` from the API at `url` (…/v1); `body` is added to each request.

    logprobs: ask for log-probabilities. A server that rejects them is called without, with a
    warning.
    """
    wanted = {"logprobs": True, "top_logprobs": TOP} if logprobs else {}
    rejecting = threading.Event()

    def one(messages: Messages) -> Reply | LlavaError:
        try:
            converted = [_to_openai(message) for message in messages]
            sent = {"model": model, "messages": converted, **body}
            reply = ask(sent)
        except (MediaError, SampleRejected) as error:
            return error
        try:
            return _reply(reply["choices"][0])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise RemoteError(f"no choices in the response of {url}: {str(reply)[:200]}") from error

    def ask(sent: dict[str, Any]) -> dict[str, Any]:
        address = f"{url.rstrip('/')}/chat/completions"
        if not wanted or rejecting.is_set():
            return request(address, key, sent)
        try:
            return request(address, key, sent | wanted)
        except SampleRejected as error:
            reply = request(address, key, sent)  # raises if it was not for the log-probabilities
            if not rejecting.is_set():
                rejecting.set()
                warnings.warn(f"no calibration: {url} rejects logprobs ({error})", stacklevel=2)
            return reply

    def answer(conversations: Sequence[Messages]) -> list[Reply | LlavaError]:
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            return list(threads.map(one, conversations))

    return answer


def _reply(choice: dict[str, Any]) -> Reply:
    """A choice; without log-probabilities where the server sends none."""
    from ..chat.table import probability_of_yes

    text, found = str(choice["message"]["content"] or ""), choice.get("logprobs") or {}
    tokens = found.get("content")
    if not tokens:
        return Reply(text)
    yes = probability_of_yes(
        [
            (one["token"], [(t["token"], t["logprob"]) for t in one.get("top_logprobs") or ()])
            for one in tokens
        ]
    )
    return Reply(text, sum(token["logprob"] for token in tokens), yes)


class SampleRejected(LlavaError):
    """The server rejects this sample."""


def only_model(url: str, key: str | None) -> str:
    """The name of the server's only model. Raises `RemoteError` if it has another number."""
    names = [
        str(model.get("id"))
        for model in request(f"{url.rstrip('/')}/models", key, None).get("data", [])
    ]
    if len(names) != 1:
        raise RemoteError(
            f"{url} has {len(names)} models ({', '.join(names[:8])}); choose one with -m"
        )
    return names[0]


def request(url: str, key: str | None, body: dict[str, Any] | None) -> dict[str, Any]:
    """The server's JSON object. `RETRY_STATUS` is retried with backoff, five attempts in all."""
    if not url.startswith(("http://", "https://")):
        raise RemoteError(f"{url} is not an http or https URL")
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, headers), timeout=TIMEOUT
            ) as reply:
                value = json.load(reply)
                if isinstance(value, dict):
                    return value
                raise RemoteError(f"the response of {url} is not a JSON object")
        except urllib.error.HTTPError as error:
            message = error.read(2000).decode("utf-8", "replace")
            if error.code in SAMPLE_STATUS:
                raise SampleRejected(f"status {error.code}: {message[:500]}") from error
            if error.code not in RETRY_STATUS or attempt == TRIES - 1:
                raise RemoteError(f"{url} returned status {error.code}: {message[:500]}") from error
            wait = error.headers.get("Retry-After") or ""
            time.sleep(min(float(wait), 60.0) if wait.isdigit() else 2.0**attempt)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, LlavaError):
                raise
            raise RemoteError(f"cannot reach {url}: {error}") from error
    raise AssertionError("the last attempt returns or raises")


def _to_openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form.

    Files become data URLs, views their names and images, frames images.
    """
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
            sampling = {key: part[key] for key in ("frames", "start", "end") if key in part}
            parts.append(_media("video_url", Path(part["path"])) | sampling)
        else:
            parts.append(part)
    return {**message, "content": parts}


def _media(kind: str, path: Path) -> dict[str, Any]:
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    try:
        return {"type": kind, kind: {"url": data_url.encode(path.read_bytes(), mime)}}
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
