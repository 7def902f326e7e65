"""What three common approximations for many images cost in answers. The package makes none of them;
whoever has a checkpoint can measure whether that is right for it.

    python bench/approximations.py position-independent [-m MODEL]
    python bench/approximations.py eviction [-m MODEL]
    python bench/approximations.py contrastive [-m MODEL]

- position-independent: the KV cache of each image but the first is computed behind the system
  prompt alone, as a cache by content would have it, and its keys are rotated to their place. The
  first tokens of an image may be recomputed in place (MPIC, arXiv 2502.01960).
- eviction: of three videos in a prompt the first two are evicted from the KV cache, and the
  question is about the third. Keys are rotated back by the gap, or the gap stays.
- contrastive: VCD (arXiv 2311.16922), with the images hidden instead of noisy.

Questions are those of `recipes.tiny_world.benchmark`, whose images are drawn. The reference network
computes them, not the engine. The rows are printed, and with `--out` written as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_interleave import Chatbot, load
from llava_interleave.evals.task import Example
from llava_interleave.model import ContinuationAttention
from llava_interleave.model.qwen2 import rotary, rotate
from llava_interleave.prompt import Media, Prompt
from recipes.tiny_world.benchmark import World

KV = list[tuple[Tensor, Tensor]]
"""Keys and values `[S, Hkv, d]` by layer."""
PLAUSIBLE = 0.1
"""VCD's beta: tokens below this part of the largest probability are never taken."""


class KVSequence:
    """Tokens computed piece by piece over a KV cache that can be changed in between."""

    def __init__(self, bot: Chatbot) -> None:
        self.model, self.tokenizer = bot.model, bot.processor.tokenizer
        c = self.model.config.text
        empty = self.model.language_model.norm.weight.new_empty(0, c.num_kv_heads, c.head_dim)
        self.kv: KV = [(empty, empty)] * c.num_layers
        self.logits = empty
        """Of the last computed token."""

    def append(self, x: Tensor, start: int) -> None:
        """Compute embeddings `[T, D]` at positions from `start` on."""
        length, new = len(self.kv[0][0]), KV()
        attend = ContinuationAttention([len(x)], [[(0, length)]], self.kv.__getitem__)

        def storing(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            new.append((k, v))
            return attend(layer, q, k, v)

        hidden = self.model(x, torch.arange(start, start + len(x), device=x.device), storing)
        self.insert(new)
        logits = self.model.logits(hidden[-1])[: self.tokenizer.size].float()
        for placeholder in self.model.config.placeholder_ids:
            logits[placeholder : placeholder + 1] = -torch.inf
        self.logits = logits

    def insert(self, kv: KV) -> None:
        self.kv = [
            (torch.cat([k, more_k]), torch.cat([v, more_v]))
            for (k, v), (more_k, more_v) in zip(self.kv, kv, strict=True)
        ]

    def evict(self, start: int, stop: int, *, rotated_back: bool) -> None:
        behind = [(k[stop:], v[stop:]) for k, v in self.kv]
        self.kv = [(k[:start], v[:start]) for k, v in self.kv]
        self.insert(self.rotated(behind, start - stop) if rotated_back else behind)

    def rotated(self, kv: KV, distance: int) -> KV:
        """The KV cache at positions that are larger by `distance`."""
        c = self.model.config.text
        by = torch.full((1,), float(distance), device=kv[0][0].device)
        rope = rotary(by, c.head_dim, c.rope_theta, torch.float32)
        return [(rotate(k.float(), *rope).to(k.dtype), v) for k, v in kv]


def generate(
    sequences: Sequence[KVSequence],
    position: int,
    most: int,
    choose: Callable[[Sequence[Tensor]], Tensor] = lambda logits: logits[0],
) -> str:
    """The greedy answer of sequences that are continued with the same tokens."""
    first = sequences[0]
    answer: list[int] = []
    while len(answer) < most:
        token = int(choose([one.logits for one in sequences]).argmax())
        if token in first.tokenizer.eos_ids:
            break
        x = first.model.embed(torch.tensor([token], device=first.logits.device))
        for one in sequences:
            one.append(x, position + len(answer))
        answer.append(token)
    return first.tokenizer.decode(answer)


def embedded(bot: Chatbot, prompt: Prompt) -> Tensor:
    """The network's input `[T, D]`."""
    model = bot.model
    weight = model.language_model.norm.weight
    spans = [
        (m.start, model.arrange(model.encode(m.pixels.to(weight.device, weight.dtype)), m.layout))
        for m in prompt.media
    ]
    return model.embed(torch.tensor(prompt.tokens, device=weight.device), spans)


def end(media: Media) -> int:
    return media.start + media.layout.length


def position_independent(bot: Chatbot, prompt: Prompt, most: int, recomputed: float) -> str:
    """The answer where `recomputed` of each image behind the first is computed in place."""
    x, first = embedded(bot, prompt), prompt.media[0]
    system = KVSequence(bot)
    system.append(x[: first.start], 0)
    whole = KVSequence(bot)
    whole.append(x[: end(first)], 0)
    done = end(first)
    for media in prompt.media[1:]:
        again = media.start + round(recomputed * media.layout.length)
        if done < again:
            whole.append(x[done:again], done)
        if again < end(media):
            apart = KVSequence(bot)
            apart.kv = system.kv
            apart.append(x[media.start : end(media)], first.start)
            skip = first.start + again - media.start
            kept = [(k[skip:], v[skip:]) for k, v in apart.kv]
            whole.insert(whole.rotated(kept, media.start - first.start))
        done = end(media)
    whole.append(x[done:], done)
    return generate([whole], len(prompt), most)


def eviction(bot: Chatbot, prompt: Prompt, most: int, way: str) -> str:
    """The answer to a prompt of which all media but the last are evicted before the question."""
    x, last = embedded(bot, prompt), prompt.media[-1]
    whole = KVSequence(bot)
    whole.append(x[: end(last)], 0)
    start, stop = prompt.media[0].start, last.start
    if way != "nothing":
        whole.evict(start, stop, rotated_back=way == "rotated back")
    gap = stop - start if way == "rotated back" else 0
    whole.append(x[end(last) :], end(last) - gap)
    return generate([whole], len(prompt) - gap, most)


def contrastive(bot: Chatbot, prompt: Prompt, most: int, alpha: float) -> str:
    """The answer by (1 + alpha) log p - alpha log p without images."""
    x = embedded(bot, prompt)
    seeing, blind = KVSequence(bot), KVSequence(bot)
    seeing.append(x, 0)
    at = 0
    for media in prompt.media:
        if at < media.start:
            blind.append(x[at : media.start], at)
        at = end(media)
    blind.append(x[at:], at)

    def choose(logits: Sequence[Tensor]) -> Tensor:
        with_images, without = (one.log_softmax(-1) for one in logits)
        least = with_images.max() + torch.tensor(PLAUSIBLE).log()
        scores = (1 + alpha) * with_images - alpha * without.nan_to_num(neginf=0.0)
        return scores.masked_fill(with_images < least, -torch.inf)

    return generate([seeing, blind], len(prompt), most, choose)


def prompts(
    bot: Chatbot, examples: Sequence[Example], folder: Path
) -> Iterator[tuple[Example, Prompt, Prompt]]:
    """Each question's prompt, and one with the media of the two questions before it in front."""
    before: list[dict[str, Any]] = []
    for example in examples:
        (message,) = example.ask(folder)
        *media, text = message["content"]
        prompt, longer = (
            bot.prompt([{"role": "user", "content": [*front, *media, text]}])
            for front in ([], before)
        )
        if len(before) == 2:
            yield example, prompt, longer
        before = [*before, *media][-2:]


def measure(bot: Chatbot, name: str, questions: int) -> dict[str, dict[str, float]]:
    """Percent of right answers by scenario and by way."""
    scenarios = {"position-independent": "multi,views", "eviction": "video"}
    level = "hard" if name == "contrastive" else "normal"
    task = World(
        questions=questions + (2 if name == "eviction" else 0),
        scenario=scenarios.get(name, "single,multi,views"), level=level,
    )  # fmt: skip
    most = task.max_new_tokens
    ways: dict[str, Callable[[Prompt, Prompt], str]] = {
        "exact": lambda prompt, _: (
            bot.answer_prompts(
                [prompt],
                dataclasses.replace(bot.default_options, max_new_tokens=most, temperature=0.0),
            )[0].text
        )
    }
    if name == "position-independent":
        for part in (0.0, 0.25, 0.5, 0.75, 1.0):
            ways[f"{part:.0%} recomputed"] = lambda prompt, _, part=part: (  # type: ignore[misc]
                position_independent(bot, prompt, most, part)
            )
    elif name == "eviction":
        for way in ("rotated back", "gap left", "nothing"):
            label = "nothing evicted" if way == "nothing" else f"evicted, {way}"
            ways[label] = lambda _, longer, way=way: eviction(bot, longer, most, way)  # type: ignore[misc]
    else:
        for alpha in (0.0, 0.5, 1.0):
            ways[f"alpha {alpha}"] = lambda prompt, _, alpha=alpha: (  # type: ignore[misc]
                contrastive(bot, prompt, most, alpha)
            )
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for scenario in dict.fromkeys(example.group for example in task.examples):
            examples = [one for one in task.examples if one.group == scenario]
            right = dict.fromkeys(ways, 0.0)
            asked = 0
            if name == "eviction":
                rows = prompts(bot, examples, Path(folder))
            else:
                made = ((one, bot.prompt(one.ask(Path(folder)))) for one in examples)
                rows = ((one, prompt, prompt) for one, prompt in made)
            for example, prompt, longer in rows:
                asked += 1
                for way, answer in ways.items():
                    right[way] += example.scorer(answer(prompt, longer)) or 0.0
            found[scenario] = {way: round(100 * n / asked, 1) for way, n in right.items()}
            print(scenario, found[scenario], flush=True)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("position-independent", "eviction", "contrastive"))
    parser.add_argument("-m", "--model", help="a checkpoint; default: the built-in model")
    parser.add_argument("--questions", type=int, default=100, help="of each scenario")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    bot = load(given.model, precision=given.precision)
    found = measure(bot, given.name, given.questions)
    if given.out:
        given.out.write_text(json.dumps({given.name: found, "questions": given.questions}) + "\n")


if __name__ == "__main__":
    main()
