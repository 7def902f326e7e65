"""The KV cache on disk: a conversation that is opened again answers as one that never ended; no
file does anything else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_interleave import checkpoints
from llava_interleave.chat import Answer, Chatbot, Conversation, kv_file, load
from llava_interleave.engine import SamplingParams
from llava_interleave.engine.kv_snapshot import KVSnapshot
from llava_interleave.engine.prefix_cache import HASH_BLOCK, CacheKey, MediaId
from llava_interleave.errors import DataError, OptionError
from llava_interleave.testing import tiny_checkpoint, tiny_config
from tests.helpers.cli import llava
from tests.helpers.engine import GREEDY, IMAGE, engine, naive, prompt, text
from tests.helpers.lora import DECODER, made

pytestmark = pytest.mark.slow

UNTIED = tiny_config(text={"tie_word_embeddings": False})
HOW: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "logprobs": 2}
KEPT = "talk.json.kv.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("saved") / "tiny", UNTIED)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(random.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    return sorted(folder.iterdir())


@cache
def bot_of(folder: Path, precision: str = "float32", kv: str = "auto") -> Chatbot:
    return load(folder, precision=precision, device="cpu", kv_precision=kv)


def fresh(bot: Chatbot) -> Chatbot:
    """As of a program that has just begun."""
    bot.engine.clear()
    return bot


def begun(bot: Chatbot, images: list[Path], **how: Any) -> Conversation:
    talk = fresh(bot).conversation()
    talk.attach(*images[:3])
    talk.ask("What is it?", **HOW | how)
    talk.attach(images[3])
    talk.ask("And this?", **HOW | how)
    return talk


def same(one: Answer, other: Answer) -> bool:
    """To the last bit of the log-probabilities."""
    return (one.tokens, one.logprobs, one.usage) == (other.tokens, other.logprobs, other.usage)


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_conversation_is_one_that_never_ended(
    tiny: Path, images: list[Path], tmp_path: Path, precision: str, kv: str
) -> None:
    bot = bot_of(tiny, precision, kv)
    talk = begun(bot, images)
    size = talk.save(tmp_path / "talk.json", kv=True)
    right = [talk.ask(question, **HOW) for question in ("More?", "Really?")]
    assert (
        size
        == (tmp_path / KEPT).stat().st_size
        > right[0].usage.cached * bot.engine.bytes_per_token
    )
    again = fresh(bot).resume(tmp_path / "talk.json")
    answers = [again.ask(question, **HOW) for question in ("More?", "Really?")]
    assert all(map(same, right, answers))
    assert answers[0].usage.cached > answers[0].usage.prompt - HASH_BLOCK
    bot.engine.check()
    cold = fresh(bot).resume(tmp_path / "talk.json", kv=False).ask("More?", **HOW)
    assert cold.usage.cached == 0
    assert precision != "float32" or cold.tokens == right[0].tokens


def test_the_file_is_safetensors_and_the_memory_itself(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    """Another program reads the same numbers; taken in, they are the file, not a copy of it, and
    can be written again.
    """
    bot = bot_of(tiny)
    begun(bot, images).save(tmp_path / "talk.json", kv=True)
    (kv,) = bot.engine._prefix_cache.idle
    assert kv.contiguous is not None
    theirs = load_file(tmp_path / KEPT)
    assert theirs.keys() - kv.contiguous.export_tensors(kv.length).keys() == {"about", "crc32"}
    assert all(
        torch.equal(theirs[name], tensor)
        for name, tensor in kv.contiguous.export_tensors(kv.length).items()
    )
    assert (tmp_path / KEPT).stat().st_mode & 0o777 == 0o600
    again = fresh(bot).resume(tmp_path / "talk.json")
    (kv,) = bot.engine._prefix_cache.idle
    assert kv.contiguous is not None
    assert (
        len(
            {
                tensor.untyped_storage().data_ptr()
                for tensor in kv.contiguous.export_tensors(kv.length).values()
            }
        )
        == 1
    )
    before = (tmp_path / KEPT).read_bytes()
    assert again.save(tmp_path / "talk.json", kv=True) == len(before)
    assert (tmp_path / KEPT).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.json", KEPT]


def test_undone_turns_are_not_saved(tiny: Path, images: list[Path], tmp_path: Path) -> None:
    bot = bot_of(tiny)
    talk = begun(bot, images)
    whole = saved_tokens(talk, tmp_path)
    assert talk.undo()
    cut = saved_tokens(talk, tmp_path)
    assert len(cut) < len(whole) and cut == whole[: len(cut)]
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 2
    assert talk.undo()
    assert talk.save(tmp_path / "talk.json", kv=True) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def saved_tokens(talk: Conversation, folder: Path) -> list[int]:
    assert talk.save(folder / "talk.json", kv=True)
    return kv_file.read(folder / KEPT, 1 << 30).metadata["tokens"]


def test_a_save_without_keys_and_values_leaves_none_of_another(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    talk = begun(bot_of(tiny), images)
    assert talk.save(tmp_path / "talk.json", kv=True)
    assert talk.save(tmp_path / "talk.json") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_only_what_follows_a_changed_image_is_computed(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    own = [tmp_path / path.name for path in images]
    for path, image in zip(own, images, strict=True):
        path.write_bytes(image.read_bytes())
    bot = bot_of(tiny)
    begun(bot, own).save(tmp_path / "talk.json", kv=True)
    own[1].write_bytes(own[4].read_bytes())
    warm = fresh(bot).resume(tmp_path / "talk.json").ask("More?", **HOW)
    second = bot.prompt(json.loads((tmp_path / "talk.json").read_text())["messages"]).media[1].start
    assert warm.usage.cached == second
    cold = fresh(bot).resume(tmp_path / "talk.json", kv=False).ask("More?", **HOW)
    assert (warm.tokens, warm.usage.prompt) == (cold.tokens, cold.usage.prompt)


def test_what_is_in_memory_no_more_is_not_written(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    bot = load(tiny, device="cpu", kv_bytes=300 * bot_of(tiny).engine.bytes_per_token)
    talk = begun(bot, images)
    whole = saved_tokens(talk, tmp_path)
    bot.ask("word " * 45, max_new_tokens=1)
    bot.engine.check()
    assert talk.save(tmp_path / "talk.json", kv=True) == 0
    assert not (tmp_path / KEPT).exists()
    talk.ask("More?", **HOW)
    assert len(saved_tokens(talk, tmp_path)) > len(whole)


def test_a_part_that_is_left_of_a_sequence_is_of_use() -> None:
    """Of the long one the memory holds what another one shares with it."""
    long, short = (
        prompt(text(0, 35), (0, 1), (1, 2), text(1, 20)),
        prompt(text(0, 35), (0, 1), (2, 1), text(2, 30)),
    )
    e, other = engine(), engine()
    e.generate([short], GREEDY)
    kept = e.save(e.cache_key(long))
    assert kept is not None and len(kept.metadata["tokens"]) == 44
    other.restore(kept)
    (answered,) = other.generate([long], GREEDY)
    assert (answered.usage.cached, answered.generated) == (44, naive(long, 12))
    other.check()


def test_a_prefix_is_cut_within_an_image() -> None:
    one, two = MediaId(7), MediaId(9)
    keys = CacheKey.of(
        [1, *[IMAGE] * 9, *[IMAGE] * 18, 2, *[IMAGE] * 9],
        [(1, 9, one), (10, 18, two), (29, 9, two)],
    )
    assert list(keys.media_spans()) == [(1, 9, 7), (10, 18, 9), (29, 9, 9)]
    assert list(keys.extended([], 12).media_spans()) == [(1, 9, 7), (10, 2, 9)]
    assert list(keys.extended([], 1).media_spans()) == []


def test_a_sequence_that_runs_is_written_as_far_as_it_is() -> None:
    """Here to the middle of an image."""
    inputs = prompt(text(0, 35), (0, 1), text(1, 20))
    e, other = engine(max_num_batched_tokens=40, max_num_seqs=4), engine()
    e.add(inputs, GREEDY)
    e.step()
    kept = e.save(e.cache_key(inputs))
    assert kept is not None and len(kept.metadata["tokens"]) == 40
    other.restore(
        KVSnapshot(kept.metadata, {name: tensor.clone() for name, tensor in kept.tensors.items()})
    )
    (answered,) = other.generate([inputs], GREEDY)
    assert (answered.usage.cached, answered.generated) == (40, naive(inputs, 12))
    other.restore(kept)  # what is there already is not kept twice
    other.check()
    assert other.load().kv_cached <= len(answered.tokens) + 256


def test_room_is_made_for_it_and_what_runs_is_not_disturbed() -> None:
    inputs = prompt(text(0, 60), (0, 1), text(1, 5))
    e = engine()
    e.generate([inputs], GREEDY)
    kept = e.save(e.cache_key(inputs))
    assert kept is not None
    small = engine(150)
    small.generate([prompt(text(5, 60))], GREEDY)
    small.restore(kept)
    small.check()
    assert small.generate([inputs], GREEDY)[0].usage.cached == len(inputs) - 1
    small = engine(140)
    running = small.add(prompt(text(6, 60)), GREEDY)
    small.step()
    with pytest.raises(
        DataError,
        match=r"no room for 74 tokens: there is KV memory for 140, of which \d+ are in use: raise kv_byt",
    ):
        small.restore(kept)
    while small.busy:
        small.step()
        small.check()
    assert running.generated == naive(prompt(text(6, 60)), 12)


def test_one_that_was_restored_may_be_pre_empted() -> None:
    inputs, other = prompt(text(0, 60), (0, 1), text(1, 5)), prompt(text(7, 60))
    e, small, how = engine(), engine(230), SamplingParams(max_new_tokens=60, ignore_eos=True)
    e.generate([inputs], GREEDY)
    kept = e.save(e.cache_key(inputs))
    assert kept is not None
    small.restore(kept)
    requests = [small.add(other, how), small.add(inputs, how)]  # who comes last gives way
    gave_way = False
    while small.busy:
        small.step()
        small.check()
        gave_way |= (
            requests[1].cached is not None
            and requests[1].kv is None
            and requests[1].finish_reason is None
        )
    assert gave_way and requests[1].usage.cached == 73
    assert [request.generated for request in requests] == [naive(other, 60), naive(inputs, 60)]


def test_what_is_written_after_it_does_not_change_the_file(tmp_path: Path) -> None:
    """Where there is room for a shorter sequence, the memory that is the file is written to."""
    long, short = (
        prompt(text(0, 40), (0, 1), text(1, 30)),
        prompt(text(0, 40), (0, 1), text(1, 12), text(2, 5)),
    )
    e, other = engine(), engine()
    e.generate([long], GREEDY)
    kept = e.save(e.cache_key(long))
    assert kept is not None
    kv_file.write(tmp_path / "kv", kept)
    before = (tmp_path / "kv").read_bytes()
    other.restore(kv_file.read(tmp_path / "kv", 1 << 30))
    (answered,) = other.generate([short], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert (answered.usage.cached, answered.generated) == (61, naive(short, 3))
    (kv,) = other._prefix_cache.idle
    assert (kv.length, kv.capacity) == (68, 79)
    assert (tmp_path / "kv").read_bytes() == before


def test_nothing_leaves_or_enters_under_a_salt_nor_enters_where_all_is_deterministic() -> None:
    """One tenant's cache is neither written nor filled from a file."""
    inputs = prompt(text(0, 40), (0, 1), text(1, 5))
    e = engine()
    secret = e.generate([inputs], GREEDY, salt=b"tenant")[0]
    assert e.save(e.cache_key(inputs)) is None
    with pytest.raises(OptionError, match="under a salt"):
        e.save(secret.cache_key)
    e.generate([inputs], GREEDY)
    kept = e.save(e.cache_key(inputs))
    assert kept is not None
    other = engine()
    other.restore(kept)
    assert other.generate([inputs], GREEDY, salt=b"tenant")[0].usage.cached == 0
    with pytest.raises(
        DataError, match="a batch-invariant engine cannot use a KV cache computed elsewhere"
    ):
        engine(batch_invariant=True).restore(kept)


def test_adapters_are_told_apart_by_their_numbers(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        checkpoints.write_adapter(tmp_path / name, made(tiny, DECODER, seed))
    first = load(tiny, device="cpu", adapters={"a": tmp_path / "a", "b": tmp_path / "b"})
    talk = begun(first, images, adapter="b")
    talk.save(tmp_path / "talk.json", kv=True)
    right = talk.ask("More?", adapter="b", **HOW)
    again = load(
        tiny,
        device="cpu",
        adapters={"other": tmp_path / "a", "mine": tmp_path / "b", "a": tmp_path / "a"},
    )
    assert same(again.resume(tmp_path / "talk.json").ask("More?", adapter="mine", **HOW), right)
    for name in (None, "other"):
        fresh(again)
        without = again.resume(tmp_path / "talk.json").ask("More?", adapter=name, **HOW)
        assert without.usage.cached == 0 and without.tokens != right.tokens
    alone = load(tiny, device="cpu", adapters={"b": tmp_path / "a"})
    with pytest.warns(
        UserWarning,
        match="with an adapter that is not loaded here; the conversation is there, but will be read",
    ):
        talk = alone.resume(tmp_path / "talk.json")
    assert len(talk.messages) == 4
    begun(bot_of(tiny), images).save(
        tmp_path / "talk.json", kv=True
    )  # and of the network alone, with adapters loaded
    assert again.resume(tmp_path / "talk.json").ask("More?", **HOW).usage.cached > 0


def test_what_was_computed_otherwise_is_refused_in_words(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    begun(bot_of(tiny), images).save(tmp_path / "talk.json", kv=True)
    deeper = tiny_checkpoint(
        tmp_path / "deeper", tiny_config(text={"tie_word_embeddings": False, "rope_theta": 1e4})
    )
    for bot, why in (
        (
            bot_of(tiny, "bfloat16"),
            "was computed in 'float32', this engine's is computed in 'bfloat16'",
        ),
        (bot_of(tiny, "int8"), "was computed in 'float32', this engine's is computed in 'int8'"),
        (
            bot_of(tiny, "float32", "int8"),
            "was stored in 'float32', this engine's is stored in 'int8'",
        ),
        (
            bot_of(tiny_checkpoint(tmp_path / "other", UNTIED, seed=1)),
            "was computed by another model",
        ),
        (bot_of(deeper), "was computed by another model"),
    ):
        with pytest.warns(
            UserWarning,
            match=rf"{KEPT}: .*{why}.*; the conversation is there, but will be read again",
        ):
            talk = fresh(bot).resume(tmp_path / "talk.json")
        assert talk.ask("More?", **HOW).usage.cached == 0
    again = bot_of(tiny)
    file = kv_file.read(tmp_path / KEPT, 1 << 30)
    kv_file.write(tmp_path / KEPT, KVSnapshot({**file.metadata, "version": 2}, file.tensors))
    with pytest.warns(UserWarning, match="this is not a llava-interleave KV cache of version 1"):
        fresh(again).resume(tmp_path / "talk.json")


def kept_by_engine() -> KVSnapshot:
    """Of 70 tokens: 40, an image of 9, a video of two frames of 9, 3 more."""
    e, inputs = engine(), prompt(text(0, 40), (0, 1), (1, 2), text(1, 4))
    e.generate([inputs], GREEDY)
    kept = e.save(e.cache_key(inputs).extended([], 70))
    assert kept is not None
    return kept


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": None},
        {"tokens": 7},
        {"tokens": [-5] * 70},  # would be the key of an image
        {"tokens": [64] * 70},  # beyond the vocabulary
        {"tokens": [True] * 70},
        {"tokens": [1.0] * 70},
        {"tokens": []},
        {"tokens": [1] * 70},  # no placeholders
        {"tokens": [1] * 71, "images": []},  # not as many as there are numbers
        {"images": None},
        {"images": [7]},
        {"images": [[40, 9, "00"]]},
        {"images": [[40, 27, 0]]},
        {"images": [[40, 27, "zz"]]},
        {"images": [[40, 1 << 62, "00"]]},
        {"images": [[40, 9, "00"], [49, -9, "00"], [49, 18, "00"]]},
        {"images": [[40, 70, "00"]] * 1000},
        {"images": [[0, 0, "00"]] * 100_000},
        {"adapter": ["a"]},
        {"adapter": "00"},
        {"model": {}},
        {"precision": "x" * 100_000},
        {"precision": "\x1b[2J"},
    ],
)
def test_what_a_file_tells_may_be_anything(changes: dict[str, Any]) -> None:
    kept, e = kept_by_engine(), engine()
    assert len(e.restore(kept).ids) == 70
    e.clear()
    with pytest.raises(DataError) as refused:
        e.restore(KVSnapshot({**kept.metadata, **changes}, kept.tensors))
    assert len(str(refused.value)) < 300 and str(refused.value).isprintable()
    e.check()
    assert e.load().kv_cached == 0


def without(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("values.1")


def surplus(tensors: dict[str, torch.Tensor]) -> None:
    tensors["keys.2"] = tensors["keys.1"]


def shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors["keys.0"] = tensors["keys.0"][..., :-1]


def turned(tensors: dict[str, torch.Tensor]) -> None:
    tensors["values.0"] = tensors["values.0"].transpose(0, 1)


def other_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors["keys.0"] = tensors["keys.0"].view(torch.uint8)[..., ::4]


@pytest.mark.parametrize("change", [without, surplus, shorter, turned, other_type])
def test_tensors_may_be_any(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    kept, e = kept_by_engine(), engine()
    tensors = dict(kept.tensors)
    change(tensors)
    with pytest.raises(
        DataError,
        match=r"for 70 tokens: 1 tensors differ in name, shape or dtype \(first: (keys|values)\.\d",
    ):
        e.restore(KVSnapshot(kept.metadata, tensors))
    e.check()
    assert e.load().kv_cached == 0


def test_files_that_hold_no_kv_cache(tiny: Path, images: list[Path], tmp_path: Path) -> None:
    """Cut anywhere, changed anywhere, or something else: told in words, and the conversation goes
    on.
    """
    bot, file = bot_of(tiny), tmp_path / KEPT
    begun(bot, images).save(tmp_path / "talk.json", kv=True)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def refused(why: str) -> None:
        with pytest.warns(UserWarning, match=why):
            talk = fresh(bot).resume(tmp_path / "talk.json")
        assert len(talk.messages) == 4
        bot.engine.check()
        assert bot.engine.load().kv_cached == 0

    for length in (0, 7, 8, header - 1, header, header + 1000, len(whole) - 5, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused("no intact safetensors file")
    for place in (header, header + 5000, len(whole) - 50, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused("is damaged: wrong checksum")
    few = torch.zeros(3, dtype=torch.uint8)
    for tensors, why in (
        ({"x": few}, "does not hold a KV cache"),
        ({"about": few}, "checksum"),
        ({"about": few, "crc32": few[:0].clone()}, "does not hold a KV cache"),
        ({"about": few, "keys.0": torch.zeros(2, dtype=torch.int64)}, "does not hold a KV cache"),
        ({"about": few, "keys.0": torch.tensor(1.0), "crc32": few.clone()}, "checksum"),
    ):
        save_file(tensors, file)
        refused(why)
    for about in (b"[" * 100_000, b"[]", b"\xff", b"{"):
        write_about(file, about)
        refused("description is not (a )?JSON")
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    refused(r"has 1,099,511,627,776 bytes, but the KV cache has room for")
    file.write_bytes(whole)
    assert fresh(bot).resume(tmp_path / "talk.json").ask("More?", **HOW).usage.cached
    file.unlink()
    os.mkfifo(file)  # would wait for a writer
    assert bot.resume(tmp_path / "talk.json").load_kv(tmp_path / "talk.json") == 0


def write_about(file: Path, about: bytes) -> None:
    """A file with the right checksum and this description of its KV cache."""
    tensors = {"about": about, "crc32": zlib.crc32(about).to_bytes(4, "little")}
    save_file(
        {
            name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for name, data in tensors.items()
        },
        file,
    )


def test_nan_in_a_kv_file_changes_no_other_answer(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    """A file with the right checksum may hold any floats; an answer comes to its end, and others
    are what they were.
    """
    bot = bot_of(tiny)
    begun(bot, images).save(tmp_path / "talk.json", kv=True)
    right = bot.ask("What?", images[4:], max_new_tokens=8, ignore_eos=True)
    file = kv_file.read(tmp_path / KEPT, 1 << 30)
    for odd in (float("nan"), float("inf"), 3e38):
        kv_file.write(
            tmp_path / KEPT,
            KVSnapshot(
                file.metadata, {n: torch.full_like(t, odd) for n, t in file.tensors.items()}
            ),
        )
        assert (
            fresh(bot)
            .resume(tmp_path / "talk.json")
            .ask("More?", max_new_tokens=8, ignore_eos=True)
            .usage.cached
        )
        bot.engine.check()
    assert (
        fresh(bot).ask("What?", images[4:], max_new_tokens=8, ignore_eos=True).tokens
        == right.tokens
    )


CHILD = """
import os, signal, sys
from llava_interleave.chat import kv_file, load
bot = load(sys.argv[1], device="cpu")
talk = bot.resume(sys.argv[2])
assert talk.ask("More?", max_new_tokens=8, ignore_eos=True).usage.cached
raw, calls = kv_file._raw, []
def killer(tensor):
    calls.append(tensor)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return raw(tensor)
kv_file._raw = killer
talk.save(sys.argv[2], kv=True)
"""


def test_a_kill_while_it_is_written_leaves_the_old_file_whole(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    """The words, written before, are the new ones; the KV cache is that of before, which
    are of use all the same.
    """
    bot = bot_of(tiny)
    begun(bot, images).save(tmp_path / "talk.json", kv=True)
    before = (tmp_path / KEPT).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tiny, tmp_path / "talk.json"], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / KEPT).read_bytes() == before
    again = fresh(bot).resume(tmp_path / "talk.json")
    assert len(again.messages) == 6
    assert again.ask("Really?", **HOW).usage.cached > 100


def test_a_disk_that_is_full_or_a_folder_that_is_missing(
    tiny: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = begun(bot_of(tiny), images)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kv_file, "write_tensors", full)
    with pytest.raises(DataError, match=rf"cannot write .*{KEPT}: No space left on device"):
        talk.save(tmp_path / "talk.json", kv=True)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 4
    with pytest.raises(DataError, match=r"cannot write .*nowhere.*: No such file or directory"):
        talk.save(tmp_path / "nowhere" / "talk.json")


def test_llava_chat_resumes_from_the_kv_file(
    tiny: Path, images: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    words = ("chat", "-m", tiny, "--max-new-tokens", 3)
    lines = f"/attach {images[0]} {images[1]}\nWhat is it?\n/save {file}\n"
    first = llava(*words, stdin=lines.encode())
    assert "MB of KV cache" in first.err, first.err
    second = llava(*words, "--resume", file, stdin=b"More?\n")
    assert "2 messages" in second.err and "tokens restored from the KV cache" in second.err
    other = llava(*words, "--resume", file, "--precision", "bfloat16", stdin=b"More?\n")
    assert other.code == 0 and "is prefilled again" in other.err and other.out
    for stdin in (f"/load {file}\nMore?\n/save\n".encode(), b""):
        third = llava(*words, "--no-kv", "--resume", file, stdin=stdin)
        assert third.code == 0 and "prefilled again" not in third.err
    assert third.out == "" and second.out
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
