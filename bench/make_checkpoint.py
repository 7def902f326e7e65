"""Write a checkpoint of random weights in the shape of a real one: for measuring speed and memory
without a download.

    python bench/make_checkpoint.py FOLDER --shape 0.5b

The weights are bfloat16 in the hub layout, made tensor by tensor. The tokenizer has Qwen's
vocabulary where the package dashscope is installed (it carries qwen.tiktoken), else a byte-level
one of a few hundred pieces with the real special ids.
"""

import argparse
import base64
import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path

from shapes import SHAPES
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from llava_interleave.processing.processor_files import SPECIAL, processor_files
from llava_interleave.processing.tokenizer import VIDEO, qwen2_tokenizer
from llava_interleave.testing import (
    tiny_checkpoint,
    tiny_tokenizer,
    write_random,
)

VOCABULARY = 151643  # pieces before the special tokens


def tokenizer(videos: bool = False) -> Tokenizer:
    """Qwen's tokenizer, or one that has its ids for the special tokens and pieces that are never
    written in between. videos: with `<video>`.
    """
    package = importlib.util.find_spec("dashscope")
    found = (
        list(Path(package.origin).parent.rglob("qwen.tiktoken"))
        if package and package.origin
        else []
    )
    model = tiktoken_bpe(found[0]) if found else padded_bpe()
    made = qwen2_tokenizer(model)
    made.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*SPECIAL, *[VIDEO] * videos)
        ]
    )
    assert made.token_to_id(SPECIAL[0]) == VOCABULARY
    return made


def padded_bpe() -> models.BPE:
    tiny = tiny_tokenizer().get_vocab(with_added_tokens=False)
    pads = {f"Ġ{number}": number for number in range(len(tiny), VOCABULARY)}
    return models.BPE(vocab=tiny | pads, merges=[])


def tiktoken_bpe(path: Path) -> models.BPE:
    """Ranks of byte strings as vocabulary and merges: a piece was merged from the two that the
    ranks below its own make of it.
    """
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    assert len(ranks) == VOCABULARY, len(ranks)
    letters = byte_letters()
    spell = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = [
        (spell[a], spell[b])
        for piece, rank in ranks.items()
        if len(piece) > 1
        for a, b in [halves(piece, rank, ranks)]
    ]
    return models.BPE(vocab={spell[piece]: rank for piece, rank in ranks.items()}, merges=merges)


def halves(piece: bytes, limit: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last two parts when `piece` is merged with the ranks below `limit`."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        rank, at = min(
            (ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)
        )
        assert rank < limit, piece
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2, encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [letters[byte] for byte in range(256)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="0.5b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, help="of tower and decoder; default: the shape's")
    given = parser.parse_args()

    import torch

    dtype = getattr(torch, given.dtype)
    if given.shape == "tiny":
        tiny_checkpoint(given.folder, seed=given.seed, dtype=dtype)
        return
    with tempfile.TemporaryDirectory() as source:
        shape = SHAPES[given.shape]
        layers = given.layers
        if layers is not None:
            shape = replace(
                shape,
                vision=replace(shape.vision, num_layers=layers),
                text=replace(shape.text, num_layers=layers),
            )
        processor_files(source, shape, tokenizer(videos=shape.video_token_id is not None))
        write_random(given.folder, shape, source, given.seed, dtype=dtype)


if __name__ == "__main__":
    main()
