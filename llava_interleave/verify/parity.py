"""Ours against transformers here, in float32: token ids, pixels, tower, projector, every layer, logits, greedy tokens."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import weights
from ..chatbot import kv_memory, locate
from ..engine import Engine, Sampling
from ..errors import Unsupported
from ..model import Llava, Packed, arrange
from ..processing import Processor
from ..prompt import Prompt
from ..weights.files import stored_precision

TOLERANCE = 1e-4
"""How far a logit may be off, relative to the largest one where that is above 1."""

Stages = dict[str, Tensor]
"""What a network computes on its way, by name: pixels, tower, projector, layer 1 ..., norm, logits."""
Answered = tuple[list[int], Stages, list[int]]
"""Token ids of the prompt, the stages, and the tokens written."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Two tensors at one place of the way. error: the largest difference, infinite for two shapes. largest: transformers' own."""

    name: str
    error: float
    largest: float

    @property
    def relative(self) -> float:
        return self.error / self.largest if self.largest else self.error


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt on both sides.

    prompt: its length in tokens. ids: whether both made the same token ids of it: template and tokenizer. stages: from pixels to
    logits; none beyond the pixels where ids differ. same: how many of the `tokens` greedy tokens agree before the first that
    differs. ours, theirs: those tokens as text.
    """

    name: str
    prompt: int
    ids: bool
    stages: tuple[Stage, ...]
    same: int
    tokens: int
    ours: str
    theirs: str

    def has(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """A stage by name; one that was not reached is infinitely wrong."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, float("inf"), 0.0))

    def told(self) -> dict[str, Any]:
        """As JSON has it: an infinite difference is null."""
        stages = [
            {
                "name": s.name,
                "error": s.error if isfinite(s.error) else None,
                "relative": s.relative if isfinite(s.error) else None,
            }
            for s in self.stages
        ]
        return {**asdict(self), "stages": stages, "passed": self.passed}

    @property
    def images(self) -> bool:
        return self.has("pixels")

    @property
    def passed(self) -> bool:
        logits, pixels = self.stage("logits"), self.stage("pixels").error if self.images else 0.0
        return self.ids and pixels == 0 and logits.error <= TOLERANCE * max(1.0, logits.largest) and self.same == self.tokens


def verify(name: str | Path | None = None, *, revision: str | None = None, tokens: int = 32) -> list[Case]:
    """Compare a checkpoint folder or Hugging Face name, or the built-in model, with transformers on text, images, several turns.

    Both networks are held in float32, one after the other. Raises `Unsupported` if transformers is not installed, or
    the weights are quantised.
    """
    try:
        import transformers
    except ImportError as error:
        raise Unsupported("transformers is not installed; pip install 'llava-interleave[verify]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = locate(name, revision)
    if held := stored_precision(folder):
        raise Unsupported(
            f"{folder} holds {held} weights, which transformers does not read; compare the checkpoint it was made from"
        )
    processor = Processor.from_folder(folder)
    chats = conversations()
    prompts = {case: processor.prompt(chat, preset="hf") for case, chat in chats.items()}
    model = weights.load(folder, dtype=torch.float32)
    ours = {case: (stages_of(model, prompt), greedy(model, processor, prompt, tokens)) for case, prompt in prompts.items()}
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
        compare(
            case, processor, prompts[case], ours[case], answer(theirs, prepare, chats[case], tokens, processor.tokenizer.size)
        )
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


def forward(model: Llava, prompt: Prompt) -> Tensor:
    """Logits `[T, vocabulary]` at every position of a prompt, in one forward pass."""
    with torch.inference_mode():
        dtype = model.lm_head.weight.dtype
        spans = [(media.start, arrange(model.encode(media.pixels.to(dtype)), media.layout)) for media in prompt.media]
        x = model.embed(torch.tensor(prompt.tokens), spans)
        return model.logits(model(x, torch.arange(len(prompt)), Packed([len(prompt)])))


def stages_of(model: Llava, prompt: Prompt) -> Stages:
    """What our network computes of a prompt."""
    with recorded(model.multi_modal_projector, model.language_model) as seen:
        logits = forward(model, prompt)
    pixels = {"pixels": torch.cat([media.pixels for media in prompt.media])} if prompt.media else {}
    return pixels | {name: torch.cat(parts) for name, parts in seen.items()} | {"logits": logits}


@contextmanager
def recorded(projector: nn.Module, decoder: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What goes into a projector and comes out, and what comes out of a decoder's layers and norm, while the context lasts."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.setdefault(name, []).append(value.detach().reshape(-1, value.shape[-1]).clone())

    with ExitStack() as hooks:
        hooks.enter_context(projector.register_forward_pre_hook(lambda _, given: keep("tower", given[0])))
        hooks.enter_context(projector.register_forward_hook(lambda _, __, out: keep("projector", out)))
        places = {f"layer {i}": layer for i, layer in enumerate(decoder.get_submodule("layers").children(), 1)}
        for name, module in {**places, "norm": decoder.get_submodule("norm")}.items():
            hooks.enter_context(module.register_forward_hook(lambda _, __, out, name=name: keep(name, out)))
        yield seen


def greedy(model: Llava, processor: Processor, prompt: Prompt, tokens: int) -> list[int]:
    """The likeliest continuation, by the engine; it does not stop at the end of the turn."""
    engine = Engine(model, eos_ids=processor.tokenizer.eos_ids, vocab=processor.tokenizer.size, kv_bytes=kv_memory(model))
    events = engine.stream(prompt, Sampling(max_new_tokens=tokens, ignore_eos=True))
    return [event.token for event in events if event.token is not None]


def answer(model: Any, prepare: Any, chat: Sequence[dict[str, Any]], tokens: int, vocab: int) -> Answered:
    """Transformers' ids, stages and greedy continuation, without the ids that have no meaning."""
    inputs = prepare.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        with recorded(model.model.multi_modal_projector, model.model.language_model) as seen:
            logits = model(**inputs).logits[0]
        written = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=list(range(vocab, logits.shape[-1])) or None,
        )
    ids = inputs["input_ids"][0].tolist()
    pixels = {"pixels": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    stages = pixels | {name: torch.cat(parts) for name, parts in seen.items()} | {"logits": logits}
    return ids, stages, written[0, len(ids) :].tolist()


def compare(name: str, processor: Processor, prompt: Prompt, ours: tuple[Stages, list[int]], theirs: Answered) -> Case:
    (our_stages, our_tokens), (ids, stages, tokens) = ours, theirs
    same_ids = prompt.tokens == ids
    names = [stage for stage in our_stages | stages if same_ids or stage == "pixels"]
    nothing = torch.zeros(0)
    return Case(
        name,
        len(prompt),
        same_ids,
        tuple(measured(stage, our_stages.get(stage, nothing), stages.get(stage, nothing)) for stage in names),
        agreeing(our_tokens, tokens),
        max(len(our_tokens), len(tokens)),
        *(processor.tokenizer.decode(written) for written in (our_tokens, tokens)),
    )


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measured(name: str, ours: Tensor, theirs: Tensor) -> Stage:
    error = _most(ours - theirs) if ours.shape == theirs.shape else float("inf")
    return Stage(name, error, _most(theirs))


def _most(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
