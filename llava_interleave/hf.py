"""The names of the model card with its call shapes: a snippet runs with its import line changed to `llava_interleave.hf`.

Inputs and outputs equal transformers' (`LlavaProcessor`, `generate`, the image-text-to-text pipeline); what is asked and cannot
be honoured raises `Unsupported` or `OptionError` with the way out, it is never passed over.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import checkpoints, license_notice
from .chat import kv_memory, named_dtype, pick_device
from .config_json import read_json
from .engine import Engine, SamplingParams
from .errors import OptionError, PromptError, Unsupported
from .image_layout import ImageTokenLayout
from .model import Llava
from .options import unknown
from .processing import FrameSampling, Processor, Tokenizer
from .processing.chat_template import hf_text, parse
from .prompt import Media, Prompt
from .quantization.replace import quantized_precision

IMAGE = "<image>"
TURN_END = "<|im_end|>\n"

Messages = Sequence[Mapping[str, Any]]


class BatchFeature(dict[str, Any]):
    """What the processor returns: a mapping whose entries are attributes too, and which moves as one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *where: str | int | torch.device | torch.dtype, **named: Any) -> BatchFeature:
        """All tensors on a device, those of real numbers in a dtype: `.to(device)`, `.to(dtype)` or both, by place or name."""
        device, dtype = _where(where, named)
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(
                    device=device, dtype=dtype if value.is_floating_point() else None
                )
        return self


class _Tokens:
    """The tokenizer as transformers' users know it: padding and decoding."""

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


class AutoProcessor:
    """Images and text into `input_ids`, `attention_mask` and `pixel_values`, equal to transformers' `LlavaProcessor`."""

    def __init__(self, processor: Processor, tokenizer: _Tokens) -> None:
        self.inner = processor
        self.tokenizer = tokenizer
        self.decode, self.batch_decode = tokenizer.decode, tokenizer.batch_decode

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        padding_side: str | None = None,
        use_fast: bool | None = None,
    ) -> AutoProcessor:
        """The processor of a checkpoint folder or a Hugging Face name. `use_fast=True` asks for torchvision's resize: refused."""
        if use_fast:
            raise Unsupported(
                "use_fast=True resizes with torchvision, whose pixels differ; leave it out for the exact PIL resize"
            )
        folder = checkpoints.resolve(name, revision)
        written = read_json(folder / "tokenizer_config.json", optional=True)
        processor = Processor.from_folder(folder)
        pad = written.get("pad_token") or "<|endoftext|>"
        pad_id = processor.tokenizer.encode(pad["content"] if isinstance(pad, dict) else pad)[0]
        side = padding_side or written.get("padding_side", "right")
        return cls(processor, _Tokens(processor.tokenizer, side, pad_id))

    def __call__(
        self,
        images: object = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """One text or several, and the images that their `<image>` stand for, flat or a list for each text.

        `return_tensors="pt"` gives input_ids and attention_mask `[B, T]` and pixel_values `[N, 3, S, S]`; without it, lists.
        Raises `PromptError` if the numbers of `<image>` and of images differ.
        """
        if return_tensors not in (None, "pt"):
            raise Unsupported(
                f"return_tensors={return_tensors!r}: PyTorch tensors ('pt') or lists (None) are made here"
            )
        if padding not in (False, True, "longest", "do_not_pad"):
            raise Unsupported(
                f"padding={padding!r}: True pads to the longest text of the batch, which is all that is needed here"
            )
        if text is None:
            raise PromptError("images need a text with <image> in it")
        texts = [text] if isinstance(text, str) else list(text)
        prompts = [
            self.inner.raw(one, own) for one, own in zip(texts, _share(texts, images), strict=True)
        ]
        rows = [prompt.tokens for prompt in prompts]
        longest = max(map(len, rows))
        if padding in (False, "do_not_pad"):
            if return_tensors and any(len(row) != longest for row in rows):
                raise OptionError(
                    f"texts of {sorted({len(row) for row in rows})} tokens make no tensor; pass padding=True"
                )
            longest = 0
        side = padding_side or self.tokenizer.padding_side

        def filled(row: list[int], filler: int) -> list[int]:
            gap = [filler] * (longest - len(row))
            return gap + row if side == "left" else row + gap

        ids = [filled(row, self.tokenizer.pad_token_id) for row in rows]
        seen = [filled([1] * len(row), 0) for row in rows]
        made = BatchFeature(input_ids=ids, attention_mask=seen)
        pixels = [media.pixels for prompt in prompts for media in prompt.media]
        if pixels:
            made["pixel_values"] = torch.cat(pixels)
        if return_tensors:
            made.update(input_ids=torch.tensor(ids), attention_mask=torch.tensor(seen))
        return made

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
        """The checkpoint's chat template: a string, or with `tokenize` what the processor makes of it and of the images that the
        conversation names by URL, path or as objects. A list of conversations gives a list."""
        batched = isinstance(conversation[0], Sequence)
        conversations: list[Messages] = list(conversation) if batched else [conversation]  # type: ignore[arg-type, list-item]
        rendered = [
            self._render(one, add_generation_prompt, continue_final_message)
            for one in conversations
        ]
        texts, images = [text for text, _ in rendered], [sources for _, sources in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        if any(source is None for sources in images for source in sources):
            raise PromptError(
                "an image part of a tokenised conversation needs 'image', 'url', 'path' or 'base64'"
            )
        made = self(
            images if any(images) else None,
            texts if batched else texts[0],
            return_tensors=return_tensors,
            padding=padding,
            padding_side=padding_side,
        )
        return made if return_dict else made["input_ids"]

    def _render(
        self, conversation: Messages, generation: bool, continued: bool
    ) -> tuple[str, list[object]]:
        """The text, and what its image parts name, in order; None of one that names nothing."""
        if generation and continued:
            raise OptionError(
                "add_generation_prompt and continue_final_message contradict each other"
            )
        messages = [
            {**message, "content": _content(message["content"])} for message in conversation
        ]
        text, _, slots = hf_text(parse(messages, FrameSampling()), generation)
        return text.removesuffix(TURN_END) if continued else text, [
            slot.source for slot in slots if slot.kind == "image"
        ]


class LlavaForConditionalGeneration:
    """A network with transformers' `generate`, run by this package's engine."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.generation = dict(generation)
        self._engine: Engine | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        use_flash_attention_2: bool = False,
        low_cpu_mem_usage: bool = True,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        quantization_config: object = None,
    ) -> LlavaForConditionalGeneration:
        """A checkpoint folder or a Hugging Face name; the numbers are the checkpoint's own without `torch_dtype` or `dtype`.

        Weights always go straight to their place in their type, which is what `low_cpu_mem_usage` asks for. `load_in_4bit` is NF4
        by bitsandbytes in every linear but the output head, on the GPU at once. FlashAttention 2 is exact attention: what a GPU
        computes that with is chosen among what is installed.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise OptionError(f"torch_dtype={torch_dtype} and dtype={dtype} contradict each other")
        if not low_cpu_mem_usage:
            raise OptionError(
                "low_cpu_mem_usage=False: weights are always read straight to their place; leave it out"
            )
        if quantization_config is not None:
            raise OptionError(
                "quantization_config is not read: load_in_4bit=True is NF4 with plain scales, computed in torch_dtype"
            )
        if (load_in_4bit or load_in_8bit) and not torch.cuda.is_available():
            raise Unsupported(
                f"load_in_{4 if load_in_4bit else 8}bit needs a CUDA GPU, which this machine lacks; leave it out and pass "
                "torch_dtype=torch.bfloat16, half the memory of float32"
            )
        if load_in_8bit:
            raise Unsupported(
                "load_in_8bit, bitsandbytes' LLM.int8(), is not offered; load_in_4bit is, and int8 in load()"
            )
        flash = use_flash_attention_2 or attn_implementation == "flash_attention_2"
        if flash:
            if not torch.cuda.is_available():
                raise Unsupported(
                    "FlashAttention 2 needs a CUDA GPU, which this machine lacks; leave it out: attention is PyTorch's fused SDPA"
                )
        elif attn_implementation not in (None, "sdpa"):
            raise Unsupported(
                f"attn_implementation={attn_implementation!r}: attention is PyTorch's SDPA here; leave it out"
            )
        wanted = dtype if dtype is not None else torch_dtype
        if isinstance(wanted, str):
            wanted = None if wanted == "auto" else named_dtype(wanted)
        checkpoint = checkpoints.Checkpoint.open(checkpoints.resolve(name, revision))
        few, usual = ("nf4", "cuda") if load_in_4bit else (None, "cpu")
        place = _device(usual if device_map is None else device_map, checkpoint, few or "auto")
        model = checkpoints.load(checkpoint, dtype=wanted, device=place, precision=few)
        if flash and model.language_model.norm.weight.dtype == torch.float32:
            raise OptionError(
                "FlashAttention 2 computes in 16 bits: pass torch_dtype=torch.bfloat16 or torch.float16"
            )
        license_notice.show_once(str(name), checkpoint.folder, checkpoint.values)
        return cls(
            model,
            Tokenizer.from_folder(checkpoint.folder),
            read_json(checkpoint.folder / "generation_config.json", optional=True),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that are not quantized."""
        return self.model.language_model.norm.weight.dtype

    def to(
        self, *where: str | int | torch.device | torch.dtype, **named: Any
    ) -> LlavaForConditionalGeneration:
        """The network on a device, in a dtype, or both, by place or name; moved in place. One of few bits stays what it is."""
        device, dtype = _where(where, named)
        if few := quantized_precision(self.model):
            if (dtype or self.dtype, torch.empty(0, device=device or self.device).device) != (
                self.dtype,
                self.device,
            ):
                raise OptionError(
                    f"{few} weights stay on {self.device} beside {self.dtype}: pass device_map and torch_dtype when you load them"
                )
            return self
        self.model.to(device=device, dtype=dtype)
        self._engine = None
        return self

    def eval(self) -> LlavaForConditionalGeneration:
        """The network itself: it is always in evaluation mode."""
        return self

    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        num_beams: int = 1,
        **other: object,
    ) -> Tensor:
        """Ids `[B * num_return_sequences, T]`: the prompts with their continuations, the shorter ones padded on the right.

        Defaults are transformers': 20 new tokens, greedy; with `do_sample` temperature 1 and top_k 50. torch's seed decides.
        """
        if other:
            known = inspect.signature(LlavaForConditionalGeneration.generate).parameters.keys() - {
                "self",
                "other",
            }
            raise unknown("keyword of generate", next(iter(other)), known)
        if num_beams != 1 or not use_cache:
            raise Unsupported("beam search and use_cache=False do not exist here; leave them out")
        if do_sample and temperature == 0:
            raise OptionError("temperature=0 is greedy; pass do_sample=False instead")
        given = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        drawn = {name: value for name, value in given.items() if value is not None}
        if drawn and not do_sample:
            raise OptionError(
                f"{next(iter(drawn))} does nothing without do_sample=True; leave it out or pass do_sample=True"
            )
        eos = self._eos(eos_token_id)
        shared: dict[str, Any] = {
            "max_new_tokens": 20 if max_new_tokens is None else max_new_tokens,
            **({"temperature": 1.0, "top_k": 50} | drawn if do_sample else {}),
            "repetition_penalty": repetition_penalty,
            "ignore_eos": True,
            "stop_ids": tuple(eos),
        }
        prompts = self._prompts(input_ids, attention_mask, pixel_values)
        prompts = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        seeds = [int(torch.randint(2**31, ())) if do_sample else None for _ in prompts]
        if self._engine is None:
            tokenizer = self.tokenizer
            self._engine = Engine(
                self.model,
                eos_ids=tokenizer.eos_ids,
                vocab=tokenizer.size,
                kv_bytes=kv_memory(self.model),
            )
        requests = self._engine.generate(
            prompts, [SamplingParams(**shared, seed=seed) for seed in seeds]
        )
        written = [request.generated for request in requests]
        longest = max(map(len, written))
        pad = (
            pad_token_id
            if pad_token_id is not None
            else self.generation.get("pad_token_id") or eos[0]
        )
        tails = torch.tensor(
            [row + [pad] * (longest - len(row)) for row in written],
            dtype=input_ids.dtype,
            device=input_ids.device,
        )
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, dim=0), tails], dim=1)

    def _eos(self, given: int | Sequence[int] | None) -> list[int]:
        eos = self.generation.get("eos_token_id") if given is None else given
        if eos is None:
            return sorted(self.tokenizer.eos_ids)
        return [eos] if isinstance(eos, int) else list(eos)

    def _prompts(
        self, input_ids: Tensor, mask: Tensor | None, pixels: Tensor | None
    ) -> list[Prompt]:
        """The rows without their padding, each placeholder run cut into images."""
        image_id, grid = self.model.config.image_token_id, self.model.config.vision.grid
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[keep].tolist() for row, keep in zip(input_ids, real, strict=True)]
        count = sum(row.count(image_id) for row in rows)
        given = 0 if pixels is None else len(pixels)
        if count != given * grid**2:
            raise PromptError(
                f"input_ids have {count} image tokens, but {given} images in pixel_values need {given * grid**2}; "
                "pass what the processor returned"
            )
        crops = iter(() if pixels is None else pixels.float().cpu())
        prompts = []
        for row in rows:
            starts = [index for index, token in enumerate(row) if token == image_id][:: grid**2]
            prompts.append(Prompt(row, tuple(_media(next(crops), grid, start) for start in starts)))
        return prompts


class pipeline:  # noqa: N801  (transformers' name)
    """`pipeline("image-text-to-text", model=...)`: chats, or images with text, to `input_text` and `generated_text`."""

    def __init__(
        self,
        task: Literal["image-text-to-text"],
        model: str | Path | LlavaForConditionalGeneration,
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
                f"pipeline({task!r}): this model answers questions about images: 'image-text-to-text'"
            )
        if isinstance(model, LlavaForConditionalGeneration):
            if processor is None:
                raise OptionError(
                    "a model that is loaded already needs processor=AutoProcessor.from_pretrained(...) beside it"
                )
            self.model, self.processor = model, processor
        else:
            self.model = LlavaForConditionalGeneration.from_pretrained(
                model,
                torch_dtype=torch_dtype,
                dtype=dtype,
                device_map=device_map if device is None else device,
                revision=revision,
            )
            self.processor = processor or AutoProcessor.from_pretrained(model, revision=revision)

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
        """A chat, several chats, or text with images; 256 new tokens unless said. A chat that ends with the assistant goes on.

        Returns a list of records, for several chats a list of such lists; `return_full_text=False` gives the new text alone,
        `return_tensors=True` gives `generated_token_ids` in its place.
        """
        if return_full_text is not None and return_tensors:
            raise OptionError("return_full_text and return_tensors contradict each other")
        chosen = dict(generate_kwargs or {})
        if max_new_tokens is not None and "max_new_tokens" in chosen:
            raise OptionError("max_new_tokens is given twice, by itself and in generate_kwargs")
        chosen = (
            {"max_new_tokens": 256}
            | chosen
            | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
        )
        if text is None and isinstance(images, Mapping):
            images, text = images["images"], images["text"]
        if text is None:
            images, text = None, images
        answered = partial(
            self._answered,
            chosen=chosen,
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
                return self._chat(text, continue_final_message, answered)
            return [self._chat(chat, continue_final_message, answered) for chat in text]
        if images is None and not isinstance(text, str):
            return [answered([one], self.processor(text=one, return_tensors="pt")) for one in text]
        texts = [text] if isinstance(text, str) else list(text)
        return answered(texts, self.processor(images, texts, return_tensors="pt", padding=True))

    def _chat(
        self, chat: Messages, continued: bool | None, answered: Callable[..., list[Any]]
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
        return answered([chat], inputs, continued)

    def _answered(
        self,
        asked: Sequence[str | Messages],
        inputs: BatchFeature,
        continued: bool = False,
        *,
        chosen: Mapping[str, Any],
        full: bool,
        tensors: bool,
        skip: bool,
    ) -> list[Any]:
        ids = self.model.generate(**inputs.to(self.model.device), **chosen)
        asked = [one for one in asked for _ in range(len(ids) // len(asked))]
        if tensors:
            return [
                {"input_text": one, "generated_token_ids": row}
                for one, row in zip(asked, ids, strict=True)
            ]
        new = self.processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=skip
        )
        return [
            {
                "input_text": one,
                "generated_text": _with_answer(one, text, continued) if full else text,
            }
            for one, text in zip(asked, new, strict=True)
        ]


def _with_answer(asked: str | Messages, text: str, continued: bool) -> str | list[Any]:
    """A text with its continuation; a chat with the answer as a new turn, or at the end of its last one."""
    if isinstance(asked, str):
        return asked + text
    if not continued:
        return [*asked, {"role": "assistant", "content": text}]
    content = asked[-1]["content"]
    whole = (
        content + text
        if isinstance(content, str)
        else [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
    )
    return [*asked[:-1], {**asked[-1], "content": whole}]


def _is_chat(given: object) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and bool(given)
        and isinstance(given[0], Sequence | Mapping)
        and not isinstance(given[0], str)
    )


def _content(content: str | Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """The parts with what an image names under one key, whichever of transformers' it had."""
    return (
        content
        if isinstance(content, str)
        else [part if part["type"] == "text" else _image(part) for part in content]
    )


def _image(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] not in ("image", "image_url"):
        raise Unsupported(
            f"the checkpoint's template has no {part['type']!r} part; pass its frames as images"
        )
    named = part.get("image_url", part)
    if not isinstance(named, Mapping):
        named = {"url": named}
    if "base64" in named:
        return {"type": "image", "base64": named["base64"]}
    return {
        "type": "image",
        "image": next((named[key] for key in ("image", "url", "path") if key in named), None),
    }


def _share(texts: Sequence[str], images: Any) -> list[list[object]]:
    """The images of each text: as they are nested, or by the number of its `<image>`."""
    flat = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    counts = [text.count(IMAGE) for text in texts]
    if flat and all(isinstance(own, list | tuple) for own in flat):
        if len(flat) != len(texts):
            raise PromptError(f"{len(texts)} texts but {len(flat)} lists of images")
        return [list(own) for own in flat]
    if sum(counts) != len(flat):
        raise PromptError(f"the text has {sum(counts)} {IMAGE} but {len(flat)} images were given")
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


def _media(pixels: Tensor, grid: int, start: int) -> Media:
    """One image of pixel_values `[3, S, S]`."""
    crop = pixels.unsqueeze(0).contiguous()
    key = hashlib.sha256(
        b"pixel_values" + repr(tuple(crop.shape)).encode() + crop.numpy().tobytes()
    ).digest()
    return Media(crop, ImageTokenLayout(grid), key, start)


def _where(given: Sequence[Any], named: Mapping[str, Any]) -> tuple[str | None, torch.dtype | None]:
    """Device and dtype of a `.to(...)`."""
    if wrong := set(named) - {"device", "dtype"}:
        raise unknown("keyword of to", min(wrong), ("device", "dtype"))
    every = [one for one in (*given, named.get("device"), named.get("dtype")) if one is not None]
    dtypes = [one for one in every if isinstance(one, torch.dtype)]
    devices = [one for one in every if not isinstance(one, torch.dtype)]
    if len(dtypes) > 1 or len(devices) > 1:
        raise OptionError(f".to() takes one device and one dtype, not {[*devices, *dtypes]}")
    return _device(devices[0]) if devices else None, dtypes[0] if dtypes else None


def _device(
    named: str | int | torch.device | Mapping[str, Any],
    source: checkpoints.Checkpoint | None = None,
    precision: str = "auto",
) -> str:
    if isinstance(named, Mapping):
        if set(named) != {""}:
            raise Unsupported(
                "a device_map that splits the network is not offered; give one device, such as device_map='cuda'"
            )
        named = named[""]
    return pick_device(f"cuda:{named}" if isinstance(named, int) else str(named), source, precision)
