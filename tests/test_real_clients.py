"""LiteLLM, Instructor, pydantic-ai, AutoGen and the AI SDK against a running server.

`make test-clients` installs each into an environment of its own below build/clients: they want
different versions of common packages. Without it these tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_interleave.chat import Chatbot, Options, load
from llava_interleave.server.run import Server
from tests.helpers.requests import RED, WHAT
from tests.helpers.server import listening

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CLIENTS = ROOT / "build" / "clients"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with listening(tiny, max_tokens=64) as server:
        yield server


@pytest.fixture(scope="module")
def bot(tiny: Path) -> Chatbot:
    return load(tiny, device="cpu")


def run(*words: object, cwd: Path = ROOT) -> dict[str, Any]:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=cwd, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["litellm", "instructor", "pydantic-ai", "autogen"])
def test_a_client_in_python(server: Server, bot: Chatbot, name: str) -> None:
    python = CLIENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip("make test-clients installs the clients")
    script = ROOT / "tests" / "helpers" / "clients.py"  # -I: without the modules next to it
    found = run(python, "-I", script, name, server.address, RED)
    seen = bot.chat(WHAT, max_new_tokens=8).text
    text = bot.ask("What is this?", max_new_tokens=16).text  # LiteLLM asks for at least 16
    raw = bot.answer_prompts([bot.processor.raw("Hello")], Options(max_new_tokens=8))[0]
    expected = {
        "chat": seen,
        "stream": seen,
        "later": True,
        "chat goes on": True,
        "response goes on": True,
        "response": text if name == "litellm" else seen,
        "completion": raw.text,
        "errors": {"long": "ContextWindowExceededError", "image": "BadRequestError"},
    }
    for key, value in found.items():
        if key.endswith("parsed"):
            assert value.keys() == {"red"} and isinstance(value["red"], bool)
        else:
            assert value == expected[key], key


@pytest.mark.skipif(
    NODE is None or not (CLIENTS / "node" / "node_modules" / "ai").exists(),
    reason="make test-clients installs the AI SDK, where node is",
)
def test_the_ai_sdk(server: Server, bot: Chatbot) -> None:
    script = ROOT / "tests" / "helpers" / "ai_sdk.mjs"
    found = run(NODE, script, server.address, RED, cwd=CLIENTS / "node")
    seen = bot.chat(WHAT, max_new_tokens=8).text
    assert len(found) == 9
    for key, value in found.items():
        if key.endswith("parsed"):
            assert isinstance(value["red"], bool)
        else:
            assert value == seen, key
