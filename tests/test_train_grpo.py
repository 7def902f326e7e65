"""GRPO is a plain re-implementation of its equations, and a run of it resumes bit for bit."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from llava_interleave import checkpoints
from llava_interleave.cli import app
from llava_interleave.config import LoraConfig
from llava_interleave.errors import DataError, OptionError
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train import grpo
from llava_interleave.train.data import datasets, formats
from llava_interleave.train.grpo import (
    Group,
    Question,
    Sampler,
    call_reward,
    grpo_loss,
    pack_groups,
)
from llava_interleave.train.losses import token_logprobs
from llava_interleave.train.recipe import GRPOConfig, Recipe
from llava_interleave.train.run import run
from tests.helpers.training import killed_before

pytestmark = pytest.mark.slow
HERE = "tests.test_train_grpo:"
TEMPERATURE = 20.0
"""Random weights are sure of their answers."""


def vowels(prompt: str, answer: str, sample: Mapping[str, Any]) -> float:
    """Something that random weights differ in, of all three arguments."""
    return sum(answer.count(letter) for letter in "aeiou") + len(prompt) + len(sample["id"])


def wrong(_: str, __: str, ___: Mapping[str, Any]) -> float:
    return float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(8):
        names = [f"{number}-{i}.png" for i in range(number % 3)]
        for name in names:
            Image.frombytes("RGB", (50, 40), Random(name).randbytes(6000)).save(place / name)
        question = "<image>\n" * len(names) + f"What is number {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Noise."}]
        rows.append({"id": f"s{number}", "image": names, "conversations": turns})
    (place / "some.json").write_text(json.dumps(rows))
    return place / "some.json"


def plain_logprobs(model: Llava, prompt: Prompt, answer: Sequence[int]) -> Tensor:
    """Log-probabilities of an answer's tokens, of one sequence alone."""
    tokens = torch.tensor([*prompt.tokens, *answer])
    spans = [
        (media.start, model.arrange(model.encode(media.pixels), media.layout))
        for media in prompt.media
    ]
    hidden = model(
        model.embed(tokens, spans), torch.arange(len(tokens)), PackedAttention([len(tokens)])
    )
    first = len(prompt.tokens)
    table = (model.logits(hidden)[first - 1 : -1].float() / TEMPERATURE).log_softmax(-1)
    return table[torch.arange(len(answer)), tokens[first:]]


def plain_loss(
    policy: Llava, old: Llava | None, reference: Llava | None, groups: Sequence[Group],
    config: GRPOConfig,
) -> Tensor:  # fmt: skip
    """Equation 3 of arXiv 2402.03300, answer by answer and token by token, divided as asked."""
    answers, tokens, total = 0, 0, torch.zeros(())
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        squares = [(reward - mean) ** 2 for reward in group.rewards]
        deviation = (sum(squares) / (len(squares) - 1)) ** 0.5
        for answer, reward in zip(group.answers, group.rewards, strict=True):
            advantage = reward - mean
            if config.scale_rewards:
                advantage /= deviation + 1e-4
            now = plain_logprobs(policy, group.question.prompt, answer)
            with torch.no_grad():
                before = plain_logprobs(old, group.question.prompt, answer) if old else now.detach()
                if reference:
                    first = plain_logprobs(reference, group.question.prompt, answer)
            summed = torch.zeros(())
            for t in range(len(answer)):
                ratio = torch.exp(now[t] - before[t])
                low, high = 1 - config.clip_low, 1 + config.clip_high
                clipped = min(max(ratio, torch.tensor(low)), torch.tensor(high))
                gain = torch.min(ratio * advantage, clipped * advantage)
                if reference:
                    quotient = torch.exp(first[t] - now[t])
                    gain = gain - config.beta * (quotient - torch.log(quotient) - 1)
                summed = summed - gain
            answers, tokens = answers + 1, tokens + len(answer)
            per = {"grpo": len(answer), "dapo": 1, "dr_grpo": config.max_new_tokens}
            total = total + summed / per[config.loss_type]
    return total / (tokens if config.loss_type == "dapo" else answers)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("apart", [False, True])
def test_loss_and_gradients_are_those_of_the_equations(
    loss_type: str, apart: bool, folder: Path, source: Path
) -> None:
    """apart: another policy has sampled the answers (some ratios are clipped), with a KL penalty."""
    config = GRPOConfig(
        rewards=("a:b",), loss_type=loss_type, beta=0.3 if apart else 0.0, max_new_tokens=9,
        temperature=TEMPERATURE, clip_low=0.01, clip_high=0.015, scale_rewards=loss_type != "dr_grpo",
    )  # fmt: skip
    random, processor, groups = Random(4), formats.processor(folder), []
    for number, row in enumerate(datasets.rows(source)[:4]):
        messages, media = row.messages()
        prompt = processor.prompt(messages[:-1], media)
        answers = [[random.randrange(200) for _ in range(random.randint(1, 9))] for _ in range(3)]
        rewards = [random.random() for _ in range(3)]
        groups.append(Group(number, Question(prompt, "", {}), answers, rewards))
    policy, old, reference = (checkpoints.load(folder).requires_grad_(True) for _ in range(3))
    if apart:
        torch.manual_seed(1)
        for model in (old, reference):
            for p in model.parameters():
                p.data += 0.02 * p.data.std() * torch.randn_like(p)
    batch = pack_groups(groups, config)
    if apart:
        with torch.no_grad():
            batch = replace(
                batch,
                old=token_logprobs(old, batch, batch.media, TEMPERATURE)[0],
                reference=token_logprobs(reference, batch, batch.media, TEMPERATURE)[0],
            )
    part = grpo_loss(config, policy, batch)
    (part.total / part.count).backward()
    gradients = {
        name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None
    }
    policy.zero_grad()
    loss = plain_loss(policy, old if apart else None, reference if apart else None, groups, config)
    loss.backward()
    torch.testing.assert_close(part.total / part.count, loss, rtol=1e-4, atol=1e-6)
    for name, p in policy.named_parameters():
        assert p.grad is not None
        worst = float((p.grad - gradients[name]).abs().max())
        assert worst <= 1e-3 * float(p.grad.abs().max()) + 1e-7, name
    clipped = part.extra["clipped"] / part.count
    assert 0.05 < clipped < 0.95 if apart else clipped == 0


def recipe(folder: Path, source: Path, **more: Any) -> Recipe:
    config = GRPOConfig(
        rewards=(HERE + "vowels",),
        questions=2,
        group_size=4,
        max_new_tokens=6,
        iterations=2,
        temperature=TEMPERATURE,
    )
    given = {
        "model": str(folder), "source": source, "steps": 6, "lr": 1e-3, "save_every": 3, "keep": 9,
        "log_every": 1, "grpo": config, "warmup_ratio": 0.0, "grad_accum_steps": 2,
    }  # fmt: skip
    return Recipe(**{**given, **more})


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda: {}["colour"], r"raised KeyError: 'colour' \(.*test_train_grpo.py, line \d+\)"),
        (lambda: sys.exit(3), "raised SystemExit: 3"),
        (lambda: time.sleep(60), r"took longer than 0.1 s \(reward_seconds\)"),
        (lambda: None, "is a NoneType, not a number"),
        (lambda: 10**400, "is a int, not a number: int too large"),
        (lambda: torch.ones(2), "is a Tensor, not a number"),
        (lambda: "1", "is '1', not a number"),
        (lambda: -math.inf, "is -inf, not a number"),
    ],
)
def test_a_reward_that_fails_ends_the_run(work: Callable[[], Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        call_reward(work, 0.1)
    assert [call_reward(lambda value=value: value, 9) for value in (True, np.float32(2))] == [1, 2]


def test_a_run_that_is_killed_between_two_iterations_resumes_bit_for_bit(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    given = recipe(folder, source, adapter=LoraConfig(rank=4, dropout=0.0), held_out=0.25)
    whole = run(given, tmp_path / "whole", log=lambda _: None)
    with killed_before(4):
        run(given, tmp_path / "killed", log=lambda _: None)
    resumed = run(given, tmp_path / "killed", log=lambda _: None)
    file = "adapter_model.safetensors"
    assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").open()]
    assert all(line["reward"] > 20 for line in lines if "loss" in line)
    assert {*lines[0]["held_out"]} == {"loss", "reward"}


def test_what_cannot_be_rewarded_is_refused(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        OptionError, match=r"'tests\.test_train_grpo:none', which is not a function"
    ):
        grpo.load_rewards([HERE + "none"])
    with pytest.raises(OptionError, match=r"HERE', which is not a function .* it is a str"):
        grpo.load_rewards([HERE + "HERE"])
    (tmp_path / "broken_reward.py").write_text("1 / 0")
    with pytest.raises(OptionError, match=r"ZeroDivisionError.*broken_reward.py, line 1"):
        grpo.load_rewards(["broken_reward:any"])
    with pytest.raises(OptionError, match="reward_weights must be numbers"):
        GRPOConfig(rewards=("a:b",), reward_weights=(math.nan,))
    with pytest.raises(OptionError, match="group_size must be at least 2"):
        GRPOConfig(rewards=("a:b",), group_size=1)
    with pytest.raises(OptionError, match="2 questions cannot be 3 batches"):
        recipe(folder, source, grad_accum_steps=3)
    given = recipe(folder, source)
    assert given.grpo
    nan = given.but({"grpo.rewards": (HERE + "wrong",)})
    with pytest.raises(DataError, match=r"the reward .*:wrong of .* is nan, not a number"):
        run(nan, tmp_path / "nan", log=lambda _: None)


def test_questions_whose_answers_have_one_reward_are_replaced(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every second question all answers are alike; without dynamic sampling they stay."""
    given = recipe(folder, source, grad_accum_steps=1)
    assert given.grpo

    class Listed:
        def sample(self, index: int) -> int:
            return index

    def sampler(config: GRPOConfig) -> Sampler:
        made = Sampler(None, Listed(), given, config, Path())  # type: ignore[arg-type]
        prompt = Prompt([1, 2])
        monkeypatch.setattr(made, "question", lambda n: Question(prompt, str(n), {"id": ""}))
        monkeypatch.setattr(
            made, "answers", lambda prompts, seeds: [
                [([3], "a" * (int(q.text) % 2 * i)) for i, _ in enumerate(seeds)] for q in prompts
            ],
        )  # fmt: skip
        return made

    config = replace(given.grpo, iterations=1)
    (batch,), after = sampler(config)._sampled(0)
    assert after == 4 and batch.rewards.view(2, 4)[:, -1].tolist() == [4.0, 4.0]
    (batch,), after = sampler(replace(config, dynamic_sampling=False))._sampled(0)
    assert after == 2 and batch.advantages.view(2, 4)[0].tolist() == [0.0] * 4


def test_the_walk_through_of_the_world_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented commands, with a few questions and one step."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "training.md").read_text("utf-8")
    (block,) = re.findall(
        r"^\$ (python -m recipes\.tiny_world\.rewards .*?)^```", page, re.M | re.S
    )
    write, train, measure = (line.lstrip("$ ") for line in block.replace("\\\n", "").splitlines())
    monkeypatch.chdir(root)
    words = shlex.split(
        write.replace("-n 1600", "-n 6").replace(" views ", f" {tmp_path}/views ", 1)
    )
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    changes = {"steps": 1, "held-out": 0.5, "grpo-questions": 1, "grpo-group-size": 2}
    more = [word for name in changes for word in (f"--{name}", str(changes[name]))]
    words = shlex.split(
        train.replace("views/", f"{tmp_path}/views/").replace("-o ", f"-o {tmp_path}/")
    )
    done = CliRunner().invoke(app, [*words[1:], *more, "--no-grpo-dynamic-sampling"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "step 1 of 1" in done.output
    words = shlex.split(measure.replace("-m ", f"-m {tmp_path}/").replace("=1200", "=1"))
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, (done.output, done.exception)
