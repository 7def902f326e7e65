"""Whole runs: stages train what they should, a run that is stopped or killed anywhere loses
nothing, what it learnt is shown.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from llava_interleave import checkpoints, kernels
from llava_interleave.checkpoints.adapters import read_adapter
from llava_interleave.cli import app
from llava_interleave.config import LoraConfig
from llava_interleave.errors import DataError, OptionError, Unsupported
from llava_interleave.lora import attach, linears
from llava_interleave.model import Llava
from llava_interleave.processing import Processor
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train import checkpointing, fsdp, loop, recipe, run
from llava_interleave.train.data import datasets
from llava_interleave.train.data.packing import SIGNALS, Batch, collate, pack
from llava_interleave.train.data.samples import (
    PackedSample,
    SampleFormat,
    Samples,
    move_images_first,
)
from llava_interleave.train.data.validate import validate
from llava_interleave.train.loop import in_bfloat16, train
from llava_interleave.train.losses import Loss, sft_loss
from llava_interleave.train.prepare import prepare_samples
from llava_interleave.train.recipe import Recipe
from recipes.tiny_world.data import write
from tests.helpers.training import Killed, PackedBatches, killed_before

pytestmark = pytest.mark.slow


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of noise: one image, two in the text, three before it."""
    place = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(9):
        names = [f"{number}-{i}.png" for i in range(1 + number % 3)]
        for name in names:
            Image.frombytes("RGB", (50, 40), Random(name).randbytes(6000)).save(place / name)
        question = (
            "<image>\nWhat?",
            "Is <image> like <image> here?",
            "<image>\n<image>\n<image>\nWhich?",
        )[number % 3]
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"Noise, number {number}." + " Yes." * number},
        ]
        rows.append({"id": f"s{number}", "image": names, "conversations": turns})
    (place / "some.json").write_text(json.dumps(rows))
    return place / "some.json"


def state(path: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(path).named_parameters())


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What was trained, of the one rank that wrote a checkpoint."""
    (file,) = checkpoint.glob("*.safetensors")
    return {
        name: tensor
        for name, tensor in load_file(file).items()
        if not name.startswith(checkpointing.OPTIMIZER)
    }


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


PARTS = {
    "tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "decoder": "language_model.",
}


@pytest.mark.parametrize(
    ("stage", "trained"),
    [("align", ["projector"]), ("instruct", [*PARTS]), ("interleave", [*PARTS][1:])],
)
def test_a_stage_trains_its_parts_and_leaves_all_others_bit_equal(
    stage: str, trained: list[str], folder: Path, source: Path, tmp_path: Path
) -> None:
    """And says so before it starts."""
    words = ["train", str(source), "-r", stage, "-m", str(folder), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(
        app,
        [
            *words,
            "--steps",
            "2",
            "--tokens",
            "2000",
            "--workers",
            "0",
            "--lr",
            "0.01",
            "--no-bfloat16",
        ],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    before, after = state(folder), state(tmp_path / "out" / "model")
    for name, p in before.items():
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        assert torch.equal(p, after[name]) != (part in trained), name
    rates = {"align": "", "instruct": "0.002"}
    for part, prefix in PARTS.items():
        count = sum(p.numel() for name, p in before.items() if name.startswith(prefix))
        pair = (count, 0) if part in trained else (0, count)
        rate = (rates.get(stage) if part == "tower" else "0.01") if part in trained else "frozen"
        assert re.search(
            rf"^{part} +{pair[0]:,} +{pair[1]:,}  {rate}$", done.output, re.MULTILINE
        ), done.output
    assert recipe.read(tmp_path / "out" / "config.toml").lr == 0.01
    about = json.loads(
        (checkpointing.list_checkpoints(tmp_path / "out")[-1] / "state.json").read_text()
    )["recipe"]
    assert about == recipe.read(tmp_path / "out" / "config.toml").stored()


@pytest.mark.parametrize("adapter", [False, True])
def test_where_bfloat16_is_slow_it_is_float32(
    adapter: bool, folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AVX-512 a step took 65 times as long by the published recipes, which ask for
    bfloat16.
    """
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    words = [
        "train",
        str(source),
        "-r",
        "instruct",
        "-m",
        str(folder),
        "--steps",
        "2",
        "--tokens",
        "2000",
        "--workers",
        "0",
    ]
    words += ["--log-every", "1", *(["--adapter-rank", "4"] if adapter else [])]
    logs = []
    for name in ("bfloat16", "no-bfloat16"):
        done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / name), f"--{name}"])
        assert done.exit_code == 0, (done.output, done.exception)
        assert ("faster in float32 than in bfloat16" in done.output) == (name == "bfloat16")
        logs.append([row["loss"] for row in log(tmp_path / name) if "loss" in row])
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_a_gpu_trains_in_bfloat16_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    has = [True]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has[0])
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    default = Recipe().bfloat16
    assert in_bfloat16(cuda, default) and not in_bfloat16(cpu, default)
    assert not in_bfloat16(cuda, False) and in_bfloat16(cpu, True)
    has[0] = False
    assert not in_bfloat16(cuda, default)


def units(source: Path, folder: Path, form: SampleFormat) -> list[PackedSample]:
    checked = validate(datasets.rows(source), Processor.from_folder(folder), form=form)
    return [
        PackedSample((one.row,), one.tokens or 0, one.images_first_tokens or 0, one.images or 0)
        for one in checked
    ]


@pytest.mark.parametrize(
    "form",
    [
        SampleFormat(),
        SampleFormat("plain"),
        SampleFormat(anyres=True),
        SampleFormat(images_first_ratio=0.5),
    ],
)
def test_what_is_counted_is_what_is_trained_on(
    form: SampleFormat, folder: Path, source: Path
) -> None:
    samples = Samples(units(source, folder, form), folder, 3, form)
    for index in range(30):
        made = samples(index)
        assert isinstance(made, Prompt)
        assert samples.length(index) == len(made), index
        assert samples.images(index) == sum(
            1 if m.layout.tiles else m.layout.crops for m in made.media
        ), index


def test_batches_are_bounded_in_images_too(folder: Path, source: Path, tmp_path: Path) -> None:
    lengths, images = [5, 5, 5, 5, 1, 1], [2, 1, 1, 0, 2, 0]
    assert [len(group) for group in pack(lengths, 100)] == [6]
    groups = pack(lengths, 100, images, 2)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(sum(images[i] for i in group) <= 2 for group in groups)
    seen: list[int] = []
    given = Recipe(
        model=str(folder), source=source, epochs=1, lr=1e-3, tokens=4000, images=3, workers=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run,
            "sft_loss",
            lambda model, batch: seen.append(len(batch.pixels)) or sft_loss(model, batch),
        )
        run.run(given, tmp_path / "out", log=quiet)
    assert sum(seen) == 18
    assert max(seen) <= 3
    with pytest.raises(
        DataError,
        match=r"sample s2 has 3 images and frames, more than the 2 of a batch: raise --images",
    ):
        run.run(given.but({"images": 2}), tmp_path / "two", log=quiet)


@pytest.mark.parametrize("trained", ["", "multi_modal_projector", ".low."])
def test_operations_are_those_that_pytorch_counts(
    trained: str, folder: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts its own operators, not our kernels. It sees all of attention, of which half is in
    the future, and the head's logits once.

    It does not see gradients of what goes into the first layer where only adapters train, or into
    the projector: there are none.
    """
    monkeypatch.setattr(kernels.training, "applies", lambda *_: False)
    network = checkpoints.load(folder)
    attach(network, LoraConfig(rank=2, dropout=0.0))
    for name, p in network.named_parameters():
        p.requires_grad_(trained in name if trained else "vision_tower" not in name)
    batch, text = collate(prompts[2:3]), network.config.text
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        part = sft_loss(network, batch)
        part.total.backward()
    future = 2 * len(batch.tokens) ** 2 * text.num_heads * text.head_dim * text.num_layers * 3
    first = (
        2 * len(batch.tokens) * 3 * text.hidden_size * (text.hidden_size + 2)
        if trained == ".low."
        else 0
    )
    assert part.flops == pytest.approx(counter.get_total_flops() - future + first, rel=0.01)


def test_layers_computed_again_give_the_same_gradients_from_less_memory(
    folder: Path, prompts: list[Prompt]
) -> None:
    """With an adapter's dropout, which must leave out the same again. What goes into layers is kept
    in both.
    """
    found, kept = [], []
    for again in (False, True):
        network = checkpoints.load(folder)
        attach(network, LoraConfig(rank=2, dropout=0.3))
        network.requires_grad_(True).train()
        if again:
            fsdp.enable_activation_checkpointing(network)
        held: dict[int, int] = {}

        def keep(x: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            part = sft_loss(network, collate(prompts))
        kept.append(
            sum(held.values()) - sum(p.nbytes for p in network.parameters() if p.data_ptr() in held)
        )
        part.total.backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None)
        assert gradient is None or torch.equal(gradient, found[1][name]), name
    assert kept[1] < 0.5 * kept[0]


def test_plain_is_images_then_the_answer(folder: Path, source: Path) -> None:
    processor = Processor.from_folder(folder)
    row = datasets.rows(source)[1]
    said, media = row.messages()
    made = SampleFormat("plain").example(processor, said, media)
    assert made.loss_mask is not None
    image = processor.tokenizer.image_id
    assert made.tokens[:32] == [image] * 32
    assert made.loss_mask == [token != image for token in made.tokens]
    assert processor.tokenizer.decode(made.tokens[32:]) == "Noise, number 1. Yes.\n"
    more = [*said, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]
    with pytest.raises(DataError, match="takes one question and its answer"):
        SampleFormat("plain").example(processor, more, media)


def test_tiles_are_for_a_sample_with_one_image(folder: Path, source: Path) -> None:
    processor = Processor.from_folder(folder)
    crops = []
    for row in datasets.rows(source)[:3]:
        crops += [
            media.layout.crops
            for media in SampleFormat(anyres=True).example(processor, *row.messages()).media
        ]
    assert crops[0] > 1
    assert crops[1:] == [1] * 5


def test_images_in_front_leave_their_numbers_and_come_in_the_same_order(
    folder: Path, source: Path
) -> None:
    rows = datasets.rows(source)
    first, second, third = (row.messages()[0] for row in rows[:3])
    assert move_images_first(first, 1) is first
    assert move_images_first(third, 2) is third  # they are in front
    mark = {"type": "text", "text": "<image>"}
    assert move_images_first(second, 2)[0]["content"] == [
        mark,
        mark,
        {"type": "text", "text": "Is [image 1] like [image 2] here?"},
    ]
    processor = Processor.from_folder(folder)
    said, media = rows[1].messages()
    made, plain = (
        SampleFormat().example(processor, said, media, images_first=images_first)
        for images_first in (True, False)
    )
    assert [m.key for m in made.media] == [m.key for m in plain.media]
    learnt = [
        [t for t, flag in zip(p.tokens, p.loss_mask or [], strict=True) if flag]
        for p in (made, plain)
    ]
    assert learnt[0] == learnt[1]
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Old"}, {"type": "image", "path": "a.png"}],
        },
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "New"}, {"type": "image", "path": "b.png"}],
        },
    ]
    assert move_images_first(chat, 0) == [
        {
            "role": "user",
            "content": [
                chat[0]["content"][1],
                chat[2]["content"][1],
                {"type": "text", "text": "Old[image 1]"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "New[image 2]"},
    ]
    views = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "x"},
                {"type": "views", "views": ["a.png", "b.png"]},
            ],
        }
    ]
    assert move_images_first(views, 0) is views


def test_the_share_of_images_first_and_a_new_draw_each_epoch(folder: Path, source: Path) -> None:
    form = SampleFormat(images_first_ratio=0.3)
    samples = Samples(units(source, folder, form)[1:2], folder, 0, form)
    drawn = [samples._drawn(index)[1] for index in range(2000)]
    assert 0.27 < sum(drawn) / 2000 < 0.33


def test_epochs_show_every_sample_as_often(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every pass once."""
    seen: list[tuple[str, ...]] = []
    make = Samples.make
    monkeypatch.setattr(
        Samples,
        "make",
        lambda self, sample, images_first=False: (
            seen.append(sample.name) or make(self, sample, images_first)
        ),
    )
    given = Recipe(
        model=str(folder),
        source=source,
        epochs=3,
        tokens=200,
        workers=0,
        lr=1e-3,
        images_first_ratio=0.5,
    )
    run.run(given, tmp_path / "out", log=quiet)
    assert sorted(seen) == sorted([f"s{i}" for i in range(9)] * 3)
    assert {frozenset(seen[i : i + 9]) for i in (0, 9, 18)} == {
        frozenset(f"s{i}" for i in range(9))
    }


RECIPE = Recipe(
    steps=8,
    lr=1e-3,
    warmup_ratio=0.25,
    tower_lr_scale=1.0,
    grad_accum_steps=2,
    save_every=3,
    log_every=1,
    keep=1,
)


@pytest.fixture(scope="module")
def prompts(folder: Path, source: Path) -> list[Prompt]:
    processor = Processor.from_folder(folder)
    return [processor.example(*row.messages()) for row in datasets.rows(source)]


def go(
    folder: Path,
    prompts: list[Prompt],
    out: Path,
    recipe: Recipe = RECIPE,
    at: int = 0,
    what: Any = None,
    **more: Any,
) -> Llava:
    """A small run; before batch number `at` of this call `what` happens."""
    network = checkpoints.load(folder).requires_grad_(True)
    done = 0

    def loss(model: Llava, batch: Batch) -> Loss:
        nonlocal done
        done += 1
        if done == at:
            what()
        return sft_loss(model, batch)

    return train(
        network,
        loss,
        PackedBatches(prompts, tokens=300, each=recipe.grad_accum_steps),
        recipe,
        out,
        **{"log": quiet, **more},
    )


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C as a program has it in front of a terminal, also where the tests run in the background
    of a shell.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGTERM, SystemExit),
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGHUP, SystemExit),
    ],
)
def test_a_signal_ends_the_step_saves_and_the_run_resumes_bit_for_bit(
    number: signal.Signals,
    end: type[BaseException],
    folder: Path,
    prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    """At the tenth batch, the second of step 5; checkpoints are due at 3 and 6."""
    handlers = [signal.getsignal(n) for n in SIGNALS]
    whole = go(folder, prompts, tmp_path / "whole")
    said: list[str] = []
    with pytest.raises(end) as ended:
        go(
            folder,
            prompts,
            tmp_path / "out",
            at=10,
            what=lambda: os.kill(os.getpid(), number),
            log=said.append,
        )
    assert number == signal.SIGINT or ended.value.code == 128 + number
    assert said[-1].startswith(f"stopped by {number.name} after step 5: ")
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-5"
    ]
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert equal(whole, go(folder, prompts, tmp_path / "out"))
    assert [line["step"] for line in log(tmp_path / "out")] == list(range(1, 9))


def test_ctrl_c_that_was_ignored_stays_so(
    folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    """A run in the background of a shell was stopped by a Ctrl-C meant for something else."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        go(
            folder,
            prompts,
            tmp_path / "out",
            at=10,
            what=lambda: os.kill(os.getpid(), signal.SIGINT),
        )
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-8"
    ]


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_does_not_wait(folder: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):  # two that come before the first was taken are one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    with pytest.raises(KeyboardInterrupt):
        go(folder, prompts, tmp_path / "out", at=10, what=twice)
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-3"
    ]


@pytest.mark.parametrize("point", range(5))
def test_a_kill_in_the_middle_of_a_save_loses_nothing(
    point: int, folder: Path, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each of the places where the second save changes the disk: at half a file, before
    and after it is named ...
    """
    out = tmp_path / "out"
    whole = go(folder, prompts, tmp_path / "whole")
    write, replace, rmtree = safetensors.torch.save, Path.replace, checkpointing.shutil.rmtree
    saves = 0

    def half(tensors: Any, **more: Any) -> bytes:
        nonlocal saves
        if (out / "checkpoint-3").exists():
            saves += 1
            if point < 2 and saves == point + 1:  # the first of several files, the second
                (out / "checkpoint.new" / "half.safetensors").write_bytes(b"half")
                raise Killed
        return write(tensors, **more)

    def named(self: Path, target: Path) -> Path:
        if point == 2 and target.name == "checkpoint-6":
            raise Killed
        done = replace(self, target)
        if point == 3 and target.name == "checkpoint-6":
            raise Killed
        return done

    def removed(path: Path, **more: Any) -> None:
        if point == 4 and path.name == "checkpoint-3":
            next(path.glob("*.safetensors")).unlink()
            raise Killed
        rmtree(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "FILE_BYTES", 400_000)
        patch.setattr(safetensors.torch, "save", half)
        patch.setattr(Path, "replace", named)
        patch.setattr(checkpointing.shutil, "rmtree", removed)
        with pytest.raises(Killed):
            go(folder, prompts, out)
    assert checkpointing.list_checkpoints(out)[-1].name == (
        "checkpoint-6" if point > 2 else "checkpoint-3"
    )
    assert equal(whole, go(folder, prompts, out))
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-8"]


@pytest.mark.parametrize("what", ["a bit", "half a file", "a file", "the state", "the list"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    what: str, folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    out, kept, said = tmp_path / "out", replace(RECIPE, keep=2), list[str]()
    whole = go(folder, prompts, out, kept)
    assert [path.name for path in checkpointing.list_checkpoints(out)] == [
        "checkpoint-6",
        "checkpoint-8",
    ]
    for number in (8, 6):
        last = out / f"checkpoint-{number}"
        (file,) = last.glob("*.safetensors")
        if what == "a bit":
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)
        elif what == "half a file":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif what == "a file":
            file.unlink()
        else:
            file = last / ("state.json" if what == "the state" else checkpointing.CHECKSUMS)
            file.write_text("")
        if number == 8:
            assert equal(whole, go(folder, prompts, out, kept, log=said.append))
            assert re.search(
                r"checkpoint-8 is damaged \(.*(differs|missing).*now .*damaged-8", said[0]
            )
            assert (out / "damaged-8").exists()
            shutil.rmtree(out / "checkpoint-8")
    with pytest.raises(DataError, match=r"checkpoint-6 is damaged .* none before it: .* rm -r "):
        go(folder, prompts, out, kept)


def killed() -> None:
    raise Killed


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(
    folder: Path, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(folder, prompts, tmp_path / "whole")
    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"cannot write .*checkpoint-6.*No space.*before it are as"),
    ):
        go(
            folder,
            prompts,
            tmp_path / "out",
            at=8,
            what=lambda: patch.setattr(safetensors.torch, "save", full),
        )
    assert equal(whole, go(folder, prompts, tmp_path / "out"))


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_line_cut_by_a_kill_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for before, after in (
        (b'{"step": 1}\n{"st', b'{"step": 1}\nx\n'),
        (b'{"st', b"x\n"),
        (b"a\n", b"a\nx\n"),
    ):
        path.write_bytes(before)
        with loop.open_jsonl(path) as file:
            file.write("x\n")
        assert path.read_bytes() == after


def test_the_last_few_and_the_best_are_kept(
    folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    """Held-out losses are made up: lowest after step 4, which is saved although it is not due."""
    losses = {0: 3.0, 2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    config = Recipe(
        steps=8, warmup_ratio=0.125, save_every=3, keep=2, evaluate_every=2, log_every=1
    )
    seen: list[int] = []

    def evaluate(_: Llava, step: int) -> dict[str, float]:
        seen.append(step)
        return {"loss": losses[step]}

    go(folder, prompts, tmp_path / "out", config, evaluate=evaluate)
    assert seen == [0, 2, 4, 6, 8]
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert json.loads((tmp_path / "out" / "checkpoint-8" / "state.json").read_text())["best"] == [
        1.0,
        4,
    ]
    assert [
        line["held_out"]["loss"] for line in log(tmp_path / "out") if "held_out" in line
    ] == list(losses.values())


def test_a_run_stops_after_evaluations_without_a_gain(
    folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    """And stays so when it is called again."""
    losses = {0: 3.0, 2: 1.0, 4: 1.1, 6: 1.0, 8: 0.5}
    config = Recipe(steps=8, evaluate_every=2, early_stopping=2, log_every=1, save_every=100)
    seen: list[int] = []
    said: list[str] = []

    def evaluate(_: Llava, step: int) -> dict[str, float]:
        seen.append(step)
        return {"loss": losses[step]}

    for _ in range(2):
        go(folder, prompts, tmp_path / "out", config, evaluate=evaluate, log=said.append)
        assert said[-1] == "stopped after step 6: no evaluation after step 2 was better"
    assert seen == [0, 2, 4, 6]
    assert checkpointing.list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-6"
    with pytest.raises(OptionError, match="early_stopping counts evaluations"):
        Recipe(early_stopping=1)


def test_checkpoints_come_by_time_too(
    folder: Path, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on half a minute at every look: each step is looked at once, and a save
    looks once.
    """
    now, ours, clock = iter(range(0, 10**6, 30)), threading.get_ident(), time.monotonic

    def clock_of_the_run() -> float:
        """Threads of libraries that other tests left look at the real one."""
        return next(now) if threading.get_ident() == ours else clock()

    monkeypatch.setattr(time, "monotonic", clock_of_the_run)
    go(
        folder,
        prompts,
        tmp_path / "out",
        Recipe(steps=6, warmup_ratio=0.1, save_every=100, save_minutes=1, keep=9),
    )
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_straight_decay_is_straight() -> None:
    config = Recipe(steps=110, warmup_ratio=1 / 11, lr_schedule="linear", min_lr_ratio=0.5)
    rates = [config.lr_factor(step) for step in range(110)]
    assert rates[:10] == [pytest.approx(i / 10) for i in range(10)]
    assert [config.lr_factor(10 + i) for i in (0, 50, 100)] == [1, 0.75, 0.5]


@pytest.mark.usefixtures("foreground")
def test_signals_to_a_whole_group_of_processes_end_a_run_in_order(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """As a terminal's Ctrl-C, and as batch systems stop jobs: the workers get them as well."""
    words = [
        "train",
        str(source),
        "-m",
        str(folder),
        "-o",
        str(tmp_path / "out"),
        "--steps",
        "100000",
        "--log-every",
        "1",
    ]
    code = "import sys; from llava_interleave.cli import main; sys.argv[0] = 'llava'; main()"
    for number, left in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        steps = (line for line in process.stdout if re.match(r"step [\d,]+ of", line))
        for _ in range(3):
            next(steps)
        os.killpg(process.pid, number)
        rest, error = process.communicate(timeout=60)
        assert process.returncode == left, error
        assert f"stopped by {number.name} after step" in rest
        assert "Traceback" not in error
    steps_ = [line["step"] for line in log(tmp_path / "out")]
    assert steps_ == list(range(1, len(steps_) + 1))


FAILING = """
import sys
from llava_interleave.cli import main
from llava_interleave.train import loop

step, open_jsonl, error = loop.train_step, loop.open_jsonl, sys.argv.pop(1)

def failing(*words, **more):
    if words[5] == 2:
        raise eval(error)
    return step(*words, **more)

class Full:
    def __init__(self, file):
        self.file, self.lines = file, 0
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, text):
        self.lines += 1
        if self.lines > 2:
            raise OSError(28, "No space left on device")
        self.file.write(text)
    def flush(self):
        self.file.flush()

if __name__ == "__main__":
    if error == "full":
        loop.open_jsonl = lambda path: Full(open_jsonl(path))
    else:
        import torch
        loop.train_step = failing
    main()
"""


def descendants(pid: int) -> set[int]:
    """Processes below a process, by /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("full", "llava: training in .* stopped after step 3: .*No space left on device"),
        (
            "torch.OutOfMemoryError('8 GiB')",
            "llava: out of memory in step 3 .8 GiB.: lower --tokens",
        ),
        ("RuntimeError('Connection reset by peer')", "RuntimeError: Connection reset by peer"),
    ],
)
def test_any_error_in_a_step_ends_all_processes(
    error: str, says: str, folder: Path, source: Path, tmp_path: Path
) -> None:
    """A worker blocks SIGTERM, and Python's exit waited for it for ever."""
    (tmp_path / "failing.py").write_text(FAILING)
    words = [sys.executable, tmp_path / "failing.py", error, "train", source, "-m", folder]
    words += ["-o", tmp_path / "out", "--steps", "9", "--log-every", "1", "--workers", "1"]
    with (tmp_path / "error").open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, stderr=file, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1 of"):
                break
        workers = descendants(process.pid)
        assert workers
        code = process.wait(timeout=120)
    assert code in (1, 2)
    assert re.search(says, (tmp_path / "error").read_text())
    left = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < left:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_answers_of_steps_that_are_done_again_are_there_once(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the evaluation of step 3, whose last checkpoint is of step 2."""
    given = Recipe(
        model=str(folder), source=source, steps=4, lr=1e-3, tokens=400, workers=0, save_every=2,
        log_every=1, evaluate_every=1, held_out=0.3, sample_generations=1,
    )  # fmt: skip
    losses = iter([9.0, 8.0, 7.0, 7.5, 7.5, 7.0])
    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *words: evaluate(*words) | {"loss": next(losses)})
    with killed_before(3):
        run.run(given, tmp_path / "out", log=quiet)
    run.run(given, tmp_path / "out", log=quiet)
    lines = log(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 1, 2, 3, 4]
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in answers] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("lora", [{}, {"dora": True, "rank_pattern": ("*.v_proj=2",),
                                       "modules_to_save": ("multi_modal_projector",)}])  # fmt: skip
def test_an_adapter_is_trained_alone_and_resumes_bit_for_bit(
    lora: dict[str, Any],
    folder: Path,
    source: Path,
    tmp_path: Path,
) -> None:
    """With dropout, which a resumed run must repeat."""
    given = Recipe(
        model=str(folder), source=source, steps=6, lr=0.01, tokens=400, workers=0, save_every=2,
        adapter=LoraConfig(rank=4, dropout=0.3, targets=("language_model.*_proj",), **lora),
    )  # fmt: skip
    said: list[str] = []
    whole = run.run(given, tmp_path / "whole", log=said.append)
    assert whole == tmp_path / "whole" / "adapter"
    network = checkpoints.load(folder)
    adapter = read_adapter(whole, network)
    assert set(adapter.parts) == {
        name for name in linears(network) if name.startswith("language_model.")
    }
    assert all(part.b.abs().max() > 0 for part in adapter.parts.values())
    count = sum(t.numel() for part in adapter.parts.values() for t in part.state_dict().values())
    base = sum(
        p.numel() for name, p in network.named_parameters() if name.startswith("language_model.")
    )
    assert any(re.fullmatch(rf"decoder +{count:,} +{base:,}  0.01", line) for line in said), said
    stored = saved(tmp_path / "whole" / "checkpoint-6")
    whole_modules = [t for of in adapter.replaced.values() for t in of.values()]
    assert bool(whole_modules) == bool(lora)
    assert sum(tensor.numel() for tensor in stored.values()) == count + sum(
        tensor.numel() for tensor in whole_modules
    )

    with killed_before(5):
        run.run(given, tmp_path / "killed", log=quiet)
    resumed = read_adapter(run.run(given, tmp_path / "killed", log=quiet), network)
    for name, part in adapter.parts.items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, resumed.parts[name].state_dict()[key]), name
    for name, of in adapter.replaced.items():
        assert all(torch.equal(of[key], resumed.replaced[name][key]) for key in of), name
    with pytest.raises(OptionError, match=r"has vision_tower\.\S+, whose learning rate scale is 0"):
        run.run(given.but({"adapter.targets": ("vision_tower.*",)}), tmp_path / "tower", log=quiet)
    frozen = given.but({"adapter.modules_to_save": ("vision_tower",)})
    with pytest.raises(OptionError, match=r"modules_to_save has vision_tower.* rate scale is 0"):
        run.run(frozen, tmp_path / "tower", log=quiet)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run on every scenario of the world, with a third held out, whose loss is told to be lowest
    after step 2.
    """
    place = tmp_path_factory.mktemp("finished")
    annotations = write(place / "data", 12, size=30)
    given = Recipe(
        model=str(folder), source=annotations, steps=6, lr=1e-3, tokens=2000, workers=0, held_out=0.34, evaluate_every=2,
        sample_generations=3, log_every=1,
    )  # fmt: skip
    said: list[str] = []
    evaluate, losses = run.evaluate, iter((3.0, 1.0, 2.0, 2.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate", lambda *words: evaluate(*words) | {"loss": next(losses)})
        run.run(given, place / "out", log=said.append)
    return place / "out", said


def test_held_out_samples_are_measured_and_answered(finished: tuple[Path, list[str]]) -> None:
    out, said = finished
    assert [line["step"] for line in log(out) if "held_out" in line] == [0, 2, 4, 6]
    questions = json.loads((out / "questions.json").read_text())
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(len(line["answers"]) == len(questions) == 3 for line in lines)
    assert all(one["truth"] and one["question"] and one["images"] for one in questions)
    for line in lines:
        for one, answer in zip(questions, line["answers"], strict=True):
            assert f"step {line['step']} {one['name']}: {answer}" in said


def test_the_best_measurement_is_a_checkpoint_of_its_own(finished: tuple[Path, list[str]]) -> None:
    out, said = finished
    assert said[-1] == (
        f"the best evaluation was after step 2, held-out loss 1.0000: {out / 'best'}"
    )
    assert not torch.equal(
        state(out / "best")["language_model.norm.weight"],
        state(out / "model")["language_model.norm.weight"],
    )
    stored = saved(out / "checkpoint-2")
    assert stored.keys() <= (best := state(out / "best")).keys()
    assert all(torch.equal(best[name], tensor) for name, tensor in stored.items())


def test_the_report_is_one_page_with_everything(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    done = CliRunner().invoke(app, ["train", "report", str(out)])
    assert done.exit_code == 0, done.exception
    assert done.output.strip() == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|url\(|@import", page)
    assert "default-src 'none'" in page
    assert set(re.findall(r'src="([^:"]*)', page)) == {"data"}
    for title in (
        "Loss",
        "Accuracy",
        "Learning rate",
        "Tokens a second",
        "Images a second",
        "MFU",
        "Peak memory, GiB",
    ):
        (curve,) = re.findall(
            rf'<svg [^>]*aria-label="{title} by step">(.*?)</svg>', page, re.DOTALL
        )
        (way,) = re.findall(r'<path class="train" d="M([^"]*)"', curve)
        assert len(way.split("L")) == 6
        assert curve.count("<circle") == (4 if title in ("Loss", "Accuracy") else 0)
        for x, y in (point.split() for point in way.split("L")):
            assert 0 <= float(x) <= 640
            assert 0 <= float(y) <= 220
    assert page.count("<article>") == 3
    assert page.count("held_out = 0.34") == 1
    with pytest.raises(DataError, match="holds no run"):
        raise (
            CliRunner().invoke(app, ["train", "report", str(out.parent)]).exception
            or AssertionError
        )


def test_a_report_of_a_run_that_is_just_writing_and_that_was_resumed(tmp_path: Path) -> None:
    """Steps that were done again count once, as they were done last; many points are thinned."""
    lines = [
        {"step": s, "loss": float(s), "accuracy": 0.0, "learning_rate": 1.0, "grad_norm": 1.0}
        for s in [*range(1, 1001), 1000]
    ]
    lines[-1]["loss"] = 7.0
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 100'
    )
    (tmp_path / "config.toml").write_text('question = "<script>"\n')
    assert (
        CliRunner()
        .invoke(app, ["train", "report", str(tmp_path), "-o", str(tmp_path / "x.html")])
        .exit_code
        == 0
    )
    page = (tmp_path / "x.html").read_text()
    assert "1,000 steps, loss 7.0000" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    (way,) = re.findall(
        r'aria-label="Loss by step">.*?<path class="train" d="M([^"]*)"', page, re.DOTALL
    )
    assert len(way.split("L")) == 334


def test_of_a_quantized_checkpoint_adapters_alone_are_trained(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    checkpoints.save(
        checkpoints.load(folder, precision="int4"), tmp_path / "int4", processor_from=folder
    )
    given = Recipe(
        model=str(tmp_path / "int4"),
        source=source,
        steps=3,
        workers=0,
        lr=0.01,
        held_out=0.2,
        tokens=400,
    )
    with pytest.raises(
        Unsupported, match=r"has int4 weights, which cannot be trained: train an adapter"
    ):
        run.run(given, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()
    done = run.run(given.but({"adapter.rank": 2}), tmp_path / "out", log=quiet)
    for base in (tmp_path / "int4", folder):
        assert all(
            part.b.abs().max() > 0
            for part in read_adapter(done, checkpoints.load(base)).parts.values()
        )
    losses = [line["held_out"]["loss"] for line in log(tmp_path / "out") if "held_out" in line]
    assert losses[-1] < losses[0]


def test_tensorboard_gets_the_log_or_is_refused_with_the_way_out(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Recipe(model=str(folder), source=source, steps=1, workers=0, trackers=("tensorboard",))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unsupported, match=r"pip install 'llava-interleave\[tensorboard\]'"):
        run.run(given, tmp_path / "out", log=quiet)
    seen: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, where: str) -> None:
            assert where == str(tmp_path / "out" / "tensorboard")

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer})
    )
    run.run(given.but({"held_out": 0.3}), tmp_path / "out", log=quiet)
    written = {
        (f"train/{k}", v, 1)
        for line in log(tmp_path / "out")
        if "loss" in line
        for k, v in line.items()
        if k != "step"
    }
    measured = {
        (f"held_out/{k}", v, line["step"])
        for line in log(tmp_path / "out")
        for k, v in line.get("held_out", {}).items()
    }
    assert set(seen) == written | measured
    assert len(measured) == 4


def test_a_second_run_in_a_folder_is_refused(folder: Path, source: Path, tmp_path: Path) -> None:
    given = Recipe(model=str(folder), source=source, steps=2, tokens=400, workers=0)
    with (
        run._locked(tmp_path / "out"),
        pytest.raises(DataError, match=r"another process is writing .*out$"),
    ):
        run.run(given, tmp_path / "out", log=quiet)
    assert not (tmp_path / "out").exists()  # nothing was written into it
    with run._locked(tmp_path / "gone"):
        shutil.rmtree(tmp_path / "gone")
    run.run(given, tmp_path / "out", log=quiet)
    (tmp_path / "out" / "samples.json").write_text('{"samples": 1')
    with pytest.raises(DataError, match=r"samples\.json is damaged .*: to resume without .*, rm "):
        run.run(given.but({"log_every": 1}), tmp_path / "out", log=quiet)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the run in .*file.* stopped: .*the same call goes on"):
        run.run(given, tmp_path / "file", log=quiet)


@pytest.mark.parametrize("name", ["samples.npy", "rows.jsonl", "media.jsonl", "index.json"])
def test_validated_samples_that_are_damaged_are_made_again(
    name: str, folder: Path, source: Path, tmp_path: Path
) -> None:
    given, said = Recipe(model=str(folder), source=source, steps=1, tokens=400), list[str]()
    form, out = SampleFormat(), tmp_path / "out"
    prepare_samples(given, folder, form, out, quiet)
    file = out / "data" / name
    file.write_bytes(file.read_bytes()[:-7])
    prepare_samples(given, folder, form, out, said.append)
    assert said[0].startswith("reading ")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("workers", "says"),
    [
        (1, r"^a data worker ended in step \d+ .*: if memory was short, lower --workers"),
        (0, r"^sample \S+: image 1: \S+\.png: there is no such file$"),
    ],
)
def test_a_killed_worker_and_a_deleted_image_are_named(
    workers: int, says: str, folder: Path, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = shutil.copytree(source.parent, tmp_path / "data")
    given = Recipe(
        model=str(folder), source=data / source.name, steps=300, tokens=200, workers=workers
    )
    step = loop.train_step

    def failing(*words: Any) -> loop.StepStats:
        if words[5] == 2 and workers:
            for pid in descendants(os.getpid()):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        elif words[5] == 2:
            for image in data.glob("*.png"):
                image.unlink()
        return step(*words)

    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(DataError, match=says):
        run.run(given, tmp_path / "out", log=quiet)
