"""The built-in model's training from scratch; `make tiny` runs it.

Five stages: patch pre-training of tower and projector (`see`), then the decoder with frozen tower:
captions (`describe`), questions (`practise`), hard questions (`sharpen`), comparisons (`compare`).

`--whole` adds two, `--widen CHECKPOINT` adds them to a checkpoint that knows the world: tower and
projector for other drawing styles and images that are not of the world (`restyle`), and the decoder
for these (`refuse`). `--steps N` tries the recipe with N steps of each stage.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import nn

from llava_interleave import config_json
from llava_interleave.checkpoints import Checkpoint, load, save
from llava_interleave.config import LlavaConfig, TextConfig
from llava_interleave.model import Llava
from llava_interleave.processing.processor_files import processor_files
from llava_interleave.testing import train_tokenizer
from llava_interleave.train.data import formats
from llava_interleave.train.recipe import Recipe

from . import feature_distillation, other_images, patch_pretraining
from .attention_supervision import attended_loss, collate
from .episodes import FRAMES, SCENARIOS, episode
from .feature_distillation import PROBE_BATCHES, FeatureDistillation
from .lessons import (
    COMPARING,
    DESCRIBING,
    PRACTISING,
    SHARPENING,
    VISION,
    WidenedExamples,
    WorldExamples,
)
from .packing import PackedDataset, batches, train_reported
from .questions import ask
from .refusal import REFUSAL

SEED = 1
PIECES = 960
TEXT = TextConfig(
    hidden_size=192, intermediate_size=512, num_layers=6, num_heads=3, num_kv_heads=3, head_dim=64,
    context=4096, rope_theta=10000.0, tie_word_embeddings=True,
)  # fmt: skip

SEE = Recipe(
    steps=2400,
    lr=2e-3,
    warmup_ratio=60 / 2400,
    min_lr_ratio=0.02,
    tower_lr_scale=1.0,
    decoder_lr_scale=0.0,
    weight_decay=0.05,
    beta2=0.98,
    muon_lr_scale=1.0,
    bfloat16=True,
    save_every=250,
    log_every=25,
)
TOKENS = 2048  # of a batch of the decoder's stages
DESCRIBE = Recipe(
    steps=300,
    tokens=TOKENS,
    lr=1.5e-3,
    warmup_ratio=60 / 300,
    min_lr_ratio=0.87,
    projector_lr_scale=0.0,
    embedding_lr_scale=0.3,
    weight_decay=0.05,
    beta2=0.95,
    muon_lr_scale=2.0,
    bfloat16=True,
    save_every=500,
    log_every=25,
)
PRACTISE = replace(DESCRIBE, steps=5000, lr=1.3e-3, warmup_ratio=50 / 5000, min_lr_ratio=0.02)
SHARPEN = replace(PRACTISE, steps=1200, lr=6e-4, warmup_ratio=30 / 1200)
COMPARE = replace(SHARPEN, steps=1300, warmup_ratio=30 / 1300)
RESTYLE = replace(
    SEE, steps=1200, lr=1.5e-3, warmup_ratio=30 / 1200, bfloat16=False, save_every=100, log_every=10
)
REFUSE = replace(COMPARE, steps=1000, lr=8e-4, warmup_ratio=20 / 1000, save_every=100, log_every=10)
FROM_NOTHING, WIDENING = (SEE, DESCRIBE, PRACTISE, SHARPEN, COMPARE), (RESTYLE, REFUSE)
# The share of the weights after `refuse` in their mean with those before it: fine-tuned weights
# forget some of the world, the mean does not (WiSE-FT; Wortsman et al. 2022, arXiv 2109.01903).
REFUSED = 0.85
WRITERS, FEATURES = 5.0, 32.0  # by which `restyle` scales the calibrated tower and projector
WINDOW = 128  # samples that are packed together


def world_texts(count: int) -> Iterator[str]:
    """Texts that the tokenizer is trained on."""
    rng = Random(f"tokenizer/{SEED}")
    for index in range(count):
        ep = episode(SCENARIOS[index % len(SCENARIOS)], rng)
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n" + ep.caption
        for question in ep.questions:
            yield f"{ask(question, rng)}\n{question.full_answer}"
        if index % 20 == 0:
            yield REFUSAL


def initialize(model: nn.Module, seed: int) -> None:
    """Matrices scaled by their inputs (0 if they write to the decoder's residual stream), norms 1,
    biases 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "o_proj.weight", "down_proj.weight")):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1)
            elif "embed_tokens" in name:
                p.normal_(0, 0.1, generator=rng)
            else:
                p.normal_(
                    0,
                    0.02 if "position" in name else min(0.05, p[0].numel() ** -0.5),
                    generator=rng,
                )


def prepare(folder: Path, texts: int = 12000) -> tuple[LlavaConfig, Path]:
    """Train the tokenizer and write the processor's files: -> config and their folder."""
    source = folder / "processor"
    source.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(world_texts(texts), PIECES)
    size = tokenizer.get_vocab_size()
    placeholder = tokenizer.token_to_id("<image>")
    assert placeholder is not None
    config = LlavaConfig(VISION, replace(TEXT, vocab_size=-(-size // 64) * 64), placeholder)
    processor_files(source, config, tokenizer)
    (source / "video_preprocessor_config.json").write_text(
        json.dumps({"num_frames": FRAMES}) + "\n"
    )
    (source / "config.json").write_text(json.dumps(config_json.to_dict(config), indent=1))
    return config, source


def main(
    folder: Path,
    see: Recipe = SEE,
    describe: Recipe = DESCRIBE,
    practise: Recipe = PRACTISE,
    sharpen: Recipe = SHARPEN,
    compare: Recipe = COMPARE,
) -> Path:
    """The five stages in `folder`; called again it resumes. -> folder of the final checkpoint."""
    config, source = prepare(folder)
    model = Llava(config)
    initialize(model, SEED)
    assert see.steps
    patch_loss = patch_pretraining.PatchNamingLoss(formats.processor(source).tokenizer)
    train_reported(
        model,
        patch_loss,
        partial(patch_pretraining.batches, VISION, SEED, see.steps),
        see,
        folder / "see",
    )
    patch_loss.calibrate(model, patch_pretraining.LabeledPatchesDataset(VISION, SEED, 1)[0])
    stages = (
        ("describe", describe, DESCRIBING),
        ("practise", practise, PRACTISING),
        ("sharpen", sharpen, SHARPENING),
        ("compare", compare, COMPARING),
    )
    for number, (name, recipe, lessons) in enumerate(stages, SEED):
        train_decoder(model, WorldExamples(source, number, lessons), recipe, folder / name, number)
    return finish(model, source, folder)


def train_decoder(
    model: Llava,
    examples: WorldExamples | WidenedExamples,
    recipe: Recipe,
    folder: Path,
    seed: int,
) -> None:
    assert recipe.steps
    windows = PackedDataset(
        examples, recipe.steps * 40, size=WINDOW, tokens=TOKENS, seed=seed, collate=collate
    )
    model.requires_grad_(True)  # the recipe freezes some parts again
    data = partial(batches, windows, workers=recipe.workers)
    train_reported(model, attended_loss, data, recipe, folder)


def widen(
    model: Llava, source: Path, folder: Path, restyle: Recipe = RESTYLE, refuse: Recipe = REFUSE
) -> Path:
    """`restyle` and `refuse` in `folder`. -> the folder of the final checkpoint."""
    assert restyle.steps
    images = folder / "other_images" / "train"
    scenes = partial(
        feature_distillation.batches, VISION, images, SEED, restyle.steps, restyle.workers
    )
    model.requires_grad_(True)
    # A step of the optimizer is as large for all matrices; calibrated ones would be lost in it.
    patch_pretraining.scale(model, residual=WRITERS, features=FEATURES)
    probe = patch_pretraining.LabeledPatchesDataset(VISION, SEED, PROBE_BATCHES)
    loss = FeatureDistillation(model, SEED, [probe[number] for number in range(len(probe))])
    train_reported(model, loss, scenes, restyle, folder / "restyle")
    patch_pretraining.scale(model, residual=1 / WRITERS, features=1 / FEATURES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    examples = WidenedExamples(source, images, SEED)
    train_decoder(model, examples, refuse, folder / "refuse", SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name].lerp(p, REFUSED))
    return finish(model, source, folder)


def finish(model: Llava, source: Path, folder: Path) -> Path:
    """Save the final checkpoint, in bfloat16. -> its folder."""
    done = folder / "model"
    shutil.rmtree(done, ignore_errors=True)
    save(model.to(torch.bfloat16), done, processor_from=source)
    return done


def adopt(checkpoint: Path, folder: Path) -> tuple[Llava, Path]:
    """A model of the world with the vocabulary of `prepare`, and the processor's folder.

    A new token's embedding is the mean of those of its pieces in the checkpoint's tokenizer.
    """
    config, source = prepare(folder)
    old = load(Checkpoint.open(checkpoint), dtype=torch.float32)
    before, after = formats.processor(checkpoint).tokenizer, formats.processor(source).tokenizer
    table = old.language_model.embed_tokens.weight
    model = Llava(config)
    initialize(model, SEED)
    weights = old.state_dict()
    with torch.no_grad():
        rows = model.language_model.embed_tokens.weight.clone()
        for token in range(after.size):
            name = after.backend.id_to_token(token)
            known = before.backend.token_to_id(name) if name is not None else None
            pieces = before.encode(after.decode([token])) if known is None else [known]
            rows[token] = table[pieces].mean(0)
        for name, tensor in weights.items():
            if tensor.shape == table.shape and tensor.data_ptr() == table.data_ptr():
                weights[name] = rows
    model.load_state_dict(weights)
    return model, source


def command(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tiny_world.training", description="Train the built-in model."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/tiny"))
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--whole", action="store_true", help="restyle and refuse as well")
    parts.add_argument("--widen", type=Path, help="a checkpoint: only restyle and refuse, from it")
    parser.add_argument("--steps", type=int, help="of each stage, to try the recipe")
    options = parser.parse_args(arguments)
    changes = {} if options.steps is None else {"steps": options.steps}
    made = options.widen or main(options.folder, *(one.but(changes) for one in FROM_NOTHING))
    if options.whole or options.widen:
        other_images.main(options.folder / "other_images")
        start = adopt(made, options.folder)
        made = widen(*start, options.folder, *(one.but(changes) for one in WIDENING))
    print(made)


if __name__ == "__main__":
    command()
