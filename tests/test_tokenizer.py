"""Tokens equal transformers', control tokens in untrusted text stay text, and streams never cut a
character.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from llava_interleave.chat import BUILTIN
from llava_interleave.errors import CheckpointError, PromptError
from llava_interleave.processing import TextStream, Tokenizer
from llava_interleave.processing.processor_files import SPECIAL
from llava_interleave.testing import tiny_checkpoint

TEXTS = st.lists(
    st.sampled_from(
        [
            *SPECIAL,
            "\n",
            " ",
            "  ",
            "a",
            "Hello",
            "é",
            "e\u0301",
            "日本",
            "😀",
            "<|im",
            "_end|>",
            "'s",
        ]
    )
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS | st.text(st.characters(max_codepoint=127), max_size=40))
def test_words_have_the_tokens_of_their_text(tokenizer: Tokenizer, text: str) -> None:
    """Texts in ASCII are cut into words here, and by the library's pattern there."""
    assert tokenizer._by_words
    for one in (text, f"the  {text}\t1\n\n it's"):
        theirs = tokenizer.backend.encode(one, add_special_tokens=False).ids
        assert tokenizer.encode(one, special=False) == theirs


def test_added_tokens_that_are_words_stay_whole(folder: Path) -> None:
    backend = Tokenizer.from_folder(folder).backend
    backend.add_tokens(["tool call"])
    tokenizer = Tokenizer(backend)
    known = backend.token_to_id("tool call")
    assert known in tokenizer.encode("a tool call here", special=False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert not Tokenizer(backend)._by_words


@settings(deadline=None, max_examples=300)
@given(text=TEXTS | st.text())
def test_tokens_and_text_equal_transformers(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == theirs(text)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS | st.text())
def test_text_from_outside_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, special=False)
    assert not {*tokenizer.eos_ids, tokenizer.im_start, tokenizer.image_id} & set(ids)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text), skip_special=False)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_stream_adds_up_to_the_text_and_never_shows_half_a_character(
    tokenizer: Tokenizer, folder: Path, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 3)) | TEXTS.map(tokenizer.encode))
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == Backend.from_file(str(folder / "tokenizer.json")).decode(ids)


def test_emoji_appears_whole(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert [piece for token in tokenizer.encode("a😀b") if (piece := stream.push(token))] == [
        "a",
        "😀",
        "b",
    ]


def test_starts_are_character_indices(tokenizer: Tokenizer) -> None:
    text = "é😀<|im_end|>x <image>"
    ids, starts = tokenizer.encode_with_starts(text)
    assert {text[start:][:1] for start in starts} == {"é", "😀", "<", "x", " "}
    assert starts[ids.index(tokenizer.im_end)] == 2


def test_ids_without_meaning(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == tokenizer.image_id  # the placeholder is never an answer
    assert tokenizer.eos_ids == {tokenizer.im_end, tokenizer.encode("<|endoftext|>")[0]}
    assert tokenizer.decode([tokenizer.size + 500]) == ""


def test_threads_share_it(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>b" * 20
    expected = tokenizer.encode(text), tokenizer.encode(text, special=False)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: tokenizer.encode(text, special=i % 2 == 0), range(400)))
    assert all(ids == expected[i % 2] for i, ids in enumerate(found))


def test_half_a_surrogate_pair_is_an_error_of_the_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        tokenizer.encode("a\ud800")


def _original(folder: Path, to: Path) -> dict[str, Any]:
    """The files of a checkpoint in the original form: vocabulary and merges, no tokenizer.json, no
    <image>.
    """
    spec: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    (to / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]
    ]
    (to / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return spec


@pytest.mark.parametrize("config", [True, False])
def test_original_checkpoints_have_no_image_token(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, config: bool
) -> None:
    _original(folder, tmp_path)
    if config:
        values = json.loads((folder / "tokenizer_config.json").read_text())
        del values["added_tokens_decoder"][str(tokenizer.image_id)]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    ours = Tokenizer.from_folder(tmp_path, tokenizer.image_id)
    text = "<|im_start|>user\nHow many <image> are <|im_end|>?<|endoftext|>"
    assert ours.encode(text) == tokenizer.encode(text)
    assert (ours.size, ours.eos_ids) == (tokenizer.size, tokenizer.eos_ids)


def test_contradictions_are_refused_by_name(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=f"<image> is token {tokenizer.image_id} .* 7 in config.json"
    ):
        Tokenizer.from_folder(folder, 7)
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": []}))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"384": {"content": "<x>"}}}'
    )
    with pytest.raises(CheckpointError, match=r"no <\|im_start"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"9": {"content": "<x>"}}}'
    )
    with pytest.raises(CheckpointError, match=r"<x> is token 9 in tokenizer_config\.json but 384"):
        Tokenizer.from_folder(tmp_path)


def test_a_long_text_is_tokenized_without_the_interpreters_lock() -> None:
    """500,000 characters of no plain text held all other threads up for seconds."""
    tokenizer, text = Tokenizer.from_folder(BUILTIN), "\U000e0061\u0301é" * 60_000
    gaps: list[float] = []
    done = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.wait(0.001):
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    encoding = tokenizer._encode(text)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    assert encoding.ids == tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert max(gaps) < 0.7 * seconds


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        "\n",
        " \t",
        "1",
        "\u0301",
        "\u0315\u0300",
        "\u200d",
        "漢",
        "<|im_start|",
        "<image>",
        "'",
    ],
)
def test_tokenizing_is_linear_in_the_text(tiny: Path, piece: str) -> None:
    """Each kind of text that a regular expression or a normalizer may go back over."""
    tokenizer = Tokenizer.from_folder(tiny)

    def seconds(characters: int) -> float:
        text = piece * (characters // len(piece))
        times = []
        for _ in range(3):
            start = time.process_time()
            tokenizer.encode(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(80_000) < 4 * 4 * seconds(20_000) + 0.05  # quadratic: 16 times as long
