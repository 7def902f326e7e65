"""Answers from a GPU are those from a CPU in float32, whatever the memory they are computed in and
in any batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_interleave import load
from llava_interleave.chat import Chatbot
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine import Engine, Request, SamplingParams
from llava_interleave.engine.kv_budget import profile_kv_bytes
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.prompt import Media, Prompt
from llava_interleave.testing import random_tensor
from recipes.tiny_world import SCENARIOS
from recipes.tiny_world.data import exam, render

pytestmark = pytest.mark.slow

ERRORS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""How far features and logits may be from float32 on the CPU, as a share of their size: some
roundings of the type.
"""
CONFIG = LlavaConfig(
    VisionConfig(64, 128, 2, 2, image_size=56, patch_size=14),
    TextConfig(128, 256, 2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=512, context=4096),
    image_token_id=500,
)
KV = 2 * 2 * 2 * 32  # numbers that are kept of a token


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 as they are written: PyTorch lets GPUs round their inputs to 11
    bits.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@cache
def network(device: str, dtype: torch.dtype = torch.float32) -> Llava:
    model = Llava(CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), 0))
    return model.to(device, dtype)


def prompt(number: int, images: int, words: int) -> Prompt:
    """Tokens and images that only prompts of the same number have."""
    random = torch.Generator().manual_seed(number)
    tokens, media, layout = (
        torch.randint(0, 500, (words,), generator=random).tolist(),
        [],
        ImageTokenLayout(4),
    )
    for image in range(images):
        key = f"{number}.{image}".encode()
        media.append(Media(torch.randn(1, 3, 56, 56, generator=random), layout, key, len(tokens)))
        tokens += [500] * layout.length
    return Prompt([*tokens, number % 500], tuple(media))


PROMPTS = [prompt(1, 0, 5), prompt(2, 1, 7), prompt(3, 2, 300), prompt(4, 3, 20), prompt(5, 0, 90)]


def engine(model: Llava, tokens: int = 4000, **options: Any) -> Engine:
    """On a CPU in blocks too, if smaller ones than a GPU's."""
    here = model.lm_head.weight
    options = {"kv_block_size": 32 if here.device.type == "cpu" else None, **options}
    return Engine(model, eos_ids={1}, vocab=500, kv_bytes=tokens * KV * here.itemsize, **options)


def answers(
    model: Llava,
    prompts: Sequence[Prompt] = PROMPTS,
    sampling: SamplingParams | None = None,
    **options: Any,
) -> list[list[int]]:
    made = engine(model, **options)
    requests = made.generate(
        prompts, sampling or SamplingParams(max_new_tokens=24, ignore_eos=True)
    )
    made.check()
    return [request.generated for request in requests]


@cache
def truth() -> list[list[int]]:
    """On a CPU in float32, a contiguous KV cache, one after another."""
    return [answers(network("cpu"), [one], kv_block_size=0)[0] for one in PROMPTS]


@torch.inference_mode()
def computed(model: Llava) -> list[Tensor]:
    """Features of images, and logits of two sequences with some of them."""
    weight, random = model.lm_head.weight, torch.Generator().manual_seed(0)
    features = model.encode(torch.randn(3, 3, 56, 56, generator=random).to(weight))
    positions = torch.cat([torch.arange(300), torch.arange(7)]).to(weight.device)
    x = model.embed(positions + 5, [(3, features[1]), (40, features[2])])
    return [
        features.float().cpu(),
        model.logits(model.forward(x, positions, PackedAttention([300, 7]))).float().cpu(),
    ]


@pytest.mark.parametrize("precision", ERRORS)
def test_numbers_are_within_the_types_error(device: str, precision: str) -> None:
    found = computed(network(device, getattr(torch, precision)))
    for ours, sure in zip(found, computed(network("cpu")), strict=True):
        assert int((~ours.isfinite()).sum()) == 0
        assert float((ours - sure).norm() / sure.norm()) < ERRORS[precision]


Questions = list[list[dict[str, Any]]]


@cache
def questions() -> Questions:
    """Of the built-in model's world, two of each scenario."""
    found = []
    for number, scenario in enumerate([*SCENARIOS, *SCENARIOS]):
        seen, _, text = exam(scenario, 2000 + number, held_out=False)
        parts = [{"type": "image", "image": image} for image in render(seen, 200)]
        found.append([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
    return found


def said(bot: Chatbot) -> list[str]:
    return [answer.text for answer in bot.batch(questions(), max_new_tokens=60)]


@cache
def sure() -> list[str]:
    return said(load(device="cpu", precision="float32"))


@pytest.mark.parametrize("precision", ERRORS)
def test_the_built_in_model_says_the_same(device: str, precision: str) -> None:
    assert said(load(device=device, precision=precision)) == sure()


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8", "nf4"])
def test_the_built_in_model_gives_the_same_answers_quantized(
    card: torch.device, precision: str
) -> None:
    """Nearly: 4 bits cost a model so small an answer or two."""
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    if precision == "fp8" and torch.cuda.get_device_capability(card) < (8, 9):
        pytest.skip("this GPU has no products in float8")
    found = said(load(device="cuda", precision=precision))
    right = sum(a == b for a, b in zip(found, sure(), strict=True))
    assert right >= len(found) - (1 if precision in ("int8", "fp8") else 3)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_num_batched_tokens": 64},
        {"tokens": 768, "max_num_seqs": 3},
        {
            "sampling": SamplingParams(
                max_new_tokens=24, ignore_eos=True, prompt_lookup_num_tokens=6
            )
        },
        {"batch_invariant": True},
    ],
    ids=["as it comes", "in pieces", "in little memory", "prompt lookup", "batch_invariant"],
)
def test_greedy_answers_in_float32_are_a_cpus(device: str, how: dict[str, Any]) -> None:
    assert answers(network(device), **how) == truth()


def test_half_the_memory_for_keys_and_values(device: str) -> None:
    """An int8 KV cache: the same answers from blocks and from contiguous memory."""
    there, here = (
        answers(network(place), kv_precision="int8", **how)
        for place, how in ((device, {}), ("cpu", {"kv_block_size": 0}))
    )
    assert there == here


def test_a_prefix_is_found_and_changes_nothing(device: str) -> None:
    made, how = engine(network(device)), SamplingParams(max_new_tokens=24, ignore_eos=True)
    (first,) = made.generate([PROMPTS[2]], how)
    (again,) = made.generate([PROMPTS[2]], how)
    assert first.generated == again.generated == truth()[2]
    assert again.cached and made.load().crops_encoded == 2


@pytest.mark.usefixtures("card")
def test_captured_steps_are_those_launch_by_launch() -> None:
    """In bfloat16, with one to five answers under way; steps ahead of the host are the same too."""
    model = network("cuda", torch.bfloat16)
    captured, plain = engine(model), engine(model)
    assert captured.attention.endswith("; CUDA graphs"), captured.attention
    plain._runner.graphs.drop("for comparison")  # the same steps of the same shapes
    how = SamplingParams(max_new_tokens=24, ignore_eos=True)
    for count in (1, 2, 3, 5):
        for made in (captured, plain):
            made.clear()
        found, expected = (
            [r.generated for r in made.generate(PROMPTS[:count], how)] for made in (captured, plain)
        )
        assert found == expected


@pytest.mark.usefixtures("card")
def test_a_step_is_launched_before_the_one_before_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end one after another; then one that ends where nobody can know it, and is gone
    on from.
    """
    model = network("cuda", torch.bfloat16)
    ahead, never = engine(model), engine(model)
    launch, launched = ahead._runner._launch_next, list[object]()

    def counted(*given: Any) -> Any:
        launched.append(launch(*given))
        return launched[-1]

    monkeypatch.setattr(ahead._runner, "_launch_next", counted)
    monkeypatch.setattr(never._runner, "_launch_next", lambda *_: None)
    events = []
    for made in (ahead, never):
        each = [
            SamplingParams(max_new_tokens=4 + 9 * n, ignore_eos=True) for n in range(len(PROMPTS))
        ]
        found = [request.generated for request in made.generate(PROMPTS, each)]
        made.clear()
        stop = SamplingParams(max_new_tokens=40, stop_ids=(found[4][-1],), ignore_eos=True)
        (ended,) = made.generate([PROMPTS[4]], stop)
        (more,) = made.generate([Prompt([*ended.tokens, 7])], each[0])
        events.append([*found, ended.generated, more.generated, more.cached])
        made.check()
    assert events[0] == events[1]
    assert sum(step is not None for step in launched) > 40


SAMPLED = [
    SamplingParams(max_new_tokens=24, temperature=1.0, seed=1, ignore_eos=True),
    SamplingParams(max_new_tokens=24, temperature=0.8, top_k=20, seed=2, ignore_eos=True),
    SamplingParams(max_new_tokens=24, repetition_penalty=1.5, ignore_eos=True),
    SamplingParams(max_new_tokens=24, temperature=1.2, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=24, ignore_eos=True),
]


def test_sampled_answers_in_float32_are_a_cpus(device: str) -> None:
    """The whole batch on the GPU, by the random numbers of each request on the host."""
    here, there = (
        [r.generated for r in made.generate(PROMPTS, SAMPLED)]
        for made in (engine(network("cpu"), kv_block_size=0), engine(network(device)))
    )
    assert here == there


def test_deterministic_answers_are_alike_to_the_last_bit(device: str) -> None:
    how = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def found(prompts: Sequence[Prompt]) -> dict[int, list[Any]]:
        made = engine(network(device, dtype), batch_invariant=True, tokens=2048)
        events: dict[int, list[Any]] = {}
        requests = {made.add(one, how): index for one in prompts for index in [PROMPTS.index(one)]}
        while made.busy:
            for event in made.step():
                assert event.error is None
                events.setdefault(requests[event.request], []).append(
                    (event.token, event.logprob, event.top_logprobs)
                )
        return events

    together = found(PROMPTS)
    assert together == {index: found([one])[index] for index, one in enumerate(PROMPTS)}
    assert found(PROMPTS[::-1]) == together


@dataclass
class Failing:
    """The tower, which at first asks for more memory than there is."""

    encode: Callable[[Tensor], Tensor]
    times: int = 1

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.times:
            self.times -= 1
            if pixels.is_cuda:
                torch.empty(1 << 50, dtype=torch.uint8, device=pixels.device)
            raise torch.OutOfMemoryError("as if there were no memory")
        return self.encode(pixels)


def test_without_memory_a_request_fails_and_the_engine_goes_on(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(device)
    made, how = engine(model), SamplingParams(max_new_tokens=24, ignore_eos=True)
    monkeypatch.setattr(model, "encode", Failing(model.encode))
    requests: list[Request] = [made.add(PROMPTS[3], how)]
    events = made.step()
    requests.append(made.add(PROMPTS[1], how))
    while made.busy:
        events += made.step()
    assert [request.finish_reason for request in requests] == ["error", "length"]
    assert isinstance(next(event.error for event in events if event.error), torch.OutOfMemoryError)
    assert requests[1].generated == truth()[1]
    made.check()


def test_the_room_that_is_measured_is_there(card: torch.device) -> None:
    """A pool of it is made, filled, and computed in without running out."""
    model = network("cuda", torch.bfloat16)
    small = profile_kv_bytes(model, max_num_seqs=2)
    assert small == 2 * CONFIG.text.context * KV * 2
    assert profile_kv_bytes(model, gpu_memory=0.5) > small
    free = torch.cuda.mem_get_info(card)[0]
    made = Engine(model, eos_ids=(), vocab=500, kv_bytes=small, max_num_seqs=2)
    prompts = [prompt(number, 6, 2900) for number in (11, 12)]
    requests = made.generate(prompts, SamplingParams(max_new_tokens=8, ignore_eos=True))
    assert [len(request.generated) for request in requests] == [8, 8]
    assert small <= free


@pytest.mark.usefixtures("card")
def test_the_attention_backend_is_reported() -> None:
    info = load(device="cuda", precision="bfloat16").info()
    assert str(info["device"]).startswith("cuda") and info["linears"] == "PyTorch"
