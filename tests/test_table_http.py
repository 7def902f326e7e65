"""Tables and searches over HTTP: the library's cells, bounded, streamed, cancelled."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from starlette.testclient import TestClient

from llava_interleave import Chatbot, load
from llava_interleave.cli.demo import copy_files
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings

COLUMNS = [
    {"name": "what", "question": "Describe the image."},
    {"name": "things", "question": "How many things are there?", "type": "int"},
    {"name": "star", "question": "Is there a star?", "type": "bool"},
    {"name": "colour", "question": "What colour is the star?", "choices": ["red", "yellow"]},
    {"name": "above", "question": "Is the orange cross above the red star?", "type": "bool"},
]
SAME: dict[str, Any] = {
    "what": "Describe the image.",
    "things": ("How many things are there?", int),
    "star": ("Is there a star?", bool),
    "colour": ("What colour is the star?", Literal["red", "yellow"]),
    "above": ("Is the orange cross above the red star?", bool),  # answered with reasons first
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("demo")
    copy_files(folder)
    return [folder / f"album-{number}.png" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return load()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    settings = Settings(requests_per_minute=100_000, max_table_cells=40, max_requests=3)
    with TestClient(create_app(load(), settings), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def ids(client: TestClient, files: list[Path]) -> list[str]:
    return [
        client.post(
            "/v1/files", files={"file": path.read_bytes()}, data={"purpose": "vision"}
        ).json()["id"]
        for path in files
    ]


@pytest.mark.slow
def test_rows_are_the_librarys(
    client: TestClient, ids: list[str], bot: Chatbot, files: list[Path]
) -> None:
    """Whole and streamed."""
    wanted = [
        {
            "index": index,
            "cells": {
                name: {
                    "value": cell.value,
                    "probability": pytest.approx(cell.probability, abs=1e-4),
                    "allowed": pytest.approx(cell.allowed, abs=1e-4),
                }
                for name, cell in row.cells.items()
            },
        }
        for index, row in enumerate(bot.each([files[1], files[0]], SAME))
    ]
    body = {"images": [ids[1], ids[0]], "columns": COLUMNS}
    assert client.post("/v1/images/table", json=body).json() == {"rows": wanted}
    events = client.post("/v1/images/table", json=body | {"stream": True})
    assert events.headers["content-type"].startswith("text/event-stream")
    *rows, end = events.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    assert [json.loads(row.removeprefix("data: ")) for row in rows] == wanted


def test_find_is_the_librarys(
    client: TestClient, ids: list[str], bot: Chatbot, files: list[Path]
) -> None:
    question = "Is there a yellow star?"
    wanted = [(files.index(Path(str(h.source))), h.probability) for h in bot.find(question, files)]
    broken = "data:image/png;base64,AAAA"
    found = client.post("/v1/images/find", json={"images": [*ids, broken], "question": question})
    hits = found.json()["hits"]
    assert [hit["index"] for hit in hits] == [index for index, _ in wanted]
    assert [hit["probability"] for hit in hits] == pytest.approx([p for _, p in wanted], abs=1e-4)
    assert list(found.json()["errors"]) == ["3"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": []}, "images"),
        ({"columns": []}, "columns"),
        ({"columns": [COLUMNS[0], COLUMNS[0]]}, "the same name"),
        ({"columns": [{"name": "a", "question": "?", "type": "date"}]}, "type"),
        ({"columns": [COLUMNS[1] | {"choices": ["a", "b"]}]}, "choices"),
        ({"images": ["file-0"] * 41}, "41 cells"),
        ({"images": ["file-" + "0" * 64]}, "no such file"),
        ({"images": ["file:///etc/passwd"]}, "file"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_requests_that_are_refused(
    client: TestClient, ids: list[str], changes: dict[str, Any], named: str
) -> None:
    """Or, for one image, an error in its cells."""
    body = {"images": ids[:1], "columns": COLUMNS[:1]} | changes
    refused = client.post("/v1/images/table", json=body)
    if refused.status_code == 200:
        assert named in refused.json()["rows"][0]["cells"]["what"]["error"]
    else:
        assert refused.status_code in (400, 404)
        assert named in refused.json()["error"]["message"]
    service = client.app.state.service  # type: ignore[attr-defined]
    assert service.num_active == 0


def test_an_error_ends_a_stream_as_an_event(client: TestClient, ids: list[str]) -> None:
    body = {"images": [ids[0], "file-" + "0" * 64], "columns": COLUMNS[1:2], "stream": True}
    first, last = client.post("/v1/images/table", json=body).text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["index"] == 0
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "file_not_found"
