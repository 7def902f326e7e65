"""Group relative policy optimization (GRPO, Shao et al. 2024, arXiv 2402.03300): answers that the
engine samples, rewards that functions compute, and their loss."""

from __future__ import annotations

import importlib
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine, SamplingParams, bytes_per_token
from ..errors import DataError, OptionError, with_place
from ..flops import training_flops
from ..image_layout import ImageTokenLayout
from ..model import Llava
from ..prompt import Prompt
from .data import formats
from .data.packing import Position, collate
from .data.samples import PackedSample, Samples
from .loop import autocast
from .losses import Loss, token_logprobs
from .recipe import GRPOConfig, Recipe

Reward = Callable[[str, str, Mapping[str, Any]], float]
"""(prompt: the last question, answer, sample: as in its file) -> reward."""
EPSILON = 1e-4
"""Added to the standard deviation of rewards, as TRL does."""
MAX_DRAWS = 16
"""Times as many questions as a step needs that dynamic sampling looks at before it ends the run."""
STORED = "rollouts"
"""Folder of answers that are trained on several times: a run that is resumed between needs them."""
EVALUATED = 64
"""Held-out questions that are answered at once."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Sampled answers with their questions, packed; images are there once a group.

    As `Batch`; media: (first placeholders in all answers of the group, layout). advantages,
    rewards: `[S]`, of each answer. old, reference: `[L]`, log-probabilities of the answers' tokens
    under the policy that sampled them (None: under this one) and under the reference model (None:
    no KL penalty).
    """

    tokens: Tensor
    loss_mask: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[tuple[int, ...], ImageTokenLayout]]
    advantages: Tensor
    rewards: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """The functions named `module:name`, also of modules in the working directory.

    Raises OptionError.
    """
    found: list[Reward] = []
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        module, colon, function = name.partition(":")
        try:
            if not colon:
                raise ValueError("it has no colon")
            found.append(getattr(importlib.import_module(module), function))
            if not callable(found[-1]):
                raise TypeError(f"it is a {type(found[-1]).__name__}")
        except Exception as error:
            known = isinstance(error, ImportError | AttributeError | ValueError | TypeError)
            why = str(error) if known else with_place(error)  # of the module's own code
            raise OptionError(
                f"grpo.rewards has {name!r}, which is not a function module:name: {why}"
            ) from error
    return found


def call_reward(work: Callable[[], Any], seconds: float) -> float:
    """The number that a reward function returns. Raises DataError where it raises anything, takes
    longer or returns something else.

    It runs in a thread of its own, which is left behind if it does not end.
    """
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  SystemExit, too
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise DataError(f"took longer than {seconds:g} s (reward_seconds)")
    if isinstance(value := found[0], BaseException):
        raise DataError(f"raised {with_place(value)}") from value
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except Exception as error:  # of a tensor of several, a number beyond floats
        raise DataError(f"is a {type(value).__name__}, not a number: {error}") from error
    if not math.isfinite(number):
        raise DataError(f"is {value!r:.60}, not a number")
    return number


def advantages(rewards: Tensor, *, scale: bool) -> Tensor:
    """Of groups `[Q, G]`: the reward less the group's mean (outcome supervision, section 4.1.2),
    divided by the group's standard deviation if `scale` (without: Dr. GRPO, arXiv 2503.20783)."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + EPSILON) if scale else centred


def policy_loss(
    logprobs: Tensor, old: Tensor, advantage: Tensor, reference: Tensor | None, config: GRPOConfig
) -> tuple[Tensor, Tensor]:
    """The loss of each token `[L]`, and whether the ratio was clipped.

    Equation 3 of arXiv 2402.03300 with the unbiased estimate of the KL divergence of equation 4;
    clip_high above clip_low is DAPO's (arXiv 2503.14476, equation 10).
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    loss = -gain
    if reference is not None:
        apart = reference - logprobs
        loss = loss + config.beta * (apart.exp() - apart - 1)
    return loss, (clipped * advantage < ratio * advantage).float()


def grpo_loss(config: GRPOConfig, model: Llava, batch: Rollouts) -> Loss:
    """The loss of sampled answers; `correct` are those with more reward than their group's mean.

    loss_type grpo: the mean over answers of the means over their tokens (equation 3); dapo: the
    mean over all tokens of the step (DAPO, equation 8); dr_grpo: the sum over tokens divided by
    answers times max_new_tokens.
    """
    logprobs, answers = token_logprobs(model, batch, batch.media, config.temperature)
    device = logprobs.device
    old = logprobs.detach() if batch.old is None else batch.old.to(device)
    reference = None if batch.reference is None else batch.reference.to(device)
    losses, clipped = policy_loss(
        logprobs, old, batch.advantages.to(device)[answers], reference, config
    )
    count = len(batch.lengths)
    lengths = torch.bincount(answers, minlength=count)
    if config.loss_type == "dapo":
        total, counted = losses.sum(), len(losses)
    else:
        per = (
            lengths
            if config.loss_type == "grpo"
            else torch.full_like(lengths, config.max_new_tokens)
        )
        total, counted = (losses / per[answers]).sum(), count
    share = counted / count
    return Loss(
        total,
        counted,
        int((batch.advantages > 0).sum()),
        len(batch.tokens),
        len(batch.pixels),
        training_flops(model, batch.lengths, len(batch.pixels), len(losses)),
        {
            "reward": float(batch.rewards.sum()) * share,
            "answer_tokens": float(lengths.sum()) * share,
            "clipped": float((clipped / lengths[answers]).sum()) * share,
        },
    )


@dataclass(frozen=True, slots=True)
class Question:
    """A sample's question as a prompt, and as a text for reward functions."""

    prompt: Prompt
    text: str
    sample: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to question `number`: their tokens, with the one that ends them, and rewards."""

    number: int
    question: Question
    answers: list[list[int]]
    rewards: list[float]


@dataclass
class Sampler:
    """Samples answers with the model in training, and computes rewards and batches.

    reference: the model before training, for the KL penalty.
    """

    network: Llava
    samples: Samples
    recipe: Recipe
    config: GRPOConfig
    out: Path
    reference: Llava | None = None

    def __post_init__(self) -> None:
        self.rewards = load_rewards(self.config.rewards)

    def __call__(self, start: Position) -> Iterator[tuple[Rollouts, Position]]:
        """The loop's data: every step's batches from a position on, each with the position after
        its step: the number of the next question, and how often its answers were trained on."""
        window, done = start.window, start.batch
        while True:
            batches, after = self._stored(window) if done else self._sampled(window)
            while done < self.config.iterations:
                done += 1
                last = done == self.config.iterations
                position = Position(after, 0) if last else Position(window, done)
                for batch in batches:
                    yield batch, position
            window, done = after, 0

    def question(self, sample: PackedSample) -> Question:
        """Raises DataError for a sample that cannot be read."""
        row = sample.rows[0]
        messages, media = row.messages()
        prompt = self.samples.form.question(formats.processor(self.samples.model), messages, media)
        asked = messages[-2]["content"] if len(messages) > 1 else ""
        text = asked if isinstance(asked, str) else "".join(p.get("text", "") for p in asked)
        return Question(prompt, text, row.sample)

    def reward(self, question: Question, answer: str) -> float:
        """The weighted sum of all rewards. Raises DataError as `call_reward`."""
        total, config = 0.0, self.config
        weights = config.reward_weights or (1.0,) * len(self.rewards)
        for name, function, weight in zip(config.rewards, self.rewards, weights, strict=True):
            work = partial(function, question.text, answer, question.sample)
            try:
                total += weight * call_reward(work, config.reward_seconds)
            except DataError as error:
                raise DataError(f"the reward {name} of {answer[:60]!r} {error}") from error
        if not math.isfinite(total):
            raise DataError(f"the sum of the rewards of {answer[:60]!r} is {total}, not a number")
        return total

    def answers(
        self, questions: Sequence[Question], seeds: Sequence[int] | None
    ) -> list[list[tuple[list[int], str]]]:
        """Answers to each question, as tokens and texts: sampled, one for each of the seeds, or
        without seeds one that is the most likely token at each place."""
        tokenizer = formats.processor(self.samples.model).tokenizer
        network, text = self.network, self.network.config.text
        sampled = [
            SamplingParams(
                max_new_tokens=self.config.max_new_tokens,
                temperature=0.0 if seeds is None else self.config.temperature,
                seed=None if seeds is None else seed,
            )
            for seed in seeds or (0,)
        ]
        longest = sum(len(q.prompt) + self.config.max_new_tokens for q in questions) * len(sampled)
        network.eval()
        engine = Engine(
            network,
            eos_ids=tokenizer.eos_ids,
            vocab=tokenizer.size,
            kv_bytes=longest * bytes_per_token(text, network.language_model.norm.weight.dtype),
            kv_block_size=0,
        )
        prompts = [q.prompt for q in questions for _ in sampled]
        requests = engine.generate(
            prompts,
            [
                replace(one, seed=None if one.seed is None else one.seed + 1000 * number)
                for number in range(len(questions))
                for one in sampled
            ],
        )
        network.train()
        found = [
            (list(request.generated), tokenizer.decode(request.generated).strip())
            for request in requests
        ]
        size = len(sampled)
        return [found[first : first + size] for first in range(0, len(found), size)]

    def _sampled(self, window: int) -> tuple[list[Rollouts], int]:
        """The batches of a step from question number `window` on, and the number of the next."""
        config, each = self.config, self.recipe.grad_accum_steps
        groups: list[Group] = []
        number, most = window, window + MAX_DRAWS * config.questions
        while len(groups) < config.questions:
            if number >= most:
                raise DataError(
                    f"of {number - window} questions only {len(groups)} have answers with "
                    f"different rewards, and a step needs {config.questions}: take others, a "
                    "higher temperature, or dynamic_sampling false"
                )
            # Several at once: the engine takes little longer for them than for one.
            more = max(config.questions - len(groups), config.questions // 2)
            wanted = range(number, number + more)
            questions = [self.question(self.samples.sample(i)) for i in wanted]
            seeds = [
                Random(f"{self.recipe.seed}/{number}/{i}").getrandbits(31)
                for i in range(config.group_size)
            ]
            for at, question, sampled in zip(
                wanted, questions, self.answers(questions, seeds), strict=True
            ):
                rewards = [self.reward(question, text) for _, text in sampled]
                enough = len(groups) == config.questions
                if not enough and (not config.dynamic_sampling or max(rewards) > min(rewards)):
                    groups.append(Group(at, question, [tokens for tokens, _ in sampled], rewards))
            number = wanted.stop
        batches = [pack_groups(groups[i::each], config) for i in range(each)]
        if config.iterations > 1:
            batches = [replace(batch, old=self._logprobs(self.network, batch)) for batch in batches]
            facts = {
                "after": number,
                "groups": [[group.number, group.answers, group.rewards] for group in groups],
                "old": [batch.old.tolist() for batch in batches if batch.old is not None],
            }
            folder = self.out / STORED
            folder.mkdir(exist_ok=True)
            draft = folder / "new"
            draft.write_text(json.dumps(facts))
            draft.replace(folder / f"{window}.json")
            # As many as a resumed run may need.
            kept = (self.recipe.save_every // config.iterations + 2) * self.recipe.keep
            for old in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))[:-kept]:
                old.unlink()
        return self._with_reference(batches), number

    def _stored(self, window: int) -> tuple[list[Rollouts], int]:
        """The batches of a step that was saved between two of its iterations."""
        try:
            facts = json.loads((self.out / STORED / f"{window}.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"answers of the last step cannot be read: {error}") from error
        groups = [
            Group(number, self.question(self.samples.sample(number)), answers, rewards)
            for number, answers, rewards in facts["groups"]
        ]
        each = self.recipe.grad_accum_steps
        batches = [
            replace(pack_groups(groups[i::each], self.config), old=torch.tensor(old))
            for i, old in enumerate(facts["old"])
        ]
        return self._with_reference(batches), facts["after"]

    def _with_reference(self, batches: list[Rollouts]) -> list[Rollouts]:
        if (model := self.reference) is None:
            return batches
        return [replace(batch, reference=self._logprobs(model, batch)) for batch in batches]

    @torch.no_grad()
    def _logprobs(self, network: Llava, batch: Rollouts) -> Tensor:
        with autocast(network.lm_head.weight.device, self.recipe.bfloat16):
            values, _ = token_logprobs(network, batch, batch.media, self.config.temperature)
        return values.cpu()

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[PackedSample]) -> dict[str, float]:
        """The mean reward of the most likely answers; `loss` is less for more of it."""
        total = 0.0
        for first in range(0, len(held_out), EVALUATED):
            questions = [self.question(sample) for sample in held_out[first : first + EVALUATED]]
            for question, ((_, text),) in zip(
                questions, self.answers(questions, None), strict=True
            ):
                total += self.reward(question, text)
        mean = total / len(held_out)
        return {"loss": -mean, "reward": mean}


def pack_groups(groups: Sequence[Group], config: GRPOConfig) -> Rollouts:
    """Pack the answers to some questions."""
    prompts: list[Prompt] = []
    media: list[tuple[tuple[int, ...], ImageTokenLayout]] = []
    begin = 0
    for group in groups:
        prompt, starts = group.question.prompt, []
        for tokens in group.answers:
            mask = [False] * len(prompt) + [True] * len(tokens)
            prompts.append(Prompt([*prompt.tokens, *tokens], (), mask))
            starts.append(begin)
            begin += len(mask)
        media += [(tuple(start + m.start for start in starts), m.layout) for m in prompt.media]
    packed = collate(prompts)
    pixels = [m.pixels for group in groups for m in group.question.prompt.media]
    rewards = torch.tensor([group.rewards for group in groups])
    return Rollouts(
        packed.tokens,
        packed.loss_mask,
        packed.lengths,
        torch.cat(pixels) if pixels else packed.pixels,
        media,
        advantages(rewards, scale=config.scale_rewards).flatten(),
        rewards.flatten(),
    )
