"""The built-in model's whole recipe: from nothing to a model that answers about the world. `make tiny` runs it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from ..config import LlavaConfig, TextConfig, VisionConfig
from ..model import Llava
from ..model.vision import Layer, SigLIP
from ..prompt import Prompt
from ..testing import processor_files, train_tokenizer
from ..weights import save
from ..world.data import conversation, pictures
from ..world.episodes import FRAMES, SCENARIOS, episode
from ..world.questions import ask
from . import data, tower
from .batch import Windows, batches
from .loop import TrainConfig, train
from .loss import answers

SEED = 1
PIECES = 700
VISION = VisionConfig(
    hidden_size=192, intermediate_size=768, num_layers=4, num_heads=3, image_size=96, patch_size=32, layer_norm_eps=1e-6
)
TEXT = TextConfig(
    hidden_size=192, intermediate_size=512, num_layers=6, num_heads=3, num_kv_heads=3, head_dim=64,
    context=4096, rope_theta=10000.0, tie_word_embeddings=True,
)  # fmt: skip

SEE = TrainConfig(steps=1200, lr=2e-3, warmup=60, bfloat16=True, log_every=50)
ANSWER = TrainConfig(steps=4000, lr=1.5e-3, warmup=100, scales=(("vision_tower.", 0.0),), beta2=0.95, bfloat16=True, log_every=25)
TOKENS = 2048  # of a batch
WINDOW = 128  # samples packed together
LOOK = 5000  # samples of single pictures, before there are other scenarios
DESCRIBE = 15000  # samples in which all is described, before questions prevail


@dataclass(frozen=True, slots=True)
class WorldExamples:
    """Sample number i of the training set, drawn and tokenised when asked for."""

    folder: Path
    seed: int

    def __call__(self, index: int) -> Prompt:
        rng = Random(f"train/{self.seed}/{index}")
        early = index < DESCRIBE
        ep = episode("single" if index < LOOK else rng.choice(SCENARIOS), rng)
        turns = conversation(ep, rng, questions=1 if index < LOOK else 2 if early else 5, caption=1.0 if early else 0.2)
        shown = pictures(ep, VISION.image_size * rng.choice((1, 1, 1, 2)))  # some are shrunk, as pictures from files are
        said, media = data.messages({"conversations": turns, **({"video": shown} if ep.clip else {"image": shown})}, Path())
        return data.processor(self.folder).example(said, media)


def world_texts(count: int) -> Iterator[str]:
    """What the tokenizer is trained on."""
    rng = Random(f"tokenizer/{SEED}")
    for index in range(count):
        ep = episode(SCENARIOS[index % len(SCENARIOS)], rng)
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n" + ep.caption
        for question in ep.questions:
            yield f"{ask(question, rng)}\n{question.answer}"


def initialise(model: nn.Module, seed: int) -> None:
    """Matrices scaled by their inputs, those that write to the decoder's residual stream nought, norms one, biases nought."""
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
                p.normal_(0, 0.02 if "position" in name else min(0.05, p[0].numel() ** -0.5), generator=rng)


def calibrate(sight: SigLIP, pixels: Tensor) -> None:
    """Scale what a trained tower writes to its residual stream so that its features have size 1; what they say stays the same.

    Each layer normalises what it reads. Unscaled, the features are hundreds of times as large as fresh embeddings, drown what
    the decoder adds to them, and it learns to look only after ten times as many samples.
    """
    with torch.no_grad():
        size = sight(pixels).square().mean().sqrt()
        writers: list[nn.Module] = [sight.embeddings.patch_embedding, sight.embeddings.position_embedding]
        for layer in sight.encoder.layers:
            assert isinstance(layer, Layer)
            writers += [layer.self_attn.out_proj, layer.mlp.fc2]
        for writer in writers:
            for p in writer.parameters():
                p.div_(size)


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
    (source / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": FRAMES}) + "\n")
    (source / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    return config, source


def main(folder: Path, see: TrainConfig = SEE, answer: TrainConfig = ANSWER, texts: int = 12000) -> Path:
    """The whole recipe in `folder`; called again it goes on where it stopped. -> the finished checkpoint's folder."""
    config, source = prepare(folder, texts)
    naming = tower.Naming(config.vision)
    initialise(naming, SEED)
    train(naming, tower.naming, lambda at: tower.pictures(VISION, SEED, see.steps, at), see, folder / "see")
    model = Llava(config)
    initialise(model, SEED + 1)
    model.vision_tower.load_state_dict(naming.vision_tower.state_dict())
    calibrate(model.vision_tower, tower.Pictures(VISION, SEED, 1)[0].pixels)
    windows = Windows(WorldExamples(source, SEED), answer.steps * 40, size=WINDOW, tokens=TOKENS, seed=SEED)
    train(model, answers, lambda at: batches(windows, at, workers=1), answer, folder / "answer")
    done = folder / "model"
    shutil.rmtree(done, ignore_errors=True)
    save(model.to(torch.bfloat16), done, processor_from=source)
    return done


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")))
