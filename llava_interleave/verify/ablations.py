"""Why do my numbers differ? The ways in which pipelines for these checkpoints differ, each switched alone, and what it does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chat import locate
from ..checkpoints import stored_precision
from ..processing import Processor
from .candidate import Candidate, load
from .parity import agreeing, conversations, divergence

BASELINE = (
    "preset hf, pictures squashed, float32 (quantized weights as they are), all layers of the tower"
)
CASES = ("one image", "three images")
PROMPTS: dict[str, dict[str, Any]] = {
    "preset interleave": {"preset": "interleave"},
    "preset official": {"preset": "official"},
    "geometry pad": {"pad": True},
    "geometry anyres": {"anyres": True},
}
"""What is switched in the making of a prompt."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
}
"""What is switched in the reading of the weights."""


@dataclass(frozen=True, slots=True)
class AblationResult:
    """What one switch does to the answer to one prompt, against `BASELINE`.

    prompt: its length in tokens. kl: Kullback-Leibler divergence of the first answer token's distribution from the baseline's, in
    nats. likeliest: whether the likeliest first token is the same. same: how many of the `tokens` greedy tokens agree before the
    first that differs. text: the greedy tokens.
    """

    switch: str
    case: str
    prompt: int
    kl: float
    likeliest: bool
    same: int
    tokens: int
    text: str


Answered = tuple[int, Tensor, list[int]]
"""Length of the prompt, logits of the first answer token, greedy tokens."""


def why(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    tokens: int = 32,
    say: Callable[[int, int], None] | None = None,
) -> list[AblationResult]:
    """The effects of every switch on one picture and on several; the first rows are the baseline itself. Needs no transformers.

    adapter: beside the network throughout. say: told how many of the answers are there, and of how many.
    """
    folder = locate(name, revision)
    beside = locate(adapter, None) if adapter else None
    processor = Processor.from_folder(folder)
    kinds = (
        ["bfloat16"] if stored_precision(folder) else list(PRECISIONS)
    )  # no kernel computes in float16
    baseline: dict[str, Answered] = {}
    effects: list[AblationResult] = []
    for switch, case, answered in _answers(folder, processor, beside, kinds, tokens):
        base = baseline.setdefault(case, answered)
        effects.append(_effect(switch, case, base, answered, processor))
        if say:
            say(len(effects), len(CASES) * (len(PROMPTS) + len(kinds) + 2))
    return effects


def _answers(
    folder: Path, processor: Processor, adapter: Path | None, kinds: list[str], tokens: int
) -> Iterator[tuple[str, str, Answered]]:
    chats = {case: chat for case, chat in conversations().items() if case in CASES}

    def answers(
        network: Candidate, switch: str, **given: Any
    ) -> Iterator[tuple[str, str, Answered]]:
        for case, chat in chats.items():
            prompt = processor.prompt(chat, **{"preset": "hf", **given})
            first = network.logits(prompt)[-1, : processor.tokenizer.size]
            yield switch, case, (len(prompt), first, network.greedy(prompt, tokens))

    network = load(folder, processor, adapter)
    yield from answers(network, "baseline")
    for switch, given in PROMPTS.items():
        yield from answers(network, switch, **given)
    _drop_layer(network)
    yield from answers(network, "layer before the last")
    for switch in kinds:
        del network
        gc.collect()
        network = load(folder, processor, adapter, **PRECISIONS[switch])
        yield from answers(network, switch)


def _drop_layer(network: Candidate) -> None:
    encoder = network.engine.model.vision_tower.encoder
    encoder.layers = encoder.layers[:-1]
    network.engine.clear()  # what it keeps of pictures is made by all layers


def _effect(
    switch: str, case: str, base: Answered, answered: Answered, processor: Processor
) -> AblationResult:
    (_, before, theirs), (length, first, written) = base, answered
    same = bool(before.argmax() == first.argmax())
    text = processor.tokenizer.decode(written)
    return AblationResult(
        switch,
        case,
        length,
        divergence(before, first),
        same,
        agreeing(theirs, written),
        len(written),
        text,
    )
