"""Clients with two API keys: one that takes all it can, and one that must be answered in time."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from llava_interleave.server.run import Server

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ATTACKER, GUEST = "attacker-attacker-key", "another-guests-own-key"
USUAL = 10.0
"""Seconds in which another key's short request is answered, also on a machine that is busy."""


def client(server: Server, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.address, headers=headers, timeout=60)


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(CHAT, json={"model": "tiny", "messages": HELLO, "max_tokens": 2} | body)


@contextlib.contextmanager
def in_background(client: httpx.Client, count: int, **body: Any) -> Iterator[list[int]]:
    """`count` requests in threads of their own; the statuses of those that have ended."""
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(ask(client, **body).status_code))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    yield statuses
    for thread in threads:
        thread.join()


def answered_in_time(guest: httpx.Client, **body: Any) -> None:
    start = time.monotonic()
    response = ask(guest, **body)
    assert response.status_code == 200, response.text
    assert time.monotonic() - start < USUAL
