"""The image-text-to-text pipeline, without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import OptionError, PromptError, Unsupported
from .model import LlavaForConditionalGeneration
from .processor import AutoProcessor, BatchFeature, Light, Messages, supported_arguments


class pipeline(Light):  # noqa: N801  (transformers' name)
    """`pipeline("image-text-to-text", model=...)`: answers chats, or texts with images.

    Without a device it takes the GPU if there is one that the model fits, as transformers does.
    """

    @supported_arguments
    def __init__(
        self,
        task: Literal["image-text-to-text"],
        model: Any,
        *,
        processor: AutoProcessor | None = None,
        revision: str | None = None,
        device: str | int | torch.device | None = None,
        device_map: str | int | torch.device | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if task != "image-text-to-text":
            raise Unsupported(
                f"pipeline({task!r}) is not supported; this model is for 'image-text-to-text'"
            )
        if not isinstance(model, str | Path):
            if processor is None:
                raise OptionError(
                    "a loaded model also needs processor=AutoProcessor.from_pretrained(...)"
                )
            self.model, self.processor = model, processor
        else:
            self.model = LlavaForConditionalGeneration.from_pretrained(
                model,
                torch_dtype=torch_dtype,
                dtype=dtype,
                device_map=next((d for d in (device, device_map) if d is not None), "auto"),
                revision=revision,
            )
            self.processor = processor or AutoProcessor.from_pretrained(model, revision=revision)

    @supported_arguments
    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool = True,
    ) -> list[Any]:
        """Answer a chat, several chats, or texts with images; 256 new tokens by default.

        A chat that ends with the assistant is continued. Returns a list of records, for several
        chats a list of such lists. `return_full_text=False` returns only the new text,
        `return_tensors=True` returns `generated_token_ids` instead.
        """
        if return_full_text is not None and return_tensors:
            raise OptionError("return_full_text and return_tensors contradict each other")
        arguments = {"max_new_tokens": 256} | dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in (generate_kwargs or {}):
                raise OptionError(
                    "max_new_tokens is also in generate_kwargs; leave out one of them"
                )
            arguments["max_new_tokens"] = max_new_tokens
        if text is None and isinstance(images, Mapping):
            images, text = images["images"], images["text"]
        if text is None:
            images, text = None, images
        generate = partial(
            self._generate,
            arguments=arguments,
            full=return_full_text is not False,
            tensors=bool(return_tensors),
            skip=skip_special_tokens,
        )
        if _is_chat(text):
            if images is not None:
                raise PromptError(
                    "images of a chat stand inside its content: {'type': 'image', 'url': ...}"
                )
            if isinstance(text[0], Mapping):
                return self._chat(text, continue_final_message, generate)
            return [self._chat(chat, continue_final_message, generate) for chat in text]
        if images is None and not isinstance(text, str):
            return [generate([one], self.processor(text=one, return_tensors="pt")) for one in text]
        texts = [text] if isinstance(text, str) else list(text)
        return generate(texts, self.processor(images, texts, return_tensors="pt", padding=True))

    def _chat(
        self, chat: Messages, continued: bool | None, generate: Callable[..., list[Any]]
    ) -> list[Any]:
        continued = chat[-1]["role"] == "assistant" if continued is None else continued
        inputs = self.processor.apply_chat_template(
            chat,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return generate([chat], inputs, continued)

    def _generate(
        self,
        prompts: Sequence[str | Messages],
        inputs: BatchFeature,
        continued: bool = False,
        *,
        arguments: Mapping[str, Any],
        full: bool,
        tensors: bool,
        skip: bool,
    ) -> list[Any]:
        ids = self.model.generate(**inputs.to(self.model.device), **arguments)
        prompts = [one for one in prompts for _ in range(len(ids) // len(prompts))]
        if tensors:
            return [
                {"input_text": one, "generated_token_ids": row}
                for one, row in zip(prompts, ids, strict=True)
            ]
        new = self.processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=skip
        )
        return [
            {
                "input_text": one,
                "generated_text": _append_answer(one, text, continued) if full else text,
            }
            for one, text in zip(prompts, new, strict=True)
        ]


def _append_answer(prompt: str | Messages, text: str, continued: bool) -> str | list[Any]:
    """A text with its continuation; a chat with a new turn, or with its last one continued."""
    if isinstance(prompt, str):
        return prompt + text
    if not continued:
        return [*prompt, {"role": "assistant", "content": text}]
    content = prompt[-1]["content"]
    whole = (
        content + text
        if isinstance(content, str)
        else [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
    )
    return [*prompt[:-1], {**prompt[-1], "content": whole}]


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and isinstance(value[0], Sequence | Mapping)
        and not isinstance(value[0], str)
    )
