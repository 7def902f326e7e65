"""One API key, one file, one socket never stops the others."""

import asyncio
import contextlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_interleave.errors import OptionError
from llava_interleave.processing import Processor
from llava_interleave.server import answer_stream
from llava_interleave.server import service as service_module
from llava_interleave.server.answer_stream import AnswerStream
from llava_interleave.server.api_errors import ApiError
from llava_interleave.server.fairness import FairThreadPool, RateLimit, Shares
from llava_interleave.server.run import Server
from llava_interleave.structured_output import grammar
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.fairness import (
    ATTACKER,
    CHAT,
    GUEST,
    HELLO,
    answered_in_time,
    ask,
    client,
    in_background,
)
from tests.helpers.requests import WHAT
from tests.helpers.server import listening, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("fairness") / "tiny")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{ATTACKER}\n{GUEST}\n")
    return path


@pytest.fixture
def server(folder: Path, key_file: Path) -> Iterator[Server]:
    with listening(folder, api_keys=key_file, shutdown_timeout=0.1) as server:
        yield server


def test_a_key_leaves_as_many_places_as_it_takes() -> None:
    shares = Shares(32, lambda: False)
    assert shares.fits("a", 16) and not shares.fits("a", 17)
    for _ in range(2):
        shares.add("a", 8)
    assert not shares.fits("a", 1) and shares.fits("b", 8)
    shares.add("b", 8)
    assert not shares.fits("b", 1) and shares.fits("c", 4) and not shares.fits("c", 5)
    shares.add("a", -16)
    assert shares.fits("a", 12) and shares.used == 8
    alone = Shares(4, lambda: True)
    assert alone.fits("", 4)


def test_rates_are_of_tokens_as_well() -> None:
    rate = RateLimit(60, "tokens")
    rate.take("a", 0.0, 0)
    rate.charge("a", 0.0, 100)
    with pytest.raises(ApiError, match="60 tokens a minute; try again in 42 s"):
        rate.take("a", 0.0, 0)
    rate.take("b", 0.0, 0)
    rate.take("a", 42.0, 0)


def test_threads_are_shared_between_keys() -> None:
    """A key takes all threads but the reserved one, which is another key's at once."""
    go, started = threading.Event(), []

    def work(name: str) -> str:
        started.append(name)
        go.wait(30)
        return name

    async def run() -> None:
        pool = FairThreadPool(2, "test")
        tasks = [asyncio.create_task(pool.run("a", lambda i=i: work(f"a{i}"))) for i in range(5)]  # type: ignore[misc]
        await asyncio.sleep(0.2)
        assert started == ["a0", "a1"] and pool.longest() > 0.1
        tasks += [asyncio.create_task(pool.run("b", lambda i=i: work(f"b{i}"))) for i in range(2)]  # type: ignore[misc]
        await asyncio.sleep(0.2)
        assert started == ["a0", "a1", "b0"]
        cancelled = tasks.pop(3)  # waits: a thread that frees up goes to others
        cancelled.cancel()
        go.set()
        assert sorted(await asyncio.gather(*tasks)) == ["a0", "a1", "a2", "a4", "b0", "b1"]
        await asyncio.sleep(0.05)
        assert pool.longest() == 0.0 and not pool._running.total() and not pool._waiting
        pool.close()

    asyncio.run(run())


def test_long_answers_of_one_key_leave_room(server: Server) -> None:
    """Four requests of eight answers that never end took every place for two minutes."""
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        endless = {"n": 8, "max_tokens": 1500, "logit_bias": {"2": -100}, "temperature": 1}
        with in_background(attacker, 4, **endless) as statuses:
            until(lambda: 429 in statuses and server.service.num_active >= 8)
            for _ in range(3):
                answered_in_time(guest)
            server.service.end()


def test_text_and_another_keys_images_pass_stuck_media(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go = Processor.prompt, threading.Event()

    def slow(self: Processor, messages: Any, *args: Any, **named: Any) -> Any:
        if "slow" in json.dumps(messages):
            go.wait(60)
        return real(self, messages, *args, **named)

    monkeypatch.setattr(Processor, "prompt", slow)
    stuck = [{"role": "user", "content": [*WHAT[0]["content"], {"type": "text", "text": "slow"}]}]
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        with in_background(attacker, 4, messages=stuck) as statuses:
            until(lambda: server.service.num_active == 4)
            answered_in_time(attacker)
            answered_in_time(guest)
            answered_in_time(guest, messages=WHAT)
            assert guest.get("/ready").status_code == 200
            for name in ("media", "text", "grammar"):
                pool = getattr(server.service, f"{name}_pool")
                monkeypatch.setattr(pool, "longest", lambda: 1000.0)
                assert guest.get("/ready").json()["error"]["code"] == f"{name}_stuck"
                monkeypatch.undo()
            go.set()
        assert statuses == [200] * 4


def test_media_that_take_too_long_end_the_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(Processor, "prompt", lambda *_, **__: go.wait(60))
    with (
        listening(folder, prepare_timeout=0.2, shutdown_timeout=0.1) as server,
        client(server, "any") as anyone,
    ):
        response = ask(anyone, messages=WHAT)
        go.set()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "media_timeout"


def test_readiness_notices_a_stuck_engine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go = server.service.bot.engine, threading.Event()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda *a: go.wait(60) and step(*a))
    monkeypatch.setattr(service_module, "STUCK_STEP", 0.2)
    attacker, guest = client(server, ATTACKER), client(server, GUEST)
    with attacker, guest, in_background(attacker, 1):
        until(lambda: guest.get("/ready").status_code == 503)
        assert guest.get("/ready").json()["error"]["code"] == "engine_stuck"
        go.set()
        until(lambda: guest.get("/ready").status_code == 200)


def test_tokens_a_minute_are_limited(folder: Path, key_file: Path) -> None:
    limits = {"api_keys": key_file, "tokens_per_minute": 5, "shutdown_timeout": 0.1}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(listening(folder, **limits))
        attacker, guest = (stack.enter_context(client(server, key)) for key in (ATTACKER, GUEST))
        assert ask(attacker).status_code == 200
        refused = ask(attacker)
        assert refused.status_code == 429 and "5 tokens a minute" in refused.text
        assert int(refused.headers["retry-after"]) > 0
        assert ask(guest).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_many_logprobs_are_written_in_a_thread(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Those of eight long answers, 20 for each token, held the event loop for six seconds."""
    threads, write = set(), AnswerStream.token_logprobs

    def written(stream: AnswerStream, tokens: Any) -> Any:
        threads.add(threading.current_thread().name)
        return write(stream, tokens)

    monkeypatch.setattr(AnswerStream, "token_logprobs", written)
    fields: dict[str, Any] = {
        CHAT: {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 4},
        "/v1/completions": {"prompt": "Hello", "logprobs": 2, "max_tokens": 4},
        "/v1/responses": {
            "input": "Hello",
            "top_logprobs": 2,
            "include": ["message.output_text.logprobs"],
            "max_output_tokens": 16,
        },
    }[path]
    with client(server, GUEST) as guest:
        for stream in (False, True):
            few = guest.post(path, json={"model": "tiny", "stream": stream, **fields})
            monkeypatch.setattr(answer_stream, "MAX_INLINE_LOGPROBS", 0)
            threads.clear()
            many = guest.post(path, json={"model": "tiny", "stream": stream, **fields})
            names = {name.partition("_")[0] for name in threads}
            assert names == {"text"} or (stream and "text" in names)
            monkeypatch.setattr(answer_stream, "MAX_INLINE_LOGPROBS", 2000)
            assert few.status_code == 200 and "logprob" in few.text
            assert many.status_code == 200 and "logprob" in many.text
            if not stream:  # of a stream each event has the tokens since the last one
                assert bare(many.text) == bare(few.text)


def bare(text: str) -> str:
    """Without ids, times, and what depends on them."""
    text = re.sub(r'"(id|item_id|created|created_at|cached_tokens)":("[^"]*"|\d+)', "", text)
    return re.sub(r'"timings":\{[^}]*\}', "", text)


def regex(pattern: str) -> dict[str, Any]:
    return {"response_format": {"type": "regex", "regex": pattern}}


def schema(value: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    }


def object_of(fields: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(fields)}}


ALTERNATIVES = {"allOf": [{"anyOf": [object_of(i + 2) for i in range(4)]} for _ in range(6)]}


@pytest.fixture
def slow_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas of 1,900 fields and more do not compile in time, others do, on any machine."""

    def limited(process: grammar._CompileProcess, text: str) -> str | None:
        return process._ask(text, 0.1 if '"p1899"' in text else 60.0)

    monkeypatch.setattr(grammar._CompileProcess, "compile", limited)


@pytest.mark.usefixtures("slow_schemas")
def test_a_grammar_that_does_not_compile_in_time_is_killed(server: Server) -> None:
    server.service.grammar_rate.per_minute = 10_000
    wide = {"type": "object", "properties": {f"p{i}": True for i in range(4000)}}  # 1.5 s idle
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        with in_background(attacker, 6, **schema(wide)) as statuses:
            until(lambda: server.service.num_active)
            answered_in_time(guest)
            answered_in_time(guest, **regex("[ab]{3}"))
        assert statuses == [400] * 6
        assert "simplify" in ask(attacker, **schema(wide)).json()["error"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is not limited")
def test_a_grammar_of_much_memory_is_refused_before_the_server_compiles_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiled in a second, and took 200 MiB of the server for as long again."""
    monkeypatch.setattr(grammar, "COMPILE_TIMEOUT", 60.0)
    for nested in ("((a{900}){1000}){1000}", "(a{1000}){1000}"):
        with pytest.raises(OptionError, match="64 MiB"):
            server.service.grammars.compile({"type": "regex", "regex": nested}, 1)


def test_a_grammar_whose_masks_take_too_long_ends_its_own_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MASK_SECONDS", 0.0)
    monkeypatch.setattr(grammar, "MASK_SECONDS_PER_TOKEN", 0.0)
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        refused = ask(attacker, **regex("[a-z]{30,60}"), max_tokens=50)
        assert refused.status_code == 400 and "simplify" in refused.text
        answered_in_time(guest)


@pytest.mark.usefixtures("slow_schemas")
def test_grammar_time_is_limited_for_each_key(server: Server) -> None:
    """Patterns that take the time limit one after the other kept a core busy for ever."""
    server.service.grammar_rate.per_minute = 1
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        costly = [ask(attacker, **schema(object_of(1900 + i))) for i in range(3)]
        assert [response.status_code for response in costly] == [400, 429, 429]
        assert "seconds of response_format a minute" in costly[-1].text
        assert int(costly[-1].headers["retry-after"]) > 5
        assert ask(attacker).status_code == 200
        answered_in_time(guest, **regex("[ab]{3}"))


@pytest.mark.parametrize("bound", [10**300, -(10**300), 2**63, 1e300])
def test_a_bound_beyond_64_bits_is_a_400(server: Server, bound: float) -> None:
    with client(server, GUEST) as guest:
        refused = ask(guest, **schema({"type": "integer", "minimum": bound}))
        assert refused.status_code == 400 and "response_format" in refused.text


def test_half_open_connections_do_not_block_others(folder: Path, key_file: Path) -> None:
    with listening(folder, api_keys=key_file, max_connections=8, shutdown_timeout=0.1) as server:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        with contextlib.ExitStack() as stack:
            for i in range(30):
                half = stack.enter_context(socket.create_connection((host, port), 10))
                if i % 2:
                    half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
            guest = stack.enter_context(client(server, GUEST))
            assert guest.get("/health").status_code == 200
            answered_in_time(guest)
            assert len(server.server_state.connections) <= 9


def test_open_requests_of_one_key_leave_room(folder: Path, key_file: Path) -> None:
    """Bodies that do not come: half of all places at most, and /health has one in any case."""
    with listening(folder, api_keys=key_file, max_connections=8, shutdown_timeout=0.1) as server:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        slow = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ATTACKER}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        ).encode()
        with contextlib.ExitStack() as stack:
            for _ in range(7):
                stack.enter_context(socket.create_connection((host, port), 10)).sendall(slow)
            guest = stack.enter_context(client(server, GUEST))
            attacker = stack.enter_context(client(server, ATTACKER))
            until(lambda: ask(attacker).status_code == 429)
            assert guest.get("/health").status_code == 200
            answered_in_time(guest)


@pytest.mark.parametrize(("size", "answered"), [(1, False), (100, True)])
def test_a_body_of_tiny_chunks_ends_the_connection(
    server: Server, size: int, answered: bool
) -> None:
    """300,000 chunks of a byte held the event loop for ten seconds."""
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    chunk = f"{size:x}\r\n{' ' * size}\r\n".encode()
    with (
        socket.create_connection((host, port), 10) as sender,
        contextlib.suppress(ConnectionError),
    ):
        sender.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {GUEST}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + chunk * 5000
            + b"0\r\n\r\n"
        )
        assert sender.recv(65536).startswith(b"HTTP/1.1 400") == answered


def test_two_lengths_of_one_body_end_the_connection(server: Server) -> None:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    with socket.create_connection((host, port), 10) as smuggler:
        smuggler.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {GUEST}\r\n"
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            "GET /health HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: smuggler.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
