"""Preference losses next to TRL's own functions: `make bench-trl`, which installs TRL apart.

Prints the largest difference of values and of gradients, and fails where one is above rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor

from llava_interleave.train.losses import odds_ratio_loss, preference_loss
from llava_interleave.train.recipe import DPOConfig

Pair = Callable[[Tensor, Tensor], Tensor]


def theirs(loss_type: str, beta: float, smoothing: float, gamma: float) -> Pair:
    """TRL's loss of log-probabilities of chosen and rejected answers."""
    device = SimpleNamespace(device="cpu")
    if loss_type == "orpo":
        trainer = import_module("trl.experimental.orpo.orpo_trainer").ORPOTrainer
        me = SimpleNamespace(beta=1.0, accelerator=device)
        return lambda chosen, rejected: -trainer.odds_ratio_loss(me, chosen, rejected)[0]
    trainer = import_module("trl.experimental.cpo.cpo_trainer").CPOTrainer
    me = SimpleNamespace(
        beta=beta, alpha=0.0, loss_type=loss_type, simpo_gamma=gamma, accelerator=device,
        label_smoothing=smoothing,
    )  # fmt: skip
    return lambda chosen, rejected: trainer.cpo_loss(me, chosen, rejected)[0]


def main() -> None:
    chosen, rejected = -torch.rand(2, 4096, generator=torch.Generator().manual_seed(0)) * 6 - 1e-3
    for loss_type, beta, smoothing in (
        ("sigmoid", 0.1, 0.0), ("sigmoid", 0.3, 0.2), ("ipo", 0.1, 0.0), ("simpo", 2.0, 0.0),
        ("simpo", 2.5, 0.1), ("orpo", 0.1, 0.0),
    ):  # fmt: skip
        config = DPOConfig(beta=beta, label_smoothing=smoothing, loss_type=loss_type, gamma=0.7)
        ours: Pair = odds_ratio_loss if loss_type == "orpo" else (
            lambda a, b, config=config: preference_loss(a, b, config)  # type: ignore[misc]
        )  # fmt: skip
        results = []
        for loss in (ours, theirs(loss_type, beta, smoothing, 0.7)):
            values = [side.clone().requires_grad_(True) for side in (chosen, rejected)]
            losses = loss(*values)
            losses.sum().backward()
            results.append((losses.detach(), *(side.grad for side in values)))
        apart = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
        print(f"{loss_type:<8} beta {beta}  smoothing {smoothing}  loss {apart[0]:.1e}  "
              f"gradients {max(apart[1:]):.1e}")  # fmt: skip
        assert max(apart) < 2e-5, loss_type


if __name__ == "__main__":
    main()
