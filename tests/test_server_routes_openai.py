"""/v1/responses, /v1/completions and /v1/batches through the openai package and as raw requests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseInputParam
from pydantic import BaseModel
from starlette.testclient import TestClient

from llava_interleave.chat import Chatbot, load
from llava_interleave.server import batches
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from tests.helpers.requests import BLUE, RED, WHAT, image_part, png, user

pytestmark = pytest.mark.slow

LOCAL = "http://127.0.0.1:8000"
KEYS = ("a-first-key-of-the-suite", "a-second-key-of-the-suite")


@pytest.fixture(scope="module")
def bot(tiny: Path) -> Chatbot:
    return load(tiny, device="cpu")


@pytest.fixture(scope="module")
def http(tiny: Path) -> Iterator[TestClient]:
    settings = Settings(requests_per_minute=100_000, max_tokens=24, batch_mb=1)
    with TestClient(create_app(load(tiny, device="cpu"), settings), base_url=LOCAL) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{LOCAL}/v1", api_key="none", http_client=http, max_retries=0)


def refused(http: TestClient, path: str, body: dict[str, Any], status: int = 400) -> str:
    reply = http.post(path, json=body)
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"]["message"])


# --- responses


def test_a_response_is_the_answer_to_the_same_messages(client: openai.OpenAI, bot: Chatbot) -> None:
    chosen: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9}
    content: ResponseInputParam = [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Before"},
                {"type": "input_image", "image_url": RED, "detail": "auto"},
            ],
        },
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Red.", "annotations": []}],
        },
        {"role": "user", "content": [{"type": "input_image", "image_url": BLUE, "detail": "low"}]},
        {"role": "user", "content": "and after?"},
    ]
    reply = client.responses.create(
        model="tiny",
        input=content,
        instructions="Be brief.",
        max_output_tokens=8,
        extra_body={"seed": 4},
        **chosen,
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        *user("Before", image_part(RED)),
        {"role": "assistant", "content": "Red."},
        *user(image_part(BLUE)),
        *user("and after?"),
    ]
    known = bot.chat(messages, seed=4, max_new_tokens=8, **chosen)
    assert reply.output_text == known.text
    assert reply.usage and reply.usage.input_tokens == known.usage.prompt
    assert reply.usage.output_tokens == known.usage.generated == 8
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (reply.temperature, reply.top_p, reply.store) == (1.5, 0.9, False)
    again = client.responses.create(
        model="tiny", input=[*content, *reply.output], max_output_tokens=2
    )
    assert again.usage.input_tokens > reply.usage.input_tokens - 20


def test_a_streamed_response_has_openais_events(client: openai.OpenAI, bot: Chatbot) -> None:
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=6) as stream:
        events = list(stream)
    final = events[-1].response
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4 : 4 + deltas] == ["response.output_text.delta"] * deltas
    assert kinds[4 + deltas :] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    known = bot.ask("Hello", max_new_tokens=6).text
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert final.output_text == text == known


def test_structured_responses(client: openai.OpenAI) -> None:
    class Colour(BaseModel):
        colour: bool

    parsed = client.responses.parse(model="tiny", input="Red?", text_format=Colour)
    assert isinstance(parsed.output_parsed, Colour)
    plain = client.responses.create(
        model="tiny",
        input="Red?",
        text={"format": {"type": "json_object"}},
        max_output_tokens=24,
        temperature=0,
    )
    assert plain.output_text.startswith("{")
    assert plain.text.format.type == "json_object"


def test_logprobs_of_a_response(client: openai.OpenAI, bot: Chatbot) -> None:
    include: Any = ["message.output_text.logprobs"]
    reply = client.responses.create(
        model="tiny", input="Hello", max_output_tokens=3, include=include, top_logprobs=2
    )
    known = bot.ask("Hello", max_new_tokens=3, logprobs=2).logprobs
    found = reply.output[0].content[0].logprobs
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in known])
    assert all(len(one.top_logprobs) == 2 for one in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "not stored; send the earlier messages"),
        ({"conversation": "conv_1"}, "not stored"),
        ({"store": True}, "nothing is stored"),
        ({"background": True}, "/v1/batches"),
        ({"truncation": "auto"}, "shorten the input"),
        ({"tools": [{"type": "web_search"}]}, "no tools"),
        ({"reasoning": {"effort": "high"}}, "does not reason"),
        ({"max_output_tokens": 25}, "max_output_tokens is 25; this server's limit is 24"),
        ({"top_logprobs": 2}, "include"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "send the message itself"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "no tools"),
        (
            {"input": user({"type": "input_file", "filename": "a.pdf", "file_url": "x"})},
            "this one has file_url, filename",
        ),
        ({"input": "x", "messages": WHAT}, "messages"),
    ],
)
def test_what_a_response_cannot_do_is_refused_by_name(
    http: TestClient, fields: dict[str, Any], message: str
) -> None:
    assert message in refused(http, "/v1/responses", {"model": "tiny", "input": "Hi", **fields})


def test_what_asks_for_nothing_is_accepted(http: TestClient, bot: Chatbot) -> None:
    fields = {
        "store": False, "previous_response_id": None, "tools": [], "tool_choice": "auto",
        "parallel_tool_calls": True, "truncation": "disabled", "metadata": {"a": "b"},
        "reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}},
        "include": ["reasoning.encrypted_content"], "service_tier": "auto", "user": "me",
        "background": False, "stream": False,
    }  # fmt: skip
    item = {"type": "reasoning", "id": "rs_1", "summary": []}
    body = {"input": [item, {"role": "user", "content": "Hi"}], "max_output_tokens": 4, **fields}
    reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    whole = reply.json()
    assert whole["output"][0]["content"][0]["text"] == bot.ask("Hi", max_new_tokens=4).text
    assert whole["metadata"] == {"a": "b"}


def test_an_upload_in_a_response(client: openai.OpenAI, bot: Chatbot) -> None:
    file = client.files.create(file=("red.png", png("red")), purpose="vision")
    known = bot.chat(WHAT, max_new_tokens=4)
    parts: list[Any] = [
        {"type": "input_image", "file_id": file.id, "detail": "auto"},
        {"type": "input_file", "file_id": file.id},
        {"type": "input_file", "filename": "red.png", "file_data": RED},
    ]
    for part in parts:
        content: Any = [part, {"type": "input_text", "text": "What is this?"}]
        reply = client.responses.create(
            model="tiny", input=[{"role": "user", "content": content}], max_output_tokens=4
        )
        assert (reply.output_text, reply.usage.input_tokens) == (known.text, known.usage.prompt)
    assert client.files.content(file.id).read() == png("red")


def test_errors_of_responses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model="tiny", input="word " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(
            model="tiny",
            input=user({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}),
        )
    assert bad.value.code == "invalid_image"


# --- completions


def test_a_raw_prompt_has_no_template(client: openai.OpenAI, bot: Chatbot) -> None:
    from llava_interleave.chat import Options

    def raw(text: str, **options: Any) -> Any:
        prompt = bot.processor.raw(text)
        return bot.answer_prompts([prompt], Options(max_new_tokens=16, **options))[0]

    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    reply = client.completions.create(model="tiny", prompt=text)
    known = raw(text)
    assert reply.choices[0].text == known.text
    assert reply.usage.prompt_tokens == known.usage.prompt == len(bot.processor.raw(text))
    ids = bot.processor.raw(text).tokens
    assert client.completions.create(model="tiny", prompt=ids).choices[0].text == known.text
    several = client.completions.create(
        model="tiny", prompt=["Hello", "Bye"], n=2, temperature=1.5, seed=3
    )
    expected = [raw(t, temperature=1.5, seed=s).text for t in ("Hello", "Bye") for s in (3, 4)]
    assert [choice.text for choice in several.choices] == expected
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["Hello", "Bye"], stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [raw("Hello").text, raw("Bye").text]
    assert chunk.usage.completion_tokens == 32


def test_every_raw_prompt_has_the_structured_output(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny",
        prompt=["Hello", "Bye", "Hi"],
        n=2,
        temperature=1.5,
        extra_body={"structured_outputs": {"choice": ["red", "blue"]}},
    )
    assert len(reply.choices) == 6
    assert {choice.text for choice in reply.choices} <= {"red", "blue"}


def test_logprobs_of_a_raw_prompt(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="Hello", logprobs=2, max_tokens=5)
    found = reply.choices[0].logprobs
    assert "".join(found.tokens) == reply.choices[0].text
    assert len(found.token_logprobs) == len(found.top_logprobs) == 5
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(5)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "What is <image>?"}, "/v1/chat/completions"),
        ({"images": [RED]}, "a raw prompt has no images"),
        ({"image_data": RED}, "a raw prompt has no images"),
        ({"multi_modal_data": {"image": RED}}, "a raw prompt has no images"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 9}, "9 answers; this server's limit is 8"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [10**6]}, "token ids must be between"),
        ({"prompt": "word " * 3000}, "maximum context length is exceeded: the prompt has"),
        ({"frames": 3}, "frames"),
        ({"max_tokens": 25}, "limit is 24"),
    ],
)
def test_what_a_raw_prompt_cannot_do_is_refused_by_name(
    http: TestClient, fields: dict[str, Any], message: str
) -> None:
    assert message in refused(http, "/v1/completions", {"prompt": "Hi", **fields})


# --- batches


def lines(*bodies: dict[str, Any], url: str = "/v1/chat/completions") -> bytes:
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}
        for i, body in enumerate(bodies)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def finished(client: openai.OpenAI, name: str) -> Any:
    end = time.monotonic() + 120
    while (batch := client.batches.retrieve(name)).status == "in_progress":
        assert time.monotonic() < end
        time.sleep(0.02)
    return batch


def started(client: openai.OpenAI, data: bytes, endpoint: Any = "/v1/chat/completions") -> Any:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )


def test_a_batch_answers_as_the_routes_do(client: openai.OpenAI, bot: Chatbot) -> None:
    image = client.files.create(file=("blue.png", png("blue")), purpose="vision")
    data = lines(
        {"model": "tiny", "messages": WHAT, "max_tokens": 4},
        {"messages": user(image_part(image.id), "What?"), "max_tokens": 5},
        {"messages": WHAT, "tools": [{"type": "function"}]},
        {"messages": WHAT, "stream": True},
        {"messages": user("word " * 3000)},
    )
    batch = finished(client, started(client, data).id)
    assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 2, 3)
    rows = {
        row["custom_id"]: row
        for row in map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    }
    text = {
        name: row["response"]["body"]["choices"][0]["message"]["content"]
        for name, row in rows.items()
    }
    assert text == {
        "r0": bot.chat(WHAT, max_new_tokens=4).text,
        "r1": bot.chat(user(image_part(BLUE), "What?"), max_new_tokens=5).text,
    }
    assert all(row["response"]["status_code"] == 200 for row in rows.values())
    failed = {
        row["custom_id"]: row["response"]["body"]["error"]["message"]
        for row in map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
    }
    assert "no tools" in failed["r2"] and "stream" in failed["r3"] and "context" in failed["r4"]
    listed = client.batches.list(limit=1)
    assert listed.data[0].id == batch.id
    assert {batch.output_file_id, batch.input_file_id} <= {f.id for f in client.files.list()}
    client.files.delete(batch.output_file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.output_file_id)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 3}),
    ],
)
def test_batches_of_the_other_routes(
    client: openai.OpenAI, http: TestClient, endpoint: str, body: dict[str, Any]
) -> None:
    batch = finished(client, started(client, lines(body, url=endpoint), endpoint).id)
    row = json.loads(client.files.content(batch.output_file_id).text)
    alone = http.post(endpoint, json=body).json()
    found = row["response"]["body"]
    for value in (found, alone):
        for name in ("id", "created", "created_at", "timings", "usage"):
            value.pop(name, None)
        for item in value.get("output", ()):
            item.pop("id")
    assert found == alone


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"not json", "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (lines({}, url="/v1/embeddings"), "mismatched_url"),
        (lines({}) + b"\n" + lines({}), "duplicate_custom_id"),
        (b'{"custom_id": 5}', "invalid_custom_id"),
        (b'{"custom_id": "a", "method": "GET"}', "invalid_method"),
        (b"[" * 300_000, "line_too_large"),
    ],
)
def test_a_file_with_errors_fails_the_batch(client: openai.OpenAI, data: bytes, code: str) -> None:
    batch = started(client, data)
    assert (batch.status, batch.errors.data[0].code) == ("failed", code)
    client.files.delete(batch.input_file_id)


def test_cancel_keeps_what_is_done(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_RUNNING", 1)
    data = lines(*[{"messages": WHAT, "max_tokens": 24, "ignore_eos": True}] * 200)
    batch = started(client, data)
    with pytest.raises(openai.ConflictError, match="cancel it"):
        client.files.delete(batch.input_file_id)
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.01)
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status == "cancelled"
    done = client.files.content(cancelled.output_file_id).text.splitlines()
    assert 0 < len(done) == cancelled.request_counts.completed < 200
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.batches.cancel(batch.id)


def test_batch_files_are_bounded(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="delete other files") as full:
        client.files.create(file=("in.jsonl", b"x" * 1_000_001), purpose="batch")
    assert full.value.status_code == 413
    for file in client.files.list():
        client.files.delete(file.id)
    pad = {"messages": user("?"), "max_tokens": 1, "metadata": {"pad": "x" * 100_000}}
    batch = finished(client, started(client, lines(*[pad] * 8 + [{"messages": WHAT}] * 300)).id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "files_full")
    assert batch.output_file_id


def test_keys_do_not_see_each_others_batches(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n".join(KEYS))
    settings = Settings(api_keys=tmp_path / "keys", batch_dir=tmp_path / "batches")
    with TestClient(create_app(load(tiny, device="cpu"), settings), base_url=LOCAL) as http:
        first, second = (
            openai.OpenAI(base_url=f"{LOCAL}/v1", api_key=key, http_client=http, max_retries=0)
            for key in KEYS
        )
        batch = finished(first, started(first, lines({"messages": WHAT, "max_tokens": 2})).id)
        assert not second.batches.list().data and not second.files.list().data
        for call in (
            lambda: second.batches.retrieve(batch.id),
            lambda: second.batches.cancel(batch.id),
            lambda: second.files.content(batch.output_file_id),
            lambda: second.files.delete(batch.input_file_id),
            lambda: second.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                call()


def test_a_batch_goes_on_after_a_restart(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_RUNNING", 1)
    settings = Settings(batch_dir=tmp_path / "batches", requests_per_minute=100_000)
    data = lines(*[{"messages": WHAT, "max_tokens": 8, "ignore_eos": True}] * 30)

    def server() -> TestClient:
        return TestClient(create_app(load(tiny, device="cpu"), settings), base_url=LOCAL)

    with server() as http:
        client = openai.OpenAI(base_url=f"{LOCAL}/v1", api_key="none", http_client=http)
        batch = started(client, data)
        while client.batches.retrieve(batch.id).request_counts.completed < 3:
            time.sleep(0.005)
    (part,) = (tmp_path / "batches" / "none").glob("*.output.part")
    kept = part.read_bytes().count(b"\n")
    assert 3 <= kept < 30
    with part.open("ab") as file:
        file.write(b'{"id": "half a row')
    monkeypatch.setattr(batches, "MAX_RUNNING", 8)
    with server() as http:
        client = openai.OpenAI(base_url=f"{LOCAL}/v1", api_key="none", http_client=http)
        ended = finished(client, batch.id)
        assert (ended.status, ended.request_counts.completed) == ("completed", 30)
        rows = client.files.content(ended.output_file_id).text.splitlines()
        assert sorted(json.loads(row)["custom_id"] for row in rows) == sorted(
            f"r{i}" for i in range(30)
        )


def test_people_come_first(client: openai.OpenAI) -> None:
    """An answer does not wait for the batch that was there before it."""
    for file in client.files.list():
        client.files.delete(file.id)
    body = {"messages": user("?"), "max_tokens": 24, "ignore_eos": True}
    batch = started(client, lines(*[body] * 60))
    whole = client.chat.completions.create(
        model="tiny", messages=WHAT, max_tokens=24, extra_body={"ignore_eos": True}
    )
    assert whole.usage.completion_tokens == 24
    assert client.batches.retrieve(batch.id).request_counts.completed < 60
    assert finished(client, batch.id).status == "completed"


def test_objects_of_a_schema_have_the_properties_that_it_names() -> None:
    from llava_interleave.structured_output.grammar import _closed

    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    shut = inner | {"additionalProperties": False}
    assert _closed(inner) == shut
    assert _closed({"type": "array", "items": inner}) == {"type": "array", "items": shut}
    assert _closed({"$defs": {"a": inner}, "$ref": "#/$defs/a"})["$defs"] == {"a": shut}
    for unchanged in (
        {"type": "object"},
        inner | {"additionalProperties": True},
        inner | {"patternProperties": {"^x": {}}},
        {"allOf": [inner, {"properties": {"b": {}}}]},
        {"enum": [inner]},
    ):
        assert _closed(unchanged) == unchanged
