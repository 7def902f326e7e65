"""Clients of OpenAI's API, each used as its documentation does, for tests/test_real_clients.py.

Runs in an environment of its own (`make test-clients`), which has the client and nothing of this
project: `python clients.py NAME ADDRESS IMAGE`. It prints one JSON object: what it was answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

QUESTION = "What is this?"
TOKENS = 8


class Colour(BaseModel):
    """What structured answers are parsed into."""

    red: bool


def litellm(address: str, image: str) -> dict[str, Any]:
    import litellm

    common: dict[str, Any] = {
        "model": "openai/tiny",
        "api_base": f"{address}/v1",
        "api_key": "none",
        "num_retries": 0,
    }
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": image}},
                {"type": "text", "text": QUESTION},
            ],
        }
    ]
    whole = litellm.completion(messages=messages, max_tokens=TOKENS, **common)
    streamed = litellm.completion(messages=messages, max_tokens=TOKENS, stream=True, **common)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    errors = {}
    for name, content in (
        ("long", "word " * 3000),
        ("image", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
    ):
        try:
            litellm.completion(messages=[{"role": "user", "content": content}], **common)
        except Exception as error:  # noqa: BLE001  its kind is the answer
            errors[name] = type(error).__name__
    response = litellm.responses(input=QUESTION, max_output_tokens=2 * TOKENS, **common)
    raw = litellm.text_completion(
        prompt="Hello", max_tokens=TOKENS, **{**common, "model": "text-completion-openai/tiny"}
    )
    return {
        "chat": whole.choices[0].message.content,
        "stream": text,
        "errors": errors,
        "response": response.output[0].content[0].text,
        "completion": raw.choices[0].text,
    }


def instructor(address: str, image: str) -> dict[str, Any]:
    import instructor
    import openai

    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    found = client.chat.completions.create(
        model="tiny",
        response_model=Colour,
        max_retries=0,
        messages=[{"role": "user", "content": [QUESTION, instructor.Image.from_base64(image)]}],
    )
    return {"parsed": found.model_dump()}


def pydantic_ai(address: str, image: str) -> dict[str, Any]:
    import base64

    from pydantic_ai import Agent, BinaryContent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{address}/v1", api_key="none")
    data = BinaryContent(base64.b64decode(image.partition(",")[2]), media_type="image/png")
    found: dict[str, Any] = {}
    for name, kind in (("chat", OpenAIChatModel), ("response", OpenAIResponsesModel)):
        agent = Agent(kind("tiny", provider=provider), model_settings={"max_tokens": TOKENS})
        first = agent.run_sync([data, QUESTION])
        found[name] = first.output
        again = agent.run_sync("And now?", message_history=first.all_messages())
        found[f"{name} goes on"] = again.usage.input_tokens > first.usage.input_tokens
        parsed = Agent(kind("tiny", provider=provider), output_type=NativeOutput(Colour))
        found[f"{name} parsed"] = parsed.run_sync([data, QUESTION]).output.model_dump()
    return found


def autogen(address: str, image: str) -> dict[str, Any]:
    from autogen_core import Image
    from autogen_core.models import AssistantMessage, SystemMessage, UserMessage
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    async def run() -> dict[str, Any]:
        client = OpenAIChatCompletionClient(
            model="tiny",
            base_url=f"{address}/v1",
            api_key="none",
            max_tokens=TOKENS,
            model_info={
                "vision": True,
                "function_calling": False,
                "json_output": True,
                "family": "unknown",
                "structured_output": True,
            },
        )
        message = UserMessage(content=[Image.from_uri(image), QUESTION], source="user")
        whole = await client.create([message])
        history = [
            SystemMessage(content="Be brief."),
            message,
            AssistantMessage(content="Red.", source="assistant"),
            UserMessage(content="And now?", source="user_proxy"),
        ]
        later = await client.create(history)
        parsed = await client.create(
            [message], json_output=Colour, extra_create_args={"max_tokens": 64}
        )
        pieces = [piece async for piece in client.create_stream([message])]
        await client.close()
        return {
            "chat": whole.content,
            "later": later.usage.prompt_tokens > whole.usage.prompt_tokens,
            "parsed": json.loads(str(parsed.content)),
            "stream": "".join(piece for piece in pieces if isinstance(piece, str)),
        }

    return asyncio.run(run())


CLIENTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "litellm": litellm,
    "instructor": instructor,
    "pydantic-ai": pydantic_ai,
    "autogen": autogen,
}

if __name__ == "__main__":
    name, address, image = sys.argv[1:]
    print(json.dumps(CLIENTS[name](address, image)))
