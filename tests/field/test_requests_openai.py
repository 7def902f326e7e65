"""Chat requests as OpenAI's and other servers' clients send them.

A field that asks for nothing is accepted; one that asks for something is honoured, or refused by
name with what to use instead.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llava_interleave.chat import load
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.requests import BLUE, GREEN, RED, WHAT, data_url, image_part, png, user

CHAT = "/v1/chat/completions"
LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("requests") / "tiny")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    app = create_app(load(folder, device="cpu"), Settings(requests_per_minute=100_000))
    with TestClient(app, base_url=LOCAL) as client:
        yield client


def ask(client: TestClient, **body: Any) -> Any:
    return client.post(CHAT, json={"model": "tiny", "messages": WHAT, "max_tokens": 3} | body)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


ANSWERED = {"role": "assistant", "content": "Red."}
IMAGE, TEXT = image_part(RED), {"type": "text", "text": "What is this?"}

SAME_MESSAGES: dict[str, list[dict[str, Any]]] = {
    "name": [WHAT[0] | {"name": "user_proxy"}],
    "null keys of a message": [WHAT[0] | {"tool_calls": None, "refusal": None, "audio": None}],
    "null keys of parts": user(
        IMAGE | {"text": None, "video_url": None}, TEXT | {"image_url": None, "uuid": None}
    ),
    "cache_control": user(IMAGE, TEXT | {"cache_control": {"type": "ephemeral"}}),
    "uuid": user(IMAGE | {"uuid": "image-1"}, TEXT),
    "modalities of SGLang": user(IMAGE | {"modalities": "multi-images"}, TEXT),
    "null detail": user(image_part(RED, detail=None), TEXT),
    "auto detail": user(image_part(RED, detail="auto"), TEXT),
    "low detail": user(image_part(RED, detail="low"), TEXT),
    "detail beside the URL": user(IMAGE | {"detail": "auto"}, TEXT),
    "a URL without an object": user({"type": "image_url", "image_url": RED}, TEXT),
    "parts of the Responses API": user(
        {"type": "input_image", "image_url": RED, "detail": "auto"},
        {"type": "input_text", "text": TEXT["text"]},
    ),
    "white space around a URL": user(image_part(f" {RED}\n"), TEXT),
    "a file with its data": user(
        {"type": "file", "file": {"filename": "red.png", "file_data": RED}}, TEXT
    ),
    "a string among parts": user(IMAGE, TEXT["text"]),
    "annotations": user(IMAGE, TEXT | {"annotations": []}),
}


@pytest.mark.parametrize("messages", SAME_MESSAGES.values(), ids=SAME_MESSAGES)
def test_messages_that_ask_the_same(client: TestClient, messages: list[dict[str, Any]]) -> None:
    expected = ask(client, messages=WHAT)
    got = ask(client, messages=messages)
    assert text_of(got) == text_of(expected)
    assert got.json()["usage"]["prompt_tokens"] == expected.json()["usage"]["prompt_tokens"]


SAME_ANSWERS: dict[str, dict[str, Any]] = {
    "as a response has it": ANSWERED
    | {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
    "reasoning of another server": ANSWERED | {"reasoning_content": "", "reasoning": None},
    "output_text": {"role": "assistant", "content": [{"type": "output_text", "text": "Red."}]},
    "with an id": ANSWERED | {"id": "msg_1"},
}


@pytest.mark.parametrize("answer", SAME_ANSWERS.values(), ids=SAME_ANSWERS)
def test_answers_of_earlier_turns(client: TestClient, answer: dict[str, Any]) -> None:
    more = {"role": "user", "content": "And now?"}
    expected, got = (ask(client, messages=[*WHAT, one, more]) for one in (ANSWERED, answer))
    assert text_of(got) == text_of(expected)
    assert got.json()["usage"]["prompt_tokens"] == expected.json()["usage"]["prompt_tokens"]


def test_an_answer_without_content_is_an_empty_one(client: TestClient) -> None:
    more = {"role": "user", "content": "And now?"}
    empty = [*WHAT, {"role": "assistant", "content": None, "tool_calls": []}, more]
    written = [*WHAT, {"role": "assistant", "content": ""}, more]
    assert text_of(ask(client, messages=empty)) == text_of(ask(client, messages=written))


NEUTRAL: dict[str, Any] = {
    "metadata": {"run": "1"},
    "store": False,
    "user": "someone",
    "safety_identifier": "someone",
    "prompt_cache_key": "mine",
    "service_tier": "auto",
    "reasoning_effort": "none",
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "modalities": ["text"],
    "verbosity": "medium",
    "chat_template_kwargs": {},
    "top_k": -1,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "echo": False,
    "include_stop_str_in_output": False,
    "stop": None,
    "stop_token_ids": [],
    "min_tokens": 0,
    "use_beam_search": False,
    "best_of": 1,
    "length_penalty": 1.0,
    "priority": 0,
    "ignore_eos": False,
    "request_id": "r-1",
    "mm_processor_kwargs": {},
    "structured_outputs": None,
    "guided_json": None,
    "response_format": {"type": "text"},
    "logit_bias": {},
    "detokenize": True,
    "return_token_ids": False,
    "vllm_xargs": {},
    "documents": [],
    "separate_reasoning": True,
    "rid": "r-1",
    "no_stop_trim": False,
    "prompt_cache_retention": "in_memory",
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_fields_that_ask_for_nothing(client: TestClient, name: str) -> None:
    assert text_of(ask(client, **{name: NEUTRAL[name]})) == text_of(ask(client))
    assert ask(client, **{name: None}).status_code == 200


REFUSED: dict[str, tuple[Any, str]] = {
    "store": (True, "nothing is stored"),
    "service_tier": ("priority", "there is one tier"),
    "reasoning_effort": ("high", "does not reason"),
    "tools": ([{"type": "function", "function": {"name": "f"}}], "response_format"),
    "tool_choice": ("required", "response_format"),
    "functions": ([{"name": "f"}], "response_format"),
    "modalities": (["text", "audio"], "answers are text"),
    "chat_template_kwargs": ({"x": 1}, "--preset"),
    "skip_special_tokens": (False, "special tokens"),
    "add_generation_prompt": (False, "an answer is generated"),
    "echo": (True, "not repeated"),
    "stop_token_ids": ([5], "use stop"),
    "min_tokens": (5, "logit_bias"),
    "use_beam_search": (True, "use n"),
    "best_of": (3, "use n"),
    "truncate_prompt_tokens": (10, "shorten the prompt"),
    "bad_words": (["x"], "logit_bias"),
    "allowed_token_ids": ([1], "structured_outputs"),
    "chat_template": ("x", "--preset"),
    "cache_salt": ("x", "caches of its own"),
    "prompt_logprobs": (1, "no log-probabilities"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_ask_for_something_else_are_refused_by_name(
    client: TestClient, name: str
) -> None:
    value, hint = REFUSED[name]
    refused = ask(client, **{name: value})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, name)
    assert hint in error["message"]


def test_an_answer_is_continued(client: TestClient, folder: Path) -> None:
    """continue_final_message gives what would have followed: the rest of the very same answer."""
    bot = load(folder, device="cpu")
    whole = bot.chat(WHAT, max_new_tokens=12, stop_on_repetition=False)
    encode = bot.processor.tokenizer.encode
    for count in range(1, 12):
        begun = bot.processor.tokenizer.decode(whole.tokens[:count])
        if encode(begun, special=False) == whole.tokens[:count]:
            break
    messages = [*WHAT, {"role": "assistant", "content": begun}]
    body = {"messages": messages, "max_tokens": 12 - count, "stop_on_repetition": False}
    rest = ask(client, **body, continue_final_message=True)
    assert begun + text_of(rest) == whole.text
    assert rest.json()["usage"]["prompt_tokens"] == whole.usage.prompt + count
    body["add_generation_prompt"] = False  # as vLLM's clients have to say
    assert text_of(ask(client, **body, continue_final_message=True)) == text_of(rest)


@pytest.mark.parametrize(
    "body",
    [
        {"continue_final_message": True},
        {"continue_final_message": True, "messages": [*WHAT, ANSWERED | {"content": ""}]},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"return_progress": True},
    ],
    ids=["a question", "no text", "both", "no stream"],
)
def test_continuing_and_progress_are_refused_where_they_cannot_be(
    client: TestClient, body: dict[str, Any]
) -> None:
    refused = ask(client, **body)
    assert refused.status_code == 400
    assert re.search("continue|stream: true", refused.json()["error"]["message"])


def test_progress_of_a_prompt(client: TestClient) -> None:
    """llama.cpp's return_progress: chunks before the first token, in images as well."""
    body = {"messages": user(image_part(BLUE), image_part(GREEN), TEXT), "max_tokens": 2}
    body |= {"stream": True, "return_progress": True}
    with client.stream("POST", CHAT, json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    first_text = next(
        i for i, c in enumerate(chunks) if c["choices"] and c["choices"][0]["delta"].get("content")
    )
    assert progress and all("prompt_progress" not in chunk for chunk in chunks[first_text:])
    assert {(one["images"], one["total"]) for one in progress} == {(2, progress[0]["total"])}
    assert [one["processed"] for one in progress] == sorted(one["processed"] for one in progress)
    assert all(
        one["images_processed"] <= 2 and one["cache"] <= one["processed"] for one in progress
    )


REFUSED_MESSAGES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a tool's result": ([*WHAT, {"role": "tool", "content": "x"}], "no tools"),
    "tool calls": ([*WHAT, ANSWERED | {"tool_calls": [{"id": "c"}]}], "response_format"),
    "audio": (user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), "type"),
    "SGLang's frames": (user(IMAGE | {"modalities": "video"}), "modalities"),
    "unknown detail": (user(image_part(RED, detail="vast")), "detail"),
    "no content": ([{"role": "user", "content": None}], "content"),
    "a name that is no text": ([WHAT[0] | {"name": 5}], "name"),
}


@pytest.mark.parametrize("name", REFUSED_MESSAGES)
def test_messages_that_ask_for_something_else_are_refused(client: TestClient, name: str) -> None:
    messages, hint = REFUSED_MESSAGES[name]
    refused = ask(client, messages=messages)
    assert refused.status_code == 400 and hint in refused.json()["error"]["message"]


STRUCTURED: dict[str, dict[str, Any]] = {
    "guided_choice": {"guided_choice": ["yes", "no"]},
    "guided_regex": {"guided_regex": "yes|no", "guided_decoding_backend": "auto"},
    "regex of SGLang": {"regex": "yes|no"},
    "a schema of llama.cpp": {
        "response_format": {"type": "json_object", "schema": {"enum": ["yes", "no"]}}
    },
    "guided_json": {"guided_json": {"enum": ["yes", "no"]}},
    "guided_json as a text": {"guided_json": '{"enum": ["yes", "no"]}'},
    "structured_outputs": {"structured_outputs": {"choice": ["yes", "no"], "json": None}},
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_output_by_vllms_names(client: TestClient, name: str) -> None:
    assert text_of(ask(client, **STRUCTURED[name], max_tokens=20)).strip('"') in ("yes", "no")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_grammar": "root ::= 'a'"},
        {"guided_choice": ["a"], "guided_regex": "a"},
        {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}},
        {"structured_outputs": "a"},
        {"guided_json": "{"},
    ],
    ids=str,
)
def test_structured_output_that_is_refused(client: TestClient, fields: dict[str, Any]) -> None:
    assert ask(client, **fields).status_code == 400


def test_ignore_eos_writes_on(client: TestClient) -> None:
    ends = {"logit_bias": {"2": 100}, "max_tokens": 5}
    ignored = ask(client, **ends, ignore_eos=True).json()
    assert ignored["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("model", [None, "", "gpt-4o-mini", "default"])
def test_any_model_or_none(client: TestClient, model: str | None) -> None:
    assert ask(client, model=model).json()["model"] == "tiny"
    body = {"messages": WHAT, "max_tokens": 1}
    assert client.post(CHAT, json=body).json()["model"] == "tiny"


def test_too_long_a_context_in_the_words_that_clients_look_for(client: TestClient) -> None:
    refused = ask(client, messages=[{"role": "user", "content": "word " * 5000}])
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "This model's maximum context length is" in error["message"]


def test_a_bad_image_is_a_400(client: TestClient) -> None:
    refused = ask(client, messages=user(image_part(data_url(b"no image at all")), TEXT))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_image")


def test_base64_of_any_spelling(client: TestClient) -> None:
    text = base64.b64encode(png("red")).decode()
    spellings = (
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        text.rstrip("="),
        text.translate(str.maketrans("+/", "-_")),
    )
    for spelling in spellings:
        messages = user(image_part(f"data:image/png;base64,{spelling}"), TEXT)
        assert text_of(ask(client, messages=messages)) == text_of(ask(client))
