"""Sampling: ours == transformers' processors in transformers' order; penalties, draws and log
probabilities by their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from llava_interleave.engine import SamplingParams
from llava_interleave.engine.sampler import Sampler, nucleus, sample
from llava_interleave.errors import OptionError

CPU = torch.device("cpu")
SIZE = 300


def transformers_scores(raw: Tensor, s: SamplingParams, tokens: list[int]) -> Tensor:
    """The chain that `GenerationMixin._get_logits_processor` builds from the same options."""
    chain: list[Callable[..., Any]] = []
    if s.logit_bias:
        chain.append(
            hf.SequenceBiasLogitsProcessor(
                {(token,): float(bias) for token, bias in s.logit_bias.items()}
            )
        )
    if s.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)))
    if s.temperature:
        chain.append(hf.TemperatureLogitsWarper(float(s.temperature)))
        if s.top_k:
            chain.append(hf.TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            chain.append(hf.TopPLogitsWarper(s.top_p))
        if s.min_p:
            chain.append(hf.MinPLogitsWarper(s.min_p))
    scores = raw[None]
    for processor in chain:
        scores = processor(torch.tensor([tokens]), scores)
    return scores[0]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 299, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
    biased=st.booleans(),
)
def test_scores_are_those_of_transformers(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    biased: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(SIZE, generator=generator) * 4
    prompt = torch.randint(SIZE, (20,), generator=generator).tolist()
    bias = {3: 5.0, 17: -100.0} if biased else {}
    s = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        logit_bias=bias,
        seed=seed,
    )
    sampler, tokens = Sampler(s, prompt, SIZE, CPU), list(prompt)
    for _ in range(3):  # the tokens generated count for the repetition penalty as well
        ours, theirs = sampler.scores(raw), transformers_scores(raw, s, tokens)
        torch.testing.assert_close(ours, theirs)
        token = sampler.pick(raw).token
        assert ours[token] > -math.inf
        tokens.append(token)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    """OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting what was generated, not
    the prompt.
    """
    s = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(s, [0, 1, 2], 4, CPU)
    logits = torch.tensor([1.0, 0.9, 0.2, 0.1])
    assert [sampler.pick(logits).token for _ in range(3)] == [0, 1, 0]
    torch.testing.assert_close(sampler.scores(logits), torch.tensor([0.0, 0.15, 0.2, 0.1]))
    assert sampler.pick(logits).token == 2


def test_log_probabilities_are_the_networks_own() -> None:
    raw = torch.randn(SIZE)
    pick = Sampler(
        SamplingParams(temperature=0.7, top_k=2, seed=1, logit_bias={5: 50.0}, logprobs=3),
        [],
        SIZE,
        CPU,
    ).pick(raw)
    logs = raw.log_softmax(-1)
    assert pick.token == 5
    assert pick.logprob == pytest.approx(float(logs[5]))
    assert [token for token, _ in pick.top] == logs.topk(3).indices.tolist()
    assert [value for _, value in pick.top] == pytest.approx(logs.topk(3).values.tolist())
    alone = Sampler(SamplingParams(logprobs=0), [], SIZE, CPU).pick(raw)
    assert alone.logprob == pytest.approx(float(logs.max()))
    assert alone.top == ()


def test_draws_follow_the_distribution_and_never_take_what_is_cut() -> None:
    scores = torch.tensor([0.0, -math.inf, math.log(3.0), -math.inf, math.log(6.0), -math.inf])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([sample(scores, generator) for _ in range(5000)]), minlength=6
    )
    assert counts[[1, 3, 5]].sum() == 0
    torch.testing.assert_close(
        counts[[0, 2, 4]] / 5000, torch.tensor([0.1, 0.3, 0.6]), atol=0.02, rtol=0
    )


def test_apples_gpu_leaves_sampling_to_the_cpu() -> None:
    """It has no float64, in which probabilities are summed."""
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=3)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    there, here = (Sampler(sampling, [1], 50, torch.device(d)) for d in ("mps", "cpu"))
    assert there.device == here.device
    assert [there.pick(logits) for _ in range(9)] == [here.pick(logits) for _ in range(9)]


def test_the_largest_random_number_takes_the_last_possible_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.ones(1, dtype=torch.float64))
    assert sample(torch.tensor([0.0, 1.0, -math.inf, -math.inf]), torch.Generator()) == 1


def test_what_is_no_number_draws_a_token_all_the_same() -> None:
    """The index was one past the vocabulary: a broken checkpoint ended in an IndexError."""
    for scores in ([math.nan] * 4, [math.inf, math.inf, 0.0, 0.0], [0.0, math.nan, 1.0, 2.0]):
        assert 0 <= sample(torch.tensor(scores), torch.Generator()) < 4


@pytest.mark.parametrize("share", [0.999, 0.3])
def test_a_large_nucleus_equals_a_whole_sort(share: float) -> None:
    scores = torch.randn(5000)
    wide = hf.TopPLogitsWarper(share)(torch.empty(1, 0), scores[None])[0]
    assert (nucleus(scores, share) > -math.inf).sum() > 1024 or share < 0.5
    # the sums run in opposite directions, so a token on the very border may differ
    assert ((nucleus(scores, share) > -math.inf) != (wide > -math.inf)).sum() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"seed": 2**64},
        {"stop_ids": (-1,)},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {1: math.inf}},
        {"logprobs": 21},
        {"ignore_eos": 1},
    ],
)
def test_what_is_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        SamplingParams(**wrong)
