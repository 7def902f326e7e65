"""Text to token ids and back, for Qwen2's byte-level BPE. Knows no chat format and no media."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Model

from ..config_json import read_json
from ..errors import CheckpointError, PromptError

IMAGE, VIDEO = "<image>", "<video>"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SHORT_TEXT, MAX_SHORT_TEXTS = 64, 1024
"""Characters of a text whose tokens are kept, and how many such texts: roles, the system prompt."""
MAX_WORD, MAX_WORDS = 64, 1 << 16
"""Characters of a word whose tokens are kept, and how many such words."""
LONG_TEXT = 20_000
"""Characters of a text that is tokenized without the interpreter's lock: 500,000 take seconds."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split of text into words before BPE, from Qwen2's tokenizer.json."""
ASCII_WORDS = re.compile(
    SPLIT.replace(r"?\p{L}+", "?[A-Za-z]+")
    .replace(r"|\p{N}|", "|[0-9]|")
    .replace(r"\p{L}\p{N}", "A-Za-z0-9"),
    re.ASCII,
)
"""`SPLIT` of a text in ASCII."""


class Tokenizer:
    """A checkpoint's tokenizer. Immutable, so safe to share between threads.

    The `tokenizers` library treats control tokens as ordinary text, always; `encode` cuts the text
    at them where they count. So text from outside cannot end a turn by spelling `<|im_end|>`.
    """

    def __init__(
        self,
        backend: Backend,
        image_id: int | None = None,
        video_id: int | None = None,
        eos_token_id: Any = None,
    ) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(
                "the tokenizer is not the byte-level BPE of Qwen2, the only one this family has"
            )
        self.im_start, self.im_end = _id_of(backend, IM_START), _id_of(backend, IM_END)
        own = [IM_START, IM_END, IMAGE] + [VIDEO] * (video_id is not None)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in own])
        backend.encode_special_tokens = True
        self._backend = backend
        self.image_id = _id_of(backend, IMAGE)
        self.video_id = None if video_id is None else _id_of(backend, VIDEO)
        for token, actual, expected in (
            (IMAGE, self.image_id, image_id),
            (VIDEO, self.video_id, video_id),
        ):
            if expected is not None and actual != expected:
                raise CheckpointError(
                    f"{token} is token {actual} in the tokenizer but {expected} in config.json"
                )
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._at_special = re.compile(
            "(" + "|".join(_pattern(t) for t in _longest_first(added.values())) + ")"
        )
        self._short: dict[str, tuple[int, ...]] = {}
        self._words = _Words(backend)
        apart = [re.escape(token.content) for token in added.values() if not token.special]
        self._added = re.compile("|".join(apart)) if apart else None
        self._by_words = _splits_words(backend)
        self._bytes = {char: byte for byte, char in enumerate(_alphabet())}
        self.size: int = 1 + max(
            backend.get_vocab_size(False) - 1, *(added.keys() - {self.image_id, self.video_id})
        )
        """Ids from here on have no meaning and must not be sampled; a last placeholder is one."""
        further = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        self.eos_ids = frozenset({self.im_end, self._special.get(END_OF_TEXT, self.im_end)}) | {
            token for token in further if type(token) is int and 0 <= token < self.size
        }
        """Ids that end an answer: Qwen2's two, and those of `eos_token_id`."""

    @classmethod
    def from_folder(
        cls, folder: str | Path, image_id: int | None = None, video_id: int | None = None
    ) -> Tokenizer:
        """Read tokenizer.json, or vocab.json with merges.txt, and check config.json's `image_id`
        and `video_id`; without the latter `<video>` is no token.

        Original checkpoints have no `<image>` token: it gets the next free id. The ids of
        generation_config.json's eos_token_id end an answer, too. Raises CheckpointError.
        """
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        if (folder / "tokenizer.json").is_file():
            try:
                backend = Backend.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises nothing narrower
                raise CheckpointError(
                    f"{folder / 'tokenizer.json'} is not a tokenizer that can be read"
                ) from error
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            try:
                backend = qwen2_tokenizer(
                    BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
                )
            except Exception as error:  # the library raises nothing narrower
                raise CheckpointError(
                    f"vocab.json and merges.txt in {folder} do not make a tokenizer"
                ) from error
        else:
            raise CheckpointError(
                f"{folder} has neither tokenizer.json nor vocab.json with merges.txt"
            )
        known = settings.get("added_tokens_decoder") or {}
        if not known and backend.token_to_id(IM_START) is None:
            known = {
                str(backend.get_vocab_size() + i): {"content": t}
                for i, t in enumerate((END_OF_TEXT, IM_START, IM_END))
            }
        for number, token in sorted(known.items(), key=lambda item: int(item[0])):
            content, special = token["content"], bool(token.get("special", True))
            if backend.token_to_id(content) is None:
                added = AddedToken(content, special=special, normalized=False)
                backend.add_special_tokens([added]) if special else backend.add_tokens([added])
            if (actual := backend.token_to_id(content)) != int(number):
                raise CheckpointError(
                    f"{content} is token {number} in tokenizer_config.json but {actual} in the "
                    "tokenizer"
                )
        generation = read_json(folder / "generation_config.json", optional=True)
        return cls(backend, image_id, video_id, generation.get("eos_token_id"))

    @property
    def backend(self) -> Backend:
        """The `tokenizers` object, to be written to a file."""
        return self._backend

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, control tokens in it become control tokens."""
        if not special:
            if (known := self._short.get(text)) is not None:
                return list(known)
            if self._by_words and text.isascii() and not self._has_added(text):
                words = ASCII_WORDS.findall(text)  # ten times as fast
                ids = list(chain.from_iterable(map(self._words.__getitem__, words)))
            else:
                ids = list(self._encode(text).ids)
            if len(text) <= SHORT_TEXT and len(self._short) < MAX_SHORT_TEXTS:
                self._short[text] = tuple(ids)
            return ids
        pieces = self._pieces(text, {})
        return [token for _, ids, _ in pieces for token in ids]

    def _has_added(self, text: str) -> bool:
        """Whether a text may have added tokens that are no words, or is long."""
        return len(text) > LONG_TEXT or bool(self._added and self._added.search(text))

    def encode_with_starts(
        self, text: str, literals: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[list[int], list[int]]:
        """Token ids of `text`, control tokens included, and the character index of each.

        literals: marks in the text, and the spelling of a control token that each stands for,
            which is as long and is no control token there.
        """
        ids: list[int] = []
        starts: list[int] = []
        for at, tokens, encoding in self._pieces(text, literals):
            ids += tokens
            offsets = ((0, 0),) if encoding is None else encoding.offsets
            starts += [at + start for start, _ in offsets]
        return ids, starts

    def _pieces(
        self, text: str, literals: Mapping[str, str]
    ) -> Iterator[tuple[int, Sequence[int], Any]]:
        """(character index, token ids, encoding) of the texts between control tokens, and of these,
        which have no encoding.
        """
        at = 0
        for piece in self._at_special.split(text):
            if (control := self._special.get(piece.strip())) is not None:
                yield at, (control,), None
            elif piece:
                for mark, spelling in literals.items():
                    piece = piece.replace(mark, spelling)
                encoding = self._encode(piece)
                yield at, encoding.ids, encoding
            at += len(piece)

    def _encode(self, text: str) -> Any:
        try:
            if len(text) > LONG_TEXT:  # this call lets other threads run, `encode` does not
                return self._backend.encode_batch([text], add_special_tokens=False)[0]
            return self._backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise PromptError(
                "the text holds a character that is not Unicode (half of a surrogate pair)"
            ) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; broken UTF-8 becomes U+FFFD, ids without a meaning become nothing."""
        return b"".join(self.token_bytes(token, skip_special) for token in ids).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes of one token; b"" for ids without a meaning, and control tokens if skipped."""
        if skip_special and token in self._special_ids:
            return b""
        text = self._backend.id_to_token(token) or ""
        try:
            return bytes([self._bytes[char] for char in text])
        except KeyError:  # an added token, written as it is
            return text.encode()


class _Words(dict[str, tuple[int, ...]]):
    """The token ids of a word; those of short words are kept."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._backend.encode(word, add_special_tokens=False).ids)
        if len(word) <= MAX_WORD and len(self) < MAX_WORDS:
            self[word] = ids
        return ids


def _splits_words(backend: Backend) -> bool:
    """Whether a text in ASCII has the tokens of its words by `SPLIT`: Qwen2's settings."""
    own = qwen2_tokenizer(BPE())

    def state(part: Any) -> Any:
        return part and json.loads(part.__getstate__())

    split, byte_level = state(own.pre_tokenizer)["pretokenizers"]
    byte_level.pop("trim_offsets")
    found = state(backend.pre_tokenizer) or {}
    parts = found.get("pretokenizers", [])
    for part in parts:
        part.pop("trim_offsets", None)
    return parts == [split, byte_level] and state(backend.normalizer) in (None, {"type": "NFC"})


class TextStream:
    """Incremental detokenization without half characters; its pieces join to `decode` of all."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is certain after one more token; "" while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, self._skip))

    def finish(self) -> str:
        """The rest of the text: U+FFFD if the ids ended within a character."""
        return self._decoder.decode(b"", final=True)


def _id_of(backend: Backend, token: str) -> int:
    number = backend.token_to_id(token)
    if number is None:
        raise CheckpointError(
            f"the tokenizer has no {token} token; the chat format of this family needs it"
        )
    return number


def _pattern(token: AddedToken) -> str:
    word = r"(?<!\w){}(?!\w)" if token.single_word else "{}"
    return (
        (r"(?<!\s)\s*" if token.lstrip else "")  # else quadratic in a run of white space
        + word.format(re.escape(token.content))
        + (r"\s*" if token.rstrip else "")
    )


def _longest_first(tokens: Iterable[AddedToken]) -> list[AddedToken]:
    return sorted((t for t in tokens if t.special), key=lambda t: -len(t.content))


def _alphabet() -> Iterator[str]:
    """The printable character that byte-level BPE writes for each byte 0..255 (GPT-2's table)."""
    unprintable = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte)
        else:
            yield chr(256 + unprintable)
            unprintable += 1


def qwen2_tokenizer(model: Model) -> Backend:
    """`model` between Qwen2's normalizer, pre-tokenizer and decoder."""
    backend = Backend(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
