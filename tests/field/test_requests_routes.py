"""Addresses, methods and headers as clients, proxies and browsers send them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llava_interleave.chat import load
from llava_interleave.errors import OptionError
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.requests import WHAT

CHAT = "/v1/chat/completions"
LOCAL = "http://127.0.0.1:8000"
KEY = "a-key-of-the-test-suite"
PAGE = "https://app.example.com"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("routes") / "tiny")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    app = create_app(load(folder, device="cpu"), Settings(requests_per_minute=100_000))
    with TestClient(app, base_url=LOCAL) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    settings = Settings(api_keys=keys, cors_origin=(PAGE,))
    with TestClient(create_app(load(folder, device="cpu"), settings), base_url=LOCAL) as client:
        yield client


BODY = {"messages": WHAT, "max_tokens": 1}


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/v1/chat/completions/", "/v1/v1/chat/completions"]
)
def test_the_same_route_by_other_spellings(client: TestClient, path: str) -> None:
    response = client.post(path, json=BODY, follow_redirects=False)
    assert response.status_code == 200 and response.json()["object"] == "chat.completion"


@pytest.mark.parametrize("path", ["/models", "/v1/models/", "/v1/models/tiny/", "/health/"])
def test_the_same_page_by_other_spellings(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/nowhere"])
def test_a_route_that_is_not_there_lists_those_that_are(client: TestClient, path: str) -> None:
    missing = client.post(path, json={"model": "tiny", "input": "x"})
    assert missing.status_code == 404
    assert CHAT in missing.json()["error"]["message"] and path in missing.json()["error"]["message"]


def test_head_is_a_get_without_a_body(client: TestClient) -> None:
    for path in ("/health", "/v1/models", "/"):
        assert client.head(path).status_code == 200
    assert client.head("/nowhere").status_code == 404


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_wrong_or_missing_content_type_is_named(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    refused = client.post(CHAT, content=json.dumps(BODY), headers=headers)
    message = refused.json()["error"]["message"]
    assert refused.status_code == 415 and "application/json" in message
    assert (kind or "missing") in message


def test_models_tell_their_limits(client: TestClient) -> None:
    model = client.get("/v1/models").json()["data"][0]
    assert model["max_model_len"] == model["context_length"] == 4096
    assert model["limits"]["media"] == 32 and model["limits"]["max_tokens"] == 4096


def preflight(client: TestClient, origin: str) -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return client.options(CHAT, headers=headers)


def test_a_page_of_an_allowed_origin_uses_the_api(guarded: TestClient) -> None:
    """A preflight has no key: browsers never send one."""
    allowed = preflight(guarded, PAGE)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    headers = {"Origin": PAGE, "Authorization": f"Bearer {KEY}"}
    answer = guarded.post(CHAT, json=BODY, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    refused = guarded.post(CHAT, json=BODY, headers={"Origin": PAGE})
    assert refused.status_code == 401  # readable by the page
    assert refused.headers["access-control-allow-origin"] == PAGE


def test_a_page_of_another_origin_does_not(guarded: TestClient, client: TestClient) -> None:
    for one in (guarded, client):
        refused = preflight(one, "https://other.example.com")
        assert refused.status_code in (401, 403)
        assert "access-control-allow-origin" not in refused.headers


def test_every_origin_needs_keys() -> None:
    with pytest.raises(OptionError, match="--api-keys"):
        Settings(cors_origin=("*",))
