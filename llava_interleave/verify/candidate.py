"""The network of this package, with an adapter or without, and its outputs for a prompt, layer by
layer.
"""

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
from ..model import PackedAttention
from ..processing import Processor
from ..prompt import Prompt
from ..quantization.linear_cpu import QuantizedLinear

LayerOutputs = dict[str, Tensor]
"""Outputs by name: pixels, tower, projector, layer 1 ..., norm, logits."""
LINEARS = "quantized linears, each alone"


@dataclass(frozen=True, slots=True)
class LayerDiff:
    """Outputs of one layer on both sides. error: largest difference, infinite for two shapes.
    largest: largest value of the reference.
    """

    name: str
    error: float
    largest: float

    @property
    def relative(self) -> float:
        return self.error / self.largest if self.largest else self.error


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine, and the name of the adapter that everything goes through."""

    engine: Engine
    adapter: str | None

    def logits(self, prompt: Prompt) -> Tensor:
        """Logits `[T, vocabulary]` at every position of a prompt, in one forward pass."""
        model = self.engine.model
        dtype = model.language_model.norm.weight.dtype
        with torch.inference_mode(), self.engine.adapters.whole(self.adapter):
            spans = [
                (media.start, model.arrange(model.encode(media.pixels.to(dtype)), media.layout))
                for media in prompt.media
            ]
            x = model.embed(torch.tensor(prompt.tokens), spans)
            return model.logits(model(x, torch.arange(len(prompt)), PackedAttention([len(prompt)])))

    def layers(self, prompt: Prompt) -> LayerOutputs:
        """The outputs of all layers for a prompt."""
        with record_layers(
            self.engine.model.multi_modal_projector, self.engine.model.language_model
        ) as outputs:
            logits = self.logits(prompt)
        pixels = (
            {"pixels": torch.cat([media.pixels for media in prompt.media])} if prompt.media else {}
        )
        return (
            pixels
            | {name: torch.cat(parts) for name, parts in outputs.items()}
            | {"logits": logits}
        )

    def linears(self, prompt: Prompt) -> tuple[LayerDiff, ...]:
        """The quantized linear with the largest error against the product with its integers, on a
        prompt's inputs; () without any.
        """
        diffs: list[LayerDiff] = []

        def record(linear: QuantizedLinear, inputs: tuple[Tensor], out: Tensor) -> None:
            diffs.append(layer_diff(LINEARS, out, linear.plain(*inputs)))

        linears = [
            module for module in self.engine.model.modules() if isinstance(module, QuantizedLinear)
        ]
        if not linears:
            return ()
        with ExitStack() as hooks:
            for linear in linears:
                hooks.enter_context(linear.register_forward_hook(record))
            self.logits(prompt)
        return (max(diffs, key=lambda layer: layer.relative),)

    def greedy(self, prompt: Prompt, tokens: int) -> list[int]:
        """The likeliest continuation, by the engine; it does not stop at the end of the turn."""
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        (request,) = self.engine.generate([prompt], params, adapter=self.adapter)
        return request.generated


def load(
    folder: Path,
    processor: Processor,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
) -> Candidate:
    """The network of a folder, as `checkpoints.load` has it, with the adapter in another folder."""
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
def record_layers(projector: nn.Module, decoder: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the projector's input and output and the outputs of the decoder's layers and norm
    within the context.
    """
    outputs: dict[str, list[Tensor]] = {}

    def record(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        outputs.setdefault(name, []).append(value.detach().reshape(-1, value.shape[-1]).clone())

    with ExitStack() as hooks:
        hooks.enter_context(
            projector.register_forward_pre_hook(lambda _, inputs: record("tower", inputs[0]))
        )
        hooks.enter_context(
            projector.register_forward_hook(lambda _, __, out: record("projector", out))
        )
        modules = {
            f"layer {i}": layer
            for i, layer in enumerate(decoder.get_submodule("layers").children(), 1)
        }
        for name, module in {**modules, "norm": decoder.get_submodule("norm")}.items():
            hooks.enter_context(
                module.register_forward_hook(lambda _, __, out, name=name: record(name, out))
            )
        yield outputs


def layer_diff(name: str, ours: Tensor, theirs: Tensor) -> LayerDiff:
    error = _max_abs(ours - theirs) if ours.shape == theirs.shape else float("inf")
    return LayerDiff(name, error, _max_abs(theirs))


def _max_abs(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
