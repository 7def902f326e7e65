"""Why do my numbers differ? Pipelines for these checkpoints differ in a few settings; each is
changed alone here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chat import locate
from ..checkpoints import Checkpoint
from ..model.siglip import SigLIP
from ..processing import Processor
from .candidate import Candidate, load
from .parity import conversations, kl_divergence, matching_prefix

BASELINE = (
    "preset hf, images squashed, float32 (quantized weights as stored), all layers of the tower"
)
CASES = ("one image", "three images")
PROMPTS: dict[str, dict[str, Any]] = {
    "preset interleave": {"preset": "interleave"},
    "preset official": {"preset": "official"},
    "geometry pad": {"pad": True},
    "geometry anyres": {"anyres": True},
}
"""Changes of the prompt."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
}
"""Changes of the weights' precision."""


@dataclass(frozen=True, slots=True)
class AblationResult:
    """The effect of one changed setting on the answer to one prompt, against `BASELINE`.

    prompt_tokens: length of the prompt. kl: Kullback-Leibler divergence of the first answer token's
    distribution from the baseline's, in nats. same_top1: whether the most probable first token is
    the same. matching: how many of the `tokens` greedy tokens agree before the first that differs.
    text: the greedy tokens.
    """

    setting: str
    case: str
    prompt_tokens: int
    kl: float
    same_top1: bool
    matching: int
    tokens: int
    text: str


Output = tuple[int, Tensor, list[int]]
"""Length of the prompt, logits of the first answer token, greedy tokens."""


def ablate(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[AblationResult]:
    """The effect of every changed setting on one image and on several; the baseline comes first.
    Needs no transformers.

    adapter: used throughout. progress: called with the number of finished answers, and of all.
    """
    folder = locate(name, revision)
    adapter_folder = locate(adapter, None) if adapter else None
    processor = Processor.from_folder(folder)
    precisions = (
        ["bfloat16"] if Checkpoint.open(folder).precision else list(PRECISIONS)
    )  # no kernel computes in float16
    baseline: dict[str, Output] = {}
    results: list[AblationResult] = []
    for setting, case, output in _run_all(folder, processor, adapter_folder, precisions, tokens):
        base = baseline.setdefault(case, output)
        results.append(_result(setting, case, base, output, processor))
        if progress:
            progress(len(results), len(CASES) * (len(PROMPTS) + len(precisions) + 2))
    return results


def _run_all(
    folder: Path, processor: Processor, adapter: Path | None, precisions: list[str], tokens: int
) -> Iterator[tuple[str, str, Output]]:
    chats = {case: chat for case, chat in conversations().items() if case in CASES}

    def answers(
        network: Candidate, setting: str, **changes: Any
    ) -> Iterator[tuple[str, str, Output]]:
        for case, chat in chats.items():
            prompt = processor.prompt(chat, **{"preset": "hf", **changes})
            logits = network.logits(prompt)[-1, : processor.tokenizer.size]
            yield setting, case, (len(prompt), logits, network.greedy(prompt, tokens))

    network = load(folder, processor, adapter)
    yield from answers(network, "baseline")
    for setting, changes in PROMPTS.items():
        yield from answers(network, setting, **changes)
    if _drop_layer(network):
        yield from answers(network, "layer before the last")
    for setting in precisions:
        del network
        gc.collect()
        network = load(folder, processor, adapter, **PRECISIONS[setting])
        yield from answers(network, setting)


def _drop_layer(network: Candidate) -> bool:
    """Whether the tower has layers of one kind, of which the last is not used now."""
    tower = network.engine.model.vision_tower
    if not isinstance(tower, SigLIP):
        return False
    tower.encoder.layers = tower.encoder.layers[:-1]
    network.engine.clear()  # its cached features come from all layers
    return True


def _result(
    setting: str, case: str, base: Output, output: Output, processor: Processor
) -> AblationResult:
    (_, base_logits, base_tokens), (length, logits, tokens) = base, output
    same_top1 = bool(base_logits.argmax() == logits.argmax())
    text = processor.tokenizer.decode(tokens)
    return AblationResult(
        setting,
        case,
        length,
        kl_divergence(base_logits, logits),
        same_top1,
        matching_prefix(base_tokens, tokens),
        len(tokens),
        text,
    )
