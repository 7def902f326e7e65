"""Training data: everything that is wrong with a sample is said, with its name, before anything is
trained on it.
"""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner, Result

from llava_interleave.cli import app
from llava_interleave.errors import DataError
from llava_interleave.processing import Loader, Processor
from llava_interleave.processing.segments import plain_jpeg
from llava_interleave.testing import tiny_checkpoint, tiny_onevision_config
from llava_interleave.train import recipe
from llava_interleave.train.data import datasets, formats
from llava_interleave.train.data import validate as validating
from llava_interleave.train.data.index import RowFile
from llava_interleave.train.data.samples import SampleFormat, epoch_order
from llava_interleave.train.data.validate import KINDS, validate
from llava_interleave.train.recipe import Recipe
from llava_interleave.train.run import run
from recipes.tiny_world.draw import write_video

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def llava(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def noise(seed: int) -> Image.Image:
    return Image.frombytes("RGB", (40, 30), Random(seed).randbytes(40 * 30 * 3))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, one of them under two names; a video; an image and a video cut short; a text that
    is no image.
    """
    folder = tmp_path_factory.mktemp("media")
    for number, name in enumerate("abc"):
        noise(number).save(folder / f"{name}.png")
    noise(0).save(folder / "again.bmp")
    noise(3).save(folder / "cut.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "text.png").write_text("no image")
    write_video([np.asarray(noise(n).resize((64, 64))) for n in range(9)], folder / "clip.mp4")
    noise(0).save(folder / "clip.gif", save_all=True, append_images=[noise(1)])
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:-200])
    return folder


def llava_sample(name: str, *said: str, **more: Any) -> dict[str, Any]:
    turns = [
        {"from": who, "value": text}
        for who, text in zip(("human", "gpt") * len(said), said, strict=False)
    ]
    return {"id": name, "conversations": turns, **more}


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.write_text(
        json.dumps(samples)
        if path.suffix == ".json"
        else "".join(json.dumps(s) + "\n" for s in samples)
    )
    return path


USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Noise."}
GOOD = llava_sample("good", "<image>\nWhat is it?", "Noise.", image="a.png")
FAULTS: list[tuple[dict[str, Any], list[str], str]] = [
    (GOOD, [], ""),
    (llava_sample("clip", "<image> What moves?", "Noise.", video="clip.mp4"), [], ""),
    (llava_sample("text", "Hello", "Hello."), [], ""),
    (llava_sample("no turns") | {"conversations": None}, ["form"], "no `conversations`"),
    ({"id": "cat", "conversations": [{"from": "cat", "value": "a"}]}, ["form"], "its role is 'cat'"),
    (llava_sample("missing", "<image> <image> What?", "x", image=["a.png", "no.png"]), ["media"], r"no\.png: there is no such"),
    (llava_sample("two missing", "<image> <image>", "x", image=["n1.png", "n2.png"]), ["media", "media"], r"n1\.png"),
    (llava_sample("cut", "<image> What?", "x", image="cut.jpg"), ["media"], r"cut\.jpg: .*cut short"),
    (llava_sample("no image", "<image> What?", "x", image="text.png"), ["media"], r"text\.png: not an image"),
    (llava_sample("cut clip", "<image> What?", "x", video="cut.mp4"), ["media"], r"cut\.mp4: "),
    (llava_sample("long name", "<image> What?", "x", image="a" * 5000), ["media"], "name too long|cannot be opened"),
    (llava_sample("too few", "What?", "x", image="a.png"), ["placeholders"], "0 `<image>` but 1 image"),
    (llava_sample("too many", "<image> <image> What?", "x", image="b.png"), ["placeholders"], "2 `<image>` but 1 image"),
    (llava_sample("both", "What?", "x", image="gone.png"), ["placeholders", "media"], "0 `<image>` but 1 image"),
    ({"id": "swapped", "image": "b.png", "conversations": [
        {"from": "gpt", "value": "<image>\nWhat?"}, {"from": "human", "value": "x"}]},
        ["roles", "roles", "roles"], "ends with a question"),
    ({"id": "swapped names", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"},
        {"from": "gpt", "value": "c"}]}, ["roles"], "begins with an answer"),
    ({"id": "twice", "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"},
        {"from": "gpt", "value": "c"}]}, ["roles"], "messages 1 and 2 of sample twice are both of the user"),
    ({"id": "late", "conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"},
        {"from": "gpt", "value": "c"}]}, ["roles"], "system message that is not its first"),
    (llava_sample("animated", "<image> What moves?", "x", video="clip.gif"), ["form"], "shows one frame: give content parts"),
    (llava_sample("silent", "<image> What?", " \n", image="a.png"), ["empty"], "turn 2 of sample silent .* its text is empty"),
    (llava_sample("image alone", "What?", "<image>", image="a.png"), ["empty", "roles"], "turn 2"),
    (llava_sample("asks nothing", " ", "b"), ["empty"], "turn 1"),
    (llava_sample("slip", "What?", "x", imgaes=["a.png"]), ["form"], "`imgaes`: it is not read; did you mean `images`"),
    (llava_sample("another key", "What?", "x", image_2="a.png"), ["form"], "`image_2`: it is not read: name it"),
    (llava_sample("kto", "What?", "x", kto_tag=False), ["form"], "`kto_tag`: it is for the recipe kto"),
    (llava_sample("label", "What?", "x", label=True), ["form"], "`label`: it is for the recipe kto"),
    (llava_sample("sound", "What?", "x", audios=["a.wav"]), ["form"], "`audios`: there is no audio encoder"),
    (llava_sample("history", "What?", "x", history=[["a", "b"]]), ["form"], "`history` next to its messages"),
    (llava_sample("weight", "What?", "x", weight=-0.5), ["form"], "`weight` -0.5: a weight is a number from 0"),
    (llava_sample("no weight", "What?", "x", sample_weight=0), ["roles"], "no answer with loss"),
    (llava_sample("left out", "What?", "x", loss=False), ["form"], "`loss`: leave the sample out"),
    (llava_sample("tools", "What?", "x", tools=[{"name": "f"}]), ["form"], "tool calls are not supported"),
    (llava_sample("two systems", "What?", "x", system="a") | {"messages": None, "conversations": [
        {"from": "system", "value": "b"}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        ["form"], "`system` and another system message"),
    ({"id": "half", "messages": [USER, {**ANSWER, "loss": 0.5}]}, ["form"], "turn 2 .* `loss` 0.5: it may be 0 or 1"),
    ({"id": "on a question", "messages": [{**USER, "train": True}, ANSWER]}, ["form"], "only answers are trained on"),
    ({"id": "no loss", "messages": [USER, {**ANSWER, "loss": False}]}, ["roles"], "no answer with loss"),
    ({"id": "thinks", "messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}, ["form"], "`reasoning_content`: reasoning"),
    ({"id": "own images", "messages": [{**USER, "images": ["a.png"]}, ANSWER]}, ["form"], "turn 1 .* `images`: name images as"),
    ({"id": "a number", "messages": [USER, ANSWER], "images": [5]}, ["form"], "has 5 among its media"),
    ({"id": "an object", "messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, ["form", "roles"], "turn 2 .* a text"),
    ({"id": "a list", "messages": [USER, {"role": "assistant", "content": [["x"]]}]}, ["empty", "form"], "part 1 of message 2"),
    ({"id": "truth", "messages": [USER, {"role": "assistant", "content": True}]}, ["form", "roles"], "its text is True"),
    ({"id": "a string", "messages": "[]"}, ["form"], "no list of messages"),
    ({"id": "prompt alone", "prompt": "What?"}, ["form"], "a `prompt` without a `completion`"),
    ({"id": "broken history", "query": "a", "response": "b", "history": ["c"]}, ["form"], "not a list of \\[question, answer\\]"),
    ({"id": "beyond", "images": ["a.png"], "messages": [
        {"role": "user", "content": [{"type": "image", "index": -1}]}, ANSWER]}, ["placeholders"], "`index` beyond its 1 images"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sample", "kinds", "text"), FAULTS, ids=[sample["id"] for sample, _, _ in FAULTS]
)
def test_every_fault_is_found_and_names_its_sample(
    sample: dict[str, Any], kinds: list[str], text: str, media: Path
) -> None:
    (found,) = validate([datasets.RawSample(sample, media, sample["id"], "set")])
    assert sorted(fault.kind for fault in found.faults) == sorted(kinds)
    assert all(f"sample {sample['id']}" in fault.text for fault in found.faults)
    assert not kinds or re.search(text, " | ".join(fault.text for fault in found.faults))
    assert found.error == bool(kinds)


IMAGE_PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]
EARLIER = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SAME: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "TRL, texts": ({"prompt": "What?", "completion": "4"}, [USER, {**ANSWER, "content": "4"}]),
    "TRL, messages, the earlier answer without loss": (
        {"prompt": [*EARLIER, USER], "completion": [ANSWER]},
        [EARLIER[0], {**EARLIER[1], "loss": False}, USER, ANSWER],
    ),
    "TRL, images without a place": (
        {"prompt": "What?", "completion": "Noise.", "images": ["a.png"]},
        [{**USER, "content": IMAGE_PARTS}, ANSWER],
    ),
    "messages, images without a place": (
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        [{**USER, "content": IMAGE_PARTS}, ANSWER],
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "What", "input": "is it?", "output": 4, "history": [["Who?", "Me."]]},
        [*EARLIER, {**USER, "content": "What\nis it?"}, {**ANSWER, "content": "4"}],
    ),
    "ms-swift, query": (
        {"query": "What?", "response": "Noise.", "history": [["Who?", "Me."]], "system": "S"},
        [{"role": "system", "content": "S"}, *EARLIER, USER, ANSWER],
    ),
    "LLaMA-Factory, a system column": (
        {"conversations": [USER, ANSWER], "system": "S", "tools": "", "audios": []},
        [{"role": "system", "content": "S"}, USER, ANSWER],
    ),
    "ms-swift, loss": (
        {"messages": [EARLIER[0], {**EARLIER[1], "loss": False}, USER, {**ANSWER, "loss": True}]},
        [EARLIER[0], {**EARLIER[1], "loss": False}, USER, ANSWER],
    ),
    "axolotl, train": (
        {
            "messages": [
                EARLIER[0],
                {**EARLIER[1], "train": False},
                {**USER, "train": False},
                ANSWER,
            ]
        },
        [EARLIER[0], {**EARLIER[1], "loss": False}, USER, ANSWER],
    ),
    "OpenAI, weight": (
        {"messages": [EARLIER[0], {**EARLIER[1], "weight": 0}, USER, {**ANSWER, "weight": 1}]},
        [EARLIER[0], {**EARLIER[1], "loss": False}, USER, ANSWER],
    ),
}


@pytest.mark.parametrize("form", SAME)
def test_forms_of_other_trainers_become_the_same_messages(form: str, media: Path) -> None:
    sample, want = SAME[form]
    messages, found = formats.messages(sample, media)
    assert messages == want
    assert found == ([media / "a.png"] if "images" in sample else [])


def test_an_answer_without_loss_is_read_and_not_learnt(model: Path) -> None:
    processor = Processor.from_folder(model)
    messages, _ = formats.messages(SAME["ms-swift, loss"][0], Path())
    prompt, plain = (
        processor.example([*messages[:1], {**messages[1], "loss": loss}, *messages[2:]])
        for loss in (False, True)
    )
    assert prompt.tokens == plain.tokens

    def learnt(mask: list[bool] | None) -> str:
        tokens = [t for t, flag in zip(prompt.tokens, mask or [], strict=True) if flag]
        return processor.tokenizer.decode(tokens, skip_special=False)

    assert learnt(prompt.loss_mask) == "Noise.<|im_end|>"
    assert learnt(plain.loss_mask) == "Me.<|im_end|>Noise.<|im_end|>"


def test_videos_are_named_in_texts(media: Path) -> None:
    sample = llava_sample("v", "<video> and <image>?", "x", images=["a.png"], videos=["clip.mp4"])
    messages, found = formats.messages(sample, media)
    assert [part["type"] for part in messages[0]["content"]] == ["video", "text", "image", "text"]
    assert found == [media / "clip.mp4", media / "a.png"]
    (one,) = validate([datasets.RawSample(sample, media, "v", "set")])
    assert not one.faults


def test_paths_of_index_parts_are_rooted_once(monkeypatch: pytest.MonkeyPatch, media: Path) -> None:
    """With a relative folder of media a path had it twice."""
    monkeypatch.chdir(media.parent)
    part = {"type": "image", "index": 0, "text": None}
    sample = {"images": ["a.png"], "messages": [{"role": "user", "content": [part]}, ANSWER]}
    (found,) = validate([datasets.RawSample(sample, Path(media.name), "x", "set")])
    assert not found.faults


def test_keys_that_are_not_read_are_listed_once_a_data_set() -> None:
    rows = [
        datasets.RawSample({**sample, "messages": [USER, ANSWER]}, Path(), str(i), "set")
        for i, sample in enumerate([{"score": 1, "id": "x", "source": "y"}, {"score": 2}])
    ]
    keys = [[f.text for f in one.faults if f.kind == "keys"] for one in validate(rows)]
    assert keys == [["sample 0 and maybe others of set have keys that are not read: score"], []]


def test_the_command_lists_counts_and_exits(media: Path, tmp_path: Path) -> None:
    """Once as text, once as JSON; a data set is what the sample's metadata say, else the file."""
    faults = [
        fault for fault in FAULTS if not {"kto_tag", "label"} & fault[0].keys()
    ]  # it reads both
    samples = [
        s | ({"metadata": {"dataset": "even"}} if i % 2 == 0 else {})
        for i, (s, _, _) in enumerate(faults)
    ]
    path = write(tmp_path / "some.jsonl", samples)
    as_json = llava("data", "check", path, "--media", media, "--json")
    assert as_json.exit_code == 1
    report = json.loads(as_json.stdout)
    wrong = [sample["id"] for sample, kinds, _ in faults if kinds]
    assert report["samples"] == len(faults)
    assert report["errors"] == len(wrong)
    assert list(dict.fromkeys(fault["sample"] for fault in report["faults"])) == wrong
    assert list(report["data_sets"]) == ["even", "some"]
    for kind in KINDS:
        want = sum(kind in kinds for _, kinds, _ in faults)
        assert sum(counts[kind] for counts in report["data_sets"].values()) == want, kind
    printed = llava("data", "check", path, "--media", media)
    assert printed.exit_code == 1
    for fault in report["faults"]:
        assert f"{'error' if fault['error'] else 'warning'}: {fault['text']}\n" in printed.stdout
    assert "Token lengths were not checked" in printed.stdout
    (row,) = re.findall(r"│ even +│ +(\d+) │ +(\d+) │", printed.stdout)
    assert [int(number) for number in row] == [
        report["data_sets"]["even"][name] for name in ("samples", "errors")
    ]
    good = write(tmp_path / "good.json", [GOOD])
    assert llava("data", "check", good, "--media", media).exit_code == 0
    assert llava("data", "check", good).exit_code == 1  # there is no image next to the file


def test_duplicates_are_found_by_pixels_and_are_no_errors(media: Path, tmp_path: Path) -> None:
    again = llava_sample("again", "<image>\nWhat is it?", "Noise.", image="again.bmp")
    other = llava_sample("other words", "<image>\nWhat is it?", "Sound.", image="a.png")
    third = llava_sample("other image", "<image>\nWhat is it?", "Noise.", image="b.png")
    path = write(tmp_path / "twins.json", [GOOD, again, other, third])
    as_json = llava("data", "check", path, "--media", media, "--json")
    assert as_json.exit_code == 0
    (fault,) = json.loads(as_json.stdout)["faults"]
    assert (fault["sample"], fault["kind"], fault["error"]) == ("again", "duplicate", False)
    assert fault["text"].endswith("as sample good")
    write(path, [GOOD, GOOD, other])
    (fault,) = json.loads(llava("data", "check", path, "--media", media, "--json").stdout)["faults"]
    assert fault["text"].startswith("sample good (2 of twins.json) has")
    assert fault["text"].endswith("as sample good (1 of twins.json)")


def test_lengths_are_those_of_training(model: Path, media: Path, tmp_path: Path) -> None:
    processor = Processor.from_folder(model)
    samples = [sample for sample, kinds, _ in FAULTS if not kinds]
    rows = [datasets.RawSample(sample, media, sample["id"], "set") for sample in samples]
    for row, found in zip(rows, validate(rows, processor), strict=True):
        assert found.tokens == len(processor.example(*row.messages()))
    lengths = {found.row.name: found.tokens for found in validate(rows, processor)}
    limit = lengths["good"]
    assert limit is not None
    short = [found.row.name for found in validate(rows, processor, limit - 1) if not found.error]
    assert short == [
        name for name, length in lengths.items() if length is not None and length < limit
    ]
    assert "good" in [
        found.row.name for found in validate(rows, processor, limit) if not found.error
    ]
    path = write(tmp_path / "a.json", [GOOD])
    listed = llava("data", "check", path, "--media", media, "-m", model, "--tokens", limit - 1)
    assert listed.exit_code == 1
    assert (
        f"sample good has {limit} tokens, more than the {limit - 1} of a batch: raise --tokens"
        in listed.stdout
    )
    far = write(tmp_path / "far.json", [llava_sample("far", "word " * 5000, "x")])
    assert (
        "more than the 4,096 of the context"
        in llava("data", "check", far, "-m", model, "--tokens", 99999).stdout
    )
    with pytest.raises(ValueError, match="name one with -m"):
        raise llava("data", "check", path, "--tokens", 9).exception or AssertionError
    with pytest.raises(ValueError, match=r"--seed is for \.yaml"):
        raise llava("data", "check", path, "--seed", 1).exception or AssertionError


def tune(
    model: Path,
    source: Path,
    out: Path,
    media: Path,
    say: Callable[[str], None] = print,
    **more: Any,
) -> None:
    settings = {"steps": 2, "lr": 1e-3, "save_every": 1, "log_every": 1, "workers": 0, **more}
    run(Recipe(model=str(model), source=source, media=media, **settings), out, log=say)


def test_training_refuses_errors_or_lists_what_it_leaves_out(
    model: Path, media: Path, tmp_path: Path
) -> None:
    samples = [sample for sample, _, _ in FAULTS]
    wrong = [sample["id"] for sample, kinds, _ in FAULTS if kinds]
    path = write(tmp_path / "some.json", samples)

    def left_out(out: str, **more: Any) -> list[str]:
        said: list[str] = []
        tune(model, path, tmp_path / out, media, said.append, **more)
        return said

    with pytest.raises(
        DataError,
        match=rf"^{len(wrong)} of {len(samples)} samples have errors: .*sample no turns.*; and \d+ more",
    ):
        left_out("refused")
    assert sorted(path.name for path in (tmp_path / "refused").iterdir()) == [".lock", "data"]
    said = left_out("skipped", skip_errors=True)
    left = [line for line in said if line.startswith("left out: ")]
    assert len(left) == len(wrong)
    for name, line in zip(wrong, left, strict=True):
        assert f"sample {name} " in line or f"sample {name}: " in line
    assert f"{len(wrong)} of {len(samples)} samples were left out" in said
    write(path, [sample for sample in samples if sample["id"] in wrong])
    with pytest.raises(DataError, match="nothing is left to train on"):
        left_out("nothing", skip_errors=True)
    write(path, [GOOD])
    with pytest.raises(
        DataError,
        match=r"1 of 1 samples have errors: sample good has \d+ tokens, more than the 20 of a batch",
    ):
        left_out("long", tokens=20)


def test_a_run_resumes_with_its_own_data_only(model: Path, media: Path, tmp_path: Path) -> None:
    """A sample that was broken at the first start and is whole at the second would move all
    others.
    """
    path = write(tmp_path / "some.json", [GOOD])
    tune(model, path, tmp_path / "out", media)
    tune(model, path, tmp_path / "out", media)
    write(path, [GOOD, FAULTS[1][0]])
    with pytest.raises(DataError, match=r"run on other data \(1 samples there, 2 here"):
        tune(model, path, tmp_path / "out", media)


def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "a\u2028b"}\n\n{"id": 2}\n')
    assert [sample["id"] for sample in formats.read(path)] == [1, 2]
    path.write_text('{"id": 1}\n\n{"id": 2,}\n')
    with pytest.raises(DataError, match=r"line 3 of .*a\.jsonl is not JSON"):
        list(formats.read(path))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.json is not JSON"):
        list(formats.read(tmp_path / "deep.json"))


def test_the_help_imports_no_torch() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "sys.argv = ['llava', 'data', 'check', '--help']; from llava_interleave.cli import main; "
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def rows_of(path: Path, samples: list[dict[str, Any]], **more: Any) -> list[datasets.RawSample]:
    return datasets.rows(write(path, samples), **more)


USER = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}
TOLD = {"role": "assistant", "content": "x"}
CHATS: list[tuple[str, dict[str, Any], list[str], str]] = [
    # name, sample, the files that are seen in order, the kind of its fault
    ("OpenAI", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}}, {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": "a.png"}}]}, TOLD]}, ["b.png", "a.png"], ""),
    ("paths", {"messages": [{"role": "user", "content": [
        {"type": "image", "path": "b.png"}, {"type": "image", "image": "c.png"}, {"type": "image", "url": "a.png"}]}, TOLD]},
        ["b.png", "c.png", "a.png"], ""),
    ("views", {"messages": [{"role": "user", "content": [
        {"type": "views", "views": [{"name": "top", "image": "b.png"}, "a.png"]},
        {"type": "views", "views": {"back": "c.png"}}]}, TOLD]}, ["b.png", "a.png", "c.png"], ""),
    ("columns", {"messages": [USER, TOLD], "images": ["b.png"]}, ["b.png"], ""),
    ("table", {"conversations": None, "id": None, "video": None, "image": None, "images": ["c.png"], "messages": [
        {"from": None, "value": None, "name": None, **USER}, TOLD]}, ["c.png"], ""),
    ("bytes", {"messages": [USER, TOLD], "images": [{"bytes": None, "path": "c.png"}]}, ["c.png"], ""),
    ("marks", {"messages": [{"role": "user", "content": "<image> or <image>?"}, TOLD], "images": ["b.png", "a.png"]},
        ["b.png", "a.png"], ""),
    ("index", {"messages": [{"role": "user", "content": [
        {"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0, "text": None},
        {"type": "text", "index": None, "text": "?"}]}, TOLD], "images": ["a.png", "c.png"]}, ["c.png", "a.png"], ""),
    ("both columns", {"messages": [{"role": "user", "content": [
        {"type": "video"}, {"type": "image"}, {"type": "text", "text": "?"}]}, TOLD],
        "images": ["b.png"], "videos": ["clip.mp4"]}, ["clip.mp4", "b.png"], ""),
    ("animation", {"messages": [{"role": "user", "content": [{"type": "video", "path": "clip.gif"}]}, TOLD]}, ["clip.gif"], ""),
    ("both and marks", {"messages": [{"role": "user", "content": "<image> <image>"}, TOLD],
        "images": ["b.png"], "videos": ["clip.mp4"]}, [], "placeholders"),
    ("unlike columns", {"messages": [{"role": "user", "content": [{"type": "video"}, {"type": "image"}]}, TOLD],
        "images": ["b.png", "a.png"]}, [], "placeholders"),
    ("no column", {"messages": [USER, TOLD]}, [], "placeholders"),
    ("surplus", {"messages": [{"role": "user", "content": [{"type": "image", "index": 0}]}, TOLD],
        "images": ["a.png", "b.png"]}, [], "placeholders"),
    ("far index", {"messages": [{"role": "user", "content": [{"type": "image", "index": 1}]}, TOLD],
        "images": ["a.png"]}, [], "placeholders"),
    ("index from the end", {"messages": [{"role": "user", "content": [{"type": "image", "index": -1}]}, TOLD],
        "images": ["a.png"]}, [], "placeholders"),
    ("missing", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "n.png"}]}, TOLD]}, [], "media"),
    ("empty parts", {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": " "}]}],
        "images": ["a.png"]}, [], "empty"),
    ("weight", {"messages": [{"role": "user", "content": "a"}, {**TOLD, "weight": "2"}]}, [], "form"),
    ("tools", {"messages": [{"role": "user", "content": "a"}, TOLD], "tools": [{"type": "function"}]}, [], "form"),
    ("unknown part", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, TOLD]}, [], "form"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sample", "files", "kind"), [chat[1:] for chat in CHATS], ids=[chat[0] for chat in CHATS]
)
def test_messages_of_openai_and_of_hugging_face(
    sample: dict[str, Any], files: list[str], kind: str, model: Path, media: Path, tmp_path: Path
) -> None:
    """What the processor is handed: exactly these images in this order, and every fault by its
    kind and the line.
    """
    processor = Processor.from_folder(model)
    (row,) = rows_of(tmp_path / "chat.jsonl", [sample], media=media)
    (found,) = validate([row], processor)
    assert [fault.kind for fault in found.faults] == ([kind] if kind else [])
    if kind:
        assert "sample 1 of chat.jsonl" in found.faults[0].text
        return
    made = processor.example(*row.messages())
    want = [
        processor.example([{"role": "user", "content": [part(media / file)]}, TOLD]).media[0].key
        for file in files
    ]
    assert [item.key for item in made.media] == want
    assert found.tokens == len(made)


def part(path: Path) -> dict[str, Any]:
    return {"type": "video" if path.stem == "clip" else "image", "path": path}


def test_a_mixture_takes_what_the_original_takes(tmp_path: Path) -> None:
    for name, count in (("a", 7), ("b", 5)):
        write(
            tmp_path / f"{name}.json", [llava_sample(f"{name}{i}", "q", "x") for i in range(count)]
        )

    def names(strategy: str, seed: int = 0) -> list[str]:
        text = f"datasets:\n  - json_path: a.json\n    sampling_strategy: {strategy}\n  - json_path: b.json\n"
        (tmp_path / "mixture.yaml").write_text(text)
        found = [row.name for row in datasets.rows(tmp_path / "mixture.yaml", seed=seed)]
        assert found[-5:] == [f"b{i}" for i in range(5)]
        return found[:-5]

    whole = [f"a{i}" for i in range(7)]
    assert names("all") == whole
    assert names("first:2") == whole[:2]
    assert names("end:2") == whole[-2:]
    assert names("first:30%") == whole[:3]  # 2.1, rounded up
    assert names("end:1%") == whole[-1:]
    assert names("first:100") == names("end:200%") == whole
    drawn = names("random:3")
    assert len(set(drawn)) == 3
    assert set(drawn) <= set(whole)
    assert drawn == names("random:3")
    assert len({tuple(names("random:3", seed)) for seed in range(8)}) > 1
    for slip in ("30%", "end:0", "frist:3", "first:-1", "first:1.5", "3"):
        with pytest.raises(
            DataError, match=r"data set 1 of .*mixture\.yaml has the sampling_strategy"
        ):
            names(slip)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("datasets: []", "must have one key"),
        ("- json_path: a.json", "must have one key"),
        ("datasets:\n  - json_path: a.json\nweights: {}", "must have one key"),
        ("datasets:\n  - path: a.json", "data set 1 of .* has no `json_path`"),
        (
            "datasets:\n  - json_path: a.json\n    image_root: x",
            "has image_root, which is not supported",
        ),
        ("datasets:\n  - json_path: a.json", r"a\.json cannot be read"),
        (
            "datasets:\n  - json_path: a.csv",
            r"a\.csv is not a \.json, \.jsonl, \.parquet, \.tar or \.yaml file and not a folder",
        ),
        ("datasets: [", "cannot be read as YAML"),
        ("datasets: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_invalid_mixtures(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "mixture.yml").write_text(text)
    with pytest.raises(DataError, match=error):
        datasets.rows(tmp_path / "mixture.yml")


def tree(root: Path, *paths: str) -> Path:
    """Files below `root`: texts say their name, all others are images that differ."""
    for number, name in enumerate(paths):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text(f"{path.stem}!\n")
        else:
            noise(100 + number).save(path)
    return root / paths[0].split("/")[0]


def fields(row: datasets.RawSample) -> tuple[str, list[str], str]:
    question, answer = (turn["value"] for turn in row.sample["conversations"])
    assert question.count("<image>") == max(1, len(row.sample["image"]))
    return row.name, row.sample["image"], answer


def test_folders(tmp_path: Path) -> None:
    classes = tree(
        tmp_path,
        "pets/polar_bear/10.jpg",
        "pets/polar_bear/9.png",
        "pets/cat/a.jpg",
        "pets/.cache/x.png",
    )
    found = datasets.rows(classes)
    assert [fields(row) for row in found] == [
        ("cat/a.jpg", ["cat/a.jpg"], "cat"),
        ("polar_bear/9.png", ["polar_bear/9.png"], "polar bear"),
        ("polar_bear/10.jpg", ["polar_bear/10.jpg"], "polar bear"),
    ]
    assert [row.group for row in found] == ["cat", "polar_bear", "polar_bear"]
    notes = tree(tmp_path, "notes/a.jpg", "notes/a.txt", "notes/b.png", "notes/c.txt")
    found = datasets.rows(notes, question="Who?")
    assert [fields(row) for row in found] == [
        ("a.jpg", ["a.jpg"], "a!"),
        ("b.png", ["b.png"], ""),
        ("c.txt", [], "c!"),
    ]
    assert {row.sample["conversations"][0]["value"] for row in found} == {"<image>\nWho?"}
    kinds = [[fault.kind for fault in one.faults] for one in validate(found)]
    assert kinds == [[], ["empty"], ["placeholders"]]
    albums = tree(
        tmp_path,
        "albums/x/2.jpg",
        "albums/x/10.jpg",
        "albums/x/t.txt",
        "albums/y/1.jpg",
        "albums/z/u.txt",
    )
    found = datasets.rows(albums)
    assert [fields(row) for row in found] == [
        ("x", ["x/2.jpg", "x/10.jpg"], "t!"),
        ("y", ["y/1.jpg"], ""),
        ("z", [], "u!"),
    ]
    assert [[fault.kind for fault in one.faults] for one in validate(found)] == [
        [],
        ["empty"],
        ["placeholders"],
    ]
    (classes / "cat" / "list.csv").write_text("x")
    assert [one.row.name for one in validate(datasets.rows(classes)) if one.error] == [
        "cat/list.csv"
    ]
    (albums / "y" / "one.txt").touch()
    (albums / "y" / "two.txt").touch()
    with pytest.raises(
        DataError, match=r"y holds 2 \.txt files: a folder is read in one of three forms"
    ):
        datasets.rows(albums)
    (classes / "loose.png").touch()
    with pytest.raises(DataError, match="holds 2 folders and 1 files: a folder is read"):
        datasets.rows(classes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds 0 folders and 0 files"):
        datasets.rows(tmp_path / "empty")


def test_a_split_is_of_every_class_and_the_same_again() -> None:
    groups = {"a": range(40), "b": range(40, 50)}
    held = datasets.held_out(groups, 0.2, 0)
    assert held == datasets.held_out(groups, 0.2, 0)
    assert [sum(number in members for number in held) for members in groups.values()] == [8, 2]
    assert held != datasets.held_out(groups, 0.2, 1)
    assert datasets.held_out(groups, 0, 0) == []


def test_data_are_validated_once_and_known_again_by_content(model: Path, tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    for name in "bc":
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "a.png").read_bytes())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    samples = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in "abc"]
    source = write(tmp_path / "s.json", samples)
    given = Recipe(model=str(model), source=source, steps=1, workers=0)
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    given = given.but({"model": str(folder)})

    def go(changes: dict[str, Any] = {}) -> str:  # noqa: B006  not changed
        said: list[str] = []
        run(given.but(changes), tmp_path / "out", log=said.append)
        return "\n".join(said)

    first = go()
    assert "reading 3 samples" in first
    assert "2 samples have the same text and media as another one" in first
    assert "3 samples, validated before" in go()
    os.utime(tmp_path / "a.png")
    assert "reading 3 samples" in go()  # and found to be the same
    assert "3 samples, validated before" in go({"log_every": 2})
    kept = tmp_path / "kept"
    assert "reading 3 samples" in go({"data_cache": kept})
    assert "validated before" in go({"data_cache": kept})
    about = (tmp_path / "b.png").stat()
    noise(2).save(tmp_path / "b.png")
    os.utime(tmp_path / "b.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(
        DataError, match=r"on other data \(3 samples there, 3 here, or as many with"
    ):
        go()
    noise(1).save(tmp_path / "b.png")
    go()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=r"from another .*: model\.safetensors differs"):
        go()


def test_processes_validate_as_threads_do(
    model: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, with errors, duplicates and pairs among the samples."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    names = ["a.png", "b.png", "c.png"]
    samples = [
        {"id": n % 40, "image": names[n % len(names)], "messages": [USER, ANSWER]}
        | ({"colour": 1, "label": True} if n % 50 == 7 else {})
        for n in range(300)
    ]
    source, processor = write(media / "many.json", samples), formats.processor(model)
    listed = datasets.rows(source)
    one = list(validate(listed, processor))
    monkeypatch.setattr(validating, "PROCESSES_FROM", 10)
    file = RowFile.write(tmp_path / "rows", datasets.samples(source))
    assert list(file) == listed
    two = list(validate(file, processor))
    assert [(a.row.name, a.faults, a.tokens, a.images, a.digest) for a in one] == [
        (a.row.name, a.faults, a.tokens, a.images, a.digest) for a in two
    ]
    assert sum(a.error for a in one) == 6
    assert {stat.path for a in two for stat in a.media} == {str(media / name) for name in names}


def test_the_label_of_kto_comes_back_from_a_process(
    model: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it two equal answers would be a fault, as those of a preference pair are."""
    turns = [{**USER, "content": "What?"}, ANSWER]
    samples = [{"messages": turns, "label": n == 0, "id": n} for n in range(2)]
    labelled = datasets.mismatched(datasets.samples(write(media / "kto.json", samples)))
    file = RowFile.write(tmp_path / "rows", labelled)
    reader = validating._SampleReader(formats.processor(model), 8192, SampleFormat(), False)
    monkeypatch.setattr(validating, "_work", (file, reader))
    chunk = validating._read_chunk(0)
    assert [one.row.sample for one, _ in chunk] == [{datasets.KTO_LABEL: n < 2} for n in range(4)]
    monkeypatch.setattr(validating, "_chunks", lambda *_: nullcontext(iter([chunk])))
    assert not any(one.error for one in validate(file))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_of_the_validation_is_an_error(
    model: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own Pool waits for its result for ever."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(validating, "PROCESSES_FROM", 10)
    monkeypatch.setattr(validating, "AHEAD", 2)  # of three chunks: the last one is never read
    sample = {"image": "a.png", "messages": [USER, ANSWER]}
    source = write(media / "more.json", [sample | {"id": n} for n in range(600)])
    file = RowFile.write(tmp_path / "rows", datasets.samples(source))
    checked = validate(file, formats.processor(model))
    next(checked)
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that validates samples was killed"):
        list(checked)


def test_plain_samples_are_read_as_all_others(media: Path) -> None:
    """The short way for M4-Instruct's form is taken by faultless samples alone."""
    human, gpt = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}
    plain: list[dict[str, Any]] = [
        {"id": 1, "image": "a.png", "conversations": [human, gpt]},
        {"sample_id": "x", "image": ["a.png"], "conversations": [human, gpt], "metadata": {}},
        {"image": "a.PNG", "conversations": [{**human, "value": "What <image>"}, gpt]},
        {"conversations": [{**human, "value": "Hm?"}, gpt, {**human, "value": "Oh?"}, gpt]},
        {"image": None, "conversations": [{**human, "value": "Hm?"}, gpt]},
        {
            "image": ["a.png", "b.png"],
            "conversations": [{**human, "value": "<image><image>?"}, gpt],
        },
    ]
    first = plain[0]
    others: list[dict[str, Any]] = [
        first | {"weight": 2},
        first | {"imgae": "b.png"},
        first | {"image": ["a.png", "b.png"]},
        first | {"image": "http://x/a.png"},
        first | {"image": "a.mp4"},
        first | {"image": [b"bytes"]},
        first | {"image": 3},
        {"image": 0, "conversations": [{**human, "value": "Hm?"}, gpt]},
        first | {"conversations": []},
        first | {"conversations": [human]},
        first | {"conversations": [gpt, human]},
        first | {"conversations": [human, {**gpt, "value": " "}]},
        first | {"conversations": [human, {**gpt, "value": 1}]},
        first | {"conversations": [human, {**gpt, "loss": False}]},
        first | {"conversations": [{**human, "value": "What?"}, {**gpt, "value": "<image>!"}]},
        first | {"conversations": [{**human, "value": "<video>What?"}, gpt]},
        {"image": "a.png", "messages": [USER, ANSWER]},
    ]
    for sample in plain:
        short, long = formats.plain_turns(sample), formats.reading(sample, media)
        assert short and not long.faults and not long.ignored
        assert short[0] == [message["content"] for message in long.messages]
        assert [media / name for name in short[1]] == long.media
    assert not any(map(formats.plain_turns, others))


@pytest.mark.parametrize("onevision", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_plain_samples_are_validated_as_all_others(
    model: Path, media: Path, tmp_path: Path, ratio: float, onevision: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The same tokens, digests and faults; also of OneVision's tiles."""
    if onevision:
        model = tiny_checkpoint(tmp_path / "onevision", tiny_onevision_config())
    form = SampleFormat(images_first_ratio=ratio)
    questions = [
        "<image>What?", "Look at <image> and\n<image>. <image>!", "<image><image>", "Is <image>",
        "<image>\n <image>", "A <image>? b <image>", "Hm?", "<im<image>age> <image>", "é <image>",
        "<image> x\n<image>", "<|im_end|><image>", ") <image><image>", "<image>" * 9,
    ]  # fmt: skip
    samples = [
        {
            "id": number,
            "image": [("a.png", "b.png", "gone.png" if number == 1 else "a.png")[i % 3]
                      for i in range(question.count("<image>"))],
            "conversations": [
                {"from": "human", "value": question}, {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "And?" + question.replace("<image>", "")},
                {"from": "gpt", "value": " <|im_start|>Two\n"},
            ],
        }
        for number, question in enumerate(questions)
    ]  # fmt: skip
    rows = datasets.rows(write(media / "plain.json", samples))
    whole = partial(validate, rows, formats.processor(model), form=form, decode=False)
    limit = max(one.tokens or 0 for one in whole()) - 1
    reader = partial(whole, tokens=limit)
    short = list(reader())
    monkeypatch.setattr(validating._SampleReader, "_plain", lambda *_: None)
    long = list(reader())
    assert {s for one in short for s in one.media} == {s for one in long for s in one.media}
    assert [replace(one, media=()) for one in short] == [replace(one, media=()) for one in long]
    assert {fault.kind for one in short for fault in one.faults} == {
        "media",
        "long",
        "placeholders",
    }


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"quality": 30}]
)
def test_a_plain_jpeg_is_one_that_the_decoder_opens(options: dict[str, Any]) -> None:
    """Also with bytes of its header changed at random, or cut short."""
    file, loader, random = BytesIO(), Loader(), Random(0)
    noise(0).resize((61, 37)).save(file, "JPEG", **options)
    whole = file.getvalue()
    assert plain_jpeg(whole) == (61, 37) and loader.image_size(whole) == (61, 37)
    assert not plain_jpeg(whole[:-2]) and not plain_jpeg(whole + b"more")
    known = 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(random.randint(1, 2)):
            data[random.randrange(2, 640)] = random.randrange(256)
        size = plain_jpeg(bytes(data))
        if size and max(size) < 100 * min(size):
            assert loader.image_size(bytes(data)) == size
            known += 1
    assert known > 300


@pytest.mark.parametrize(
    "form", ["parquet", "arrow", "tar", "two tars", "remote parquet", "remote tars"]
)
def test_images_in_shards_are_those_of_files(form: str, model: Path, tmp_path: Path) -> None:
    """Equal texts, pixels and tokens; a run trains on them. Remote ones are in fsspec's memory."""
    samples: list[dict[str, Any]] = []
    for number in range(7):
        images = [f"{number}.{i}.png" for i in range(1 + number % 3)]
        for name in images:
            noise(len(samples) * 10 + len(name)).save(tmp_path / name)
        turn = {"from": "human", "value": "<image>" * len(images) + "What?"}
        turns = [turn, {"from": "gpt", "value": f"Number {number}."}]
        samples.append({"id": str(number), "image": images, "conversations": turns})
    listed = list(
        validate(datasets.rows(write(tmp_path / "s.json", samples)), formats.processor(model))
    )
    if form.endswith(("parquet", "arrow")):
        source = tmp_path / "s.parquet"
        rows = [
            {**sample, "image": None}
            | {"images": [{"bytes": (tmp_path / name).read_bytes(), "path": name}
                          for name in sample["image"]]}
            for sample in samples
        ]  # fmt: skip
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, source, row_group_size=3)
        if form == "arrow":  # the files of `Dataset.save_to_disk(folder, num_shards=2)`
            source = tmp_path / "saved"
            source.mkdir()
            names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
            for name, part in zip(names, (table.slice(0, 4), table.slice(4)), strict=True):
                with pyarrow.ipc.new_stream(source / name, table.schema) as stream:
                    stream.write_table(part, max_chunksize=3)
            listed_files = [{"filename": name} for name in names]
            (source / "state.json").write_text(json.dumps({"_data_files": listed_files}))
    else:
        source = tmp_path / ("s-*.tar" if form.endswith("tars") else "s.tar")
        shares = [samples[:4], samples[4:]] if form.endswith("tars") else [samples]
        for place, share in enumerate(shares):
            with tarfile.open(tmp_path / source.name.replace("*", str(place)), "w") as tar:
                for sample in share:
                    (tmp_path / f"{sample['id']}.json").write_text(json.dumps(sample))
                    for name in (f"{sample['id']}.json", *sample["image"]):
                        tar.add(tmp_path / name, name)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    if form.startswith("remote"):
        memory = fsspec.filesystem("memory")
        for path in tmp_path.glob(source.name):
            memory.put_file(path, f"/{tmp_path.name}/{path.name}")
            path.unlink()
        source = Path(f"memory://{tmp_path.name}/{source.name}").absolute()
    found = list(validate(datasets.rows(source), formats.processor(model)))
    assert [(a.row.name, a.faults, a.tokens, a.images, a.digest) for a in found] == [
        (a.row.name, a.faults, a.tokens, a.images, a.digest) for a in listed
    ]
    given = Recipe(model=str(model), source=source, epochs=2, workers=0, tokens=400)
    said: list[str] = []
    run(given, tmp_path / "out", log=said.append)
    assert "7 samples to train on, 0 held out" in said
    run(given.but({"log_every": 1}), tmp_path / "out", log=said.append)
    assert "7 samples, validated before" in said
    if form == "arrow":
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
        with pytest.raises(DataError, match="has the splits saved: name the folder of one"):
            datasets.rows(tmp_path)
        (source / names[1]).write_bytes(b"no arrow")
        with pytest.raises(DataError, match=r"00001-of-00002\.arrow cannot be read as Arrow"):
            datasets.rows(source)
        return
    with pytest.raises(DataError, match=r"cannot be read|there is no file"):
        datasets.rows(source.with_name(f"none{source.suffix}"))


def test_captions_in_a_tar_and_what_it_lacks(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("Noise.\n")
    (tmp_path / "b.json").write_text('{"image": "b.png", "conversations": []}')
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.jpg", "a.txt"):
            tar.add(tmp_path / name, name)
    (row,) = datasets.rows(tmp_path / "s.tar")
    messages, media = row.messages()
    assert messages[1]["content"] == "Noise."
    assert media == [(tmp_path / "a.jpg").read_bytes()]
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        tar.add(tmp_path / "b.json", "b.json")
    with pytest.raises(DataError, match=r"s\.tar/b has no file \.png, which its image names"):
        datasets.rows(tmp_path / "s.tar")
    with pytest.raises(DataError, match="there is no file"):
        datasets.rows(tmp_path / "none-*.tar")


def test_a_list_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{"id": n, "text": "x" * (n % 50), "list": ["]", {}]} for n in range(200)]
    for indent in (None, 2):
        path = tmp_path / "some.json"
        path.write_text(" " + json.dumps(samples, indent=indent) + "\n")
        for size in (8, 37, 100_000):
            monkeypatch.setattr(formats, "BLOCK", size)
            assert list(formats.read(path)) == samples
    for text in ('[{"a": 1}, {"b": ]', '[{"a": 1} {"b": 2}]', '[{"a": 1},]', '[{"a": 1}] 3', "[{"):
        path.write_text(text)
        monkeypatch.setattr(formats, "BLOCK", 8)
        with pytest.raises(DataError, match="is not JSON"):
            list(formats.read(path))
    for text in ("[]", " [ ] ", "3", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(DataError, match="must be a list of samples, and not empty"):
            list(formats.read(path))


def test_weights_say_how_often_samples_are_in_an_epoch(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 20)):
        rows = [{"id": f"{name}{i}", "messages": [USER, ANSWER]} for i in range(count)]
        write(tmp_path / f"{name}.json", rows)
    (tmp_path / "m.yaml").write_text(
        "datasets: [{json_path: a.json, weight: 2.5}, {json_path: b.json, weight: 0.25}]"
    )
    weights = np.array([row.weight for row in datasets.rows(tmp_path / "m.yaml")], "<f4")
    orders = [epoch_order(weights, None, seed).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        times = np.bincount(order, minlength=30)
        assert sorted(times[:10]) == [2] * 5 + [3] * 5
        assert sorted(times[10:]) == [0] * 15 + [1] * 5
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: a.json, weight: 0}]")
    with pytest.raises(DataError, match="has the weight 0; it is how often a sample is shown"):
        datasets.rows(tmp_path / "m.yaml")


def test_blocks_stay_near_each_other() -> None:
    """At most 16 blocks of a file that is read block by block are mixed."""
    blocks = np.repeat(np.arange(-1, 100), 50)
    order = epoch_order(np.ones(len(blocks), "<f4"), blocks, 3)
    assert sorted(order) == list(range(len(blocks)))
    shown = blocks[order]
    for number in range(100):
        at = np.flatnonzero(shown == number)
        assert at.max() - at.min() < 17 * 50
    apart = np.flatnonzero(shown == -1)
    assert apart.max() - apart.min() > 3000


def test_a_folder_is_trained_on_but_for_what_is_held_out(model: Path, tmp_path: Path) -> None:
    """The loss of the held-out part is that of the checkpoint before and of the result after;
    `llava batch` asks its file.
    """
    pets = tree(tmp_path, *(f"pets/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(4)))
    words = (
        "train",
        pets,
        "-o",
        tmp_path / "out",
        "-m",
        model,
        "--steps",
        12,
        "--lr",
        0.003,
        "--held-out",
        0.25,
    )
    done = llava(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "6 samples to train on, 2 held out" in done.output
    before, after = (
        float(loss) for loss in re.findall(r"step \d+ held out: +loss ([\d.]+)", done.output)
    )
    assert after < before
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "held-out.jsonl").read_text().splitlines()
    ]
    assert [line["truth"] for line in lines] == ["cat", "dog"]
    assert llava(*words).exit_code == 0  # finished: nothing is trained again
    answered = llava(
        "batch",
        tmp_path / "out" / "held-out.jsonl",
        tmp_path / "a.jsonl",
        "-m",
        model,
        "--max-new-tokens",
        2,
    )
    assert answered.exit_code == 0, answered.output
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [line["id"] for line in lines]
    assert not any("error" in answer for answer in answers)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("a.json", "--question", "Who?"), "leave out question"),
        (("pets", "--media", "."), "leave out media"),
        (("a.json", "--evaluate-every", 2), r"there are none: give held_out"),
        (("pets", "--held-out", 0.9), "hold out less"),
    ],
)
def test_options_that_do_not_fit_the_source(
    words: tuple[object, ...],
    error: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "pets/cat/1.png")
    write(tmp_path / "a.json", [llava_sample("a", "q", "x")])
    with pytest.raises(ValueError, match=error):
        raise (
            llava("train", *words, "-o", "out", "-m", model, "--steps", 1).exception
            or AssertionError
        )


def test_the_documentation_runs_and_its_forms_are_read(
    tmp_path: Path, media: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    files = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(files) == 13
    for name, text in files:
        (tmp_path / name).write_text(text)
        for image in re.findall(r'"(\w+\.png)"', text):
            noise(len(image)).save(tmp_path / image)
    (tmp_path / "clip.mp4").write_bytes((media / "clip.mp4").read_bytes())
    folders = [
        tree(tmp_path, *block.split())
        for block in re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]
    assert len(folders) == 3
    for source in [
        *(tmp_path / name for name, _ in files if name.endswith((".json", ".jsonl", ".yaml"))),
        *folders,
    ]:
        done = llava("data", "check", source)
        assert done.exit_code == 0, (source, done.output, done.exception)
    tree(
        tmp_path, *(f"photos/cat/{number}.jpg" for number in range(3, 12))
    )  # of fewer than six a tenth is none
    (tmp_path / "model").symlink_to(model)
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = "".join(block for block in blocks if "demo/" not in block)
    assert all(f" -r {name} " in commands for name in recipe.SHIPPED)
    for command in [
        *commands.splitlines(),
        re.sub(r"\s+", " ", re.findall(r"`(llava batch[^`]*)`", page)[0]),
    ]:
        words = shlex.split(command)[1:]
        trains = words[0] == "train" and words[1] != "report"
        done = llava(
            *words, *(("--workers", 0) if trains else ())
        )  # a process more for each would take most of the time
        assert done.exit_code == 0, (command, done.output, done.exception)
    section = page[page.index("## What is checked") : page.index("## Output files")]
    kinds = re.findall(r"^\| (\w+) \| [a-z]", section, re.MULTILINE)
    assert kinds[1:] == list(KINDS)
