"""The processor without transformers, with the outputs of its `LlavaProcessor` and
`LlavaOnevisionProcessor`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .. import checkpoints
from ..chat import pick_device
from ..config_json import read_json
from ..errors import OptionError, PromptError, Unsupported
from ..options import unknown
from ..processing import FrameSampling, Processor, Tokenizer
from ..processing.chat_template import LITERALS, hf_text, parse
from ..processing.limits import PixelBudget
from ..processing.tokenizer import IM_END, IMAGE, VIDEO

NEEDS_TRANSFORMERS = "needs transformers: pip install 'llava-interleave[hf]'"

Messages = Sequence[Mapping[str, Any]]
F = TypeVar("F", bound=Callable[..., Any])


class Missing(Unsupported, AttributeError):
    """An attribute that only transformers' class has."""


class Light:
    """A class without transformers: an attribute that it lacks names the extra that brings it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Missing(f"{type(self).__name__}.{name} {NEEDS_TRANSFORMERS}")


def supported_arguments(function: F) -> F:
    """Raise `Unsupported`, which names the extra, for an argument that `function` does not have."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            name = function.__qualname__.removesuffix(".__call__").removesuffix(".__init__")
            raise Unsupported(f"{name}: {error}; other arguments {NEEDS_TRANSFORMERS}") from None
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


class BatchFeature(dict[str, Any]):
    """The processor's output: a mapping whose entries are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: str | int | torch.device | torch.dtype, **kwargs: Any) -> BatchFeature:
        """Move all tensors to a device and cast floating-point ones: device, dtype or both."""
        device, dtype = device_and_dtype(args, kwargs)
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(
                    device=device, dtype=dtype if value.is_floating_point() else None
                )
        return self


class TokenizerView(Light):
    """The tokenizer with transformers' names: padding and decoding."""

    def __init__(self, tokenizer: Tokenizer, padding_side: str, pad_token_id: int) -> None:
        self.inner = tokenizer
        self.padding_side = padding_side
        self.pad_token_id = pad_token_id

    def decode(self, ids: Tensor | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids."""
        return self.inner.decode(
            ids.tolist() if isinstance(ids, Tensor) else list(ids), skip_special=skip_special_tokens
        )

    def batch_decode(
        self, rows: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """The texts of several sequences of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]


class AutoProcessor(Light):
    """Makes `input_ids`, `attention_mask` and `pixel_values` of texts and images."""

    def __init__(self, processor: Processor, tokenizer: TokenizerView) -> None:
        self.inner = processor
        self.tokenizer = tokenizer
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode

    @classmethod
    @supported_arguments
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        padding_side: str | None = None,
        use_fast: bool | None = None,
    ) -> AutoProcessor:
        """The processor of a checkpoint folder or a Hugging Face name.

        `use_fast=True` (torchvision's resize, with other pixels) is refused.
        """
        if use_fast:
            raise Unsupported(
                "use_fast=True resizes with torchvision, whose pixels differ; "
                "leave it out for the exact PIL resize"
            )
        folder = checkpoints.resolve(name, revision)
        values = read_json(folder / "tokenizer_config.json", optional=True)
        processor = Processor.from_folder(folder)
        pad = values.get("pad_token") or "<|endoftext|>"
        pad_id = processor.tokenizer.encode(pad["content"] if isinstance(pad, dict) else pad)[0]
        side = padding_side or values.get("padding_side", "right")
        return cls(processor, TokenizerView(processor.tokenizer, side, pad_id))

    @supported_arguments
    def __call__(
        self,
        images: object = None,
        text: str | Sequence[str] | None = None,
        videos: object = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """One or several texts, the images of their `<image>`, flat or one list per text, and of
        OneVision the videos of their `<video>`.

        `return_tensors="pt"` gives input_ids and attention_mask `[B, T]` and pixel_values
        `[N, 3, S, S]`; without it, lists. OneVision's pixel_values are `[N, crops, 3, S, S]`, with
        image_sizes `[N, 2]` (height, width) and batch_num_images, and pixel_values_videos
        `[N, frames, 3, S, S]` of all frames. As in transformers, images of a flat list are each
        tiled; of a list per text only one that is alone. Raises `PromptError` if the numbers of
        `<image>` and of images, or of `<video>` and of videos, differ.
        """
        if return_tensors not in (None, "pt"):
            raise Unsupported(
                f"return_tensors={return_tensors!r} is not supported; use 'pt' or None (lists)"
            )
        if padding not in (False, True, "longest", "do_not_pad"):
            raise Unsupported(
                f"padding={padding!r} is not supported; True pads to the longest text of the batch"
            )
        if text is None:
            raise PromptError("images need a text with <image> in it")
        texts = [text] if isinstance(text, str) else list(text)
        onevision = self.inner.config.arrangement.newline
        if videos is not None and self.inner.tokenizer.video_id is None:
            raise Unsupported("this checkpoint has no <video>; pass its frames as images")
        per_text: list[list[Any]] = [[*own] for own in images_per_text(texts, images)]
        limits = self.inner.loader.limits
        if onevision:  # their sizes are part of the output
            per_text = [
                [self.inner.loader.image(one, PixelBudget(limits)) for one in own]
                for own in per_text
            ]
        nested = _is_nested(images)
        anyres = True if onevision and not nested else None
        every = FrameSampling(frames=limits.video_frames + 1)  # more is refused
        clips = iter(_videos(videos))
        prompts = []
        for one, own in zip(texts, per_text, strict=True):
            rest = iter(own)
            marks = re.findall(f"{IMAGE}|{VIDEO}" if videos is not None else IMAGE, one)
            media = [next(rest if mark == IMAGE else clips, None) for mark in marks]
            if None in media or next(rest, None) is not None:
                raise PromptError(f"the text has {len(marks)} {IMAGE} and {VIDEO}, not its media")
            prompts.append(self.inner.raw(one, media, anyres=anyres, frames=every))
        if next(clips, None) is not None:
            raise PromptError(f"there are more videos than {VIDEO} in the text")
        rows = [prompt.tokens for prompt in prompts]
        longest = max(map(len, rows))
        if padding in (False, "do_not_pad"):
            if return_tensors and any(len(row) != longest for row in rows):
                raise OptionError(
                    f"texts of {sorted({len(row) for row in rows})} tokens make no tensor; "
                    "pass padding=True"
                )
            longest = 0
        side = padding_side or self.tokenizer.padding_side

        def pad(row: list[int], value: int) -> list[int]:
            padding = [value] * (longest - len(row))
            return padding + row if side == "left" else row + padding

        ids = [pad(row, self.tokenizer.pad_token_id) for row in rows]
        mask = [pad([1] * len(row), 0) for row in rows]
        output = BatchFeature(input_ids=ids, attention_mask=mask)
        found = [media for prompt in prompts for media in prompt.media]
        shown = [media.pixels for media in found if not media.name.startswith("video")]
        if shown and not onevision:
            output["pixel_values"] = torch.cat(shown)
        elif shown:
            numbers = [len(own) for own in per_text if own] if nested else [1] * len(shown)
            output["pixel_values"] = torch.nn.utils.rnn.pad_sequence(shown, batch_first=True)
            output["image_sizes"] = torch.tensor([i.size[::-1] for own in per_text for i in own])
            output["batch_num_images"] = torch.tensor(numbers)
        if moving := [media.pixels for media in found if media.name.startswith("video")]:
            if len(counts := {len(pixels) for pixels in moving}) > 1:
                raise PromptError(
                    f"videos of {sorted(counts)} frames make no tensor; pass as many of each"
                )
            output["pixel_values_videos"] = torch.stack(moving)
        if return_tensors:
            output.update(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        return output

    @supported_arguments
    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
    ) -> Any:
        """The checkpoint's chat template as a string, or with `tokenize` the model inputs.

        The images and videos of the inputs are URLs, paths or objects in the conversation. A list
        of conversations gives a list.
        """
        batched = isinstance(conversation[0], Sequence)
        conversations: list[Messages] = list(conversation) if batched else [conversation]  # type: ignore[arg-type, list-item]
        rendered = [
            self._render(one, add_generation_prompt, continue_final_message)
            for one in conversations
        ]
        texts, images = [text for text, _, _ in rendered], [one for _, one, _ in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        videos = [video for _, _, own in rendered for video in own]
        if any(source is None for sources in [*images, videos] for source in sources):
            raise PromptError(
                "an image part of a tokenized conversation needs 'image', 'url', 'path' or "
                "'base64', a video part 'video', 'url' or 'path'"
            )
        output = self(
            images if any(images) else None,
            texts if batched else texts[0],
            videos or None,
            return_tensors=return_tensors,
            padding=padding,
            padding_side=padding_side,
        )
        return output if return_dict else output["input_ids"]

    def _render(
        self, conversation: Messages, generation: bool, continued: bool
    ) -> tuple[str, list[object], list[object]]:
        """The text and the sources of its images and of its videos, in order; None for a part
        without a source.
        """
        if generation and continued:
            raise OptionError(
                "add_generation_prompt and continue_final_message contradict each other"
            )
        has_videos = self.inner.tokenizer.video_id is not None and self.inner.template.has_videos
        messages = [
            {**message, "content": _content(message["content"], has_videos)}
            for message in conversation
        ]
        turns = parse(messages, FrameSampling())
        text, slots = hf_text(turns, generation, self.inner.template)
        for mark, spelling in LITERALS.items():
            text = text.replace(mark, spelling)
        if continued:
            text = text[: text.rindex(IM_END)]
        kinds = ("image", "video")
        images, videos = ([slot.source for slot in slots if slot.kind == kind] for kind in kinds)
        return text, images, videos


def _content(
    content: str | Sequence[Mapping[str, Any]], has_videos: bool
) -> str | list[Mapping[str, Any]]:
    """The parts with an image's source under one key, whichever of transformers' keys it had."""
    if isinstance(content, str):
        return content
    texts = ("text", "video") if has_videos else ("text",)
    return [part if part["type"] in texts else _image(part) for part in content]


def _image(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] not in ("image", "image_url"):
        raise Unsupported(
            f"the checkpoint's template has no {part['type']!r} part; pass its frames as images"
        )
    source = part.get("image_url", part)
    if not isinstance(source, Mapping):
        source = {"url": source}
    if "base64" in source:
        return {"type": "image", "base64": source["base64"]}
    image = next((source[key] for key in ("image", "url", "path") if key in source), None)
    return {"type": "image", "image": image}


def _is_nested(images: object) -> bool:
    """Whether there is a list of images for each text."""
    return (
        isinstance(images, list | tuple)
        and bool(images)
        and all(isinstance(one, list | tuple) for one in images)
    )


def _videos(videos: Any) -> list[object]:
    """The videos, or one, which is a path, a URL, frames or an array of frames."""
    if videos is None:
        return []
    if not isinstance(videos, list | tuple):
        return [videos]
    is_frame = isinstance(videos[0], Image.Image) or getattr(videos[0], "ndim", 0) == 3
    return [videos] if is_frame else list(videos)


def images_per_text(texts: Sequence[str], images: Any) -> list[list[object]]:
    """The images of each text: as nested, or by its number of `<image>`."""
    flat = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    counts = [text.count(IMAGE) for text in texts]
    if _is_nested(images):
        if len(flat) != len(texts):
            raise PromptError(f"{len(texts)} texts but {len(flat)} lists of images")
        return [list(one) for one in flat]
    if sum(counts) != len(flat):
        raise PromptError(f"the text has {sum(counts)} {IMAGE} but {len(flat)} images were given")
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


class LlavaOnevisionProcessor(AutoProcessor):
    """The same for a checkpoint of LLaVA-OneVision."""


def device_and_dtype(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str | None, torch.dtype | None]:
    """Device and dtype of a `.to(...)`."""
    if wrong := set(kwargs) - {"device", "dtype"}:
        raise unknown("keyword of to", min(wrong), ("device", "dtype"))
    values = [x for x in (*args, kwargs.get("device"), kwargs.get("dtype")) if x is not None]
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    devices = [value for value in values if not isinstance(value, torch.dtype)]
    if len(dtypes) > 1 or len(devices) > 1:
        raise OptionError(f".to() takes one device and one dtype, not {[*devices, *dtypes]}")
    return resolve_device(devices[0]) if devices else None, dtypes[0] if dtypes else None


def resolve_device(
    device: str | int | torch.device | Mapping[str, Any],
    checkpoint: checkpoints.Checkpoint | None = None,
    precision: str = "auto",
) -> str:
    """The device of a `device_map` or `.to(...)`. Raises `Unsupported` for several devices."""
    if isinstance(device, Mapping):
        if set(device) != {""}:
            raise Unsupported(
                f"a device_map over several devices {NEEDS_TRANSFORMERS}; without it give one "
                "device, such as device_map='cuda'"
            )
        device = device[""]
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    return pick_device(name, checkpoint, precision)
