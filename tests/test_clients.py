"""The server as its users reach it: the `llm` command, LangChain's client, and schemathesis with
the document of the API.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from llava_interleave.chat import Chatbot, load
from llava_interleave.server.run import Server
from tests.helpers.requests import BLUE, RED, image_part, png, user
from tests.helpers.server import QUESTIONS, listening

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def oracle(tiny: Path) -> Chatbot:
    return load(tiny, device="cpu")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with listening(tiny, max_tokens=24) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_llm_with_attachments(
    server: Server, oracle: Chatbot, tmp_path: Path, stream: bool
) -> None:
    """The command as a person types it, with the file of further models that its documentation
    describes.
    """
    model = {
        "model_id": "mine",
        "model_name": "tiny",
        "api_base": f"{server.address}/v1",
        "vision": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump([model]))
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    words = [
        "-m",
        "mine",
        "What differs?",
        "-a",
        "red.png",
        "-a",
        "blue.png",
        "-o",
        "temperature",
        "1.5",
        "-o",
        "seed",
        "3",
    ]
    done = subprocess.run(
        [BIN / "llm", *words, *([] if stream else ["--no-stream"])],
        cwd=tmp_path,
        env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    known = oracle.chat(
        user("What differs?", image_part(RED), image_part(BLUE)),
        temperature=1.5,
        seed=3,
        max_new_tokens=24,
    )
    assert done.stdout.strip() == known.text.strip(), done.stderr


def test_langchain_with_images(server: Server, oracle: Chatbot) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage  # 1.5 s
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{server.address}/v1",
        api_key="none",
        model="tiny",
        temperature=1.5,
        seed=4,
        max_tokens=24,  # type: ignore[call-arg]
        max_retries=0,
    )
    image = {
        "type": "image",
        "source_type": "base64",
        "mime_type": "image/png",
        "data": BLUE.partition(",")[2],
    }
    history = [
        SystemMessage("Be brief."),
        HumanMessage(
            [{"type": "text", "text": "Before"}, {"type": "image_url", "image_url": {"url": RED}}]
        ),
        AIMessage("Red."),
        HumanMessage([image, {"type": "text", "text": "and after?"}]),
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        *user("Before", image_part(RED)),
        {"role": "assistant", "content": "Red."},
        *user(image_part(BLUE), "and after?"),
    ]
    known = oracle.chat(messages, temperature=1.5, seed=4, max_new_tokens=24)
    whole = chat.invoke(history)
    assert whole.content == known.text
    assert whole.usage_metadata["input_tokens"] == known.usage.prompt
    assert "".join(chunk.content for chunk in chat.stream(history)) == known.text
    assert [answer.content for answer in chat.batch([history, history])] == [known.text] * 2
    form = {
        "title": "Colour",
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    assert chat.with_structured_output(form, method="json_schema").invoke(history)["colour"] in (
        "red",
        "blue",
    )


def test_the_openapi_document_holds(server: Server) -> None:
    """Whatever is sent, nothing is a fault of the server's, and requests and answers are what
    /openapi.json says.

    Only that no request of the right form is refused is not asked for: whether an image can be
    read is not in its form.
    """
    words = [
        "--max-examples=4",
        "--seed=1",
        "--generation-deterministic",
        "--warnings=off",
        "--no-color",
    ]
    done = subprocess.run(
        [
            BIN / "schemathesis",
            "run",
            f"{server.address}/openapi.json",
            *words,
            "--exclude-checks=positive_data_acceptance",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_openapi_document_describes_accepted_messages(server: Server) -> None:
    """The forms of messages in the document are those that are answered, and no other."""
    whole = server.config.app.openapi()
    validator = jsonschema_rs.validator_for(
        {"$ref": "#/components/schemas/ChatRequest", "components": whole["components"]}
    )
    for name, (messages, fields, _) in QUESTIONS.items():
        assert validator.is_valid({"model": "tiny", "messages": messages, **fields}), name
    for part in (
        {"type": "image"},
        {"type": "text"},
        {"type": "views", "views": []},
        {"type": "image_url", "image_url": "x"},
    ):
        assert not validator.is_valid({"model": "tiny", "messages": user(part)}), part
