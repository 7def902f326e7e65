"""`llava serve --ray` on a cluster of two nodes here: what clients get is what one process gives,
whatever is lost.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_interleave import cli
from llava_interleave.errors import OptionError, RemoteError
from tests.helpers.requests import BLUE, RED, STILLS, WHAT, data_url, image_part, png, user

ray = pytest.importorskip("ray", reason="needs ray: pip install 'llava-interleave[ray]'")
serve = pytest.importorskip(
    "ray.serve", reason="needs ray's serve: pip install 'llava-interleave[ray]'"
)
httpx = pytest.importorskip("httpx")

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from llava_interleave.chat import load  # noqa: E402
from llava_interleave.server.api_errors import ApiError  # noqa: E402
from llava_interleave.server.app import create_app  # noqa: E402
from llava_interleave.server.ray import gateway  # noqa: E402
from llava_interleave.server.ray.gateway import deploy, session_id  # noqa: E402
from llava_interleave.server.ray.router import SessionAffinityRouter  # noqa: E402
from llava_interleave.server.run import Server  # noqa: E402
from llava_interleave.server.settings import ReplicaSpec, Settings  # noqa: E402
from llava_interleave.server.uploads import RequestScopedFiles, Stored  # noqa: E402
from llava_interleave.testing import tiny_checkpoint  # noqa: E402

pytestmark = pytest.mark.slow

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}  # room for one replica
FAST = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
CHAT = "/v1/chat/completions"
KEYS = {name: f"{name}-" + "0" * 16 for name in ("one", "two", "three", "many", "last")}
LIMIT = 400


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    more = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",
    }
    os.environ |= more
    made = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "include_dashboard": False, "_system_config": FAST},
    )
    made.add_node(**NODE)
    ray.init(made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    for name in more:
        del os.environ[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ray")
    tiny_checkpoint(made / "tiny")
    (made / "keys").write_text("\n".join(KEYS.values()))
    return made


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return Settings(
        port=0,
        api_keys=folder / "keys",
        requests_per_minute=LIMIT,
        max_requests=8,
        max_tokens=3900,
        sse_keepalive=0.5,
        shutdown_timeout=0.5,
    )


@pytest.fixture(scope="module")
def server(nodes: Any, folder: Path, settings: Settings) -> Iterator[Server]:
    with deploy(
        model(str(folder / "tiny")), settings, address=nodes.address, cpus=1, replicas=(2, 2)
    ) as app:
        server = Server(app, settings)
        thread = threading.Thread(target=server.run)
        thread.start()
        until(lambda: server.started)
        yield server
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
    assert not serve.status().applications


@pytest.fixture(scope="module")
def alone(folder: Path, settings: Settings) -> Iterator[TestClient]:
    with TestClient(
        create_app(load(folder / "tiny", device="cpu"), settings), headers=bearer("one")
    ) as client:
        yield client


@pytest.fixture
def one(server: Server) -> Iterator[Any]:
    with client(server, "one") as made:
        yield made


def model(name: str) -> ReplicaSpec:
    return ReplicaSpec(name, None, "auto", "cpu", False, (), "auto", logging.INFO)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[key]}"}


def client(server: Server, key: str) -> Any:
    return httpx.Client(base_url=server.address, headers=bearer(key), timeout=120)


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def body(messages: Any = WHAT, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": messages, "max_tokens": 4} | more


def about(colour: str, question: str = "What is this?") -> list[dict[str, Any]]:
    return user(image_part(data_url(png(colour))), question)


def plain(response: Any) -> tuple[int, str, str]:
    """Status, type and text of a response, without what is another one each time."""
    text = re.sub(
        r'"(id|created|timings)":("chatcmpl-\w+"|\d+|\{[^}]*\})', r'"\1":0', response.text
    )
    return response.status_code, response.headers["content-type"], text


def measured(http: Any, name: str) -> Counter[str]:
    """A metric by replica; "" is what the front counted itself."""
    found: Counter[str] = Counter()
    for line in http.get("/metrics").text.splitlines():
        if sample := re.fullmatch(rf'{name}(?:{{.*replica="(\w*)".*}})? (\S+)', line):
            found[sample[1] or ""] += float(sample[2])
    return found


# What is told to who starts it.


def test_the_command(nodes: Any, folder: Path) -> None:
    """Killed and started again, it has the replicas that it had and no more; stopped, it takes them
    with it.
    """
    port = str(free())
    given = [
        "-m",
        "tiny",
        "--port",
        port,
        "--ray",
        nodes.address,
        "--ray-replicas",
        "1",
        "--device",
        "cpu",
    ]
    for end in (signal.SIGKILL, signal.SIGTERM):
        command = [sys.executable, "-m", "llava_interleave", "serve", *given]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == f"serving tiny at http://127.0.0.1:{port}/v1\n"
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                assert http.post(CHAT, json=body()).status_code == 200
                assert (
                    http.get("/ready", headers={"X-Forwarded-For": "1.2.3.4"}).status_code == 403
                )  # no keys: not for others
                assert len(measured(http, "llava_num_requests_active")) == 1
            assert len(serve.status().applications) == 1
            process.send_signal(end)
            process.wait(60)
    assert not serve.status().applications


def free() -> int:
    """A port without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_user_errors(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_START_ATTEMPTS", 1)
    given = {"address": nodes.address, "cpus": 1, "replicas": None}
    with (
        pytest.raises(RemoteError, match=r"^the replicas do not start: [^\n]*/nowhere[^\n]*$"),
        deploy(model("/nowhere"), Settings(port=0), **given),
    ):
        pass
    assert not serve.status().applications
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1, port {port}: "),
            deploy(model(""), Settings(port=port), **given),
        ):
            pass
    for words, message in (
        (["--ray-cpus", "2"], "name it with --ray"),
        (["--ray", "auto", "--ray-replicas", "3:2"], "minimum and maximum as in 2:8"),
        (["--ray", "auto", "--device", "cuda:1"], "use --device cuda instead of cuda:1"),
        (["--ray", "auto", "--host", "0.0.0.0"], "--api-keys"),
        (["--ray", "ray://head:10001"], "run the command on a node"),
    ):
        done = CliRunner().invoke(cli.app, ["serve", "--port", "0", *words])
        assert done.exit_code and message in " ".join(
            f"{done.output} {done.exception}".replace("│", "").split()
        )


def test_where_ray_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava_interleave.server.ray.gateway", None)
    done = CliRunner().invoke(cli.app, ["serve", "--ray", "auto"])
    assert "pip install 'llava-interleave[serve,ray]'" in str(done.exception)


def test_what_meets() -> None:
    """The image that a request names first, whatever stands around it; of one key; nothing where
    there is none.
    """

    def of(messages: Any, key: str = "k", **more: Any) -> str:
        return session_id(key, json.dumps(body(messages, **more)).encode())

    red = of(WHAT)
    assert (
        red
        == of(user(image_part(RED), image_part(BLUE), "Another?"), n=2)
        == of(user("First", {"type": "views", "views": {"a": RED}}))
    )
    assert (
        len(
            {
                red,
                of(WHAT, "l"),
                of(user(image_part(BLUE), image_part(RED))),
                of(user({"type": "image", "path": "a.png"})),
                "",
            }
        )
        == 5
    )
    assert of(user(image_part("https://a.example/b"))) == of(
        user({"type": "video", "video": ["https://a.example/b", RED]})
    )
    assert (
        of([{"role": "user", "content": "Hello"}])
        == session_id("k", b"")
        == session_id("k", b"\xff{")
        == ""
    )


def test_who_has_enough_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = [[SimpleNamespace(replica_id=name)] for name in "abc"]

    async def ranked(*_: Any) -> list[list[Any]]:
        return ring

    monkeypatch.setattr(ConsistentHashRouter, "choose_replicas", ranked)
    for name in ("initialize_state", "on_send_request"):
        monkeypatch.setattr(ConsistentHashRouter, name, lambda *_, **__: None)
    router = object.__new__(SessionAffinityRouter)
    router.initialize_state(target=2)

    def order() -> str:
        return "".join(rank[0].replica_id for rank in asyncio.run(router.choose_replicas([])))

    seen = []
    for _ in range(7):
        seen.append(order())
        router.on_send_request(seen[-1][0])
    assert seen == ["abc", "abc", "bca", "bca", "cab", "cab", "abc"]
    for name in "abbb":
        router.on_request_completed(name, "")
    assert order() == "bac"
    router.on_request_completed("a", "")
    assert order() == "abc"


def test_files_live_as_long_as_a_request_uses_them() -> None:
    lent, file = RequestScopedFiles(), Stored(b"x", "a.png", "vision", 0)
    with lent.during("k", {"file-1": file}):
        with lent.during("k", {"file-1": file}), lent.during("l", {}):
            assert lent.get("k", "file-1") is file
        assert lent.get("k", "file-1") is file
        with pytest.raises(ApiError):
            lent.get("l", "file-1")
    with pytest.raises(ApiError):
        lent.get("k", "file-1")


# What a client gets.

CALLS: dict[str, tuple[str, str, Any]] = {
    "text": ("POST", CHAT, body([{"role": "user", "content": "Hello"}])),
    "images": (
        "POST",
        CHAT,
        body(
            user(image_part(RED), "is the first,", image_part(BLUE), "the second"),
            seed=3,
            temperature=1.5,
        ),
    ),
    "video": ("POST", CHAT, body(user(STILLS, "What moves?"), frames=2)),
    "several": ("POST", CHAT, body(n=3, seed=7, temperature=1.5, logprobs=True)),
    "stream": (
        "POST",
        CHAT,
        body(stream=True, stream_options={"include_usage": True}, max_tokens=1),
    ),
    "attribution": ("POST", CHAT, body(attribution="attention")),
    "count": ("POST", "/v1/messages/count", {"messages": WHAT}),
    "models": ("GET", "/v1/models", None),
    "another model": ("GET", "/v1/models/gpt", None),
    "a mistake": ("POST", CHAT, body(tools=[1])),
    "no field": ("POST", CHAT, body(colour="red")),
    "no JSON": ("POST", CHAT, None),
    "too much": ("POST", CHAT, body(max_tokens=4000)),
    "nowhere": ("GET", "/nowhere", None),
    "no such method": ("DELETE", CHAT, None),
    "nor here": ("PUT", "/health", None),
    "no file": ("GET", "/v1/files/file-0", None),
    "health": ("GET", "/health", None),
    "ready": ("GET", "/ready", None),
    "the page": ("GET", "/", None),
    "a file of it": ("GET", "/app.js", None),
    "for programs": ("GET", "/openapi.json", None),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_as_one_process(one: Any, alone: TestClient, call: tuple[str, str, Any]) -> None:
    method, path, sent = call
    many, single = one.request(method, path, json=sent), alone.request(method, path, json=sent)
    assert plain(many) == plain(single)


def test_without_a_key(server: Server) -> None:
    for path, status in (
        ("/v1/models", 401),
        ("/metrics", 401),
        ("/openapi.json", 401),
        ("/ready", 401),
        ("/health", 200),
        ("/", 200),
    ):
        assert httpx.get(server.address + path, timeout=60).status_code == status


def test_who_asks_about_the_same_image_meets_its_features(server: Server) -> None:
    """Each image's second question finds its prefix, so it came to the same replica; both replicas
    have images.
    """
    colours = [
        "red",
        "lime",
        "navy",
        "teal",
        "gold",
        "gray",
        "plum",
        "pink",
        "tan",
        "cyan",
        "snow",
        "peru",
    ]
    with client(server, "three") as http:
        before = measured(http, "llava_encoded_crops")
        for question, cached in (("What is this?", False), ("And what is that?", True)):
            for colour in colours:
                usage = http.post(CHAT, json=body(about(colour, question), max_tokens=1)).json()[
                    "usage"
                ]
                details = usage["prompt_tokens_details"]
                assert (details["cached_tokens"] >= details["image_tokens"]) == cached
        encoded = measured(http, "llava_encoded_crops") - before
    assert len(encoded) == 2 and sum(encoded.values()) == len(colours)


def test_clients_do_not_see_each_others_requests(server: Server) -> None:
    for key in ("one", "two"):
        with client(server, key) as http:
            usage = http.post(CHAT, json=body(about("olive"), max_tokens=1)).json()["usage"]
            assert (
                usage["prompt_tokens_details"]["cached_tokens"]
                < usage["prompt_tokens_details"]["image_tokens"]
            )


def test_uploads_are_everywhere(server: Server, alone: TestClient) -> None:
    """An upload goes with the requests that name it, to whichever replica; another key neither sees
    nor uses it.
    """
    with client(server, "one") as http, client(server, "two") as other:
        said = http.post(
            "/v1/files", files={"file": ("a.png", png("red"))}, data={"purpose": "vision"}
        ).json()
        reply = alone.post(
            "/v1/files", files={"file": ("a.png", png("red"))}, data={"purpose": "vision"}
        ).json()
        assert said | {"created_at": 0} == reply | {"created_at": 0}
        before = measured(http, "llava_http_requests_total")
        for first in (
            "red",
            "lime",
            "navy",
            "teal",
            "gold",
            "gray",
            "plum",
            "pink",
            "tan",
            "cyan",
        ):  # four met by chance on one
            question = body(
                user(
                    image_part(data_url(png(first))), "and", image_part(said["id"]), "What differs?"
                )
            )
            assert plain(http.post(CHAT, json=question)) == plain(alone.post(CHAT, json=question))
        after = measured(http, "llava_http_requests_total") - before
        assert len([replica for replica in after if replica]) == 2
        assert [file["id"] for file in http.get("/v1/files").json()["data"]] == [said["id"]]
        assert other.get("/v1/files").json()["data"] == []
        assert other.post(CHAT, json=body(user(image_part(said["id"])))).status_code == 404
        assert http.delete(f"/v1/files/{said['id']}").json()["deleted"]
        assert http.post(CHAT, json=body(user(image_part(said["id"])))).status_code == 404


def test_a_disconnect_ends_a_stream(one: Any) -> None:
    with one.stream(
        "POST", CHAT, json=body(stream=True, max_tokens=3900, stop_on_repetition=False)
    ) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert (
            sum(measured(one, "llava_num_requests_active").values()) == 1
        )  # it goes on, while this was read
    until(lambda: not sum(measured(one, "llava_num_requests_active").values()))
    assert sum(measured(one, "llava_aborted_requests_total").values()) >= 1


def test_popular_images_spread_over_replicas(server: Server) -> None:
    """Of six answers about one image four are computed where it is known: half of --max-requests.
    The others go elsewhere.
    """
    going: list[Any] = []
    with client(server, "one") as http:
        try:
            for _ in range(6):
                going.append(
                    http.send(
                        http.build_request(
                            "POST",
                            CHAT,
                            json=body(stream=True, max_tokens=3900, stop_on_repetition=False),
                        ),
                        stream=True,
                    )
                )
            spread = {
                replica: count
                for replica, count in measured(http, "llava_num_requests_active").items()
                if replica
            }
            assert sorted(spread.values()) == [2, 4]
            assert http.get("/ready").status_code == 200
        finally:
            for response in going:
                response.close()
        until(lambda: not sum(measured(http, "llava_num_requests_active").values()))


def test_a_limit_is_not_multiplied(server: Server) -> None:
    with client(server, "many") as http, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        statuses = Counter(pool.map(lambda _: http.get("/v1/files").status_code, range(LIMIT + 60)))
        refilled = int((time.monotonic() - began) * LIMIT / 60) + 1
        assert LIMIT <= statuses[200] <= LIMIT + refilled
        assert statuses[429] == LIMIT + 60 - statuses[200] > 0


# What is lost. From here on there is one node.


def test_a_node_that_is_killed(nodes: Any, server: Server) -> None:
    """Streams of the lost replica end in an error that a client knows, the others go on, and what
    comes is answered.
    """
    colours = ["red", "lime", "navy", "teal", "gold", "gray", "plum", "pink"]
    came: dict[str, list[str]] = {colour: [] for colour in colours}
    where: dict[str, set[str]] = {}

    def read(colour: str, response: Any) -> None:
        for line in response.iter_lines():
            came[colour].append(line)

    def lost() -> set[str]:
        return {
            colour
            for colour, lines in came.items()
            if any('"replica_lost"' in line for line in lines[-2:])
        }

    with client(server, "last") as http, ThreadPoolExecutor(len(colours)) as pool:
        going = {}
        for colour in colours:
            before = measured(http, "llava_num_requests_active")
            request = http.build_request(
                "POST",
                CHAT,
                json=body(about(colour), stream=True, max_tokens=3900, stop_on_repetition=False),
            )
            going[colour] = http.send(request, stream=True)
            (replica,) = measured(http, "llava_num_requests_active") - before
            where.setdefault(replica, set()).add(colour)
        assert len(where) == 2
        reading = {
            colour: pool.submit(read, colour, response) for colour, response in going.items()
        }
        nodes.remove_node(nodes.list_all_nodes()[1], allow_graceful=False)
        until(lambda: lost() in where.values())
        left = set(colours) - lost()
        before = {colour: len(came[colour]) for colour in left}
        until(lambda: all(len(came[colour]) > before[colour] for colour in left))
        for colour in left:
            going[colour].close()
        until(lambda: all(one.done() for one in reading.values()))
        for colour in colours:
            while (answer := http.post(CHAT, json=body(about(colour)))).status_code != 200:
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
                assert int(answer.headers["retry-after"]) == 1
        assert http.get("/ready").status_code == 200
        assert (
            len([replica for replica in measured(http, "llava_num_requests_active") if replica])
            == 1
        )


def test_a_request_over_its_time_limit_is_an_error(server: Server) -> None:
    with (
        client(server, "last") as http,
        http.stream(
            "POST", CHAT, json=body(stream=True, max_tokens=3900, stop_on_repetition=False)
        ) as response,
    ):
        lines = response.iter_lines()
        assert next(lines)
        server.should_exit = True
        *_, last = filter(None, lines)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
