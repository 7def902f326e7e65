"""`llava mcp` as the official client of the Model Context Protocol uses it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import StdioServerParameters, stdio_client
from mcp.client import Client
from PIL import Image

from llava_interleave import load
from llava_interleave.mcp_server import create_server
from llava_interleave.processing import Limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for color in ("red", "blue"):
        Image.new("RGB", (40, 30), color).save(root / f"{color}.png")
    Image.new("RGB", (9, 9)).save(root.parent / "outside.png")
    return root


def call(server: Any, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """The results of tool calls of one session."""

    async def session() -> list[Any]:
        async with Client(server) as client:
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return anyio.run(session)


def test_tools_answer_as_the_chatbot_does(tiny: Path, root: Path) -> None:
    bot = load(tiny, limits=Limits(media_root=root))
    images = ["red.png", "blue.png"]
    ask, compare, attribute, count = call(
        create_server(bot, root),
        ("ask", {"question": "What?", "attachments": images, "max_new_tokens": 5}),
        ("compare", {"first": images[0], "second": images[1], "max_new_tokens": 5}),
        ("attribute", {"question": "What?", "attachments": images, "max_new_tokens": 5}),
        ("count_tokens", {"question": "What?", "attachments": images}),
    )
    images = [str(root / name) for name in images]
    answer = bot.ask("What?", images, max_new_tokens=5)
    assert ask.structured_content == {
        "answer": answer.text,
        "finish_reason": "length",
        "prompt_tokens": answer.usage.prompt,
        "completion_tokens": 5,
    }
    other = bot.ask("What are the differences between the two images?", images, max_new_tokens=5)
    assert compare.structured_content["answer"] == other.text
    assert not attribute.is_error, attribute.content
    attribution = bot.attribute(bot.turn("What?", images), answer)
    shares = attribute.structured_content["images"]
    assert attribute.structured_content["answer"] == answer.text
    assert [(image["name"], image["share"]) for image in shares] == [
        (image.name, image.share) for image in attribution.images
    ]
    assert count.structured_content["total"] == answer.usage.prompt
    assert sum(count.structured_content["parts"].values()) == answer.usage.prompt


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"question": "What?", "attachments": ["../outside.png"]}, "outside"),
        ({"question": "What?", "attachments": ["missing.png"]}, "missing.png"),
        ({"question": "<image>?", "attachments": ["red.png", "red.png"]}, "2"),
        ({"question": "What?", "attachments": ["http://127.0.0.1/red.png"]}, "127.0.0.1"),
        ({"question": "What?", "attachments": ["red.png"], "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_errors_reach_the_assistant_in_words(
    tiny: Path, root: Path, arguments: dict[str, Any], words: str
) -> None:
    bot = load(tiny, limits=Limits(media_root=root))
    (result,) = call(create_server(bot, root), ("ask", arguments))
    assert result.is_error
    assert words in result.content[0].text
    assert "Traceback" not in result.content[0].text


@pytest.mark.slow
def test_the_command_speaks_over_standard_input_and_output(tiny: Path, root: Path) -> None:
    """A first answer that a notice or progress line on standard output would break."""
    words = ["-m", "llava_interleave", "mcp", "-m", str(tiny), "--root", str(root)]
    command = StdioServerParameters(command=sys.executable, args=words, env=dict(os.environ))
    (result,) = call(
        stdio_client(command),
        ("ask", {"question": "What?", "attachments": ["red.png"], "max_new_tokens": 3}),
    )
    assert not result.is_error, result.content
    assert result.structured_content["completion_tokens"] == 3
