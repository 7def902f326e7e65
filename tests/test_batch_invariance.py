"""Deterministic answers: the same bytes whatever shares the batch, is cached, arrives in between or
takes the memory.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from llava_interleave import Options, checkpoints, kernels, load
from llava_interleave.cli.local_model import ClusterWorker, LazyModel, ModelFlags
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import Llava
from llava_interleave.prompt import Media, Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.slow

Told = list[tuple[object, ...]]
HOW = SamplingParams(max_new_tokens=25, ignore_eos=True, logprobs=3, prompt_lookup_num_tokens=8)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Llava:
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("tiny"),
        tiny_config(text={"num_heads": 2, "num_kv_heads": 2, "head_dim": 32}),
    )
    if request.param != "int4":
        return checkpoints.load(folder, dtype=getattr(torch, request.param))
    if kernels.unavailable_reason() is not None:
        pytest.skip(f"no kernels: {kernels.unavailable_reason()}")
    return checkpoints.load(folder, dtype=torch.bfloat16, precision="int4")


@cache
def prompts(image: int, size: int, grid: int) -> tuple[Prompt, ...]:
    """Eight, of 15 to 230 tokens, the first two with one beginning; some with images, which two
    of them share.
    """

    def one(number: int, words: int, *seeds: int) -> Prompt:
        tokens, media = [5 + (number + i * i) % 200 for i in range(words)], []
        for seed in seeds:
            pixels = (
                torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            )
            media.append(Media(pixels, ImageTokenLayout(grid, 1), bytes([seed]), len(tokens)))
            tokens += [image] * grid**2 + [7, 8, 7, 8, 7, 8]
        return Prompt(tokens, tuple(media))

    long, alike = one(1, 200), one(1, 200)
    return (
        long,
        Prompt([*alike.tokens, 11, 12, 13]),
        one(2, 15),
        one(3, 33, 1),
        one(4, 10, 1, 2),
        one(5, 129),
        one(6, 64, 3, 4, 5),
        Prompt([5, 6, 7, 8] * 9),
    )


def answers(
    model: Llava, inputs: Sequence[Prompt], late: Sequence[int] = (), kv_bytes: int = 1 << 24
) -> list[Told]:
    """What each is told; late: by prompt, how many steps after the first."""
    e = Engine(
        model,
        eos_ids={300},
        vocab=300,
        kv_bytes=kv_bytes,
        batch_invariant=True,
        max_num_batched_tokens=128,
    )
    after = dict(enumerate(late))
    tokens: dict[int, Told] = defaultdict(list)
    numbers: dict[int, int] = {}
    turn = 0
    while len(numbers) < len(inputs) or e.busy:
        for number, prompt in enumerate(inputs):
            if after.get(number, 0) == turn:
                numbers[e.add(prompt, HOW).id] = number
        for event in e.step():
            tokens[numbers[event.request.id]].append(
                (event.token, event.logprob, event.top_logprobs)
            )
        turn += 1
    return [tokens[number] for number in range(len(inputs))]


def of(model: Llava) -> tuple[Prompt, ...]:
    c = model.config
    return prompts(c.image_token_id, c.vision.image_size, c.vision.grid)


def test_it_is_the_same_alone_and_with_two_and_with_eight(model: Llava) -> None:
    inputs = of(model)
    alone = [answers(model, [prompt])[0] for prompt in inputs]
    assert len({str(tokens) for tokens in alone}) == len(inputs)
    assert answers(model, inputs[3:5]) == alone[3:5]
    assert answers(model, inputs) == alone
    assert answers(model, inputs[::-1], late=[0, 9, 1, 2, 40, 3, 3, 60]) == alone[::-1]


def test_it_is_the_same_with_little_memory_and_after_others(model: Llava) -> None:
    """Some are pre-empted; some come again, when what they need is cached."""
    inputs = of(model)
    alone = [answers(model, [prompt])[0] for prompt in inputs]
    e = Engine(model, eos_ids={300}, vocab=300, kv_bytes=1 << 24)
    few = answers(model, inputs, kv_bytes=450 * e.bytes_per_token)
    assert few == alone
    again = answers(model, [*inputs, *inputs], late=[0] * 8 + [100] * 8)
    assert again == alone + alone


def test_it_is_a_keyword_and_a_flag(tmp_path: Path) -> None:
    folder = str(tiny_checkpoint(tmp_path))
    flags = ModelFlags(folder, device="cpu", batch_invariant=True)
    assert (
        load(folder, batch_invariant=True).engine.batch_invariant
        and not load(folder).engine.batch_invariant
    )
    assert LazyModel(flags).ready(Options(max_new_tokens=1)).engine.batch_invariant
    assert (
        LazyModel(ClusterWorker(flags).model)
        .ready(Options(max_new_tokens=1))
        .engine.batch_invariant
    )


def test_a_prefix_is_reused_up_to_its_last_whole_chunk(model: Llava) -> None:
    e = Engine(
        model,
        eos_ids={300},
        vocab=300,
        kv_bytes=1 << 24,
        batch_invariant=True,
        max_num_batched_tokens=128,
    )
    first, second, *_ = of(model)
    e.generate([first], HOW)
    (request,) = e.generate([second], HOW)
    assert request.usage.cached == 192  # of 200, in chunks of 64
