"""Ours against transformers on this machine: token ids, pixels, logits and greedy tokens of one checkpoint, in float32."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import weights
from .chatbot import kv_memory, locate
from .engine import Engine, Sampling
from .errors import Unsupported
from .model import Llava, Packed, arrange
from .processing import Processor
from .prompt import Prompt

TOLERANCE = 1e-4
"""How far a logit may be off, relative to the largest one where that is above 1."""

Answered = tuple[list[int], Tensor, Tensor, list[int]]
"""Token ids of the prompt, pixel values, logits `[T, vocabulary]`, and the tokens written."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt on both sides.

    prompt: its length in tokens. ids: whether both made the same token ids of it. pixels, logits: the largest difference of a
    pixel value and of a logit at any position. largest: the largest logit. same: how many of the `tokens` greedy tokens agree
    before the first that differs.
    """

    name: str
    prompt: int
    ids: bool
    pixels: float
    logits: float
    largest: float
    same: int
    tokens: int

    @property
    def passed(self) -> bool:
        return self.ids and self.pixels == 0 and self.logits <= TOLERANCE * max(1.0, self.largest) and self.same == self.tokens


def verify(name: str | Path | None = None, *, revision: str | None = None, tokens: int = 32) -> list[Case]:
    """Compare a checkpoint folder or Hugging Face name, or the built-in model, with transformers on text, images, several turns.

    Both networks are held in float32, one after the other. Raises `Unsupported` if transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise Unsupported("transformers is not installed; pip install 'llava-interleave[verify]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = locate(name, revision)
    processor = Processor.from_folder(folder)
    chats = conversations()
    prompts = {case: processor.prompt(chat, preset="hf") for case, chat in chats.items()}
    model = weights.load(folder, dtype=torch.float32)
    ours = {case: (logits_of(model, prompt), greedy(model, processor, prompt, tokens)) for case, prompt in prompts.items()}
    with tempfile.TemporaryDirectory() as scratch:
        if "mm_projector_type" in weights.read_json(
            folder / "config.json"
        ):  # the original form, which transformers does not read
            weights.save(model, Path(scratch) / "hub", processor_from=folder)
            folder = Path(scratch) / "hub"
        del model
        gc.collect()
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None  # as ours, it goes on past the end of the turn
        prepare = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    return [
        compare(case, prompts[case], ours[case], answer(theirs, prepare, chats[case], tokens, processor.tokenizer.size))
        for case in chats
    ]


def conversations() -> dict[str, list[dict[str, Any]]]:
    """What is asked on both sides: text alone, one image, several, and a second turn with another image."""
    a, b, c = (picture(seed) for seed in range(3))
    several = [turn("user", "What changed between these pictures?", a, b, c)]
    turns = [turn("user", "What is this?", a), turn("assistant", "A picture."), turn("user", "And this one?", b)]
    return {
        "text only": [turn("user", "What is the capital of France?")],
        "one image": [turn("user", "What is in the picture?", a)],
        "three images": several,
        "two turns": turns,
    }


def turn(role: str, text: str, *images: Image.Image) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}


def picture(seed: int) -> Image.Image:
    """A picture of coloured waves, 97 + 40 x seed pixels wide: smooth and sharp parts, and no side of the tower's size."""
    width, height = 97 + 40 * seed, 131
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack([torch.sin((3 + seed) * x * (k + 2)) * torch.cos((5 - seed) * y * (k + 1)) for k in range(3)], dim=-1)
    waves[height // 3 : height // 2, width // 4 : width // 2] = torch.tensor([1.0, -1.0, 0.5]) * (1 if seed % 2 else -1)
    return Image.fromarray(((waves + 1) * 127.5).to(torch.uint8).numpy())


def logits_of(model: Llava, prompt: Prompt) -> Tensor:
    """Logits `[T, vocabulary]` at every position of a prompt, in one forward pass."""
    with torch.inference_mode():
        spans = [(media.start, arrange(model.encode(media.pixels), media.layout)) for media in prompt.media]
        x = model.embed(torch.tensor(prompt.tokens), spans)
        return model.logits(model(x, torch.arange(len(prompt)), Packed([len(prompt)])))


def greedy(model: Llava, processor: Processor, prompt: Prompt, tokens: int) -> list[int]:
    """The likeliest continuation, by the engine; it does not stop at the end of the turn."""
    engine = Engine(model, eos_ids=processor.tokenizer.eos_ids, vocab=processor.tokenizer.size, kv_bytes=kv_memory(model))
    events = engine.stream(prompt, Sampling(max_new_tokens=tokens, ignore_eos=True))
    return [event.token for event in events if event.token is not None]


def answer(model: Any, prepare: Any, chat: Sequence[dict[str, Any]], tokens: int, vocab: int) -> Answered:
    """Transformers' ids, pixel values, logits and greedy continuation, without the ids that have no meaning."""
    inputs = prepare.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
        written = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=list(range(vocab, logits.shape[-1])) or None,
        )
    ids = inputs["input_ids"][0].tolist()
    return ids, inputs.get("pixel_values", torch.zeros(0)), logits, written[0, len(ids) :].tolist()


def compare(name: str, prompt: Prompt, ours: tuple[Tensor, list[int]], theirs: Answered) -> Case:
    (our_logits, our_tokens), (ids, pixels, logits, tokens) = ours, theirs
    our_pixels = torch.cat([media.pixels for media in prompt.media]) if prompt.media else torch.zeros(0)
    same_ids = prompt.tokens == ids
    return Case(
        name,
        len(prompt),
        same_ids,
        furthest(our_pixels, pixels),
        furthest(our_logits, logits) if same_ids else float("inf"),
        float(our_logits.abs().max()),
        next((i for i, (a, b) in enumerate(zip(our_tokens, tokens, strict=False)) if a != b), min(len(our_tokens), len(tokens))),
        max(len(our_tokens), len(tokens)),
    )


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; infinite for two of different shapes, 0 for empty ones."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max()) if a.numel() else 0.0
