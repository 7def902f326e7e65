"""Shared by tests: see tests/test_server.py."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_interleave.chat import load
from llava_interleave.server.app import create_app
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings
from tests.helpers.requests import (
    BLUE,
    RED,
    STILLS,
    WHAT,
    image_part,
    user,
)


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


QUESTIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "text": ([{"role": "user", "content": "Hello"}], {}, {}),
    "interleaved": (user(image_part(RED), "is the first,", image_part(BLUE), "the second"), {"seed": 3, "temperature": 1.5}, {}),
    "views": (user({"type": "views", "views": {"front": RED, "back": BLUE}}, "How many?"), {"temperature": 1.0, "seed": 1}, {}),
    "named views": (user({"type": "views", "views": [{"name": "top", "image": RED}]}, "How many?"), {}, {}),
    "video": (user(STILLS, "What moves?"), {"frames": 2, "temperature": 1.2, "seed": 5}, {}),
    "anyres": (user(image_part(RED, detail="high"), "Read it"), {"temperature": 1.1, "seed": 2}, {}),
    "several": (WHAT, {"n": 3, "seed": 7, "temperature": 1.5}, {}),
    "penalties": (
        WHAT,
        {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "top_k": 9, "min_p": 0.01, "top_p": 0.9,
         "temperature": 2.0, "seed": 11},
        {},
    ),
    "bias": (WHAT, {"logit_bias": {"70": 100, "71": 99.5}}, {"logit_bias": {70: 100, 71: 99.5}}),
    "logprobs": (WHAT, {"logprobs": True, "top_logprobs": 3, "temperature": 1.5, "seed": 4}, {"logprobs": 3}),
    "history": ([*WHAT, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "And now?"}], {}, {}),
    "developer": ([{"role": "developer", "content": "Be brief."}, *WHAT], {}, {}),
}  # fmt: skip


@contextlib.contextmanager
def listening(tiny: Path, **changes: Any) -> Iterator[Server]:
    settings = Settings(port=0, requests_per_minute=100_000, **changes)
    server = Server(create_app(load(tiny, device="cpu"), settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
