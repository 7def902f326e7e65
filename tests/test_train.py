"""Training: packed equals unpacked, resumed equals uninterrupted, answers alone carry loss, nothing
is cut or dropped.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from llava_interleave import checkpoints
from llava_interleave.cli import app
from llava_interleave.errors import DataError
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.processing import Processor
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train import loop, losses, recipe, report
from llava_interleave.train.data import formats
from llava_interleave.train.data.packing import (
    Batch,
    Position,
    collate,
    pack,
    prefetch,
)
from llava_interleave.train.data.samples import SampleFormat
from llava_interleave.train.loop import parameter_groups, train
from llava_interleave.train.losses import Loss, sft_loss
from llava_interleave.train.recipe import Recipe
from llava_interleave.train.run import run
from recipes.tiny_world import (
    SCENARIOS,
    episode,
    feature_distillation,
    lessons,
    patch_pretraining,
    training,
)
from recipes.tiny_world.data import conversation, render, talk, write
from recipes.tiny_world.episodes import FRAMES
from recipes.tiny_world.packing import PackedDataset, batches, train_reported
from tests.helpers.training import PackedBatches

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(folder: Path) -> Llava:
    return checkpoints.load(folder).requires_grad_(True)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[Prompt]:
    """Samples with one image, several, a video and views."""
    processor = Processor.from_folder(folder)
    made = []
    for index in range(8):
        rng = Random(index)
        ep = episode(SCENARIOS[index % 4], rng)
        turns, shown = conversation(ep, talk(ep, rng, questions=2, caption=0.5)), render(ep, 30)
        said, media = formats.messages(
            {"conversations": turns, **({"video": shown} if ep.clip else {"image": shown})}, Path()
        )
        made.append(processor.example(said, media))
    return made


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_and_unpacked_gradients_are_equal(model: Llava, prompts: list[Prompt]) -> None:
    whole = sft_loss(model, collate(prompts))
    whole.total.backward()
    packed = gradients(model)
    model.zero_grad()
    parts = [sft_loss(model, collate([prompt])) for prompt in prompts]
    sum((part.total for part in parts), torch.zeros(())).backward()
    assert whole.count == sum(part.count for part in parts)
    assert whole.correct == sum(part.correct for part in parts)
    alone = gradients(model)
    assert alone.keys() == packed.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for name, gradient in alone.items():  # that of a key's bias is 0 but for rounding
        torch.testing.assert_close(
            packed[name],
            gradient,
            rtol=1e-3,
            atol=1e-6 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("chunk", [7, 2048])
def test_gradients_of_a_tied_embedding_equal_those_of_plain_autograd(
    chunk: int, model: Llava, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss adds the embedding's rows to the gradient of the head itself, also when gradients
    are accumulated, and computes logits of all chunks but the last twice."""
    batch, steps = collate(prompts[:1]), 2
    monkeypatch.setattr(losses, "CHUNK", chunk)
    for _ in range(steps):
        sft_loss(model, batch).total.backward()
    found = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(losses, "_embedding", lambda _: None)
    where = batch.loss_mask.nonzero()[:, 0]
    hidden, tokens = losses._hidden(
        model,
        batch.tokens,
        losses._spans(model, batch.pixels, losses._single(batch)),
        batch.lengths,
    )
    plain = cross_entropy(model.logits(hidden[where - 1]), tokens[where], reduction="sum")
    (plain * steps).backward()
    assert found.keys() == gradients(model).keys()
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_gradient_norm_of_a_large_matrix_is_exact() -> None:
    """By PyTorch alone that of thirty million numbers is 0.2 % too small on a CPU."""
    gradient = torch.randn(30_000, 1024)
    found = torch.nn.utils.get_total_norm([loop._norms(gradient), loop._norms(gradient[0])])
    exact = (gradient.double().square().sum() + gradient[0].double().square().sum()).sqrt()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_a_step_frees_is_there_for_the_next_one() -> None:
    """Without pages that the system zeroes anew, which took a tenth of a step."""
    code = """
import resource, torch
from llava_interleave.train.loop import keeping_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
outside = [faults() for _ in range(20)]
with keeping_freed_memory(torch.device("cpu")):
    inside = [faults() for _ in range(20)]
print(sum(inside[10:]) < 20000 and sum(outside[10:]) > 150000, inside, outside)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stdout


def test_denormal_numbers_are_zero_in_every_thread_of_a_run() -> None:
    """A tenth of the time of a step went into products with the gradients of unlikely tokens."""
    code = """
import torch
from llava_interleave.train.loop import flushing_denormals
torch.set_num_threads(2)
with flushing_denormals():
    inside = (torch.full((1 << 22,), 1e-30) * 1e-10).count_nonzero()
print(int(inside), (torch.full((4,), 1e-30) * 1e-10).count_nonzero().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0 4\n", done.stdout


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_weights_of_samples_and_answers_multiply_their_losses(
    template: str, model: Llava, folder: Path
) -> None:
    """The sum of weight times loss, and of weights, of samples computed alone."""
    processor, form = Processor.from_folder(folder), SampleFormat(template)

    def prompt(weights: list[float], whole: float) -> Prompt:
        turns = []
        for number, weight in enumerate(weights):
            turns += [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": f"Answer {number}.", "weight": weight},
            ]
        messages, media = formats.messages({"messages": turns, "weight": whole}, Path())
        return form.example(processor, messages, media)

    given = [([0.5, 3.0], 2.0), ([1.0, 0.0], 0.25)] if template == "chat" else [([0.5], 3.0)]
    sums = torch.zeros(3)
    for weights, whole in given:
        for number, weight in enumerate(weights):
            only = [float(number == other) for other in range(len(weights))]
            alone = sft_loss(model, collate([prompt(only, 1.0)]))
            sums += weight * whole * torch.tensor([float(alone.total), alone.count, alone.correct])
    found = sft_loss(model, collate([prompt(*one) for one in given]))
    torch.testing.assert_close(torch.tensor([float(found.total), found.count, found.correct]), sums)


def test_packed_attention_is_causal_attention_of_each_sequence() -> None:
    lengths = [5, 1, 17, 16, 3, 40]
    q, k, v = torch.randn(82, 4, 8), torch.randn(82, 2, 8), torch.randn(82, 2, 8)
    out = PackedAttention(lengths)(0, q, k, v)
    for i, (q1, k1, v1) in enumerate(
        zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ):
        scores = torch.einsum("thd,shd->hts", q1, k1.repeat_interleave(2, 1)) / 8**0.5
        scores = scores.masked_fill(
            torch.ones(lengths[i], lengths[i]).triu(1).bool(), float("-inf")
        )
        want = torch.einsum("hts,shd->thd", scores.softmax(-1), v1.repeat_interleave(2, 1))
        torch.testing.assert_close(out.split(lengths)[i], want, rtol=1e-4, atol=1e-5)


def test_only_answers_carry_loss(model: Llava, prompts: list[Prompt], folder: Path) -> None:
    prompt = prompts[0]
    assert prompt.loss_mask is not None
    tokenizer = Processor.from_folder(folder).tokenizer
    learnt = tokenizer.decode(
        [t for t, flag in zip(prompt.tokens, prompt.loss_mask, strict=True) if flag],
        skip_special=False,
    )
    assert learnt.count("<|im_end|>") == learnt.rstrip().count("<|im_end|>") >= 1
    assert "<|im_start|>" not in learnt
    batch = collate([prompt])
    features = [(prompt.media[0].start, model.encode(prompt.media[0].pixels).flatten(0, 1))]
    logits = model.logits(
        model(model.embed(batch.tokens, features), batch.positions, PackedAttention(batch.lengths))
    )
    rows = batch.loss_mask.nonzero()[:, 0]
    want = cross_entropy(logits[rows - 1], batch.tokens[rows], reduction="sum")
    torch.testing.assert_close(sft_loss(model, batch).total, want)


def test_packing_fills_batches_and_keeps_every_sample() -> None:
    rng = Random(0)
    lengths = [rng.choice([1, 2, 2, 4, 8, 10]) * 729 + rng.randint(40, 400) for _ in range(2000)]
    groups_ = pack(lengths, 32768)
    assert sorted(i for group in groups_ for i in group) == list(range(2000))
    filled = [sum(lengths[i] for i in group) for group in groups_]
    assert max(filled) <= 32768
    assert sum(lengths) / (32768 * len(groups_)) > 0.95
    with pytest.raises(DataError, match="sample 1 has 9 tokens, more than the 8"):
        pack([3, 9], 8)


class Struck:
    """Items for a worker that gets both signals while it starts."""

    def __setstate__(self, _: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    def __getstate__(self) -> int:
        return 1

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return index


def test_signals_leave_workers_alone() -> None:
    """A second worker imports PyTorch while the first one's batches are trained on; signals to a
    whole group killed it there.
    """
    assert list(prefetch(Struck(), iter([0, 2, 1]), 1)) == [0, 2, 1]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


class Large:
    """Items that a worker takes long to send."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, _: int) -> torch.Tensor:
        return torch.zeros(60_000_000)


def test_a_worker_that_still_sends_ends_in_order() -> None:
    """Some runs that were stopped said "terminate called without an active exception" at the end,
    with a traceback of PyTorch's: the worker's interpreter was gone when the thread that sends came
    back from copying a tensor.
    """
    made: Any = prefetch(Large(), None, 1)
    next(made)
    (worker,) = made._workers
    made._shutdown_workers()
    worker.join()
    assert worker.exitcode == 0


class Numbers:
    """Examples whose tokens tell which they are."""

    def __call__(self, index: int) -> Prompt:
        return Prompt([1, index], loss_mask=[False, True])


def test_batches_go_on_at_any_position_and_do_not_depend_on_workers() -> None:
    windows = PackedDataset(Numbers(), 50, size=16, tokens=10, seed=3, collate=collate)
    whole = [(batch.tokens.tolist(), at) for batch, at in batches(windows, Position(), workers=0)]
    assert sorted(t for tokens, _ in whole for t in tokens[1::2]) == list(range(50))
    for cut in (0, 2, 3, 4, len(whole) - 1):
        rest = [
            (batch.tokens.tolist(), at) for batch, at in batches(windows, whole[cut][1], workers=0)
        ]
        assert rest == whole[cut + 1 :]
    assert [(b.tokens.tolist(), at) for b, at in batches(windows, Position(), workers=1)] == whole


RECIPE = Recipe(
    steps=8,
    lr=1e-3,
    warmup_ratio=0.25,
    min_lr_ratio=0.02,
    tower_lr_scale=1.0,
    weight_decay=0.05,
    beta2=0.98,
    grad_accum_steps=2,
    save_every=3,
    log_every=1,
)


@pytest.mark.parametrize("muon", [0.0, 2.0])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    folder: Path, prompts: list[Prompt], tmp_path: Path, muon: float
) -> None:
    """Killed after step 5, whose last checkpoint is of step 3."""
    data = PackedBatches(prompts, tokens=800, each=2)

    class Killed(Exception):
        pass

    def run(out: Path, kill: int | None = None) -> Llava:
        network = checkpoints.load(folder).requires_grad_(True)
        steps = 0

        def loss(model: Llava, batch: Batch) -> Loss:
            nonlocal steps
            steps += 1
            if kill is not None and steps > kill:
                raise Killed
            return sft_loss(model, batch)

        return train(
            network,
            loss,
            data,
            config,
            out,
            log=lambda _: None,
        )

    config = replace(RECIPE, muon_lr_scale=muon)
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=10)
    resumed = run(tmp_path / "killed")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    lines = [
        json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 9))  # 4 and 5 were done twice
    with pytest.raises(DataError, match=r"other settings \(lr: 0.001 there, 0.002 here\)"):
        train(
            whole,
            sft_loss,
            data,
            replace(config, lr=2e-3),
            tmp_path / "whole",
        )


def test_frozen_parts_stay_bit_equal(model: Llava, prompts: list[Prompt], tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = PackedBatches(prompts, tokens=800, each=2)
    config = replace(RECIPE, steps=2, tower_lr_scale=0.0, projector_lr_scale=0.5)
    train(
        model,
        sft_loss,
        data,
        config,
        tmp_path,
        log=lambda _: None,
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("vision_tower."), name


def test_matrices_decay_and_vectors_do_not(model: Llava) -> None:
    for group in parameter_groups(model, RECIPE)[0]:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_steps_the_matrices_but_no_embedding(model: Llava) -> None:
    """Every parameter has exactly one optimiser."""
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = (
        [names[id(p)] for g in some for p in g["params"]]
        for some in parameter_groups(model, replace(RECIPE, muon_lr_scale=2.0))
    )
    assert sorted(adamw + muon) == sorted(names.values())
    assert "language_model.layers.0.mlp.down_proj.weight" in muon
    assert "language_model.embed_tokens.weight" in adamw
    assert "vision_tower.embeddings.position_embedding.weight" in adamw
    assert not any(name.endswith(("norm.weight", "bias")) for name in muon)
    assert {
        g["lr_scale"] for g in parameter_groups(model, replace(RECIPE, muon_lr_scale=2.0))[1]
    } == {2.0}


def poisoned(model: Llava, kind: str) -> Llava:
    """Its gradients of one matrix are not numbers, though the loss may be one."""
    if kind == "gradient":
        weight = model.language_model.layers[0].mlp.down_proj.weight
        weight.register_hook(lambda gradient: gradient * float("inf"))
    return model


def unchanged(model: Llava, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("loss", "the loss is nan at step 0: lower"),
        ("gradient", r"the gradient norm is (nan|inf) at"),
    ],
)
def test_a_step_that_is_not_finite_stops_before_the_weights_change(
    kind: str, error: str, model: Llava, prompts: list[Prompt], tmp_path: Path
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(model: Llava, batch: Batch) -> Loss:
        part = sft_loss(model, batch)
        return replace(part, total=part.total * float("nan")) if kind == "loss" else part

    data = PackedBatches(prompts, tokens=800, each=2)
    with pytest.raises(DataError, match=error):
        train(poisoned(model, kind), loss, data, RECIPE, tmp_path, log=lambda _: None)
    assert unchanged(model, before)
    assert not list(tmp_path.glob("checkpoint*"))


def test_as_many_steps_are_skipped_as_was_allowed(
    model: Llava, prompts: list[Prompt], tmp_path: Path
) -> None:
    """Steps 3 and 4 change nothing, the log stays JSON, and three in a row end the run."""
    number, bad = 0, {4, 5, 6, 7}
    seen: list[dict[str, torch.Tensor]] = []

    def loss(model: Llava, batch: Batch) -> Loss:
        nonlocal number
        if number % 2 == 0:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        part = sft_loss(model, batch)
        number += 1
        return replace(part, total=part.total * float("nan")) if number - 1 in bad else part

    data, recipe = PackedBatches(prompts, tokens=800, each=2), replace(RECIPE, warmup_ratio=0.0)
    skipping = replace(recipe, max_skipped_steps=2)
    train(model, loss, data, skipping, tmp_path / "two", log=lambda _: None)
    assert [unchanged(model, seen[-1])] + [
        all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(seen)
    ] == [False, False, False, True, True, False, False, False]

    def no_constant(text: str) -> None:
        raise AssertionError(text)

    text = (tmp_path / "two" / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 2, 0, 0, 0, 0]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, *[False] * 4]
    (tmp_path / "two" / "config.toml").write_text(skipping.toml())
    report.write(tmp_path / "two", tmp_path / "page.html")
    number, bad = 0, {4, 5, 6, 7, 8}
    with pytest.raises(DataError, match=r"the loss is nan at step 4, the 3. in a row: lower"):
        train(model, loss, data, skipping, tmp_path / "three", log=lambda _: None)


def test_weights_that_overflow_are_not_saved(
    model: Llava, prompts: list[Prompt], tmp_path: Path
) -> None:
    """A gradient may be finite and the step not; the checkpoint before it stays."""
    number = 0

    def loss(model: Llava, batch: Batch) -> Loss:
        nonlocal number
        number += 1
        if number == 10:  # the second batch of step 5
            with torch.no_grad():
                model.language_model.norm.weight.fill_(float("inf"))
            part = sft_loss(model, batch)
            return replace(part, total=part.total.detach() * 0 + sum_of(model) * 0)
        return sft_loss(model, batch)

    def sum_of(model: Llava) -> torch.Tensor:
        return model.multi_modal_projector.linear_1.bias.sum()

    data = PackedBatches(prompts, tokens=800, each=2)
    recipe = replace(RECIPE, save_every=1, max_skipped_steps=9)
    with pytest.raises(DataError, match=r"weights are NaN or infinite after step 5.*not saved"):
        train(model, loss, data, recipe, tmp_path, log=lambda _: None)
    names = {path.name for path in tmp_path.glob("checkpoint*")}
    assert names == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        ({}, "sample without id has no `conversations`"),
        (
            {"id": 7, "conversations": [{"from": "human", "value": "<image> hi"}]},
            "sample 7 ends with a question",
        ),
        (
            {"id": 7, "conversations": [{"from": "cat", "value": "hi"}]},
            "turn 1 of sample 7 must have a role",
        ),
        (
            {"id": 7, "conversations": [{"from": "gpt", "value": " "}]},
            "turn 1 of sample 7 must have a role",
        ),
        (
            {"id": 7, "image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]},
            "sample 7 has 0 `<image>` but 1 image",
        ),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_by_its_id(
    sample: dict[str, object], error: str
) -> None:
    with pytest.raises(DataError, match=error):
        formats.messages(sample, Path())


def test_a_file_that_is_no_list_of_samples_is_refused(tmp_path: Path) -> None:
    for text in ('[{"a": 1},]', "{}", "[]", "[1]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError):
            list(formats.read(tmp_path / "a.json"))
    with pytest.raises(DataError, match="cannot be read"):
        list(formats.read(tmp_path / "none.json"))


def test_fine_tuning_a_checkpoint_learns_its_samples(folder: Path, tmp_path: Path) -> None:
    """`llava train` on eight samples: the loss falls, the result is a checkpoint, a second call
    finds it finished.
    """
    annotations = write(tmp_path / "data", 8, size=30)
    words = [
        "train",
        str(annotations),
        "-o",
        str(tmp_path / "out"),
        "-m",
        str(folder),
        "--steps",
        "6",
        "--lr",
        "0.003",
    ]
    result = CliRunner().invoke(app, [*words, "--warmup-ratio", "0", "--tokens", "2048"])
    assert result.exit_code == 0, (result.output, result.exception)
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    tuned = checkpoints.load(tmp_path / "out" / "model")
    assert not torch.equal(tuned.lm_head.weight, checkpoints.load(folder).lm_head.weight)
    stored = recipe.read(tmp_path / "out" / "config.toml")
    assert run(stored.but({"workers": 0}), tmp_path / "out") == tmp_path / "out" / "model"
    with pytest.raises(DataError, match=r"with other settings \(lr: 0.003 there, 0.004 here\)"):
        run(stored.but({"lr": 0.004}), tmp_path / "out")


def test_a_missing_image_is_named_with_its_sample(folder: Path, tmp_path: Path) -> None:
    annotations = write(tmp_path / "data", 1, size=30)
    next((tmp_path / "data").glob("*.png")).unlink()
    with pytest.raises(DataError, match=r"sample single-00000: .*single-00000-1\.png"):
        run(Recipe(model=str(folder), source=annotations, steps=1), tmp_path / "out")


@pytest.fixture
def naming(tmp_path: Path) -> tuple[Llava, patch_pretraining.PatchNamingLoss]:
    config, source = training.prepare(tmp_path / "recipe", texts=40)
    network = Llava(config)
    training.initialize(network, 0)
    return network, patch_pretraining.PatchNamingLoss(formats.processor(source).tokenizer)


def test_tower_and_projector_learn_to_name_what_they_see(
    naming: tuple[Llava, patch_pretraining.PatchNamingLoss], tmp_path: Path
) -> None:
    network, loss = naming
    batch, _ = next(patch_pretraining.batches(lessons.VISION, 1, 1, Position()))
    first = loss(network, batch)
    config = replace(training.SEE, steps=12, lr=1e-3, warmup_ratio=2 / 12, muon_lr_scale=0.0)
    words = network.language_model.embed_tokens.weight.detach().clone()

    def same(at: Position):  # type: ignore[no-untyped-def]
        while True:
            yield batch, at

    train(network, loss, same, config, tmp_path, log=lambda _: None)
    last = loss(network, batch)
    assert last.total.item() < 0.7 * first.total.item()
    assert torch.equal(words, network.language_model.embed_tokens.weight)


def test_a_name_is_the_mean_of_its_tokens_with_and_without_a_space(
    naming: tuple[Llava, patch_pretraining.PatchNamingLoss], tmp_path: Path
) -> None:
    network, loss = naming
    tokenizer = formats.processor(tmp_path / "recipe" / "processor").tokenizer
    vectors = loss.vectors(network)
    for group, found in zip(patch_pretraining.NAMES, vectors, strict=True):
        for name, vector in zip(group, found, strict=True):
            ids = tokenizer.encode(name) + tokenizer.encode(f" {name}")
            torch.testing.assert_close(
                vector, network.language_model.embed_tokens.weight[ids].mean(0)
            )


def test_calibration_changes_the_size_of_features_and_not_what_they_say(
    naming: tuple[Llava, patch_pretraining.PatchNamingLoss],
) -> None:
    """Unscaled, a tower's features drowned what the decoder adds to them, and it learnt to look
    only much later.
    """
    network, loss = naming
    batch = patch_pretraining.LabeledPatchesDataset(lessons.VISION, 1, 1)[0]
    with torch.no_grad():
        for p in network.vision_tower.parameters():
            p.mul_(3)
    network.requires_grad_(False)
    before = network.encode(batch.pixels)
    loss.calibrate(network, batch)
    after = network.encode(batch.pixels)
    scale = (after * before).sum() / before.square().sum()
    # up to the epsilon of the layer norms, which does not scale
    torch.testing.assert_close(
        after, before * scale, rtol=1e-2, atol=1e-2 * float(after.abs().max())
    )
    assert network.vision_tower(batch.pixels).square().mean().sqrt().item() == pytest.approx(
        1, rel=1e-3
    )


def test_the_whole_recipe_makes_a_checkpoint_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of each stage, each from the weights of the one before; the folder loads."""
    monkeypatch.setattr(training, "TOKENS", 512)
    monkeypatch.setattr(training, "WINDOW", 16)
    for name in ("FIRST_STYLE", "OTHER_STYLES", "OUT_OF_DOMAIN"):
        monkeypatch.setattr(feature_distillation, name, 2)
    (tmp_path / "other_images/train/source").mkdir(parents=True)  # where it is, nothing is fetched
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(noise).resize((99, 99)).save(tmp_path / "other_images/train/source/0.png")
    monkeypatch.setattr(training, "prepare", partial(training.prepare, texts=40))
    for part in ("FROM_NOTHING", "WIDENING"):
        recipes = getattr(training, part)
        few = [replace(one, workers=int(one is training.DESCRIBE)) for one in recipes]
        monkeypatch.setattr(training, part, few)
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}

    def recorded(model: nn.Module, loss: Any, data: Any, stage: Recipe, folder: Path) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train_reported(model, loss, data, stage, folder)
        assert (folder / "report.html").is_file()
        after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen[folder.name] = [before, after]

    monkeypatch.setattr(training, "train_reported", recorded)
    training.command([str(tmp_path), "--whole", "--steps", "2"])
    done = tmp_path / "model"
    assert list(seen) == [
        *("see", "describe", "practise", "sharpen", "compare", "restyle", "refuse")
    ]
    tower = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    decoder = "language_model.layers.0.mlp.up_proj.weight"
    for (_, (_, after)), (stage, (before, trained)) in pairwise(seen.items()):
        for name in (tower, decoder):
            # restyle starts from the saved checkpoint
            kept = after[name].bfloat16().float() if stage == "restyle" else after[name]
            assert torch.equal(before[name], kept)
            assert torch.equal(before[name], trained[name]) == (
                name != (tower if stage == "restyle" else decoder)
            )
    before, after = seen["refuse"]
    mean = before[decoder].lerp(after[decoder], training.REFUSED)
    assert torch.equal(checkpoints.load(done).state_dict()[decoder], mean.bfloat16())
    from llava_interleave.chat import load

    bot = load(done)
    assert bot.processor.num_frames == FRAMES
    assert isinstance(
        bot.ask("What is there?", render(episode("single", Random(0)), 96), max_new_tokens=3).text,
        str,
    )
