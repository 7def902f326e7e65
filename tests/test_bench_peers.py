"""The systems that `make bench-peers` installs apart: what can be held to something
without them.
"""

import importlib.util
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llava_interleave.testing import tiny_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def systems() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "systems", Path(__file__).parent.parent / "bench" / "systems.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turn(role: str, text: str, *images: str) -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            *({"type": "image", "path": path} for path in images),
            {"type": "text", "text": text},
        ],
    }


def test_a_chat_is_rendered_as_the_checkpoints_template_does(
    systems: ModuleType, tmp_path: Path
) -> None:
    processor = pytest.importorskip("transformers").AutoProcessor.from_pretrained(
        tiny_checkpoint(tmp_path / "tiny")
    )
    chat = [
        turn("user", "What is this?", "a", "b"),
        turn("assistant", "A cat."),
        turn("user", "And this?", "c"),
    ]
    assert systems.spelt(chat, "<image>") == processor.apply_chat_template(
        chat, add_generation_prompt=True
    )
    assert [systems.spelt(chat, "<{}>").count(f"<{number}>") for number in range(4)] == [1, 1, 1, 0]
    assert systems.paths(chat) == ["a", "b", "c"]


class Library:
    """What of llama.cpp reads prompts, as a memory of keys by sequence and position. A chunk is its
    kind and its keys.
    """

    MTMD_INPUT_CHUNK_TYPE_TEXT = "text"

    def __init__(self) -> None:
        self.memory: dict[int, dict[int, Any]] = defaultdict(dict)
        self.did: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def mtmd_input_chunk_get_type(self, chunk: tuple[str, list[Any]]) -> str:
        return chunk[0]

    def llama_memory_seq_rm(self, _: object, sequence: int, start: int, end: int) -> None:
        assert end == -1
        self.memory[sequence] = {
            place: key for place, key in self.memory[sequence].items() if place < start
        }

    def llama_decode(self, _: object, batch: SimpleNamespace) -> int:
        for row in range(batch.n_tokens):
            self.write(batch.seq_id[row][0], batch.pos[row], [batch.token[row]])
        self.did["tokens"] += batch.n_tokens
        return 0

    def mtmd_helper_decode_image_chunk(self, *given: Any) -> int:
        _, _, chunk, _, place, sequence, *_ = given
        self.write(sequence, place, chunk[1])
        self.did["images"] += 1
        return 0

    def write(self, sequence: int, place: int, keys: list[Any]) -> None:
        assert len(self.memory[sequence]) == place
        self.memory[sequence] |= dict(enumerate(keys, place))


def test_a_sequence_of_llama_cpp_computes_what_it_does_not_hold(systems: ModuleType) -> None:
    """Whatever was read before, the memory ends as the prompt is; counts are of what the prompts do
    not have in common.
    """
    system, library = object.__new__(systems.LlamaCpp), Library()
    system.llama = system.mtmd = library
    system.context = system.tower = None
    system.max_tokens = 8192
    system.held = [[] for _ in range(system.SEQUENCES)]
    system.batch = SimpleNamespace(
        token={}, pos={}, n_seq_id={}, seq_id=defaultdict(dict), logits={}
    )

    def read(sequence: int, *pieces: list[Any]) -> dict[str, int]:
        chunks = [("text" if isinstance(piece[0], int) else "image", piece) for piece in pieces]
        keys = [key for piece in pieces for key in piece]
        library.did.clear()
        system.keep(sequence, keys[:-1])
        system.read(sequence, [(chunk, chunk[1]) for chunk in chunks])
        assert (
            system.held[sequence]
            == keys
            == [library.memory[sequence][place] for place in range(len(keys))]
        )
        return dict(library.did)

    a, b = ["a"] * 5, ["b"] * 5
    assert read(0, [1, 2], a, b, [3, 4]) == {"tokens": 4, "images": 2}
    assert read(0, [1, 2], a, b, [3, 5, 6]) == {"tokens": 2}
    assert read(0, [1, 2], a, b, [3, 5, 6]) == {"tokens": 1}  # which tells what comes next
    assert read(1, [1, 2], b, [3]) == {"tokens": 3, "images": 1}
    assert read(0, [1, 2], a, [3], b, [4]) == {"tokens": 2, "images": 1}
    assert read(0, [7], a, [3]) == {"tokens": 2, "images": 1}
    system.decode([(0, 8), (1, 9)])
    assert (system.held[0][-1], system.held[1][-1]) == (8, 9) and [
        system.batch.logits[row] for row in range(2)
    ] == [True, True]
