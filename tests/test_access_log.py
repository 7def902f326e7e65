"""What an operator sees of a request: the access log, the client's name, traces; keys by SIGHUP."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from llava_interleave.chat import load
from llava_interleave.errors import OptionError
from llava_interleave.server import middleware
from llava_interleave.server.api_keys import ApiKeys, Client
from llava_interleave.server.app import create_app
from llava_interleave.server.fairness import MAX_BUCKETS, RateLimit
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings
from llava_interleave.server.tracing import Tracing
from tests.helpers.requests import WHAT, png
from tests.helpers.server import listening, until

CHAT = "/v1/chat/completions"
ALICE, BOB, SECOND = "alice-alice-alice-1", "bob-bob-bob-bob-bob", "alice-alice-alice-2"
BODY = {"messages": [{"role": "user", "content": "a private question"}], "max_tokens": 3}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# people\n{ALICE} alice weight=2\n\n{BOB}\n")
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def running(tiny: Path, **changes: Any) -> Iterator[TestClient]:
    app = create_app(load(tiny, device="cpu"), Settings(**changes))
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("9.9.9.9", 1)) as client:
        client.headers["Authorization"] = f"Bearer {ALICE}"
        yield client


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "llava_interleave")
    names = ("llava_interleave.access",)
    return lambda: [r.getMessage() for r in caplog.records if r.name in names]


def test_each_request_is_one_line_of_json(
    tiny: Path, key_file: Path, lines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tiny, api_keys=key_file) as client:
        answer = client.post(CHAT, json=BODY | {"user": "someone\nelse"})
        client.post(CHAT, json=BODY | {"stream": True, "messages": WHAT})
        client.post(CHAT, json=BODY | {"max_tokens": -1})
        client.get("/v1/files/nothing", headers={"X-Request-Id": "from-the-client.1"})
        client.post("/v1/files", files={"file": png("red")}, data={"purpose": "vision"})
        client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        client.get("/health", headers={"X-Request-Id": 'forged" {}'})
    assert all("\n" not in line for line in lines())
    chat, stream, bad, missing, upload, refused, health = map(json.loads, lines())
    usage = answer.json()["usage"]
    assert chat["prompt_tokens"] == usage["prompt_tokens"]
    assert chat["completion_tokens"] == usage["completion_tokens"] == 3
    assert (chat["key"], chat["address"], chat["status"]) == ("alice", "9.9.9.9", 200)
    assert (chat["method"], chat["route"], chat["error"]) == ("POST", CHAT, None)
    assert (chat["model"], chat["user"]) == (tiny.name, "someone\nelse")
    assert chat["milliseconds"] > 0 and re.match(r"20\d\d-\d\d-\d\dT.*\+00:00", chat["time"])
    assert chat["request_id"] == answer.headers["x-request-id"]
    assert chat["body_bytes"] == int(answer.request.headers["content-length"])
    assert stream["status"] == 200 and stream["completion_tokens"] > 0
    assert (bad["status"], bad["error"], bad["prompt_tokens"]) == (400, "invalid_value", None)
    assert (missing["status"], missing["route"]) == (404, "/v1/files/{name}")
    assert missing["request_id"] == "from-the-client.1"
    assert (upload["status"], upload["route"]) == (200, "/v1/files")
    assert (refused["status"], refused["key"], refused["error"]) == (401, None, "invalid_api_key")
    assert (health["status"], health["request_id"][:4]) == (200, "req-")
    assert "private" not in caplog.text and ALICE not in caplog.text


def test_the_log_as_text_or_not_at_all(tiny: Path, key_file: Path, lines: Any) -> None:
    with running(tiny, api_keys=key_file, access_log="text") as client:
        client.post(CHAT, json=BODY)
        client.get("/v1/no%0Asuch")
    first, second = lines()
    assert re.fullmatch(rf"9.9.9.9 alice POST {CHAT} 200 \d+\+3 tokens [\d.]+ ms - req-\w+", first)
    assert "404" in second and "\n" not in second
    with running(tiny, api_keys=key_file, access_log="off") as client:
        client.get("/v1/models")
    assert len(lines()) == 2
    with pytest.raises(OptionError, match="access-log"):
        Settings(access_log="xml")


def test_a_client_that_leaves_is_logged(tiny: Path, lines: Any) -> None:
    with (
        listening(tiny, shutdown_timeout=0.1) as server,
        httpx.Client(base_url=server.address) as client,
    ):
        endless = BODY | {"stream": True, "ignore_eos": True, "max_tokens": 4000}
        with client.stream("POST", CHAT, json=endless) as response:
            next(response.iter_bytes())
        until(lambda: lines())
    (line,) = map(json.loads, lines())
    assert (line["status"], line["error"]) == (200, "client_disconnected")
    assert line["prompt_tokens"] > 0


def test_a_refused_request_is_logged_with_its_key(tiny: Path, key_file: Path, lines: Any) -> None:
    with running(tiny, api_keys=key_file, requests_per_minute=1) as client:
        assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 429]
    logged = [json.loads(line) for line in lines()]
    assert [(line["key"], line["status"]) for line in logged] == [("alice", 200), ("alice", 429)]


def test_wrong_keys_are_throttled_and_do_not_fill_the_log(
    tiny: Path, key_file: Path, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "MAX_FAILED_LOGINS", 4)
    with running(tiny, api_keys=key_file) as client:
        wrong = {"Authorization": "Bearer wrong"}
        tried = [client.get("/v1/models", headers=wrong) for _ in range(24)]
        assert [response.status_code for response in tried] == [401] * 4 + [429] * 20
        assert int(tried[-1].headers["retry-after"]) > 0
        assert client.get("/v1/models").status_code == 200
    logged = [json.loads(line) for line in lines()]
    assert len(logged) == 5
    assert logged[-1]["suppressed"] == 20 and "suppressed" not in logged[0]


def test_a_rate_limit_forgets_addresses() -> None:
    rate = RateLimit(60)
    for number in range(3 * MAX_BUCKETS):
        rate.take(f"address {number}", number / 1000)
    assert len(rate._buckets) <= MAX_BUCKETS


def test_keys_have_names_and_weights() -> None:
    keys = ApiKeys([f"{ALICE} alice weight=2", f"  {SECOND}\talice weight=2.0", BOB, "# no", ""])
    alice = Client("alice", 2.0)
    assert keys.client(f"Bearer {ALICE}") == keys.client(f"bearer {SECOND}") == alice
    bob = keys.client(f"Bearer {BOB}")
    assert bob is not None and re.fullmatch("[0-9a-f]{16}", bob.name) and bob.weight == 1
    assert keys.client(f"Basic {ALICE}") is None
    assert keys.names == {"alice", bob.name}


def test_the_engine_shares_by_weight(
    tiny: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny, api_keys=key_file) as client:
        engine, seen = client.app.state.service.bot.engine, []  # type: ignore[attr-defined]
        add = engine.add

        def watched(*arguments: Any, **named: Any) -> Any:
            seen.append((named["client"], named["weight"]))
            return add(*arguments, **named)

        monkeypatch.setattr(engine, "add", watched)
        client.post(CHAT, json=BODY)
        client.post("/v1/messages/prefill", json={"messages": BODY["messages"]})
        client.post(CHAT, json=BODY, headers={"Authorization": f"Bearer {BOB}"})
    assert seen[:2] == [("alice", 2.0)] * 2 and seen[2][1] == 1.0


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (f"{ALICE} a/b", "line 2: after the API key"),
        (f"{ALICE} a b", "line 2: after the API key"),
        (f"{ALICE} a weight=nan", "line 2: a weight"),
        (f"{ALICE} weight=0", "line 2: a weight"),
        (f"{ALICE} {'x' * 65}", "line 2: after the API key"),
        (BOB, "line 2: this API key is there twice"),
        (f"{ALICE} bob weight=3", "line 2: bob has two weights"),
        ("short", "line 2: an API key has 5"),
    ],
)
def test_a_faulty_line_is_named(line: str, match: str) -> None:
    with pytest.raises(OptionError, match=match) as caught:
        ApiKeys([f"{BOB} bob", line])
    assert ALICE not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_a_key_file_that_others_can_read_is_warned_of(
    key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ApiKeys.read(key_file)
    assert not caplog.records
    key_file.chmod(0o644)
    ApiKeys.read(key_file)
    assert "mode 644" in caplog.text and "chmod 600" in caplog.text


def test_keys_are_read_again(tiny: Path, key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(api_keys=key_file, port=0)
    app = create_app(load(tiny, device="cpu"), settings)
    server = Server(app, settings)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:

        def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return client.get("/v1/models", headers=headers).status_code

        for key in (ALICE, BOB):
            client.post(
                "/v1/files",
                files={"file": png("red")},
                data={"purpose": "vision"},
                headers={"Authorization": f"Bearer {key}"},
            )
        assert app.state.service.shares.largest == settings.max_requests // 2
        key_file.write_text(f"{SECOND} alice\n")
        server.reload_keys()
        assert [status(key) for key in (ALICE, BOB, SECOND)] == [401, 401, 200]
        assert list(app.state.service.files._by_key) == ["alice"]
        assert app.state.service.shares.largest == settings.max_requests
        key_file.write_text("short\n")
        server.reload_keys()
        assert "stay what they were" in caplog.text
        assert status(SECOND) == 200


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGHUP")
def test_sighup_reads_the_keys_again(tiny: Path, key_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_interleave", "serve", "-m", tiny, "--port", "0"]
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*command, "--api-keys", key_file], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            address = re.findall(r"http://[\d.:]+", process.stdout.readline())[0]

            def status(key: str) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                return httpx.get(f"{address}/v1/models", headers=headers).status_code

            assert status(ALICE) == 200
            key_file.write_text(f"{SECOND} alice\n")
            process.send_signal(signal.SIGHUP)
            until(lambda: status(SECOND) == 200)
            assert status(ALICE) == 401
            host, port = address.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), 10) as garbage:
                garbage.sendall(b"\x16\x03\x01 is no HTTP\r\n\r\n")
                assert garbage.recv(100).startswith(b"HTTP/1.1 400")
        finally:
            process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)
    logged = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {line["key"] for line in logged} == {"alice", None}
    assert "Invalid HTTP" not in log.read_text(), "anyone could fill the log with it"


def test_the_address_is_the_clients_behind_a_known_proxy(
    tiny: Path, key_file: Path, lines: Any
) -> None:
    forwarded = {"X-Forwarded-For": "203.0.113.7", "Authorization": f"Bearer {ALICE}"}
    for proxies in ("127.0.0.1", "10.0.0.1"):
        limits = {"forwarded_allow_ips": proxies, "api_keys": key_file, "shutdown_timeout": 0.1}
        with listening(tiny, **limits) as server:
            httpx.get(f"{server.address}/v1/models", headers=forwarded)
    assert [json.loads(line)["address"] for line in lines()] == ["203.0.113.7", "127.0.0.1"]


def test_traces_have_the_phases_as_spans(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    monkeypatch.setattr(Tracing, "to_endpoint", lambda _: tracing)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(tiny, otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces") as client:
        answer = client.post(CHAT, json=BODY | {"messages": WHAT}, headers={"traceparent": parent})
        client.post(CHAT, json=BODY | {"n": -1})
    tracing.provider.force_flush()
    spans = exporter.get_finished_spans()
    *children, root, refused = spans
    assert [span.name for span in children] == ["media", "queue", "prefill", "decode"]
    assert f"{root.context.trace_id:032x}" in parent and root.parent is not None
    assert f"{root.parent.span_id:016x}" in parent
    assert all(span.parent == root.context for span in children)
    begin, end = bounds(root)
    for before, after in itertools.pairwise(children):
        assert begin <= bounds(before)[0] <= bounds(before)[1] <= bounds(after)[0] + 1000
    assert bounds(children[-1])[1] <= end
    usage = answer.json()["usage"]
    attributes = dict(root.attributes or {})
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert attributes["http.route"] == CHAT and attributes["http.response.status_code"] == 200
    assert attributes["llava.request_id"] == answer.headers["x-request-id"]
    assert dict(refused.attributes or {})["error.type"] == "invalid_value"
    assert root.resource.attributes["service.name"] == "llava-interleave"


def bounds(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time, span.end_time
