"""Whole training runs next to TRL's own trainers: SFT, DPO, IPO, KTO, SimPO.

`make bench-trl` installs TRL apart. Both train the same tiny Qwen2 decoder on the tokens that TRL
made, in the same order, with AdamW, warm-up, a cosine and clipped gradients, in float32. Prints the
largest difference of the losses of all steps, relative, and of the final weights as a share of
their change; fails where one is above rounding. TRL's ORPOTrainer also learns the prompt: of ORPO
the function alone is compared (`trl_losses.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llava_interleave import checkpoints
from llava_interleave.model import Llava
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config
from llava_interleave.train.data.packing import Pair, Position, collate, collate_pairs
from llava_interleave.train.loop import train
from llava_interleave.train.losses import dpo_loss, kto_loss, logprobs, sft_loss
from llava_interleave.train.recipe import DPOConfig, KTOConfig, Recipe

STEPS, BATCH = 8, 4
SETTINGS = Recipe(
    steps=STEPS, lr=1e-3, warmup_ratio=0.25, projector_lr_scale=0.0, weight_decay=0.01,
    log_every=1, keep=1,
)  # fmt: skip
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("trl", "SFT", {"completion_only_loss": True}),
    "sigmoid": ("trl", "DPO", {"beta": 0.3, "loss_type": ["sigmoid"]}),
    "ipo": ("trl", "DPO", {"beta": 0.3, "loss_type": ["ipo"]}),
    "kto": ("trl", "KTO", {"beta": 0.3, "undesirable_weight": 1.5}),
    "simpo": (
        "trl.experimental.cpo", "CPO",
        {"beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7},
    ),
}  # fmt: skip


def rows(kind: str) -> list[dict[str, Any]]:
    """Texts of different lengths."""
    found: list[dict[str, Any]] = []
    for number in range(STEPS * BATCH):
        question = f"What is {number} " + "and more " * (number % 3) + "?"
        good, bad = f" It is {number * 7}." * (1 + number % 2), " No idea" + "!" * (number % 5)
        if kind == "sft":
            found.append({"prompt": question, "completion": good})
        elif kind == "kto":
            label = number % 3 > 0
            text = good if label else bad
            found.append({"prompt": question, "completion": text, "label": label})
        else:
            found.append({"prompt": question, "chosen": good, "rejected": bad})
    return found


def theirs(kind: str, folder: Path, out: Path) -> tuple[list[float], dict[str, Tensor], Any]:
    """TRL's losses of all steps, trained weights by our names, and its tokens."""
    datasets, transformers = import_module("datasets"), import_module("transformers")
    package, name, options = TRAINERS[kind]
    module = import_module(package)
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model = transformers.Qwen2ForCausalLM(whole.config.text_config)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    model.save_pretrained(out / "text")  # from there TRL loads the reference model
    model = transformers.Qwen2ForCausalLM.from_pretrained(out / "text", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = getattr(module, f"{name}Config")(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH,
        learning_rate=SETTINGS.lr, warmup_steps=SETTINGS.warmup_steps, lr_scheduler_type="cosine",
        weight_decay=SETTINGS.weight_decay, max_grad_norm=1.0, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = getattr(module, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows(kind)),
        processing_class=tokenizer,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(
        trainer.train_dataset
    )
    losses: list[float] = []
    compute = trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    weights = {
        name if name.startswith("lm_head") else f"language_model.{name.removeprefix('model.')}": p
        for name, p in model.named_parameters()
    }
    return losses, {name: p.detach() for name, p in weights.items()}, trainer.train_dataset


def ours(
    kind: str, folder: Path, out: Path, tokens: Sequence[dict[str, Any]]
) -> tuple[list[float], dict[str, Tensor]]:
    """Our losses of all steps and the trained weights, on TRL's tokens."""
    model = checkpoints.load(folder).requires_grad_(True)
    batches, loss = _batches(kind, model, tokens)

    def data(_: Position) -> Iterator[tuple[Any, Position]]:
        for number, batch in enumerate(batches, 1):
            yield batch, Position(number)

    train(model, loss, data, SETTINGS, out, log=lambda _: None)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], dict(model.named_parameters())


def _batches(
    kind: str, model: Llava, tokens: Sequence[dict[str, Any]]
) -> tuple[list[Any], Callable[..., Any]]:
    """Batches of TRL's tokens in their order, with reference log-probabilities, and our loss."""
    groups = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    if kind == "sft":
        return [collate([_labelled(r, "") for r in group]) for group in groups], sft_loss
    options = TRAINERS[kind][2]
    if kind == "kto":
        loss: Any = partial(kto_loss, KTOConfig(beta=0.3, undesirable_weight=1.5))
    else:
        loss = partial(dpo_loss, DPOConfig(beta=options["beta"], loss_type=kind, gamma=0.7))
    made = [collate_pairs([_pair(kind, row) for row in group]) for group in groups]
    with torch.no_grad():
        references = [logprobs(model, batch) for batch in made]
    return [replace(b, reference=r) for b, r in zip(made, references, strict=True)], loss


def _pair(kind: str, row: dict[str, Any]) -> Pair:
    if kind == "kto":
        sides = [_joined(row, "completion_ids"), _joined(row, "KL_completion_ids")]
    elif kind == "simpo":
        sides = [_labelled(row, "chosen_"), _labelled(row, "rejected_")]
    else:
        sides = [_joined(row, "chosen_ids"), _joined(row, "rejected_ids")]
    return Pair(sides[0], sides[1], (0.0, 0.0), bool(row.get("label", True)))


def _joined(row: dict[str, Any], answer: str) -> Prompt:
    tokens = [*row["prompt_ids"], *row[answer]]
    mask = [number >= len(row["prompt_ids"]) for number in range(len(tokens))]
    return Prompt(tokens, (), mask)


def _labelled(row: dict[str, Any], side: str) -> Prompt:
    mask = [label != -100 for label in row[f"{side}labels"]]
    return Prompt(list(row[f"{side}input_ids"]), (), mask)


def main() -> None:
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = tiny_checkpoint(root / "tiny", tiny_config(text={"tie_word_embeddings": False}))
        before = dict(checkpoints.load(folder).named_parameters())
        for kind in TRAINERS:
            losses, weights, tokens = theirs(kind, folder, root / f"theirs-{kind}")
            found, trained = ours(kind, folder, root / f"ours-{kind}", list(tokens))
            apart = max(abs(a / b - 1) for a, b in zip(found, losses, strict=True))
            difference, change = (
                sum(float((trained[n] - of[n]).square().sum()) for n in weights) ** 0.5
                for of in (weights, before)
            )
            print(
                f"{kind:<8} losses {apart:.1e}  weights {difference / change:.1e} of their change"
            )
            assert apart < 1e-4 and difference < 0.01 * change, kind


if __name__ == "__main__":
    main()
