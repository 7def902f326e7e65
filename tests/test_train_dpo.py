"""Preferences: the loss is the papers', on packed pairs with shared images as on padded ones;
pairs of every form are read.
"""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, sigmoid
from typer.testing import CliRunner

from llava_interleave import checkpoints
from llava_interleave.cli import app
from llava_interleave.errors import DataError
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import Llava, PackedAttention, arrange_features
from llava_interleave.processing import Processor
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train import checkpointing, references, run
from llava_interleave.train.data import datasets, formats
from llava_interleave.train.data.datasets import RawSample
from llava_interleave.train.data.packing import Pair, collate_pairs
from llava_interleave.train.data.samples import PackedSample, SampleFormat, Samples
from llava_interleave.train.data.validate import validate
from llava_interleave.train.losses import dpo_loss, kto_loss, logprobs
from llava_interleave.train.recipe import DPOConfig, KTOConfig, Recipe
from tests.helpers.training import Killed, killed_before

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs about no image, one and two, of answers of different lengths."""
    place = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(6):
        names = [f"{number}-{i}.png" for i in range(number % 3)]
        for name in names:
            Image.frombytes("RGB", (30, 30), Random(name).randbytes(2700)).save(place / name)
        answers = {"chosen": "It is red. " * (1 + number), "rejected": "Blue"}
        rows.append(
            {
                "id": f"p{number}",
                "image": names,
                "prompt": "<image> " * len(names) + f"Which colour is {number}?",
                **answers,
            }
        )
    (place / "pairs.json").write_text(json.dumps(rows))
    return place / "pairs.json"


def units(source: Path, folder: Path) -> list[PackedSample]:
    checked = list(validate(datasets.rows(source), formats.processor(folder)))
    assert not any(one.error for one in checked)
    return [
        PackedSample((a.row, b.row), (a.tokens or 0) + (b.tokens or 0), 0, a.images or 0)
        for a, b in zip(checked[::2], checked[1::2], strict=True)
    ]


def padded(model: Llava, prompts: list[Prompt]) -> Tensor:
    """Summed log-probabilities `[P]` of answers, in a batch padded at the end, every sequence with
    its own images.
    """
    longest = max(len(prompt) for prompt in prompts)
    rows = []
    for prompt in prompts:
        tokens = torch.tensor(prompt.tokens + [0] * (longest - len(prompt)))
        features = [
            (m.start, arrange_features(model.encode(m.pixels), m.layout)) for m in prompt.media
        ]
        hidden = model(
            model.embed(tokens, features), torch.arange(longest), PackedAttention([longest])
        )
        each = log_softmax(model.logits(hidden)[:-1], -1).gather(1, tokens[1:, None])[:, 0]
        mask = torch.tensor([*(prompt.loss_mask or []), *[False] * (longest - len(prompt))])[1:]
        rows.append((each * mask).sum())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("smoothing", "loss_type"),
    [
        (0.0, "sigmoid"),
        (0.2, "sigmoid"),
        (0.0, "ipo"),
        (0.0, "ipo_sum"),
        (0.1, "simpo"),
        (0.0, "orpo"),
    ],
)
def test_loss_and_gradients_are_those_of_plain_padded_sequences(
    smoothing: float, loss_type: str, folder: Path, source: Path
) -> None:
    beta = 0.3
    made = Samples(units(source, folder), folder, 0)
    pairs = [pair for unit in made.packed if isinstance(pair := made.make(unit), Pair)]
    reference = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1)) * 3 - 20
    model = checkpoints.load(folder).requires_grad_(True)
    chosen, rejected = (
        padded(model, [getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")
    )
    gained = torch.stack([chosen - reference[:, 0], rejected - reference[:, 1]])
    if loss_type in ("simpo", "orpo"):
        gained = torch.stack([chosen, rejected])
    if loss_type in ("ipo", "simpo", "orpo"):  # means over the tokens of each answer
        sides = ([p.chosen for p in pairs], [p.rejected for p in pairs])
        gained = gained / torch.tensor([[sum(p.loss_mask or []) for p in side] for side in sides])
    h = gained[0] - gained[1]
    if loss_type == "orpo":
        odds = gained.double().exp() / (1 - gained.double().exp())
        want = (-gained[0] - beta * torch.log(sigmoid(torch.log(odds[0] / odds[1])))).sum().float()
    elif loss_type == "simpo":
        rewards = beta * h - 0.7
        want = -((1 - smoothing) * logsigmoid(rewards) + smoothing * logsigmoid(-rewards)).sum()
    elif loss_type != "sigmoid":
        want = ((h - 1 / (2 * beta)) ** 2).sum()
    else:
        want = -(logsigmoid(beta * h) * (1 - smoothing) + logsigmoid(-beta * h) * smoothing).sum()
    want.backward()
    slow = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = collate_pairs(
        [
            Pair(p.chosen, p.rejected, (float(a), float(b)))
            for p, (a, b) in zip(pairs, reference.tolist(), strict=True)
        ]
    )
    found = dpo_loss(
        DPOConfig(beta=beta, label_smoothing=smoothing, loss_type=loss_type, gamma=0.7),
        model,
        batch,
    )
    found.total.backward()
    torch.testing.assert_close(found.total, want, rtol=1e-4, atol=1e-4)
    assert (found.count, found.correct) == (len(pairs), int((h > 0).sum()))
    fast = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert fast.keys() == slow.keys()
    largest = max(float(gradient.abs().max()) for gradient in slow.values())
    for name, gradient in slow.items():
        torch.testing.assert_close(
            fast[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def kto_rows(source: Path) -> list[dict[str, Any]]:
    """The chosen answers of pairs, every other one labelled undesirable, in three forms."""
    rows = []
    for number, row in enumerate(json.loads(source.read_text())):
        names, question, answer = row["image"], row["prompt"], row["chosen"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        about = {"id": row["id"], "image": names}
        rows.append(
            [
                {**about, "prompt": question, "completion": answer, "label": number % 2 == 0},
                {**about, "messages": turns, "label": number % 2 == 0},
                {
                    **about,
                    "conversations": [
                        {"from": "human", "value": question},
                        {"from": "gpt", "value": answer},
                    ],
                    "kto_tag": number % 2 == 0,
                },
            ][number % 3]
        )
    return rows


def test_ktos_loss_and_gradients_are_those_of_plain_padded_sequences(
    folder: Path, source: Path
) -> None:
    """As TRL's KTOTrainer computes it, with the KL divergence of the batch."""
    config = KTOConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    rows = [
        RawSample(row, source.parent, row["id"], "kto", str(number))
        for number, row in enumerate(kto_rows(source))
    ]
    sides = [side for row in datasets.mismatched(rows) for side in datasets.sides(row) or ()]
    checked = list(validate(sides, formats.processor(folder)))
    packed = [PackedSample((a.row, b.row), 0, 0, 0) for a, b in zip(checked[::2], checked[1::2])]  # noqa: B905
    made = Samples(packed, folder, 0)
    pairs = [pair for unit in packed if isinstance(pair := made.make(unit), Pair)]
    labels = [pair.desirable for pair in pairs]
    assert labels == [True, False] * 3
    answers = [row["chosen"] for row in json.loads(source.read_text())]
    tokenizer = formats.processor(folder).tokenizer
    for number, pair in enumerate(pairs):
        own, other = (
            tokenizer.decode([t for t, m in zip(p.tokens, p.loss_mask or [], strict=True) if m])
            for p in (pair.chosen, pair.rejected)
        )
        assert own.strip().startswith(answers[number].strip())
        assert other.strip().startswith(answers[number - 1 if number else 1].strip())
    reference = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1)) * 2
    model = checkpoints.load(folder).requires_grad_(True)
    own, other = (
        padded(model, [getattr(p, side) for p in pairs]) for side in ("chosen", "rejected")
    )
    reference = torch.stack([own, other], 1).detach() + reference - torch.tensor([0.0, 3.0])
    gained = own - reference[:, 0]
    kl = (other - reference[:, 1]).mean().clamp(min=0).detach()
    assert kl > 1
    losses = [
        1.5 * (1 - sigmoid(0.3 * (g - kl))) if label else 0.7 * (1 - sigmoid(0.3 * (kl - g)))
        for g, label in zip(gained, labels, strict=True)
    ]
    want = torch.stack(losses).sum()
    want.backward()
    slow = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = collate_pairs(
        [
            replace(p, reference=(float(a), float(b)))
            for p, (a, b) in zip(pairs, reference.tolist(), strict=True)
        ]
    )
    found = kto_loss(config, model, batch)
    found.total.backward()
    torch.testing.assert_close(found.total, want, rtol=1e-4, atol=1e-4)
    assert found.extra["kl"] == pytest.approx(6 * float(kl), rel=1e-4)
    assert found.correct == sum(
        bool(g > kl) == label for g, label in zip(gained, labels, strict=True)
    )
    largest = max(float(gradient.abs().max()) for gradient in slow.values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, slow[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_samples_without_a_label_and_one_alone_are_refused(source: Path) -> None:
    def row(**sample: Any) -> RawSample:
        return RawSample(sample, source.parent, "a", "kto", "1")

    whole = {"prompt": "What?", "completion": "x"}
    for label in ({}, {"label": 1}, {"label": "yes"}):
        with pytest.raises(DataError, match="sample a has no answer with a `label`, true or false"):
            list(datasets.mismatched([row(**whole, **label)]))
    with pytest.raises(DataError, match="kto needs two samples at least, and a is alone"):
        list(datasets.mismatched([row(**whole, label=True)]))
    pair = row(prompt="What?", chosen="x", rejected="y")
    found = [one.sample for one in datasets.mismatched([pair])]
    assert [one["kto_label"] for one in found] == [True, False]
    assert [one["rejected_messages"][0]["content"] for one in found] == ["y", "x"]


def test_images_go_through_the_tower_once_a_pair(folder: Path, source: Path) -> None:
    made = Samples(units(source, folder), folder, 0)
    pairs = [pair for unit in made.packed if isinstance(pair := made.make(unit), Pair)]
    batch = collate_pairs(pairs)
    assert len(batch.pixels) == sum(len(pair.chosen.media) for pair in pairs) == 6
    assert [layout for *_, layout in batch.media] == [ImageTokenLayout(4)] * 6
    model = checkpoints.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            logprobs(model, batch).flatten(),
            padded(model, [p for pair in pairs for p in (pair.chosen, pair.rejected)]),
            rtol=1e-4,
            atol=1e-3,
        )


def test_both_sides_are_the_tokens_of_the_whole_conversation_and_the_last_answer_is_learnt(
    folder: Path, tmp_path: Path
) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
    ]
    turns.append({"role": "user", "content": "Two?"})
    row = {
        "id": "x",
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": "2 it is"}],
        "rejected": "3",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (unit,) = units(tmp_path / "a.jsonl", folder)
    pair = Samples([unit], folder, 0).make(unit)
    assert isinstance(pair, Pair)
    processor = Processor.from_folder(folder)
    for side, answer in ((pair.chosen, "2 it is"), (pair.rejected, "3")):
        whole = processor.example([*turns, {"role": "assistant", "content": answer}])
        assert side.tokens == whole.tokens
        learnt = [t for t, flag in zip(side.tokens, side.loss_mask or [], strict=True) if flag]
        assert processor.tokenizer.decode(learnt, skip_special=False) == f"{answer}<|im_end|>"
    assert len(pair) == unit.tokens


QUESTION = {"role": "user", "content": "<image>\nWho?"}
YES, NO = {"role": "assistant", "content": "A cat."}, {"role": "assistant", "content": "A dog."}
FORMS: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "<image>\nWho?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"]},
    "TRL, messages": {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO], "images": ["a.png"]},
    "TRL, no prompt": {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO], "images": ["a.png"]},
    "TRL, parts": {
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Who?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}], "rejected": [NO], "images": ["a.png"],
    },
    "TRL, no place": {"prompt": [{"role": "user", "content": "Who?"}], "chosen": [YES], "rejected": [NO], "images": ["a.png"]},
    "LLaVA-Hound": {
        "id": "v", "video": "a.png", "prompt": "<video>\nWho?", "answer": "x", "chosen": "A cat.", "rejected": "A dog.",
        "chosen_score": 5, "rejected_score": 1,
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>\nWho?"}], "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."}, "images": ["a.png"],
    },
    "ms-swift": {"messages": [QUESTION, YES], "rejected_response": "A dog.", "images": ["a.png"]},
    "ms-swift, messages": {"messages": [QUESTION, YES], "rejected_messages": [QUESTION, NO], "images": ["a.png"]},
    "both whole, the prompt again": {"prompt": "<image>\nWho?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO], "images": ["a.png"]},
    "RLAIF-V": {"question": "Who?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png", "ds_name": "x"},
    "RLHF-V": {"text": json.dumps({"question": "Who?", "chosen": "A cat.", "rejected": "A dog."}), "image_path": "a.png"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_pairs_become_the_same(form: str, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", **FORMS[form]}))
    (unit,) = units(tmp_path / "a.jsonl", folder)
    pair = Samples([unit], folder, 0).make(unit)
    assert isinstance(pair, Pair)
    processor = Processor.from_folder(folder)
    for side, answer in ((pair.chosen, YES), (pair.rejected, NO)):
        want = processor.example([QUESTION, answer], [tmp_path / "a.png"])
        assert (side.tokens, side.loss_mask) == (want.tokens, want.loss_mask)
        assert [m.start for m in side.media] == [m.start for m in want.media]


def test_invalid_pairs_are_refused_by_name(folder: Path, source: Path, tmp_path: Path) -> None:
    def refused(rows: list[dict[str, Any]], error: str, **more: Any) -> None:
        (tmp_path / "a.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match=error):
            run.run(
                Recipe(model=str(folder), source=tmp_path / "a.json", steps=1, **more),
                tmp_path / "out",
                log=lambda _: None,
            )

    plain = {"id": "plain", "messages": [{"role": "user", "content": "a"}, YES]}
    pair = {"id": "pair", "prompt": "Who?", "chosen": "A cat.", "rejected": "A dog."}
    refused([pair], "sample pair has a chosen and a rejected answer.*take the recipe dpo")
    refused([pair, plain], "sample plain is not a pair", dpo=DPOConfig())
    refused(
        [pair | {"rejected": "A cat."}],
        "pair pair has one answer twice: there is no preference",
        dpo=DPOConfig(),
    )
    refused(
        [pair | {"rejected": " "}],
        "sample pair, rejected must have a role|its text is empty",
        dpo=DPOConfig(),
    )
    refused([pair | {"prompt": None}], "sample pair, chosen begins with an answer", dpo=DPOConfig())
    refused([pair | {"chosen": [YES, 2]}], "turn 3 of sample pair, chosen", dpo=DPOConfig())
    refused(
        [pair | {"chosen": {}, "rejected": [[]]}], "turn 2 of sample pair, chosen", dpo=DPOConfig()
    )
    refused(
        [{"id": "one", "chosen": [YES], "rejected": [NO]}], "one, chosen begins", dpo=DPOConfig()
    )
    refused(
        [pair | {"chosen": [{**YES, "loss": False}]}],
        "sample pair, chosen has no answer with loss",
        dpo=DPOConfig(),
    )
    (tmp_path / "b.json").write_text(json.dumps([pair]))
    (unit,) = units(tmp_path / "b.json", folder)
    refused(
        [pair],
        rf"pair pair has {unit.tokens} tokens, more than the {unit.tokens - 1} of a batch",
        dpo=DPOConfig(),
        tokens=unit.tokens - 1,
    )
    done = CliRunner().invoke(app, ["data", "check", str(source), "-m", str(folder)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kto", [False, True])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one_and_its_reference_is_computed_once(
    kto: bool, folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the reference, then in the middle of training."""
    if kto:
        (source.parent / "kto.json").write_text(json.dumps(kto_rows(source)))
        source = source.parent / "kto.json"
    recipe = Recipe(
        model=str(folder),
        source=source,
        epochs=6,
        lr=1e-3,
        tokens=300,
        workers=0,
        save_every=2,
        log_every=1,
        dpo=None if kto else DPOConfig(),
        kto=KTOConfig() if kto else None,
        held_out=0.2,
    )

    whole = run.run(recipe, tmp_path / "whole", log=lambda _: None)
    times = 0

    def once(*given: Any) -> Tensor:
        nonlocal times
        times += 1
        if times == 2:
            raise Killed
        return logprobs(*given)

    monkeypatch.setattr(references, "logprobs", once)
    with pytest.raises(Killed):
        run.run(recipe, tmp_path / "killed", log=lambda _: None)
    with killed_before(5):
        run.run(recipe, tmp_path / "killed", log=lambda _: None)
    before = times
    resumed = run.run(recipe, tmp_path / "killed", log=lambda _: None)
    assert times == before
    assert (
        checkpointing.list_checkpoints(tmp_path / "killed")[-1].name
        == checkpointing.list_checkpoints(tmp_path / "whole")[-1].name
    )
    a, b = (checkpoints.load(path) for path in (whole, resumed))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    # Nothing is preferred yet: log 2, of KTO 1 - sigmoid(0).
    assert losses[0] == pytest.approx(0.5 if kto else 0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    assert [line for line in lines if "loss" in line][-1]["accuracy"] >= (0.5 if kto else 1)


def test_the_reference_is_the_model_before_training(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    recipe = Recipe(model=str(folder), source=source, steps=1, lr=1e-3, workers=0, dpo=DPOConfig())
    run.run(recipe, tmp_path / "out", log=lambda _: None)
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "reference.jsonl").read_text().splitlines()[1:]
    ]
    stored = {row["id"]: (row["chosen"], row["rejected"]) for row in rows}
    model = checkpoints.load(folder)
    made = Samples(units(source, folder), folder, 0, SampleFormat())
    for unit in made.packed:
        pair = made.make(unit)
        assert isinstance(pair, Pair)
        with torch.no_grad():
            torch.testing.assert_close(
                torch.tensor(stored[unit.name]),
                padded(model, [pair.chosen, pair.rejected]),
                rtol=1e-4,
                atol=1e-3,
            )
