"""An MCP server: a model's images, videos and views as tools of an assistant. Knows no terminal.

The protocol is that of the official `mcp` package (https://modelcontextprotocol.io).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from anyio.to_thread import run_sync
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from . import __version__
from .chat import Chatbot
from .errors import LlavaError, MediaRefused

T = TypeVar("T")
INSTRUCTIONS = (
    "Tools that look at images, videos and folders of video frames with a local LLaVA-Interleave "
    "model. Images are numbered in the order in which they are given. Give paths below the "
    "server's folder, http(s) addresses or data: URLs."
)
Media = Annotated[
    list[str],
    Field(description="Paths, http(s) addresses or data: URLs of images and videos, in order."),
]
Tokens = Annotated[int, Field(ge=1, le=4096, description="Length limit of the answer in tokens.")]


class AskResult(BaseModel):
    """An answer with its numbers of tokens; finish_reason "length" means that it was cut off."""

    answer: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class ImageShare(BaseModel):
    """How much an answer relies on one image: its share of the fall in log-probability."""

    name: str
    share: float
    logprob_drop: float
    attention: float


class AttributeResult(BaseModel):
    """An answer and, image by image, how much it relies on each."""

    answer: str
    images: list[ImageShare]


class TokenCount(BaseModel):
    """Tokens of a prompt and what the context leaves for an answer."""

    parts: dict[str, int]
    total: int
    context: int
    left: int


def create_server(bot: Chatbot, root: Path) -> MCPServer:
    """The tools `ask`, `compare`, `attribute` and `count_tokens` over a chatbot.

    root: only files below it are read; `server.run()` serves over standard input and output.
    """
    root = root.resolve()
    server = MCPServer("llava-interleave", instructions=INSTRUCTIONS, version=__version__)
    read_only = ToolAnnotations(read_only_hint=True, idempotent_hint=True)

    def answer(question: str, attachments: list[str], max_new_tokens: int) -> AskResult:
        sources = [_source(source, root) for source in attachments]
        reply = bot.ask(question, sources, max_new_tokens=max_new_tokens)
        return AskResult(
            answer=reply.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.usage.prompt,
            completion_tokens=reply.usage.generated,
        )

    @server.tool(annotations=read_only)
    async def ask(question: str, attachments: Media, max_new_tokens: Tokens = 512) -> AskResult:
        """Answer a question about images and videos, or about text alone."""
        return await _in_thread(lambda: answer(question, attachments, max_new_tokens))

    @server.tool(annotations=read_only)
    async def compare(
        first: str,
        second: str,
        question: str = "What are the differences between the two images?",
        max_new_tokens: Tokens = 512,
    ) -> AskResult:
        """Compare two images or videos."""
        return await _in_thread(lambda: answer(question, [first, second], max_new_tokens))

    @server.tool(annotations=read_only)
    async def attribute(
        question: str, attachments: Media, max_new_tokens: Tokens = 512
    ) -> AttributeResult:
        """Answer a question about several images and tell how much the answer relies on each.

        Each image is left out in turn, so this takes a prefill per image.
        """

        def run() -> AttributeResult:
            messages = bot.turn(question, [_source(source, root) for source in attachments])
            reply = bot.chat(messages, max_new_tokens=max_new_tokens)
            attribution = bot.attribute(messages, reply)
            images = [
                ImageShare(
                    name=image.name,
                    share=image.share or 0.0,
                    logprob_drop=image.change or 0.0,
                    attention=image.attention,
                )
                for image in attribution.images
            ]
            return AttributeResult(answer=reply.text, images=images)

        return await _in_thread(run)

    @server.tool(annotations=read_only)
    async def count_tokens(question: str, attachments: Media) -> TokenCount:
        """Count the tokens of a question and its images, without answering it."""

        def counted() -> TokenCount:
            sources = [_source(source, root) for source in attachments]
            estimate = bot.estimate(bot.turn(question, sources))
            return TokenCount(
                parts={part.name: part.tokens for part in estimate.parts},
                total=estimate.total,
                context=estimate.context,
                left=estimate.left,
            )

        return await _in_thread(counted)

    return server


def _source(source: str, root: Path) -> str:
    """An address as it is, a path as the absolute one below `root`. Raises `MediaRefused`."""
    if source.startswith(("http://", "https://", "data:")):
        return source
    path = (root / source).resolve()
    if not path.is_relative_to(root):
        raise MediaRefused(f"{source} is outside {root}, the folder that this server reads")
    return str(path)


async def _in_thread(compute: Callable[[], T]) -> T:
    """The result of work that takes time; the event loop answers pings meanwhile."""
    try:
        return await run_sync(compute)
    except LlavaError as error:
        raise ToolError(str(error)) from error
