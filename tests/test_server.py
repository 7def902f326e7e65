"""The server: its answers against the chatbot's, its limits against a hostile corpus, its manners
under load and faults.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import itertools
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from fastapi.exceptions import RequestValidationError
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from typer.testing import CliRunner

from llava_interleave import cli
from llava_interleave.attribution.attribution import ImageAttribution
from llava_interleave.attribution.forward import AttributionRun
from llava_interleave.chat import Answer, AnswerDelta, Chatbot, Options, load
from llava_interleave.errors import LlavaError, MediaRefused, OptionError
from llava_interleave.processing import Limits, Loader
from llava_interleave.processing.fetch import Address
from llava_interleave.prompt import Prompt
from llava_interleave.server import api_keys, middleware, uploads
from llava_interleave.server import service as service_module
from llava_interleave.server.api_errors import ApiError
from llava_interleave.server.api_keys import ApiKeys
from llava_interleave.server.app import create_app
from llava_interleave.server.attribution import sentence_attributions
from llava_interleave.server.engine_thread import EngineThread, ServerJob
from llava_interleave.server.fairness import RateLimit
from llava_interleave.server.metrics import Metrics
from llava_interleave.server.openai_types import ChatRequest
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings
from tests.helpers.requests import (
    BLUE,
    HOSTILE,
    RED,
    STILLS,
    WHAT,
    data_url,
    image_part,
    png,
    sent,
    user,
)
from tests.helpers.server import QUESTIONS, listening, until

pytestmark = pytest.mark.slow

LOCAL = "http://127.0.0.1:8000"
CHAT = "/v1/chat/completions"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def oracle(tiny: Path) -> Chatbot:
    return load(tiny, device="cpu")


@contextlib.contextmanager
def running(tiny: Path, **changes: Any) -> Iterator[TestClient]:
    app = create_app(load(tiny, device="cpu"), Settings(**changes))
    with TestClient(app, base_url=LOCAL) as client:
        yield client
        settled(client)


def settled(client: TestClient) -> None:
    """Whatever happened: nothing is left running, and memory is accounted for."""
    service = client.app.state.service  # type: ignore[attr-defined]
    until(
        lambda: (
            not (
                service.engine_thread.load.running
                or service.engine_thread.load.waiting
                or service.num_active
            )
        )
    )
    if not service.engine_thread.failed:
        service.bot.engine.check()


@pytest.fixture(scope="module")
def client(tiny: Path) -> Iterator[TestClient]:
    with running(tiny, requests_per_minute=100_000) as client:
        yield client


def ask(client: TestClient, **body: Any) -> Any:
    return client.post(CHAT, json={"model": "tiny", "messages": WHAT, "max_tokens": 4} | body)


def events(text: str) -> list[dict[str, Any]]:
    *data, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in data if not line.startswith(":")]


def folded(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Choices from the chunks of a stream, as a client puts them together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            into = choices.setdefault(
                choice["index"], {"text": "", "logprobs": [], "finish_reason": None}
            )
            assert into["finish_reason"] is None, "nothing comes after the end"
            into["text"] += choice["delta"].get("content", "")
            into["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            into["finish_reason"] = choice["finish_reason"]
    return choices


# Answers.


def expected(oracle: Chatbot, name: str) -> list[Answer]:
    messages, fields, renamed = QUESTIONS[name]
    known = {field.name for field in dataclasses.fields(Options)}
    changes = {name: value for name, value in fields.items() if name in known} | renamed
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    return oracle.choices(messages, max_new_tokens=12, **changes)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_is_the_chatbots_and_a_stream_folds_to_it(
    client: TestClient, oracle: Chatbot, name: str
) -> None:
    messages, fields, _ = QUESTIONS[name]
    answers = expected(oracle, name)
    body = {"messages": messages, "max_tokens": 12, **fields}
    whole = ask(client, **body).json()
    streamed = ask(client, **body, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = events(streamed.text)
    choices = folded(chunks)
    assert len(whole["choices"]) == len(choices) == len(answers)
    for index, answer in enumerate(answers):
        choice = whole["choices"][index]
        assert choice["message"] == {"role": "assistant", "content": answer.text, "refusal": None}
        assert choice["finish_reason"] == answer.finish_reason == choices[index]["finish_reason"]
        assert choices[index]["text"] == answer.text
        if answer.logprobs is None:
            assert choice["logprobs"] is None and choices[index]["logprobs"] == []
            continue
        assert choices[index]["logprobs"] == choice["logprobs"]["content"]
        for token, known in zip(choice["logprobs"]["content"], answer.logprobs, strict=True):
            assert token["logprob"] == pytest.approx(known.logprob, abs=1e-4)
            assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"] == known.text
            assert len(token["top_logprobs"]) == 3
    usage = whole["usage"]
    assert usage["prompt_tokens"] == answers[0].usage.prompt
    assert usage["completion_tokens"] == sum(answer.usage.generated for answer in answers)
    assert "attributions" not in whole
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert {**chunks[-1]["usage"], "prompt_tokens_details": 0} == {
        **usage,
        "prompt_tokens_details": 0,
    }
    assert chunks[-1]["choices"] == [] and all(chunk["usage"] is None for chunk in chunks[:-1])
    assert whole["timings"].keys() == chunks[-2]["timings"].keys()
    assert whole["timings"]["total"] > 0 < whole["timings"]["prepare"]


def test_a_stop_string_ends_the_answer_before_it_and_the_computation(
    client: TestClient, oracle: Chatbot
) -> None:
    free = oracle.chat(WHAT, max_new_tokens=30, temperature=2.0, seed=9).text
    stop = free[len(free) // 2 :][:2]
    answer = oracle.chat(WHAT, max_new_tokens=30, temperature=2.0, seed=9, stop=stop)
    got = ask(client, temperature=2.0, seed=9, max_tokens=30, stop=[stop, "never"]).json()
    assert got["choices"][0]["message"]["content"] == answer.text == free[: free.index(stop)]
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] == answer.usage.generated < 30


def test_concurrent_requests_change_no_answer(client: TestClient, oracle: Chatbot) -> None:
    names = list(QUESTIONS)
    with ThreadPoolExecutor(8) as pool:
        got = list(
            pool.map(
                lambda n: ask(
                    client, messages=QUESTIONS[n][0], **QUESTIONS[n][1] | {"max_tokens": 12}
                ),
                names,
            )
        )
    for name, response in zip(names, got, strict=True):
        assert [c["message"]["content"] for c in response.json()["choices"]] == [
            a.text for a in expected(oracle, name)
        ]


def test_usage_has_cached_and_image_tokens(client: TestClient) -> None:
    messages = user(
        image_part(data_url(png("orange"))),
        image_part(RED),
        "One of a kind, and long enough to be worth a copy?",
    )
    first, again = (ask(client, messages=messages).json()["usage"] for _ in range(2))
    assert (
        first["prompt_tokens_details"]["image_tokens"]
        == again["prompt_tokens_details"]["image_tokens"]
        == 2 * 16
    )
    assert (
        first["prompt_tokens_details"]["cached_tokens"]
        < again["prompt_tokens_details"]["cached_tokens"]
    )
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1


def test_counting_is_the_librarys_estimate(client: TestClient, oracle: Chatbot) -> None:
    messages = user(
        image_part(RED), STILLS, {"type": "views", "views": {"front": BLUE}}, "How many?"
    )
    counted = client.post("/v1/messages/count", json={"messages": messages, "frames": 2}).json()
    estimate = dataclasses.asdict(oracle.estimate(messages, frames=2))
    assert counted == json.loads(json.dumps(estimate))
    assert [len(part["times"]) for part in counted["parts"]] == [0, 0, 2, 0]
    assert (
        counted["total"]
        == ask(client, messages=messages, frames=2).json()["usage"]["prompt_tokens"]
    )


# Fields.


def test_every_field_of_openai_is_known_or_refused_by_name(client: TestClient) -> None:
    """Taken from the official client: what it can send and this server does not do is said, never
    ignored.
    """
    theirs = set(CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert {"messages", "logit_bias", "tools", "metadata"} <= theirs
    for name in theirs - set(ChatRequest.model_fields):
        refused = ask(client, **{name: "x"})
        assert refused.status_code == 400, name
        assert refused.json()["error"]["param"] == name
        assert name in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n is 9"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "4096"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nope"}},
                }
            },
            "nope",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "http://a/b"}},
                }
            },
            "http://a/b",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": ["y" * 64_000]}},
                }
            },
            "64,000",
        ),
        ({"response_format": {"type": "regex", "regex": "("}}, "unclosed"),
        ({"response_format": {"type": "regex", "regex": "x" * 4097}}, "regex"),
        ({"response_format": {"type": "choice", "choice": []}}, "choice"),
        ({"tools": [{}]}, "tools"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"user": "x" * 129}, "user"),
        ({"user": 5}, "user"),
        ({"fps": 0}, "fps"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
        ({"messages": user({"type": "image_url", "image_url": {"url": RED, "zoom": 2}})}, "zoom"),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": RED, "detail": "vast"}})},
            "detail",
        ),
        ({"messages": user({"type": "file", "file": {"file_data": "aGk="}})}, "file_id"),
        ({"messages": user({"type": "file", "file": {"file_data": RED}, "end": 2})}, "end"),
        ({"messages": user(*["x"] * 600)}, "512"),
    ],
)
def test_a_field_out_of_range_is_a_400_that_names_it(
    client: TestClient, fields: dict[str, Any], named: str
) -> None:
    refused = ask(client, **fields)
    error = refused.json()["error"]
    assert refused.status_code == 400, error
    assert named in error["message"] and error["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_is_a_400_without_a_field(client: TestClient) -> None:
    refused = client.post(CHAT, content=b'{"model": ', headers={"Content-Type": "application/json"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_json", None)
    assert "not JSON: EOF" in error["message"] and "column 10" in error["message"]


COLOUR = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def form(kind: str, value: Any) -> dict[str, Any]:
    return {
        "response_format": {
            "type": kind,
            kind: {"name": "it", "schema": value} if kind == "json_schema" else value,
        }
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 2.0, "seed": 5, "n": 3},
        {"temperature": 1.0, "seed": 1, "top_p": 0.3, "top_k": 4},
    ],
)
def test_the_form_of_answers_is_kept(client: TestClient, how: dict[str, Any], stream: bool) -> None:
    """With random weights, which know nothing of any form: whatever comes, the form is the
    grammar's work.
    """

    def texts(**fields: Any) -> list[str]:
        got = ask(client, max_tokens=60, **how, **fields, stream=stream)
        choices = folded(events(got.text)).values() if stream else got.json()["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"stop"}
        return [choice["text"] if stream else choice["message"]["content"] for choice in choices]

    for text in texts(**form("json_schema", COLOUR)):
        parsed = json.loads(text)
        assert parsed == {"colour": parsed["colour"], "count": parsed["count"]}
        assert parsed["colour"] in ("red", "blue") and 0 <= parsed["count"] <= 20
        assert text == json.dumps(parsed)
    for text in texts(**form("regex", r"(left|right) [0-9]{2,4}!")):
        assert re.fullmatch(r"(left|right) [0-9]{2,4}!", text)
    options = ["a red square", 'ünïcödé "quoted"', "a blue\ncircle"]
    assert set(texts(**form("choice", options))) <= set(options)


def test_a_form_that_allows_all_changes_nothing(client: TestClient) -> None:
    how: dict[str, Any] = {
        "temperature": 1.5,
        "seed": 8,
        "logit_bias": {"70": 3},
        "frequency_penalty": 0.5,
    }
    free, guided = (
        ask(client, max_tokens=20, **how, **more).json() for more in ({}, form("regex", r"(?s:.*)"))
    )
    assert (
        "\ufffd" not in free["choices"][0]["message"]["content"]
    )  # bytes that are no text match nothing
    assert guided["choices"] == free["choices"]


def test_json_may_be_any_object(client: TestClient, oracle: Chatbot) -> None:
    """The likeliest token of this network is a newline; and where the closing brace is made
    likelier, it comes at once.
    """
    any_json = {"response_format": {"type": "json_object"}}
    assert (
        ask(client, max_tokens=5, **any_json)
        .json()["choices"][0]["message"]["content"]
        .startswith("{")
    )
    brace = oracle.processor.tokenizer.encode("}")[0]
    got = ask(client, max_tokens=5, logit_bias={str(brace): 100}, **any_json).json()["choices"][0]
    assert (got["message"]["content"], got["finish_reason"]) == ("{}", "stop")


def test_a_guided_answer_changes_no_other(client: TestClient) -> None:
    alone = [
        ask(client, max_tokens=20, temperature=1.0, seed=3).json(),
        ask(client, max_tokens=20, **form("regex", "[ab]{9}")).json(),
    ]
    with ThreadPoolExecutor(2) as pool:
        later = [
            pool.submit(ask, client, max_tokens=20, temperature=1.0, seed=3),
            pool.submit(ask, client, max_tokens=20, **form("regex", "[ab]{9}")),
        ]
    assert [answer.result().json()["choices"] for answer in later] == [
        answer["choices"] for answer in alone
    ]


@pytest.mark.parametrize(
    "regex",
    [
        "((a{1,999}){1,999}){1,999}",
        "(a|b|ab)*c" * 300,
        "(x+x+)+y",
        "(.*)*(.*)*(.*)*$",
        "a{1,100000}",
        "(?:" * 1000 + ")" * 1000,
    ],
)
def test_no_pattern_holds_up_the_server(client: TestClient, regex: str) -> None:
    began = time.monotonic()
    assert ask(client, max_tokens=3, **form("regex", regex)).status_code in (200, 400)
    assert time.monotonic() - began < 30


def test_null_and_neutral_values_are_accepted(client: TestClient) -> None:
    """Clients send null for what they do not set, and an answer's message back as it came."""
    said = ask(client).json()["choices"][0]["message"]
    nothing = {
        name: None
        for name in ChatRequest.model_fields
        if name not in ("messages", "model", "max_tokens")
    }
    plain = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "store": False,
        "user": "someone",
    }
    for fields in (
        nothing,
        plain,
        {"messages": [*WHAT, said | {"tool_calls": None}, {"role": "user", "content": "Sure?"}]},
    ):
        assert ask(client, **fields).status_code == 200, fields


def test_what_is_counted_is_named_by_texts(client: TestClient) -> None:
    """A number or an object in the place of an image was counted as one, because nothing is opened
    to count.
    """
    for part in (
        {"type": "image", "image": {}},
        {"type": "video", "video": [RED, 5]},
        {"type": "views", "views": {"front": [RED]}},
        {"type": "views", "views": [RED, {"name": "back", "image": {}}]},
    ):
        refused = client.post("/v1/messages/count", json={"messages": user(part)})
        assert refused.status_code == 400 and "must be a string" in refused.text, part


def test_a_preview_is_the_image_as_the_server_reads_it(client: TestClient) -> None:
    """Chromium decodes no TIFF, and no other key's image is shown."""
    file = BytesIO()
    Image.new("RGB", (600, 300), "purple").save(file, "TIFF")
    path = f"/v1/files/{upload(client, file.getvalue()).json()['id']}/preview"
    for size, shown in ((64, (64, 32)), (2048, (600, 300))):
        answer = client.get(path, params={"size": size})
        image = Image.open(BytesIO(answer.content))
        assert (answer.headers["content-type"], image.size) == ("image/webp", shown)
        shown_colour = image.resize((1, 1)).getpixel((0, 0))
        assert np.abs(np.subtract(shown_colour, (128, 0, 128))).max() < 6
    assert client.get(path, params={"size": 5000}).status_code == 400
    damaged = upload(client, file.getvalue()[:100]).json()["id"]
    refused = client.get(f"/v1/files/{damaged}/preview").json()["error"]
    assert refused["code"] == "invalid_image"
    assert client.get("/v1/files/file-0/preview").json()["error"]["code"] == "file_not_found"


def test_a_405_tells_all_that_is_allowed(client: TestClient) -> None:
    for path, allowed in (
        ("/v1/files", "GET, POST"),
        ("/v1/files/x", "DELETE, GET"),
        (CHAT, "POST"),
    ):
        refused = client.options(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)


def test_an_answer_that_repeats_itself_was_cut_off(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's finish_reason has no value for it, and strict clients take no other."""
    no_eos = {
        str(token): -100 for token in client.app.state.service.bot.processor.tokenizer.eos_ids
    }  # type: ignore[attr-defined]
    loop = "llava_interleave.engine.scheduler.ends_in_loop"
    monkeypatch.setattr(loop, lambda tokens, start: len(tokens) - start == 5)
    for fields, count, reason in (({}, 5, "repetition"), ({"stop_on_repetition": False}, 9, None)):
        body = {"max_tokens": 9, "logit_bias": no_eos} | fields
        whole = ask(client, **body).json()
        (choice,) = whole["choices"]
        assert (choice["finish_reason"], choice.get("stop_reason")) == ("length", reason)
        assert whole["usage"]["completion_tokens"] == count
        last = events(ask(client, **body, stream=True).text)[-1]["choices"][0]
        assert (last["finish_reason"], last.get("stop_reason")) == ("length", reason)


def test_a_prefill_serves_the_question_of_its_key(client: TestClient) -> None:
    begin = user(image_part(data_url(png("teal"))), image_part(data_url(png("olive"))))
    first = client.post("/v1/messages/prefill", json={"messages": begin}).json()
    again = client.post("/v1/messages/prefill", json={"messages": begin}).json()
    assert (first["cached_tokens"], again["cached_tokens"]) == (0, first["prompt_tokens"] - 1)
    messages = user(*begin[0]["content"], "What changed?")
    usage = ask(client, messages=messages, max_tokens=3).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - 8
    assert client.post("/v1/messages/prefill", json={"messages": []}).status_code == 400


def test_any_name_is_the_only_model(client: TestClient) -> None:
    assert ask(client, model="gpt").json()["model"] == "tiny"
    assert client.get("/v1/models/gpt").status_code == 404
    assert client.get("/v1/models").json()["data"] == [client.get("/v1/models/tiny").json()]
    assert client.get("/v1/models/tiny").json()["context_length"] == 4096


def test_too_long_says_what_would_fit(client: TestClient) -> None:
    refused = ask(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    assert "4,096" in refused.json()["error"]["message"]


# Files.


def upload(client: TestClient, data: bytes, **headers: str) -> Any:
    return client.post(
        "/v1/files", files={"file": ("a.png", data)}, data={"purpose": "vision"}, headers=headers
    )


def test_a_file_is_named_by_its_content_and_stands_for_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same content again is the same file to the last field, however much later it is sent."""
    ticks = itertools.count(1000)
    monkeypatch.setattr(uploads.time, "time", lambda: next(ticks))
    stored = upload(client, png("purple")).json()
    assert upload(client, png("purple")).json() == stored
    assert upload(client, png("pink")).json()["id"] != stored["id"]
    assert client.get(f"/v1/files/{stored['id']}").json() == stored
    direct = ask(
        client,
        messages=user(image_part(data_url(png("purple")), detail="high"), "What?"),
        temperature=1.0,
        seed=1,
    )
    named = ask(
        client,
        messages=user(image_part(stored["id"], detail="high"), "What?"),
        temperature=1.0,
        seed=1,
    )
    assert named.json()["choices"] == direct.json()["choices"]
    by_part = ask(
        client,
        messages=user(
            {"type": "file", "file": {"file_id": stored["id"]}},
            {"type": "image", "image": stored["id"]},
        ),
    )
    assert by_part.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 2 * 16
    assert client.delete(f"/v1/files/{stored['id']}").json()["deleted"]
    assert client.get(f"/v1/files/{stored['id']}").status_code == 404
    gone = ask(client, messages=user(image_part(stored["id"])))
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "file_not_found")


def test_a_video_is_uploaded_and_looked_at(client: TestClient, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue", "white")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    name = upload(client, (tmp_path / "a.gif").read_bytes()).json()["id"]
    for part in (
        {"type": "file", "file": {"file_id": name}},
        {"type": "video_url", "video_url": {"url": name}},
    ):
        usage = ask(client, messages=user(part, "What moves?"), frames=3).json()["usage"]
        assert usage["prompt_tokens_details"]["image_tokens"] == 3 * 16


def test_files_are_bounded(tiny: Path) -> None:
    big = png("red") + bytes(600_000)
    with running(tiny, files_mb=1) as client:
        assert upload(client, big).status_code == 200
        assert upload(client, big).status_code == 200  # the same
        full = upload(client, big + b"!")
        assert full.status_code == 413 and "600,09" in full.json()["error"]["message"]
        assert upload(client, b"#!/bin/sh").status_code == 400


# Which image an answer leaned on.

LOOK = user(
    "Compare",
    image_part(RED, detail="high"),
    "with",
    {"type": "views", "views": {"front": BLUE}},
    "and",
    STILLS,
    "now?",
)


def explained(
    bot: Chatbot, answer: Answer | str, leave_out: bool, **changes: Any
) -> dict[str, Any]:
    """What the library tells of an answer, as JSON has it."""
    found = bot.attribute(LOOK, answer, leave_out=leave_out, **changes)
    names = ("image 1", "view front", "video 3")
    images = [
        {
            "name": name,
            "share": look.share if look.share is None else pytest.approx(look.share, abs=1e-4),
            "change": look.change if look.change is None else pytest.approx(look.change, abs=1e-4),
            "attention": pytest.approx(look.attention, abs=1e-4),
            "heat": [[pytest.approx(row, abs=1e-4) for row in rows] for rows in look.heat.tolist()],
        }
        for name, look in zip(names, found.images, strict=True)
    ]
    return {
        "layers": list(found.layers),
        "logprob": pytest.approx(found.logprob, abs=1e-3),
        "images": images,
    }


def without_sentences(attribution: dict[str, Any], text: str, how: bool | str) -> dict[str, Any]:
    """An attribution, once its sentences are checked: they are the answer, and so are their sums."""
    sentences = attribution.pop("sentences")
    if how is not True:
        assert sentences is None
        return attribution
    assert "".join(sentence["text"] for sentence in sentences) == text
    sums = [sum(column) for column in zip(*(one["changes"] for one in sentences), strict=True)]
    assert sums == pytest.approx([image["change"] for image in attribution["images"]], abs=1e-4)
    return attribution


def test_sentences_of_an_attribution() -> None:
    """A sentence ends with its space or line; a token belongs to where its last byte is."""
    tokens = [b"Two", b" cats", b". ", b"A", b" dog", b".\n", b"", b"3.5", b" m", b""]
    changes = np.arange(10, dtype=np.float32)
    image = ImageAttribution("x", 45.0, changes, 1.0, 1.0, np.zeros((1, 1, 1)), np.zeros(1))
    other = dataclasses.replace(image, token_changes=-changes)
    found = sentence_attributions(tokens, [image, other])
    assert found is not None
    assert [one.text for one in found] == ["Two cats. ", "A dog.\n", "3.5 m"]
    assert [one.changes for one in found] == [[3, -3], [18, -18], [24, -24]]
    assert [one.shares for one in found] == [[1, 0]] * 3


@pytest.mark.parametrize("how", [True, "attention"])
def test_an_explanation_is_the_librarys_whole_or_streamed(
    client: TestClient, oracle: Chatbot, how: bool | str
) -> None:
    fields: dict[str, Any] = {"messages": LOOK, "temperature": 1.5, "seed": 3, "n": 2, "frames": 2}
    answers = oracle.choices(LOOK, temperature=1.5, seed=3, n=2, frames=2, max_new_tokens=4)
    known = [
        {"index": i, **explained(oracle, answer, how is True, frames=2)}
        for i, answer in enumerate(answers)
    ]
    whole = ask(client, attribution=how, **fields).json()
    found = zip(whole["attributions"], answers, strict=True)
    assert [without_sentences(one, answer.text, how) for one, answer in found] == known
    assert len(known[0]["images"][2]["heat"]) == 2
    assert whole["timings"]["total"] > 0
    chunks = events(
        ask(
            client, attribution=how, **fields, stream=True, stream_options={"include_usage": True}
        ).text
    )
    assert {index: choice["text"] for index, choice in folded(chunks).items()} == {
        i: a.text for i, a in enumerate(answers)
    }
    found = zip(chunks[-2]["attributions"], answers, strict=True)
    assert [without_sentences(one, answer.text, how) for one, answer in found] == known
    assert chunks[-2]["choices"] == [] and chunks[-1]["usage"]
    for index, answer in enumerate(answers):
        body = {
            "messages": [*LOOK, {"role": "assistant", "content": answer.text}],
            "frames": 2,
            "attribution": how,
        }
        later = client.post("/v1/messages/attribution", json=body)
        found_later = without_sentences(later.json(), answer.text, how)
        assert found_later == explained(oracle, answer.text, how is True, frames=2), index


def test_citations_are_the_librarys_whole_or_streamed(client: TestClient, oracle: Chatbot) -> None:
    """As annotations beside the same text; an answer to text alone needs no image."""
    fields: dict[str, Any] = {"messages": LOOK, "temperature": 1.5, "seed": 3, "n": 2, "frames": 2}
    answers = oracle.choices(
        LOOK, temperature=1.5, seed=3, n=2, frames=2, max_new_tokens=4, cite=True
    )
    known = [
        [
            {
                "type": "image_citation",
                "start_index": one.start,
                "end_index": one.end,
                "images": list(one.images),
                "changes": pytest.approx(list(one.changes), abs=1e-4),
                "uncertain": one.uncertain,
            }
            for one in answer.citations or ()
        ]
        for answer in answers
    ]
    assert all(known)
    whole = ask(client, cite=True, **fields).json()
    assert [choice["message"]["annotations"] for choice in whole["choices"]] == known
    chunks = events(ask(client, cite=True, **fields, stream=True).text)
    found = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [
        "".join(one["delta"].get("content", "") for one in found if one["index"] == i)
        for i in range(2)
    ] == [answer.text for answer in answers]
    cited = {
        one["index"]: one["delta"]["annotations"] for one in found if "annotations" in one["delta"]
    }
    assert [cited[index] for index in range(2)] == known
    assert "annotations" not in ask(client, **fields).json()["choices"][0]["message"]
    text = ask(client, messages=[{"role": "user", "content": "Hello"}], cite=True).json()
    (choice,) = text["choices"]
    assert [one["images"] for one in choice["message"]["annotations"]] == [[]] * len(
        choice["message"]["annotations"]
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"messages": [{"role": "user", "content": "Hello"}]}, "needs an image"),
        ({"max_tokens": 1025}, "1024"),
        (
            {
                "messages": user(*[image_part(RED)] * 32, "Which?"),
                "max_tokens": 2,
                "attribution": "exact",
            },
            "'attention'",
        ),
        ({"n": 8, "max_tokens": 300, "attribution": "attention"}, "the limit is 5,000"),
        ({"attribution": "shares"}, "attribution"),
        ({"attribution": False, "cite": True, "max_tokens": 1025}, "cite is limited to"),
        ({"attribution": False, "cite": True, "n": 8, "max_tokens": 300}, "the limit is 5,000"),
    ],
)
def test_an_impossible_attribution_is_refused_before_the_answer(
    tiny: Path, changes: dict[str, Any], named: str
) -> None:
    with running(tiny, max_attribution_tokens=5_000) as client:
        refused = ask(client, **{"attribution": True} | changes)
        assert refused.status_code == 400 and named in refused.json()["error"]["message"]
        assert (
            client.app.state.service.metrics.registry.get_sample_value(
                "llava_tokens_total", {"kind": "generated"}
            )
            is None
        )  # type: ignore[attr-defined]


def test_an_answer_to_attribute_is_the_last_message(client: TestClient) -> None:
    said = {"role": "assistant", "content": "Red."}
    in_parts = said | {"content": [{"type": "text", "text": "Red."}]}
    for messages in (WHAT, [said], [*WHAT, in_parts], [*WHAT, said, *WHAT]):
        refused = client.post("/v1/messages/attribution", json={"messages": messages})
        assert refused.status_code == 400 and "assistant's answer" in refused.text
    for content in ("", "word " * 1100):
        refused = client.post(
            "/v1/messages/attribution",
            json={"messages": [*WHAT, {"role": "assistant", "content": content}]},
        )
        assert refused.status_code == 400 and "tokens" in refused.text
    unlike = client.post(
        "/v1/messages/attribution", json={"messages": [*WHAT, said], "attribution": False}
    )
    assert unlike.status_code == 400 and "attribution" in unlike.text


def test_other_requests_are_answered_during_an_attribution(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed in a thread of its own, and counts as an answer under way until it has ended."""
    service, go, seen = client.app.state.service, threading.Event(), []  # type: ignore[attr-defined]
    real = service_module.attribute_prompt
    monkeypatch.setattr(
        service_module,
        "attribute_prompt",
        lambda *a: seen.append(threading.current_thread().name) or (go.wait(60) and real(*a)),
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, attribution=True)
        until(lambda: seen)
        assert ask(client).status_code == 200
        assert (service.num_active, seen[0].startswith("attribution")) == (1, True)
        go.set()
        assert waiting.result().status_code == 200


# Keys and limits.

KEYS = ["first-key-of-the-test", "second-key-of-the-test"]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n{KEYS[0]}\n\n{KEYS[1]}\n")
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_health_and_the_page_asks_for_a_key(tiny: Path, key_file: Path) -> None:
    with running(tiny, host="0.0.0.0", api_keys=key_file) as client:
        routes = [(route.path, method) for route in client.app.routes for method in route.methods]  # type: ignore[attr-defined]
        assert len(routes) >= 12 and ("/health", "GET") in routes
        for path, method in [
            *routes,
            ("/nowhere", "GET"),
            (CHAT, "OPTIONS"),
            ("/Health", "GET"),
        ]:
            if (path in ("/health", *middleware.WEB_FILES)) and method == "GET":
                assert client.get(path).status_code == 200
                continue
            for headers in ({}, bearer("wrong")):
                assert client.request(method, path, headers=headers).status_code == 401, (
                    path,
                    method,
                )
            assert client.request(method, path, headers=bearer(KEYS[1])).status_code != 401
        for wrong in (
            f"Bearer {KEYS[0][:-1]}",
            KEYS[0],
            f"Basic {KEYS[0]}",
            "Bearer",
            f"Bearer {KEYS[0]} {KEYS[1]}",
        ):
            assert client.get("/ready", headers={"Authorization": wrong}).status_code == 401, wrong
        assert "Bearer" in client.get("/ready").headers["www-authenticate"]


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, by the function made for it, whichever matches."""
    compared = []
    monkeypatch.setattr(
        api_keys.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b
    )
    keys = ApiKeys(KEYS)
    clients = [keys.client(f"Bearer {key}") for key in (*KEYS, "x", "ü")]
    names = [client and client.name for client in clients]
    assert names[0] != names[1] and names[2:] == [None, None]
    assert compared == [(32, 32)] * 8
    assert not any(key in str(names) for key in KEYS)


def test_an_address_of_the_network_demands_keys(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.com"):
        with pytest.raises(OptionError, match="--api-keys"):
            Settings(host=host)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        Settings(host=host)
    for text, match in (("", "has none"), ("short", "5 characters")):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(OptionError, match=match):
            ApiKeys.read(tmp_path / "keys")
    with pytest.raises(OptionError, match="cannot read"):
        ApiKeys.read(tmp_path / "none")
    with pytest.raises(OptionError, match="max-body-mb"):
        Settings(max_body_mb=0)


def test_without_keys_only_this_machine_is_answered(client: TestClient) -> None:
    """A page in a browser can reach 127.0.0.1: by a name that leads here, from its own origin, or
    through a proxy.
    """
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"X-Forwarded-For": "9.9.9.9"},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 403, headers
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/models"):
        pass
    for headers in (
        {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
        {"Host": "[::1]:8000"},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 200, headers


def test_one_key_learns_nothing_of_another(tiny: Path, key_file: Path) -> None:
    """Neither its files, nor by cached tokens or time that it asked the same."""
    messages = user(
        image_part(RED),
        "A question that is long enough to be kept in the cache of prefixes, with an image",
    )
    body = {"model": "tiny", "messages": messages, "max_tokens": 2}
    with running(tiny, api_keys=key_file) as client:
        engine = client.app.state.service.bot.engine  # type: ignore[attr-defined]
        cached, encoded = [], []
        for key in (KEYS[0], KEYS[0], KEYS[1], KEYS[1]):
            usage = client.post(CHAT, json=body, headers=bearer(key)).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            encoded.append(engine.load().crops_encoded)
        assert cached[0] == cached[2] == 0 < cached[1] == cached[3]
        assert encoded == [1, 1, 2, 2]
        name = upload(client, png("red"), **bearer(KEYS[0])).json()["id"]
        assert client.get(f"/v1/files/{name}", headers=bearer(KEYS[1])).status_code == 404
        assert client.get("/v1/files", headers=bearer(KEYS[1])).json()["data"] == []
        theirs = {**body, "messages": user(image_part(name))}
        assert client.post(CHAT, json=theirs, headers=bearer(KEYS[1])).status_code == 404
        assert client.post(CHAT, json=theirs, headers=bearer(KEYS[0])).status_code == 200


def test_requests_a_minute(tiny: Path, key_file: Path) -> None:
    with running(tiny, api_keys=key_file, requests_per_minute=3) as client:
        statuses = [client.get("/v1/models", headers=bearer(KEYS[0])).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert client.get("/v1/models", headers=bearer(KEYS[1])).status_code == 200
        start = time.monotonic()
        refused = client.get("/v1/models", headers=bearer(KEYS[0]))
        assert 1 <= int(refused.headers["retry-after"]) <= 21
        assert time.monotonic() - start >= middleware.REFUSAL_DELAY
        assert client.get("/health").status_code == 200
    rate = RateLimit(60)
    for at in [0.0] * 60 + [1.0, 2.0]:
        rate.take("a", at)
    with pytest.raises(ApiError):
        rate.take("a", 2.5)


def test_requests_that_cannot_be_answered_wait_after_many_of_them(
    tiny: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sent bad files as fast as it could doubled the latency of another key. A
    client by itself never waits.
    """
    monkeypatch.setattr(middleware, "MAX_ERRORS", 3)

    def seconds(client: TestClient, **headers: str) -> float:
        start = time.monotonic()
        assert client.post(CHAT, json={"messages": []}, **headers).status_code == 400
        return time.monotonic() - start

    with running(tiny, api_keys=key_file) as client:
        bad = [seconds(client, headers=bearer(KEYS[0])) for _ in range(5)]
        assert max(bad[:3]) < middleware.REFUSAL_DELAY <= min(bad[3:])
        assert seconds(client, headers=bearer(KEYS[1])) < middleware.REFUSAL_DELAY
        start = time.monotonic()
        body = {"messages": user("Hello"), "max_tokens": 2}
        assert client.post(CHAT, json=body, headers=bearer(KEYS[0])).status_code == 200
        assert time.monotonic() - start < middleware.REFUSAL_DELAY
    with running(tiny) as client:
        assert max(seconds(client) for _ in range(5)) < middleware.REFUSAL_DELAY


def test_media_come_only_from_where_it_was_allowed(
    client: TestClient, tiny: Path, tmp_path: Path
) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.png").write_bytes(png("red"))
    (tmp_path / "secret.png").write_bytes(png("blue"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "frames").mkdir()
    (root / "frames" / "1.png").write_bytes(b"broken")
    for part in (
        image_part("https://example.com/a.png"),
        {"type": "image", "path": str(root / "a.png")},
        image_part(f"file://{root}/a.png"),
    ):
        assert ask(client, messages=user(part)).status_code == 403, part
    with running(tiny, media_root=root, allow_host=("images.example.com",)) as open_client:
        assert (
            ask(open_client, messages=user({"type": "image", "path": "a.png"})).status_code == 200
        )
        outside = (
            "../secret.png",
            "link.png",
            str(tmp_path / "secret.png"),
            "/etc/passwd",
            "nothing.png",
            "..",
            "a.png\0",
        )
        for path in outside:
            for part in (
                {"type": "image", "path": path},
                {"type": "video", "path": path},
                image_part(f"file:{path}"),
            ):
                refused = ask(open_client, messages=user(part))
                assert refused.status_code in (400, 403), part
                assert str(tmp_path) not in refused.text.replace(path, ""), part
        broken = ask(open_client, messages=user({"type": "video", "path": "frames"}))
        assert (
            broken.status_code == 400
            and "frames/1.png" in broken.text
            and str(tmp_path) not in broken.text
        )
        elsewhere = ask(open_client, messages=user(image_part("https://other.example.com/a.png")))
        assert elsewhere.status_code == 403 and "other.example.com:443" in elsewhere.text


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        (("a.example",), "https://a.example/x", True),
        (("a.example",), "http://A.example./x", True),
        (("a.example",), "https://a.example:8443/x", False),
        (("a.example:8443",), "https://a.example:8443/x", True),
        (("a.example:8443",), "https://a.example/x", False),
        (("a.example",), "https://b.a.example/x", False),
        (("*.a.example",), "https://b.a.example/x", True),
        (("*.a.example",), "https://a.example/x", False),
        (("*.a.example",), "https://evil-a.example/x", False),
        (("*.a.example",), "https://evil.example/.a.example", False),
        (("*",), "https://anything.example/x", True),
        (("*",), "http://anything.example:22/x", False),
        ((), "https://a.example/x", False),
        (None, "http://a.example:99/x", True),
    ],
)
def test_hosts_that_media_may_come_from(
    hosts: tuple[str, ...] | None, url: str, allowed: bool
) -> None:
    if allowed:
        Address.parse(url).check(hosts)
    else:
        with pytest.raises(MediaRefused, match="may not be fetched"):
            Address.parse(url).check(hosts)


def test_a_redirect_leads_to_allowed_hosts_only() -> None:
    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/moved" else 200)
            if self.path == "/moved":
                self.send_header("Location", f"http://localhost:{port}/a.png")
            self.end_headers()
            self.wfile.write(png("red"))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as http:
        port = http.server_port
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            for hosts, allowed in (
                ((f"127.0.0.1:{port}", f"localhost:{port}"), True),
                ((f"127.0.0.1:{port}",), False),
            ):
                loader = Loader(Limits(allow_private=True, remote_hosts=hosts))
                assert loader.image(f"http://127.0.0.1:{port}/a.png").size == (40, 30)
                with (
                    contextlib.nullcontext()
                    if allowed
                    else pytest.raises(MediaRefused, match=f"localhost:{port} here")
                ):
                    loader.image(f"http://127.0.0.1:{port}/moved")
        finally:
            http.shutdown()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_a_4xx_and_the_server_goes_on(
    client: TestClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    for path in (CHAT, "/v1/messages/count", "/v1/messages/attribution"):
        answer = client.post(
            path, content=sent(HOSTILE[name], path), headers={"Content-Type": "application/json"}
        )
        if (
            not path.endswith("count") or answer.status_code != 200
        ):  # what is too much to decode can still be counted
            assert 400 <= answer.status_code < 500, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert len(answer.text) < 2000
            assert (
                "Traceback" not in answer.text
                and "object at 0x" not in answer.text
                and str(ROOT) not in answer.text
            )
    assert time.monotonic() - began < 30
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert ask(client, max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_let_go_of_at_once(client: TestClient, stream: bool) -> None:
    """Refused requests of 2 MB lay about by the hundred till the garbage collector came: errors
    held frames, frames errors.
    """

    kept = (ChatRequest, RequestValidationError, LlavaError, ApiError, middleware._Body)
    gc.collect()
    before = sum(issubclass(type(thing), kept) for thing in gc.get_objects())
    gc.disable()
    try:
        for name in ("long role", "long object", "many fields", "cut", "half", "wide", "deepest"):
            assert (
                client.post(
                    CHAT, content=sent(HOSTILE[name]), headers={"Content-Type": "application/json"}
                ).status_code
                < 500
            )
        assert ask(client, max_tokens=5000, stream=stream).status_code == 400
        assert [thing for thing in gc.get_objects() if issubclass(type(thing), kept)][before:] == []
    finally:
        gc.enable()


def test_a_body_over_the_limit_is_not_read(tiny: Path) -> None:
    with running(tiny, max_body_mb=1) as client:
        for body in (bytes(1_000_001), iter([bytes(500_000)] * 5)):
            refused = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert refused.status_code == 413 and "1 MB" in refused.text
        assert (
            client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}).status_code
            == 415
        )


# Faults.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [RuntimeError("secret /etc/x"), ValueError("secret /etc/x"), MemoryError("secret /etc/x")],
)
def test_a_fault_fails_the_requests_it_hit_and_the_next_works(
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
    stream: bool,
) -> None:
    runner = client.app.state.service.bot.engine._runner  # type: ignore[attr-defined]
    run, left = runner.run, [1]

    def broken(plan: Any) -> Any:
        if left and left.pop():
            raise fault
        return run(plan)

    monkeypatch.setattr(runner, "run", broken)
    hit = ask(client, stream=stream)
    error = json.loads(hit.text.split("data: ")[-1])["error"] if stream else hit.json()["error"]
    assert hit.status_code == (200 if stream else 500)
    number = re.search(r"internal error ([0-9a-f]{12});", error["message"])
    assert number and "secret" not in hit.text
    assert any(number[1] in record.getMessage() and record.exc_info for record in caplog.records), (
        "the log has it"
    )
    assert ask(client).status_code == 200
    settled(client)


def test_a_mistake_of_ours_before_the_engine_is_an_id(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(client.app.state.service.bot, "prompt", broken)  # type: ignore[attr-defined]
    hit = ask(client)
    assert (hit.status_code, hit.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in hit.text and "/secret/path" in caplog.text


def test_an_engine_that_fails_for_good_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny) as client:
        engine = client.app.state.service.bot.engine  # type: ignore[attr-defined]

        def broken(_: float) -> None:
            raise ValueError("no way on")

        monkeypatch.setattr(engine, "step", broken)
        assert ask(client).status_code == 500
        until(lambda: client.get("/health").status_code == 503)
        assert ask(client).status_code == client.get("/ready").status_code == 503
        monkeypatch.undo()


def test_media_are_read_in_one_thread_and_computed_in_another(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bot = client.app.state.service.bot  # type: ignore[attr-defined]
    seen: dict[str, str] = {}
    for owner, name in (
        (bot.processor.loader, "fitted"),
        (bot.engine, "add"),
        (bot.engine, "step"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *a, real=real, name=name, **k: (
                seen.update({name: threading.current_thread().name}) or real(*a, **k)
            ),
        )
    assert ask(client).status_code == 200
    assert seen.pop("fitted").startswith("media") and seen == {"add": "engine", "step": "engine"}


def test_a_full_queue_is_a_503_that_says_when_to_come_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny, max_requests=2) as client, ThreadPoolExecutor(2) as pool:
        service = client.app.state.service  # type: ignore[attr-defined]
        free, prompt = threading.Event(), service.bot.prompt
        monkeypatch.setattr(service.bot, "prompt", lambda *a, **k: free.wait() and prompt(*a, **k))
        waiting = [pool.submit(ask, client) for _ in range(2)]
        until(lambda: service.num_active == 2)
        for refused in (
            ask(client),
            client.post("/v1/messages/count", json={"messages": WHAT}),
            client.get("/ready"),
        ):
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        free.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        until(lambda: client.get("/ready").status_code == 200)


# Over a real port.


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with listening(tiny, sse_keepalive=0.05, shutdown_timeout=0.1) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(tiny: Path) -> Iterator[Server]:
    with listening(tiny, request_timeout=0.8, shutdown_timeout=0.1) as server:
        yield server


def connect(server: Server) -> socket.socket:
    host, port = server.servers[0].sockets[0].getsockname()
    return socket.create_connection((host, port), timeout=10)


def request(path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, *(f"{n}: {v}" for n, v in headers.items()), "", ""]).encode() + body


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": WHAT} | fields).encode()


def test_the_official_client(server: Server, oracle: Chatbot, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny"]
        text = oracle.chat(WHAT, max_new_tokens=8, temperature=1.5, seed=1).text
        how: dict[str, Any] = {
            "model": "tiny",
            "messages": WHAT,
            "max_completion_tokens": 8,
            "temperature": 1.5,
            "seed": 1,
        }
        whole = api.chat.completions.create(**how)
        assert whole.choices[0].message.content == text
        assert whole.usage and whole.usage.prompt_tokens_details
        assert whole.usage.prompt_tokens_details.cached_tokens is not None
        chunks = list(
            api.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-1].usage and chunks[-1].usage.total_tokens == whole.usage.total_tokens
        extra = api.chat.completions.create(**how, extra_body={"top_k": 1, "frames": 2})
        assert extra.choices[0].message.content == oracle.chat(WHAT, max_new_tokens=8).text
        (tmp_path / "a.png").write_bytes(png("red"))
        stored = api.files.create(file=tmp_path / "a.png", purpose="vision")
        assert [file.id for file in api.files.list()] == [stored.id] and stored.filename == "a.png"
        about: Any = user(image_part(stored.id), "What is this?")
        assert (
            api.chat.completions.create(**how | {"messages": about}).choices[0].message.content
            == text
        )
        assert api.files.delete(stored.id).deleted
        with pytest.raises(openai.BadRequestError, match="tools"):
            api.chat.completions.create(
                **how, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist"):
            api.models.retrieve("gpt")
        with pytest.raises(openai.PermissionDeniedError, match="may not be fetched"):
            api.chat.completions.create(
                **how | {"messages": user(image_part("https://example.com/a.png"))}
            )


@pytest.mark.parametrize("path", [CHAT, "/v1/messages/attribution"])
def test_a_disconnect_cancels_the_attribution(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Given up before the next pass through the network; the image's share would have taken two
    more.
    """
    passes: list[Any] = []
    go, first = threading.Event(), threading.Event()
    real = AttributionRun._forward
    monkeypatch.setattr(
        AttributionRun,
        "_forward",
        lambda *a: passes.append(first.set()) or (go.wait(60) and real(*a)),
    )
    messages = WHAT if path == CHAT else [*WHAT, {"role": "assistant", "content": "Red."}]
    body = {
        "messages": messages,
        "attribution": True,
        **({"model": "tiny", "max_tokens": 3} if path == CHAT else {}),
    }
    with connect(server) as leaving:
        leaving.sendall(request(path, json.dumps(body).encode()))
        assert first.wait(60)
    until(lambda: not server.service.num_active)
    go.set()
    server.service.attribution_pool.submit(int).result(60)
    assert len(passes) == 1


def test_an_attribution_over_its_time_limit_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, first = threading.Event(), threading.Event()
    real = AttributionRun._forward
    monkeypatch.setattr(
        AttributionRun, "_forward", lambda *a: first.set() or (go.wait(60) and real(*a))
    )
    with listening(tiny, shutdown_timeout=0.1) as going, connect(going) as reading:
        reading.sendall(request(CHAT, chat_body(max_tokens=3, attribution=True)))
        assert first.wait(60)
        going.should_exit = True
        until(lambda: going.service.shutdown_error)
        go.set()
        answer = b"".join(iter(lambda: reading.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 503") and '"code":"stopping"' in answer


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_who_leaves_frees_their_memory_at_once(server: Server, stream: bool, half: bool) -> None:
    worker = server.service.engine_thread
    with connect(server) as leaving:
        leaving.sendall(
            request(CHAT, chat_body(stream=stream, max_tokens=3900, n=2, stop_on_repetition=False))
        )
        until(lambda: worker.load.running == 2)
        if stream:
            assert leaving.recv(100).startswith(b"HTTP/1.1 200")
        if half:
            leaving.shutdown(socket.SHUT_WR)
            until(lambda: not worker.load.running)
    until(lambda: not (worker.load.running or worker.load.kv_running or server.service.num_active))
    worker.engine.check()


def test_a_small_network_runs_in_one_thread(server: Server) -> None:
    """Two threads that meet after each of its layers waited for other requests' threads."""
    before = torch.get_num_threads()
    assert server.service.engine_thread.call(lambda _: torch.get_num_threads()).result(60) == 1
    pool = server.service.attribution_pool
    pool.submit(torch.set_num_threads, 2).result(60)
    with connect(server) as reading:
        reading.sendall(request(CHAT, chat_body(max_tokens=1, messages=WHAT, attribution=True)))
        assert reading.recv(100).startswith(b"HTTP/1.1 200")
    assert pool.submit(torch.get_num_threads).result(60) == 1
    assert torch.get_num_threads() == before


def test_a_stream_says_that_it_is_alive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.service.bot.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda patience: time.sleep(0.12) or step(patience))
    with connect(server) as reading:
        reading.sendall(request(CHAT, chat_body(stream=True, max_tokens=2), Connection="close"))
        text = b"".join(iter(lambda: reading.recv(65536), b"")).decode()
    assert re.search(r"^: ", text, re.MULTILINE) and "[DONE]" in text


@pytest.mark.parametrize(
    "sent",
    [[b""], [b"POST /v1/chat"], [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /v1"]],
    ids=["nothing", "half a header", "half a second header"],
)
def test_a_header_that_does_not_come_ends_the_connection(
    impatient: Server, sent: list[bytes]
) -> None:
    with connect(impatient) as slow:
        for data in sent[:-1]:
            slow.sendall(data)
            assert slow.recv(65536).startswith(b"HTTP/1.1 200")
        slow.sendall(sent[-1])
        began = time.monotonic()
        while slow.recv(65536):
            pass
        assert 0.4 < time.monotonic() - began < 30


def test_a_body_that_does_not_come_is_a_408(impatient: Server) -> None:
    with connect(impatient) as slow:
        slow.sendall(request(CHAT, chat_body())[:-5])
        assert slow.recv(65536).startswith(b"HTTP/1.1 408")
    until(lambda: not impatient.service.num_active)


def test_garbage_on_the_wire(server: Server) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /nowhere HTTP/9.9\r\n\r\n",
        b"G" * 200_000,
        b"PRI * HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\nSM\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        request(CHAT, b"{", **{"Content-Length": "-1"}),
    ):
        with connect(server) as hostile, contextlib.suppress(ConnectionError):
            hostile.sendall(garbage)
            assert hostile.recv(65536)[:10] in (b"", b"HTTP/1.1 4")
    with connect(server) as fine:
        fine.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert fine.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_takes_nothing_is_left() -> None:
    """A client that does not read its answer blocks the sending; after a time the request ends and
    what it held is free.
    """
    left = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x"})
        finally:
            left.append(True)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"question", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    guarded = middleware.GuardMiddleware(app, Settings(request_timeout=0.05), None, Metrics())
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    asyncio.run(asyncio.wait_for(guarded(scope, receive, send), 5))
    assert left and guarded.bodies.used == 0


def test_what_runs_is_finished_before_the_server_goes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(tiny, shutdown_timeout=20) as going, connect(going) as reading:
        step = going.service.bot.engine.step
        # Slower, or it is over unseen.
        monkeypatch.setattr(
            going.service.bot.engine, "step", lambda patience: time.sleep(0.005) or step(patience)
        )
        reading.sendall(request(CHAT, chat_body(stream=True, max_tokens=100)))
        until(lambda: going.service.engine_thread.load.running)
        going.should_exit = True
        text = b"".join(iter(lambda: reading.recv(65536), b"")).decode()
        assert "[DONE]" in text and "error" not in text
    assert not going.service.engine_thread._thread.is_alive()


def test_a_request_over_its_time_limit_is_an_error(tiny: Path) -> None:
    with listening(tiny, shutdown_timeout=0.2) as going, connect(going) as reading:
        reading.sendall(
            request(CHAT, chat_body(stream=True, max_tokens=3900, stop_on_repetition=False))
        )
        until(lambda: going.service.engine_thread.load.running)
        going.should_exit = True
        text = b"".join(iter(lambda: reading.recv(65536), b"")).decode()
        assert '"code":"stopping"' in text and "[DONE]" not in text


# Metrics and logs.


def test_metrics_count(client: TestClient) -> None:
    def read() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    before = read()
    usage = ask(client, max_tokens=3).json()["usage"]
    ask(client, temperature=9)
    client.get("/some/unheard/of/path")
    after = read()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("llava_prompt_tokens_total") == usage["prompt_tokens"]
    assert (
        more("llava_cached_prompt_tokens_total") == usage["prompt_tokens_details"]["cached_tokens"]
    )
    assert more("llava_generation_tokens_total") == usage["completion_tokens"] == 3
    assert more(f'llava_http_requests_total{{route="{CHAT}",status="200"}}') == 1
    assert (
        more(f'llava_http_requests_total{{route="{CHAT}",status="400"}}')
        == more('llava_errors_total{code="invalid_value"}')
        == 1
    )
    assert more('llava_http_requests_total{route="other",status="404"}') == 1
    assert (
        more("llava_time_to_first_token_seconds_count")
        == more("llava_preprocess_seconds_count")
        == more("llava_crops_total")
        == 1
    )
    assert more("llava_attribution_seconds_count") == 0
    assert (
        after["llava_kv_cache_capacity_tokens"] == 8192
        and after["llava_num_requests_running"] == after["llava_num_requests_active"] == 0
    )


def test_the_document_of_the_api_is_whole(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["components"]["schemas"]["ChatRequest"]["properties"]) == set(
        ChatRequest.model_fields
    )


def test_the_guide_has_every_flag_and_no_other() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text("utf-8")
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], terminal_width=200).output
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Settings)}
    assert flags <= set(re.findall(r"--[a-z-]+", shown))
    assert flags <= set(re.findall(r"^\| `(--[a-z-]+)` \|", guide, re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", guide)) <= set(
        re.findall(r"--[a-z-]+", shown)
    ) | {"--help"}
    for field in dataclasses.fields(Settings):
        row = next(
            line
            for line in guide.splitlines()
            if line.startswith(f"| `--{field.name.replace('_', '-')}` |")
        )
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        assert field.default in (None, ()) or f"| {default} |" in row, row


HEAPS = """
import ctypes, sys, threading
from llava_interleave.server.process import SWITCH_INTERVAL, trim_heap, tune_process
libc, text, size = ctypes.CDLL(None), ctypes.c_char_p(), ctypes.c_size_t()
libc.open_memstream.restype = ctypes.c_void_p
tune_process()
threads = [threading.Thread(target=libc.malloc, args=(1000,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
libc.malloc_info(0, file)
libc.fclose(file)
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [bytes(100_000) for _ in range(1000)]
end = bytes(100_000)
blocks.clear()
before = resident()
trim_heap()
freed = before - resident() > 50_000_000
print(sys.getswitchinterval() <= SWITCH_INTERVAL, text.value.count(b"<heap nr"), freed)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="another C library than glibc"
)
def test_the_heap_of_a_server_gives_memory_back() -> None:
    """Memory grew by megabytes a minute of traffic: what one thread's heap had free no other could
    use, and what was free below a block in use stayed resident.
    """
    done = subprocess.run([sys.executable, "-c", HEAPS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1", "True"]


def test_the_command_serves_what_its_flags_say(
    tiny: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Server] = []
    monkeypatch.setattr(Server, "run", lambda server: made.append(server))
    words = [
        "serve",
        "-m",
        str(tiny),
        "--host",
        "0.0.0.0",
        "--port",
        "81",
        "--api-keys",
        str(key_file),
        "--name",
        "mine",
    ]
    done = CliRunner().invoke(
        cli.app,
        [
            *words,
            "--allow-host",
            "a.example",
            "--allow-host",
            "*.b.example",
            "--shutdown-timeout",
            "2.5",
        ],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    settings = made[0].service.settings
    assert (settings.host, settings.port, settings.shutdown_timeout) == ("0.0.0.0", 81, 2.5)
    assert settings.allow_host == ("a.example", "*.b.example")
    assert made[0].service.name == "mine"
    limits = made[0].service.bot.processor.loader.limits
    assert (
        limits.remote_hosts == settings.allow_host
        and limits.allow_remote
        and not limits.allow_local_files
    )
    refused = CliRunner().invoke(cli.app, ["serve", "--host", "0.0.0.0"])
    assert isinstance(refused.exception, OptionError) and len(made) == 1
    assert gc.isenabled() and gc.get_freeze_count()
    gc.unfreeze()


def test_nothing_of_it_is_imported_without_need() -> None:
    code = "import sys, llava_interleave.cli; print({'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_reader_that_is_late_finds_one_piece_of_each_answer() -> None:
    async def read() -> None:
        job = ServerJob(Prompt([1]), Options())
        job.receive(None)
        await job.queued()
        for index, text in ((0, "a"), (1, "x"), (0, "b")):
            job.receive(AnswerDelta(text, index))
        assert await job.next(60) == [AnswerDelta("ab", 0), AnswerDelta("x", 1)]
        assert await job.next(0.01) == []
        job.receive(AnswerDelta("y", 1))
        job.receive(MediaRefused("too late"))
        assert await job.next(60) == [AnswerDelta("y", 1)]
        with pytest.raises(MediaRefused):
            await job.next(60)

    asyncio.run(read())


def test_a_step_wakes_the_event_loop_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = EngineThread(load(tiny, device="cpu"))
    prompt, how = (
        worker.bot.prompt(WHAT, max_new_tokens=9),
        Options(max_new_tokens=9, ignore_eos=True),
    )
    calls, steps, step = [], [], worker.engine.step
    monkeypatch.setattr(
        worker.engine, "step", lambda patience: steps.append(patience) or step(patience)
    )

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: calls.append(a) or wake(*a))
        jobs = [ServerJob(prompt, how) for _ in range(6)]
        for job in jobs:
            worker.submit(job)
        worker.start()
        for job in jobs:
            while not any(piece.answer for piece in await job.next(60)):
                pass

    asyncio.run(ask())
    worker.close()
    assert len(steps) < 6 + 9 + 6 and len(calls) <= 6 + len(steps)


def test_a_loop_that_is_gone_does_not_stop_the_thread(tiny: Path) -> None:
    """A client's event loop may end before its job: the thread goes on for the others."""
    bot = load(tiny, device="cpu")
    worker = EngineThread(bot)
    prompt = bot.prompt(WHAT, max_new_tokens=5)
    worker.start()

    async def leave() -> None:
        worker.submit(ServerJob(prompt, Options(max_new_tokens=5)))

    async def stay() -> int:
        job = ServerJob(prompt, Options(max_new_tokens=5))
        worker.submit(job)
        while True:
            for piece in await job.next(60):
                if piece.answer:
                    return len(piece.answer.tokens)

    asyncio.run(leave())
    assert asyncio.run(stay()) == 5
    worker.close()
