"""Prompt lookup: draft tokens against a plain search, and answers that are the same with it and
without.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_interleave import checkpoints, kernels
from llava_interleave.chat import load
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.engine.kv_contiguous import MAX_DECODE_TOKENS
from llava_interleave.engine.prompt_lookup import MAX_CREDIT, NGRAM_SIZES, PromptLookupDrafter
from llava_interleave.errors import OptionError
from llava_interleave.options import MAX_DRAFT_TOKENS
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config
from tests.helpers.engine import (
    EOS,
    IMAGE,
    MIXED,
    VOCAB,
    answers,
    engine,
    expected,
    finish,
    prompt,
    stream,
    text,
)

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(max_new_tokens=60, ignore_eos=True)
DRAWN = [
    SamplingParams(max_new_tokens=60, temperature=0.3, seed=1, ignore_eos=True),
    SamplingParams(
        max_new_tokens=60, temperature=0.5, top_k=5, top_p=0.9, seed=2, ignore_eos=True, logprobs=2
    ),
    SamplingParams(
        max_new_tokens=60,
        temperature=0.4,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        seed=3,
        ignore_eos=True,
    ),
    SamplingParams(max_new_tokens=60, frequency_penalty=0.1, logprobs=1, ignore_eos=True),
]


def searched(tokens: list[int], most: int, never: int) -> list[int]:
    """By looking everywhere."""
    for n in NGRAM_SIZES:
        for at in range(len(tokens) - 1, n - 1, -1):
            if tokens[at - n : at] == tokens[-n:] and never not in tokens[at - n : at]:
                whole = list(tokens)
                for index in range(most):
                    whole.append(whole[at + index])
                draft = whole[len(tokens) :]
                return draft[: draft.index(never)] if never in draft else draft
    return []


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    cut=st.integers(1, 40),
    most=st.integers(1, 9),
)
def test_guesses_are_what_followed_last(tokens: list[int], cut: int, most: int) -> None:
    """Whether a sequence comes at once or token by token; 0 is the one that is never drafted."""
    lookup = PromptLookupDrafter(9, placeholder_ids=(0,))
    lookup.length = 9
    for length in range(min(cut, len(tokens)), len(tokens) + 1):
        assert list(lookup.propose(tokens[:length], most)) == searched(tokens[:length], most, 0)


def test_it_stops_where_guesses_fail_and_grows_where_they_are_right() -> None:
    lookup, tokens = (
        PromptLookupDrafter(8, placeholder_ids=(0,)),
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3],
    )
    assert list(lookup.propose(tokens, 8)) == [4, 5, 6, 7]
    lookup.update(4, 4)
    assert len(lookup.propose(tokens, 8)) == 8
    lookup.update(8, 1)
    assert list(lookup.propose(tokens, 8)) == [4, 5] and list(lookup.propose(tokens, 1)) == [4]
    drafted = 0
    while found := lookup.propose(tokens, 8):
        lookup.update(len(found), 0)
        drafted += len(found)
    assert 0 < drafted <= 4 * MAX_CREDIT + 8


@pytest.mark.parametrize("most", [1, 8, MAX_DRAFT_TOKENS])
@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 4}, {"max_num_batched_tokens": 7, "max_num_seqs": 3}, {"max_num_seqs": 1}],
)
def test_answers_are_the_same(most: int, options: dict[str, int]) -> None:
    """Greedy and drawn, several requests at once, prompts in pieces; and drafts are accepted often
    enough to be seen.
    """
    prompts = [*MIXED, *MIXED[: len(DRAWN)]]
    how = [GREEDY] * len(MIXED) + DRAWN
    plain = engine(**options).generate(prompts, how)
    e = engine(**options)
    drafting = e.generate(prompts, [replace(one, prompt_lookup_num_tokens=most) for one in how])
    e.check()
    assert answers(drafting) == answers(plain)
    assert answers(drafting)[0][:12] == expected()[0]
    assert sum(r.usage.accepted for r in drafting) > 0 == sum(r.usage.drafted for r in plain)
    assert all(r.usage.accepted <= r.usage.drafted for r in drafting)


def test_log_probabilities_are_the_same() -> None:
    p, how = MIXED[1], replace(GREEDY, logprobs=1)
    plain = stream(engine(), p, how)
    drafting = stream(engine(), p, replace(how, prompt_lookup_num_tokens=8))
    assert drafting[-1].usage.accepted > 0
    for a, b in zip(plain, drafting, strict=True):
        assert (a.token, a.finish_reason) == (b.token, b.finish_reason)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_no_answer_exceeds_max_new_tokens(new: int) -> None:
    for p, answer in zip(MIXED, expected(), strict=True):
        (request,) = engine().generate(
            [p], SamplingParams(max_new_tokens=new, ignore_eos=True, prompt_lookup_num_tokens=8)
        )
        assert request.generated == answer[:new] and request.finish_reason == "length"


def test_nothing_comes_after_a_stop_token() -> None:
    """Wherever in a step it is chosen; the rest of the step is forgotten, and the cache ends with
    the answer.
    """
    whole = engine().generate([MIXED[1]], GREEDY)[0].generated
    for stop in sorted(set(whole))[:6]:
        e = engine()
        how = replace(GREEDY, stop_ids=(stop,), prompt_lookup_num_tokens=8)
        (request,) = e.generate([MIXED[1]], how)
        assert (
            request.generated == whole[: whole.index(stop) + 1] and request.finish_reason == "stop"
        )
        e.check()
        again = e.generate([MIXED[1]], how)[0]
        assert again.generated == request.generated


@pytest.mark.slow
def test_memory_that_is_short_changes_nothing() -> None:
    """Answers are pre-empted and go on; drafts never take memory that is not there."""
    prompts = [prompt(text(n, 30)) for n in range(4)]
    how = replace(GREEDY, max_new_tokens=150, prompt_lookup_num_tokens=8)
    plain = engine().generate(prompts, replace(how, prompt_lookup_num_tokens=0))
    e = engine(tokens=330)
    requests = [e.add(p, how) for p in prompts]
    finish(e)
    assert answers(requests) == answers(plain)
    assert sum(r.usage.accepted for r in requests) > 0


def test_tokens_after_a_stop_string_do_not_count(tmp_path: Path) -> None:
    """A step may write beyond it."""
    bot = load(tiny_checkpoint(tmp_path / "tiny", seed=3))
    how = {"max_new_tokens": 80, "ignore_eos": True, "prompt_lookup_num_tokens": 8}
    whole = bot.ask("What?", **how)
    assert (
        whole.usage.accepted > 0
        and whole.text == bot.ask("What?", **how | {"prompt_lookup_num_tokens": 0}).text
    )
    for at in range(20, len(whole.text) - 6, 25):
        cut = bot.ask("What?", **how, stop=whole.text[at : at + 6])
        assert cut.finish_reason == "stop" and cut.usage.generated == len(cut.tokens)


def test_images_are_not_guessed() -> None:
    e = engine()
    (request,) = e.generate(
        [prompt((0, 1), (0, 1), text(1, 3), (0, 1))], replace(GREEDY, prompt_lookup_num_tokens=8)
    )
    assert request.drafter is not None and IMAGE in request.drafter.placeholder_ids
    assert IMAGE not in request.generated and EOS < VOCAB


@pytest.mark.skipif(
    kernels.unavailable_reason() is not None, reason=f"no kernels: {kernels.unavailable_reason()}"
)
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("fused", [False, True])
def test_with_kernels_guesses_change_no_bit(fused: bool, kv: str, tmp_path: Path) -> None:
    """Quantized weights in bfloat16: the log-probabilities too. Where all layers are one call,
    drafts are made by default.
    """
    shape = (
        tiny_config(text={"num_heads": 2, "num_kv_heads": 2, "head_dim": 32})
        if fused
        else tiny_config()
    )
    model = checkpoints.load(
        tiny_checkpoint(tmp_path / "tiny", shape), dtype=torch.bfloat16, precision="int8"
    )
    inputs = Prompt([5, 6, 7, 8] * 9)
    runs = []
    for most in (0, 8, None):
        e = Engine(model, eos_ids={300}, vocab=300, kv_bytes=1 << 22, kv_precision=kv)
        how = SamplingParams(
            max_new_tokens=80, ignore_eos=True, logprobs=3, prompt_lookup_num_tokens=most
        )
        events = stream(e, inputs, how)
        runs.append([(event.token, event.logprob, event.top_logprobs) for event in events])
        assert (events[-1].usage.accepted > 0) == (fused if most is None else most > 0)
    assert runs[0] == runs[1] == runs[2]


def test_prompt_lookup_is_off_by_default_where_it_changes_rounding() -> None:
    """Floats: several tokens of a sequence are rounded otherwise than one."""
    (request,) = engine().generate([MIXED[0]], GREEDY)
    assert request.drafter is None and request.usage.drafted == 0


def test_out_of_range() -> None:
    assert MAX_DRAFT_TOKENS < MAX_DECODE_TOKENS
    with pytest.raises(
        OptionError,
        match=f"prompt_lookup_num_tokens must be between 0 and {MAX_DRAFT_TOKENS}, not 16",
    ):
        SamplingParams(prompt_lookup_num_tokens=16)
