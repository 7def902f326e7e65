"""The built-in model's training from scratch; `make tiny` runs it.

Five stages: patch pre-training of tower and projector (`see`), then the decoder with frozen tower:
captions (`describe`), questions (`practise`), hard questions (`sharpen`), comparisons (`compare`).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import nn

from llava_interleave import config_json
from llava_interleave.checkpoints import save
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.model import Llava
from llava_interleave.processing.processor_files import processor_files
from llava_interleave.testing import train_tokenizer
from llava_interleave.train.data import formats
from llava_interleave.train.loop import train
from llava_interleave.train.recipe import Recipe

from . import patch_pretraining
from .attention_supervision import (
    AttendedSample,
    AttentionTargets,
    attended_loss,
    collate,
    with_targets,
)
from .data import conversation, render, talk
from .episodes import FRAMES, NORMAL, SCENARIOS, changed, episode
from .packing import PackedDataset, batches
from .questions import ask

SEED = 1
PIECES = 960
VISION = VisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_layers=4,
    num_heads=3,
    image_size=96,
    patch_size=32,
    layer_norm_eps=1e-6,
)
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
DESCRIBE = Recipe(
    steps=300,
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
TOKENS = 2048  # of a batch
WINDOW = 128  # samples that are packed together


@dataclass(frozen=True, slots=True)
class Lesson:
    """`samples` in a row, drawn from `scenarios`.

    questions: at most, of a sample. caption: fraction with a description. hard: fraction with
    `HARD` questions only. comparison: fraction with two images and one question about their
    difference.
    """

    samples: float
    scenarios: tuple[str, ...]
    questions: int
    caption: float
    hard: float = 0.0
    comparison: float = 0.0


HARD = (
    "changed", "same_at", "order_up", "order_down", "order_events", "still", "moving", "appears",
    "disappears", "first_appears", "last_appears", "first_disappears", "last_disappears",
    "faster", "slower", "seen", "hidden", "behind", "in_front", "side_of", "total",
    "count_shape", "count_colour",
)  # fmt: skip
DESCRIBING = (Lesson(2000, ("single",), 1, 1.0), Lesson(math.inf, SCENARIOS, 3, 1.0))
# Questions about one image are also asked about several, and about the frames of a video: a mix of
# all scenarios from the start is learnt far slower.
PRACTISING = (
    Lesson(6000, ("single",), 6, 0.1),
    Lesson(7000, ("single", "multi", "multi"), 6, 0.1),
    Lesson(8000, ("single", "multi", "video", "video"), 6, 0.1),
    Lesson(math.inf, ("single", *("multi", "video") * 2, *("views",) * 3), 6, 0.1, 0.3),
)
SHARPENING = (
    Lesson(math.inf, ("single", *("multi",) * 4, *("video",) * 3, "views"), 6, 0.03, 0.65),
)
# In a conversation the first answer says whether anything differs, and later answers repeat it:
# only first answers teach comparison.
COMPARING = (Lesson(math.inf, ("single", *("multi", "video", "views") * 2), 6, 0.03, 0.5, 0.45),)


@dataclass(frozen=True, slots=True)
class WorldExamples:
    """Sample number i of the training set, drawn and tokenized on demand."""

    folder: Path
    seed: int
    lessons: tuple[Lesson, ...]

    def __call__(self, index: int) -> AttendedSample:
        rng = Random(f"train/{self.seed}/{index}")
        for lesson in self.lessons:
            if index < lesson.samples:
                break
            index -= int(lesson.samples)
        if lesson.comparison and rng.random() < lesson.comparison:
            ep, about = changed(rng, NORMAL), rng.choice(("changed",) * 3 + ("same_at",) * 2)
            ep, lesson = (
                replace(ep, questions=tuple(q for q in ep.questions if q.about == about)),
                Lesson(0, (), 1, 0.0),
            )
        else:
            ep = episode(
                lesson.scenarios[0] if len(lesson.scenarios) == 1 else rng.choice(lesson.scenarios),
                rng,
            )
        if lesson.hard and rng.random() < lesson.hard:
            ep = replace(
                ep, questions=tuple(q for q in ep.questions if q.about in HARD) or ep.questions
            )
        turns = talk(ep, rng, questions=lesson.questions, caption=lesson.caption)
        # Some images are resized, as images from files are.
        images = render(ep, VISION.image_size * rng.choice((1, 1, 1, 2)))
        sample = {"conversations": conversation(ep, turns), "video" if ep.clip else "image": images}
        processor = formats.processor(self.folder)
        prompt = processor.example(*formats.messages(sample, Path()))
        return with_targets(
            prompt,
            processor.tokenizer,
            AttentionTargets(ep, VISION.image_size, VISION.patch_size),
            turns,
        )


def world_texts(count: int) -> Iterator[str]:
    """Texts that the tokenizer is trained on."""
    rng = Random(f"tokenizer/{SEED}")
    for index in range(count):
        ep = episode(SCENARIOS[index % len(SCENARIOS)], rng)
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n" + ep.caption
        for question in ep.questions:
            yield f"{ask(question, rng)}\n{question.full_answer}"


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
    texts: int = 12000,
) -> Path:
    """All stages in `folder`; called again it resumes. -> the folder of the final checkpoint."""
    config, source = prepare(folder, texts)
    model = Llava(config)
    initialize(model, SEED)
    assert see.steps
    patch_loss = patch_pretraining.PatchNamingLoss(formats.processor(source).tokenizer)
    train(
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
        assert recipe.steps
        windows = PackedDataset(
            WorldExamples(source, number, lessons),
            recipe.steps * 40,
            size=WINDOW,
            tokens=TOKENS,
            seed=number,
            collate=collate,
        )
        model.requires_grad_(True)  # the recipe freezes some parts again
        data = partial(batches, windows, workers=recipe.workers)
        train(model, attended_loss, data, recipe, folder / name)
    done = folder / "model"
    shutil.rmtree(done, ignore_errors=True)
    save(model.to(torch.bfloat16), done, processor_from=source)
    return done


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")))
