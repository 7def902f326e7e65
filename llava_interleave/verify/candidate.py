"""Our network of a checkpoint, an adapter beside it or none, and what it computes of a prompt, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..chat import kv_memory
from ..engine import Engine, SamplingParams
from ..model import PackedAttention, arrange_features
from ..processing import Processor
from ..prompt import Prompt
from ..quantization.linear_cpu import QuantizedLinear

Stages = dict[str, Tensor]
"""What a network computes on its way, by name: pixels, tower, projector, layer 1 ..., norm, logits."""
LINEARS = "quantized linears, each alone"


@dataclass(frozen=True, slots=True)
class LayerDiff:
    """Two tensors at one place of the way. error: the largest difference, infinite for two shapes. largest: transformers' own."""

    name: str
    error: float
    largest: float

    @property
    def relative(self) -> float:
        return self.error / self.largest if self.largest else self.error


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine, and the name of the adapter in it that everything goes through."""

    engine: Engine
    adapter: str | None

    def logits(self, prompt: Prompt) -> Tensor:
        """Logits `[T, vocabulary]` at every position of a prompt, in one forward pass."""
        model = self.engine.model
        dtype = model.language_model.norm.weight.dtype
        with torch.inference_mode(), self.engine.adapters.whole(self.adapter):
            spans = [
                (media.start, arrange_features(model.encode(media.pixels.to(dtype)), media.layout))
                for media in prompt.media
            ]
            x = model.embed(torch.tensor(prompt.tokens), spans)
            return model.logits(model(x, torch.arange(len(prompt)), PackedAttention([len(prompt)])))

    def stages(self, prompt: Prompt) -> Stages:
        """What the network computes of a prompt."""
        with recorded(
            self.engine.model.multi_modal_projector, self.engine.model.language_model
        ) as seen:
            logits = self.logits(prompt)
        pixels = (
            {"pixels": torch.cat([media.pixels for media in prompt.media])} if prompt.media else {}
        )
        return (
            pixels | {name: torch.cat(parts) for name, parts in seen.items()} | {"logits": logits}
        )

    def linears(self, prompt: Prompt) -> tuple[LayerDiff, ...]:
        """Of the quantized linears the one furthest from what its integers say, given what a prompt gives it; () without any."""
        found: list[LayerDiff] = []

        def keep(linear: QuantizedLinear, given: tuple[Tensor], out: Tensor) -> None:
            found.append(measured(LINEARS, out, linear.plain(*given)))

        quantized = [
            module for module in self.engine.model.modules() if isinstance(module, QuantizedLinear)
        ]
        if not quantized:
            return ()
        with ExitStack() as hooks:
            for linear in quantized:
                hooks.enter_context(linear.register_forward_hook(keep))
            self.logits(prompt)
        return (max(found, key=lambda stage: stage.relative),)

    def greedy(self, prompt: Prompt, tokens: int) -> list[int]:
        """The likeliest continuation, by the engine; it does not stop at the end of the turn."""
        how = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        (request,) = self.engine.generate([prompt], how, adapter=self.adapter)
        return request.generated


def load(
    folder: Path,
    processor: Processor,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
) -> Candidate:
    """The network of a folder, as `weights.load` has it, with the adapter in another folder."""
    model = checkpoints.load(folder, dtype=dtype, precision=precision)
    engine = Engine(
        model,
        eos_ids=processor.tokenizer.eos_ids,
        vocab=processor.tokenizer.size,
        kv_bytes=kv_memory(model),
    )
    if adapter:
        engine.adapters.add(str(adapter), checkpoints.read_adapter(adapter, model))
    return Candidate(engine, str(adapter) if adapter else None)


@contextmanager
def recorded(projector: nn.Module, decoder: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What goes into a projector and comes out, and what comes out of a decoder's layers and norm, while the context lasts."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen.setdefault(name, []).append(value.detach().reshape(-1, value.shape[-1]).clone())

    with ExitStack() as hooks:
        hooks.enter_context(
            projector.register_forward_pre_hook(lambda _, given: keep("tower", given[0]))
        )
        hooks.enter_context(
            projector.register_forward_hook(lambda _, __, out: keep("projector", out))
        )
        places = {
            f"layer {i}": layer
            for i, layer in enumerate(decoder.get_submodule("layers").children(), 1)
        }
        for name, module in {**places, "norm": decoder.get_submodule("norm")}.items():
            hooks.enter_context(
                module.register_forward_hook(lambda _, __, out, name=name: keep(name, out))
            )
        yield seen


def measured(name: str, ours: Tensor, theirs: Tensor) -> LayerDiff:
    error = _most(ours - theirs) if ours.shape == theirs.shape else float("inf")
    return LayerDiff(name, error, _most(theirs))


def _most(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
