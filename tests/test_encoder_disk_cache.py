"""Image features on disk: equal to computed ones, never those of damaged files or other models."""

import contextlib
import os
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_interleave import Chatbot, load
from llava_interleave.chat.engine_driver import GenerationJob
from llava_interleave.engine.encoder_disk_cache import EncoderDiskCache
from llava_interleave.errors import DataError
from llava_interleave.model import Llava
from llava_interleave.options import Options

DEMO = Path(__file__).parent.parent / "llava_interleave" / "demo_files"
IMAGES = [DEMO / "before.png", DEMO / "after.png", DEMO / "clip.mp4"]
GIB = 1 << 30


def cache_of(bot: Chatbot) -> EncoderDiskCache:
    cache = bot.engine._runner.encoder_disk_cache
    assert cache is not None
    return cache


@pytest.fixture(scope="module")
def model() -> Llava:
    return load().model


def test_answers_are_those_without_a_cache(tmp_path: Path) -> None:
    """The second process computes no image; tokens and log-probabilities are the same bits."""
    options = Options(logprobs=3)
    plain = load().ask("What changed?", IMAGES, options)
    first = load(encoder_cache_dir=tmp_path)
    answer = first.ask("What changed?", IMAGES, options)
    assert (answer.text, answer.logprobs) == (plain.text, plain.logprobs)
    written = cache_of(first).misses
    assert cache_of(first).hits == 0 and written == len(list(tmp_path.rglob("*.features"))) > 2
    second = load(encoder_cache_dir=tmp_path)
    again = second.ask("What changed?", IMAGES, options)
    assert (again.text, again.logprobs) == (plain.text, plain.logprobs)
    assert (cache_of(second).hits, cache_of(second).misses) == (written, 0)
    assert second.engine._runner.crops_encoded == 0


def test_requests_with_a_salt_leave_nothing_on_disk(tmp_path: Path) -> None:
    """Images of an API key are private: neither written nor read, also if they are there."""
    bot = load(encoder_cache_dir=tmp_path)
    prompt = bot.prompt(bot.turn("What do you see?", IMAGES[:1]))
    bot.answer_jobs([GenerationJob(prompt, Options(), salt=b"key")])
    assert not list(tmp_path.rglob("*.features"))
    bot.ask("What do you see?", IMAGES[:1])
    (path,) = tmp_path.rglob("*.features")
    other = load(encoder_cache_dir=tmp_path)
    other.answer_jobs([GenerationJob(prompt, Options(), salt=b"key")])
    assert cache_of(other).hits == 0 and path.exists()


@pytest.mark.parametrize("damage", ["byte", "header", "short", "empty", "longer"])
def test_damaged_files_are_computed_again(tmp_path: Path, model: Llava, damage: str) -> None:
    cache = EncoderDiskCache(tmp_path, GIB, model)
    features = torch.randn(9, 192)
    cache.put((b"image", 0), features)
    (path,) = tmp_path.rglob("*.features")
    data = bytearray(path.read_bytes())
    if damage == "byte":
        data[100] ^= 1
    elif damage == "header":
        data[8] ^= 1
    path.write_bytes({"short": data[:-1], "empty": b"", "longer": data + b"x"}.get(damage, data))
    assert cache.get((b"image", 0)) is None
    assert not path.exists()
    cache.put((b"image", 0), features)
    read = cache.get((b"image", 0))
    assert read is not None and torch.equal(read, features)


def test_features_of_another_model_are_not_used(tmp_path: Path, model: Llava) -> None:
    EncoderDiskCache(tmp_path, GIB, model).put((b"image", 0), torch.randn(9, 192))
    weight = model.multi_modal_projector.linear_1.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1
        assert EncoderDiskCache(tmp_path, GIB, model).get((b"image", 0)) is None
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert EncoderDiskCache(tmp_path, GIB, model).get((b"image", 0)) is not None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "reopen"]), st.integers(0, 9), st.integers(1, 5)),
        max_size=40,
    )
)
def test_it_is_a_dict_that_forgets_the_least_recently_used(
    tmp_path_factory: pytest.TempPathFactory, model: Llava, steps: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    limit = 12_000
    cache = EncoderDiskCache(folder, limit, model)
    put: dict[int, torch.Tensor] = {}
    for action, name, rows in steps:
        key = (b"%d" % name, name)
        if action == "put":
            if cache.get(key) is None:
                put[name] = torch.full((rows, 192), float(name + rows))
                cache.put(key, put[name])
        elif action == "reopen":
            cache = EncoderDiskCache(folder, limit, model)
        elif (found := cache.get(key)) is not None:
            assert torch.equal(found, put[name])
        size = sum(path.stat().st_size for path in folder.rglob("*.features"))
        assert cache.bytes == size <= limit


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_share_a_folder(tmp_path: Path, model: Llava) -> None:
    """Also where they evict each other's files and damage them."""

    def work(seed: int) -> None:
        rng, cache = Random(seed), EncoderDiskCache(tmp_path, 20_000, model)
        for _ in range(300):
            number = rng.randrange(12)
            features = torch.full((2, 192), float(number))
            read = cache.get((b"%d" % number, 0))
            assert read is None or torch.equal(read, features)
            cache.put((b"%d" % number, 0), features)
            if rng.random() < 0.02:
                for path in list(tmp_path.rglob("*.features"))[:1]:
                    with contextlib.suppress(OSError):
                        path.write_bytes(path.read_bytes()[:-1] + b"x")

    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            try:
                work(seed)
                os._exit(0)
            except BaseException:  # noqa: BLE001  the child must not return
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert list(tmp_path.rglob("*.features")) and not list(tmp_path.rglob("*.part"))


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, model: Llava) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(DataError, match="cannot use"):
        EncoderDiskCache(file, GIB, model)
