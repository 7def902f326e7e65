"""Answers that repeat themselves end: the rule, what it leaves alone, and that batches change
nothing.
"""

import base64
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_interleave
from llava_interleave import Chatbot, load
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.engine.repetition import LOOP_TOKENS, MAX_PERIOD, ends_in_loop
from llava_interleave.errors import OptionError
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.engine import MIXED, TOKEN, VOCAB, finish, network

pytestmark = pytest.mark.slow


def naive(tokens: Sequence[int]) -> bool:
    """Some span of up to 32 tokens, again and again, makes the last 256."""
    last = list(tokens)[-LOOP_TOKENS:]
    spans = (last[-period:] for period in range(1, MAX_PERIOD + 1))
    return len(last) == LOOP_TOKENS and any(
        (span * LOOP_TOKENS)[: LOOP_TOKENS * len(span)][-LOOP_TOKENS:] == last for span in spans
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.integers(0, 2), min_size=1, max_size=MAX_PERIOD + 3),
    st.integers(0, 20),
    st.integers(-1, 300),
    st.integers(0, 5),
)
def test_the_rule_is_that_of_a_direct_search(
    begin: list[int], span: list[int], repeats: int, change: int, start: int
) -> None:
    tokens = begin + span * repeats
    if 0 <= change < len(tokens):
        tokens[-1 - change] = 7
    assert ends_in_loop(tokens, min(start, len(tokens))) == naive(tokens[start:])


@pytest.mark.parametrize("period", [1, 2, 7, MAX_PERIOD])
def test_it_needs_256_tokens_of_the_answer(period: int) -> None:
    loop = [n % period for n in range(LOOP_TOKENS)]
    assert ends_in_loop(loop, 0)
    assert not ends_in_loop(loop, 1)
    assert not ends_in_loop([9, *loop[1:]], 0) or (period == 1 and loop[0] == 9)
    assert not ends_in_loop([n % (MAX_PERIOD + 1) for n in range(1000)], 0)


def legitimate() -> dict[str, str]:
    """Long answers with much repetition that must not be cut."""
    chance = random.Random(0)
    rows = [f"| {n} | {chance.randint(0, 9)} | yes | no |" for n in range(120)]
    code = Path(llava_interleave.__file__).with_name("options.py").read_text("utf-8")
    return {
        "numbered list": "\n".join(f"{n}. A red car" for n in range(1, 200)),
        "numbers": ", ".join(map(str, range(500))),
        "table": "\n".join(["| n | count | left | right |", "|---|---|---|---|", *rows]),
        "a hundred equal lines": "yes\n" * 100,
        "wide rule": "-" * 120 + "\n" + "=" * 120,
        "table of contents": "\n".join(f"Part {n} {'.' * 60} {3 * n}" for n in range(40)),
        "base64": base64.b64encode(chance.randbytes(1500)).decode(),
        "code": code,
        "json": str([{"id": n, "label": "car", "box": [n, n, 9, 9]} for n in range(100)]),
        "counting down": " ".join(map(str, range(400, 0, -1))),
        "code with equal lines": "def reset():\n"
        + "    values.append(0)\n" * 12
        + "    return 0\n",
        "inserts": "\n".join(f"INSERT INTO t VALUES ({n}, 'red', 0, 0);" for n in range(60)),
        "refrain": "\n".join(f"{n} bottles on the wall, " * 2 + "fall" for n in range(60, 0, -1)),
        "hex dump": "\n".join(f"{16 * n:08x} {'00 ' * 16}" for n in range(40)),
        "matrix": "\n".join(" ".join("1" if r == c else "0" for c in range(16)) for r in range(16)),
    }


@pytest.mark.parametrize("name", legitimate())
def test_legitimate_answers_are_not_cut(name: str, builtin_tokens: Any) -> None:
    for tokens in builtin_tokens(legitimate()[name]):
        stops = [n for n in range(len(tokens) + 1) if ends_in_loop(tokens[:n], 0)]
        assert not stops, (len(tokens), stops[:1])


LOOPS = {
    "one token": "4 " * 900,
    "two tokens": "red red green " + "red " * 900,
    "lines": "The answer is:\n" + "yes\nno\n" * 300,
    "phrase of 30 words": "I see " + " ".join(f"a{n}" for n in range(30)).join([" "] * 80),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_end(name: str, builtin_tokens: Any) -> None:
    """After 256 tokens of the loop; of a phrase of 30 words with a token each."""
    for tokens in builtin_tokens(LOOPS[name])[name.startswith("phrase") :]:
        first = next(n for n in range(len(tokens) + 1) if ends_in_loop(tokens[:n], 0))
        assert LOOP_TOKENS <= first <= LOOP_TOKENS + 10


@pytest.fixture(scope="module")
def builtin_tokens() -> Any:
    """A text as tokens of the built-in model, and by words, as a larger vocabulary has it."""
    tokenizer = load().processor.tokenizer

    def tokens(text: str) -> list[list[int]]:
        words = text.replace("\n", " \n ").split(" ")
        return [tokenizer.encode(text, special=False), [hash(word) for word in words]]

    return tokens


LONG = SamplingParams(max_new_tokens=600)


def looping(**options: Any) -> Engine:
    """Without attention a token decides the next one, so every answer becomes a loop."""
    model = deepcopy(network())
    for layer in model.language_model.layers:
        layer.self_attn.o_proj.weight.zero_()
    return Engine(model, eos_ids=(), vocab=VOCAB, kv_bytes=8000 * TOKEN, **options)


def test_a_batch_ends_as_each_alone_and_as_with_draft_tokens() -> None:
    alone = [looping().generate([p], LONG)[0] for p in MIXED]
    assert "repetition" in [request.finish_reason for request in alone]
    drafting = replace(LONG, prompt_lookup_num_tokens=8)
    for requests in (
        looping().generate(MIXED, LONG),
        looping(max_num_batched_tokens=20, max_num_seqs=3).generate(MIXED, drafting),
    ):
        for request, right in zip(requests, alone, strict=True):
            assert request.generated == right.generated
            assert request.finish_reason == right.finish_reason
    free = looping().generate(MIXED, replace(LONG, stop_on_repetition=False))
    for whole, request in zip(free, alone, strict=True):
        assert (whole.finish_reason, len(whole.generated)) == ("length", 600)
        assert whole.generated[: len(request.generated)] == request.generated
        first = next((n for n in range(601) if naive(whole.generated[:n])), 600)
        assert len(request.generated) == first


def test_the_last_event_has_its_token_and_ignore_eos_goes_on() -> None:
    e = looping()
    requests = [e.add(p, LONG) for p in MIXED]
    events = finish(e)
    for request in requests:
        own = [event for event in events if event.request is request]
        assert [event.token for event in own] == request.generated
        assert own[-1].finish_reason == request.finish_reason
        assert own[-1].usage is not None
    kept = looping().generate(MIXED, replace(LONG, ignore_eos=True))
    assert {request.finish_reason for request in kept} == {"length"}
    with pytest.raises(OptionError, match="stop_on_repetition must be true or false, not 1"):
        SamplingParams(stop_on_repetition=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    bot = load(tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"), precision="float32")
    for layer in bot.model.language_model.layers:
        layer.self_attn.o_proj.weight.zero_()
    return bot


def test_streamed_text_is_the_answers(bot: Chatbot) -> None:
    how: dict[str, Any] = {
        "max_new_tokens": 600,
        "logit_bias": dict.fromkeys(bot.processor.tokenizer.eos_ids, -1000.0),
    }
    answer = bot.ask("What?", **how)
    deltas = list(bot.stream(bot.turn("What?"), **how))
    assert "".join(delta.text for delta in deltas) == answer.text
    assert deltas[-1].answer is not None
    assert deltas[-1].answer.tokens == answer.tokens
    assert answer.finish_reason == "repetition"
    assert naive(answer.tokens)
    assert answer.text == bot.processor.tokenizer.decode(answer.tokens)
    longer = bot.ask("What?", stop_on_repetition=False, **how)
    assert len(longer.tokens) == 600
    assert longer.tokens[: len(answer.tokens)] == answer.tokens
