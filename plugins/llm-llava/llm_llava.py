"""LLaVA-Interleave as a model of the `llm` command: attachments, streaming, options, conversations.

The plugin's own commands keep the names of added checkpoints in `llava-models.json` of llm's
folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import click
import llm
from llm.parts import AttachmentPart, TextPart
from pydantic import ConfigDict, Field, create_model

from llava_interleave.options import Options

UNSUPPORTED = ("n", "logprobs", "system")
"""Options that have no place in llm's answers, or have llm's own flag."""
IMAGES = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif")
VIDEOS = ("mp4", "webm", "quicktime", "x-matroska", "x-msvideo", "mpeg")
ATTACHMENTS = {f"image/{name}" for name in IMAGES} | {f"video/{name}" for name in VIDEOS}


def llm_options() -> type[llm.Options]:
    """The fields of `llava_interleave.Options` as llm's: each None unless it is set."""
    hints = get_type_hints(Options)
    fields: dict[str, Any] = {
        field.name: (hints[field.name] | None, Field(None, description=field.metadata.get("help")))
        for field in dataclasses.fields(Options)
        if field.name not in UNSUPPORTED
    }
    model = create_model("LlavaOptions", __base__=llm.Options, **fields)
    model.model_config = ConfigDict(extra="forbid")
    return model


@cache
def chatbot(source: str | None) -> Any:
    """The loaded model; PyTorch is imported here and not when llm lists its plugins."""
    from llava_interleave import load

    return load(source)


class Llava(llm.Model):
    """A checkpoint folder or Hugging Face name under the name `model_id`."""

    can_stream = True
    attachment_types = ATTACHMENTS
    Options = llm_options()  # type: ignore[assignment]

    def __init__(self, model_id: str, source: str | None) -> None:
        self.model_id, self.source = model_id, source

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """The answer's text as it is generated; usage and finish reason go to llm's log."""
        options = {
            name: value for name, value in prompt.options.model_dump().items() if value is not None
        }
        for delta in chatbot(self.source).stream(messages(prompt), **options):
            yield delta.text
            if delta.answer is not None:
                usage = delta.answer.usage
                response.set_usage(input=usage.prompt, output=usage.generated)
                response.response_json = {"finish_reason": delta.answer.finish_reason}


def messages(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """llm's messages, the conversation so far included, in the form of `Chatbot.stream`.

    Attachments stand before the text of their message, in the order of the flags. A part of any
    other kind, such as a tool's result, raises `llm.ModelError`.
    """
    turns = []
    for message in prompt.messages:
        media, texts = [], []
        for part in message.parts:
            if isinstance(part, TextPart):
                texts.append({"type": "text", "text": part.text})
            elif isinstance(part, AttachmentPart) and part.attachment is not None:
                media.append(attachment_part(part.attachment))
            else:
                raise llm.ModelError(f"llm-llava cannot send a {type(part).__name__} to the model")
        turns.append({"role": message.role, "content": [*media, *texts]})
    return turns


def attachment_part(attachment: llm.Attachment) -> dict[str, Any]:
    """A content part: the path, the bytes, or the address, which our loader fetches within its
    limits.
    """
    kind = (attachment.resolve_type() or "").partition("/")[0]
    if attachment.path:
        return {"type": kind, "path": attachment.path}
    if attachment.content:
        return {"type": kind, kind: attachment.content}
    return {"type": kind, "url": attachment.url}


def models_file() -> Path:
    """Where the names of added checkpoints are kept."""
    return llm.user_dir() / "llava-models.json"


def added() -> dict[str, str]:
    """Source by name of the added checkpoints."""
    file = models_file()
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def write(models: dict[str, str]) -> None:
    """Replace the list of added checkpoints."""
    models_file().write_text(json.dumps(models, indent=2) + "\n", "utf-8")


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """The built-in model as `llava`, and every added checkpoint."""
    register(Llava("llava", None))
    for name, source in added().items():
        register(Llava(name, source))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """`llm llava add | list | remove`."""

    @cli.group(name="llava")
    def group() -> None:
        """Checkpoints that LLaVA-Interleave answers with."""

    @group.command()
    @click.argument("name")
    @click.argument("source")
    def add(name: str, source: str) -> None:
        """Add a checkpoint folder or Hugging Face name SOURCE as the model NAME."""
        if name == "llava":
            raise click.ClickException("llava is the built-in model; choose another name")
        folder = Path(source).expanduser()
        write(added() | {name: str(folder.resolve()) if folder.is_dir() else source})

    @group.command(name="list")
    def list_() -> None:
        """List the added checkpoints."""
        for name, source in added().items():
            click.echo(f"{name}: {source}")

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Remove the model NAME from the list; no file of the checkpoint is deleted."""
        models = added()
        if name not in models:
            raise click.ClickException(f"there is no {name}; llm llava list shows the names")
        del models[name]
        write(models)
