"""Several models in one process: loaded when a request names one, unloaded to make room."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from llava_interleave.chat import Chatbot, load
from llava_interleave.cli import app as cli
from llava_interleave.cli.serve import _sources
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.processing import Processor
from llava_interleave.server.app import create_app
from llava_interleave.server.models import ModelSpec, ServedModels
from llava_interleave.server.service import model_card
from llava_interleave.server.settings import Settings
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.requests import WHAT, png
from tests.helpers.server import until

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("several")
    return {name: tiny_checkpoint(base / name, seed=i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> dict[str, Chatbot]:
    return {name: load(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture
def loads() -> list[str]:
    return []


@contextlib.contextmanager
def serving(folders: dict[str, Path], loads: list[str], **changes: Any) -> Iterator[TestClient]:
    def spec(name: str) -> ModelSpec:
        def load_it() -> Chatbot:
            loads.append(name)
            return load(folders[name], device="cpu")

        processor = Processor.from_folder(folders[name])
        return ModelSpec(load_it, model_card(name, None, processor, {}, folders[name]))

    app = create_app({name: spec(name) for name in NAMES}, Settings(**changes))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


def ask(client: TestClient, model: str | None, **body: Any) -> Any:
    named = {} if model is None else {"model": model}
    return client.post(CHAT, json={"messages": WHAT, "max_tokens": 6, **named, **body})


def models(client: TestClient) -> ServedModels:
    service: ServedModels = client.app.state.service  # type: ignore[attr-defined]
    return service


def test_each_name_is_its_own_model(
    folders: dict[str, Path], oracles: dict[str, Chatbot], loads: list[str]
) -> None:
    logprobs: dict[str, tuple[float, ...]] = {}
    with serving(folders, loads, max_loaded_models=2) as client:
        for name in ("a", "b", "a", "c", "b", "a"):
            response = ask(client, name, logprobs=True, top_logprobs=3)
            assert response.status_code == 200, response.text
            assert response.json()["model"] == name
            tokens = response.json()["choices"][0]["logprobs"]["content"]
            logprobs[name] = tuple(top["logprob"] for one in tokens for top in one["top_logprobs"])
            oracle = oracles[name].chat(WHAT, max_new_tokens=6, logprobs=3).logprobs
            assert oracle is not None
            wanted = [logprob for one in oracle for _, logprob in one.top]
            assert logprobs[name] == pytest.approx(wanted, abs=1e-3)
            assert len(models(client).loaded) <= 2
        # c took the place of b, which was idle longer than a; b that of a, a that of c
        assert loads == ["a", "b", "c", "b", "a"]
        stream = ask(client, "b", stream=True).text
        assert '"model":"b"' in stream
        assert ask(client, None).json()["model"] == "a"
    assert len(set(logprobs.values())) == 3


def test_an_unknown_name_is_a_404_with_the_names(
    folders: dict[str, Path], loads: list[str]
) -> None:
    with serving(folders, loads) as client:
        for path in (CHAT, "/v1/messages/count"):
            response = client.post(path, json={"model": "gpt-4o", "messages": WHAT})
            assert response.status_code == 404
            assert "'a', 'b', 'c'" in response.json()["error"]["message"]
        assert client.get("/v1/models/d").status_code == 404


def test_all_models_are_listed_and_what_is_loaded(
    folders: dict[str, Path], loads: list[str]
) -> None:
    with serving(folders, loads) as client:
        until(lambda: models(client).loaded == ["a"])
        data = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["loaded"]) for one in data] == [
            ("a", True),
            ("b", False),
            ("c", False),
        ]
        assert client.get("/v1/models/b").json() == data[1]
        assert data[1]["context_length"] == data[0]["context_length"] > 0
        counted = client.post("/v1/messages/count", json={"model": "b", "messages": WHAT})
        assert counted.status_code == 200
        assert client.get("/v1/models/b").json()["loaded"]
        assert client.get("/ready").status_code == 200
        text = client.get("/metrics").text
        assert "llava_kv_cache_capacity_tokens 16384.0" in text


def test_uploads_and_places_are_shared(folders: dict[str, Path], loads: list[str]) -> None:
    with serving(folders, loads) as client:
        file = client.post("/v1/files", files={"file": png("red")}, data={"purpose": "vision"})
        part = {"type": "image_url", "image_url": {"url": file.json()["id"]}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        for name in ("a", "b"):
            assert ask(client, name, messages=messages).status_code == 200
        services = [one.service for one in models(client)._loaded.values()]
        assert services[0].shares is services[1].shares and not services[0].num_active


def test_a_model_with_requests_is_not_unloaded(folders: dict[str, Path], loads: list[str]) -> None:
    """A request for another model waits for it, and is told to come back if it takes too long."""
    with serving(folders, loads, max_loaded_models=1, prepare_timeout=0.3) as client:
        done = []
        endless = {"max_tokens": 3000, "ignore_eos": True, "stop_on_repetition": False}
        thread = threading.Thread(target=lambda: done.append(ask(client, "a", **endless)))
        thread.start()
        until(lambda: models(client).num_active)
        refused = ask(client, "b")
        assert refused.status_code == 503 and "a have requests" in refused.text
        assert int(refused.headers["retry-after"]) > 0
        assert models(client).loaded == ["a"]
        models(client)._loaded["a"].service.end()
        thread.join()
        assert ask(client, "b").status_code == 200
        assert models(client).loaded == ["b"]


def test_requests_for_a_model_that_loads_share_the_load(
    folders: dict[str, Path], loads: list[str]
) -> None:
    with serving(folders, loads) as client:
        ask(client, "a")
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask(client, "b"))) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 5
        assert loads == ["a", "b"]


def test_a_model_that_cannot_be_loaded_takes_nobody_with_it(
    folders: dict[str, Path], loads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(folders, loads) as client:
        ask(client, "a")
        spec = models(client).specs["b"]

        def broken() -> Chatbot:
            raise CheckpointError("secret path")

        models(client).specs = {**models(client).specs, "b": ModelSpec(broken, spec.card)}
        for _ in range(2):
            response = ask(client, "b")
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_not_loaded"
            assert "secret" not in response.text and "secret path" in caplog.text
        assert ask(client, "a").status_code == 200


def test_memory_of_an_unloaded_model_is_free(folders: dict[str, Path], loads: list[str]) -> None:
    import gc
    import weakref

    with serving(folders, loads, max_loaded_models=1) as client:
        ask(client, "a")
        network = weakref.ref(models(client)._loaded["a"].service.bot.model)
        threads = threading.active_count()
        ask(client, "b")
        gc.collect()
        assert network() is None
        assert threading.active_count() <= threads + 1


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    assert _sources([], "n") == {"n": None}
    assert _sources(["org/model"], None) == {None: "org/model"}
    assert _sources(["mine=org/model"], None) == {"mine": "org/model"}
    assert _sources([str(tmp_path / "x=y")], None) == {None: str(tmp_path / "x=y")}
    assert _sources(["a=one", "/b/two"], None) == {"a": "one", "two": "/b/two"}
    with pytest.raises(OptionError, match="two models are called a"):
        _sources(["a=x", "a=y"], None)
    with pytest.raises(OptionError, match="NAME=MODEL"):
        _sources(["a="], None)


@pytest.mark.parametrize(
    "flag", [["--name", "x"], ["--revision", "r"], ["--adapter", "x=y"], ["--ray", "auto"]]
)
def test_flags_of_a_single_model(folders: dict[str, Path], flag: list[str]) -> None:
    words = ["serve", "-m", f"a={folders['a']}", "-m", f"b={folders['b']}", *flag]
    with pytest.raises(OptionError, match=f"{flag[0]} .*single --model, not"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
