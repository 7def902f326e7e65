"""Fewer tokens an image: counted, keyed and computed as features that were averaged and chosen by
hand.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llava_interleave import load
from llava_interleave.chat import Chatbot
from llava_interleave.errors import ContextError, OptionError
from llava_interleave.image_layout import ImageTokenLayout, TokenReduction, anyres
from llava_interleave.journal import read
from llava_interleave.model import arrange_features
from llava_interleave.processing import FrameSampling
from tests.helpers.cli import llava
from tests.helpers.engine import GREEDY, GRID, answers, engine, finish, naive, prompt, text

VIDEO = {
    "type": "video",
    "video": [Image.new("RGB", (20, 20), (0, 0, 40 * i)) for i in range(5)],
    "frames": 3,
}
ASKED = [
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (90, 40), "red")}, VIDEO],
    }
]


@pytest.fixture(scope="module")
def bot(tiny: Path) -> Chatbot:
    return load(tiny, device="cpu")


def averaged(features: Tensor, grid: int, pool: int) -> Tensor:
    """`[crops, grid * grid, D]` -> `[crops, side * side, D]`, a square at a time."""
    squares = features.view(len(features), grid, grid, -1)
    corners = range(0, grid, pool)
    means = [squares[:, y : y + pool, x : x + pool].mean((1, 2)) for y in corners for x in corners]
    return torch.stack(means, dim=1)


@pytest.mark.parametrize(
    ("grid", "pool"), [(27, 1), (27, 2), (27, 3), (27, 27), (3, 2), (4, 3), (5, 2), (1, 1)]
)
def test_tokens_are_the_means_of_squares_and_lie_as_those_of_a_smaller_grid(
    grid: int, pool: int
) -> None:
    side = -(-grid // pool)
    for layout, smaller in (
        (ImageTokenLayout(grid, 3, pool=pool), ImageTokenLayout(side, 3)),
        (anyres(800, 300, 384, grid, pool), anyres(800, 300, 384, side)),
        (anyres(300, 3000, 384, grid, pool), anyres(300, 3000, 384, side)),
    ):
        features = torch.randn(
            layout.crops, grid**2, 5, generator=torch.Generator().manual_seed(grid)
        ).double()
        tokens = arrange_features(features, layout)
        assert len(tokens) == layout.length == smaller.length
        assert torch.allclose(
            tokens, arrange_features(averaged(features, grid, pool), smaller), rtol=1e-12
        )


def test_27_become_14_or_9() -> None:
    assert [ImageTokenLayout(27, 8, pool=pool).length for pool in (1, 2, 3)] == [
        8 * 729,
        8 * 196,
        8 * 81,
    ]


def spread(features: Tensor, count: int) -> list[int]:
    """Which tokens of `[T, D]` differ most from each other, a token at a time."""
    apart = [[1 - float(torch.cosine_similarity(a, b, dim=0)) for b in features] for a in features]
    every = range(len(features))
    chosen = [max(every, key=lambda i: min(apart[i][j] for j in every if j != i))]
    while len(chosen) < count:
        chosen.append(max(set(every) - set(chosen), key=lambda i: min(apart[i][j] for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_tokens_are_kept_that_differ_most_frame_by_frame_and_over_all_tiles(share: float) -> None:
    for whole in (
        ImageTokenLayout(4, 3),
        ImageTokenLayout(7, 2, pool=2),
        anyres(800, 300, 384, 4),
        anyres(800, 300, 384, 5, pool=2),
    ):
        layout = replace(whole, share=share)
        features = torch.randn(
            layout.crops, layout.grid**2, 6, generator=torch.Generator().manual_seed(1)
        )
        parts = arrange_features(features, whole).split(
            whole.length if whole.tiles else whole.side**2
        )
        kept = [part[spread(part, max(1, round(len(part) * share)))] for part in parts]
        assert layout.length == sum(map(len, kept)) < whole.length
        assert torch.equal(arrange_features(features, layout), torch.cat(kept))


def test_of_tokens_that_are_alike_one_is_kept() -> None:
    """A thing on a plain wall: half of the tokens still hold the thing."""
    features = torch.ones(1, 16, 8) + 0.01 * torch.randn(
        1, 16, 8, generator=torch.Generator().manual_seed(0)
    )
    features[0, 6] = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
    assert any(
        torch.equal(row, features[0, 6])
        for row in arrange_features(features, ImageTokenLayout(4, share=0.15))
    )


def test_the_engine_answers_as_whole_forwards_do_and_keeps_apart_what_was_thinned_otherwise() -> (
    None
):
    """Prefix hit or miss, batched or alone; the same frames with other tokens share neither
    features nor KV cache.
    """
    head = text(0, 40)
    ways = ((1, 1.0), (2, 1.0), (3, 1.0), (1, 0.5), (2, 0.75))
    videos = [
        prompt(head, (2, ImageTokenLayout(GRID, 4, pool=pool, share=share)), text(1, 5))
        for pool, share in ways
    ]
    tiled = prompt(
        text(2, 5),
        (3, ImageTokenLayout(GRID, 5, (2, 2), (1, 0, 3, 4), pool=2, share=0.7)),
        text(3, 3),
    )
    right = [naive(p, 12) for p in (*videos, tiled)]
    assert len({tuple(answer) for answer in right}) == len(right)
    e = engine(max_batched_images=3)
    requests = [e.add(p, GREEDY) for p in (*videos, tiled)]
    finish(e)
    assert answers(requests) == right
    width = e.model.config.text.hidden_size * 4
    lengths = [m.layout.length for p in (*videos, tiled) for m in p.media]
    tiles = 5 * GRID**2  # before they are reduced and arranged
    assert e.load().feature_bytes == width * (sum(lengths) + tiles)
    again = [e.add(p, GREEDY) for p in (*videos, tiled)]
    finish(e)
    assert answers(again) == right
    assert all(request.usage.cached > len(head) for request in again[:-1])
    alone = engine()
    for p, answer in zip(videos, right, strict=False):
        request = alone.add(p, GREEDY)
        finish(alone)
        assert request.generated == answer
        assert request.usage.cached == (0 if p is videos[0] else len(head))


@pytest.mark.parametrize(
    "thin",
    [
        TokenReduction(),
        TokenReduction(image_token_pool=2),
        TokenReduction(video_token_pool=3),
        TokenReduction(2, 4),
        TokenReduction(2, 1, 0.5, 0.3),
        TokenReduction(image_token_ratio=0.8),
    ],
)
@pytest.mark.parametrize("tiles", [False, True])
def test_the_estimate_is_exact_and_keys_differ(
    bot: Chatbot, thin: TokenReduction, tiles: bool
) -> None:
    made = bot.processor.prompt(ASKED, reduction=thin, anyres=tiles)
    image, video = made.media
    assert (image.layout.pool, video.layout.pool) == (thin.image_token_pool, thin.video_token_pool)
    assert video.layout.length == 3 * round(video.layout.side**2 * thin.video_token_ratio)
    assert (
        made.tokens.count(bot.model.config.image_token_id)
        == image.layout.length + video.layout.length
    )
    counted = bot.processor.estimate(ASKED, reduction=thin, anyres=tiles)
    assert (counted.total, [part.tokens for part in counted.parts[1:]]) == (
        len(made),
        [m.layout.length for m in made.media],
    )
    plain = bot.processor.prompt(ASKED, anyres=tiles)
    same = [
        (thin.image_token_pool, thin.image_token_ratio) == (1, 1),
        (thin.video_token_pool, thin.video_token_ratio) == (1, 1),
    ]
    assert [m.key == p.key for m, p in zip(made.media, plain.media, strict=True)] == same
    assert all(
        torch.equal(m.pixels, p.pixels) for m, p in zip(made.media, plain.media, strict=True)
    )


def test_more_frames_fit_and_the_error_counts_them(bot: Chatbot) -> None:
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(250)]
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}]}]
    reserve = bot.model.config.text.context - 900  # 200 frames of 4 tokens fit, 250 do not

    def length(count: int, thin: TokenReduction) -> int:
        return len(
            bot.processor.prompt(
                messages, frames=FrameSampling(frames=count), reduction=thin, max_new_tokens=reserve
            )
        )

    assert 800 < length(200, TokenReduction(video_token_pool=2)) < 900
    for thin, tokens in (
        (TokenReduction(image_token_pool=2), 16),
        (TokenReduction(video_token_pool=3), 4),
    ):
        with pytest.raises(ContextError) as error:
            length(250, thin)
        most = int(str(error.value).split("at most ")[1].split(" frames fit")[0])
        assert 900 - length(most, thin) < tokens


@pytest.mark.parametrize("wrong", [0, 5, -1, True, 1.5, "2"])
def test_what_cannot_be_pooled_is_refused(bot: Chatbot, wrong: Any) -> None:
    for name in ("image_token_pool", "video_token_pool"):
        with pytest.raises(OptionError, match=f"{name} must be a whole number from 1 to 4"):
            bot.prompt(ASKED, **{name: wrong})


@pytest.mark.parametrize("wrong", [0, 1.01, -0.5, True, float("nan"), "1"])
def test_what_is_no_share_is_refused(bot: Chatbot, wrong: Any) -> None:
    for name in ("image_token_ratio", "video_token_ratio"):
        with pytest.raises(
            OptionError, match=f"{name} is a share of the tokens, above 0 and at most 1"
        ):
            bot.prompt(ASKED, **{name: wrong})


def test_an_answer_and_its_explanation(bot: Chatbot, tmp_path: Path) -> None:
    """Maps have the smaller grid, and the answer's log-probability is the engine's."""
    options: dict[str, Any] = {"image_token_pool": 2, "video_token_pool": 3}
    answer = bot.chat(ASKED, max_new_tokens=6, logprobs=0, ignore_eos=True, **options)
    assert answer.usage.prompt == bot.estimate(ASKED, **options).total < bot.estimate(ASKED).total
    found = bot.attribute(ASKED, answer, **options)
    assert answer.logprobs is not None
    assert found.logprob == pytest.approx(sum(token.logprob for token in answer.logprobs), abs=1e-4)
    assert [look.heat.shape for look in found.images] == [(1, 2, 2), (3, 2, 2)]
    assert sum(float(look.heat.sum()) for look in found.images) == pytest.approx(1, abs=1e-5)
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count('class="map"') == 4
    few = bot.chat(ASKED, max_new_tokens=2, video_token_ratio=0.5)
    with pytest.raises(OptionError, match="without image_token_ratio and video_token_ratio"):
        bot.attribute(ASKED, few, video_token_ratio=0.5)


def test_commands_take_it_and_results_say_so(tiny: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "a.png")
    words = ("What?", "-a", tmp_path / "a.png", "-m", tiny, "--image-token-pool", 2, "--json")
    planned, answered = (json.loads(llava(command, *words).out) for command in ("estimate", "ask"))
    assert planned["parts"][1]["tokens"] == 4
    assert answered["usage"]["prompt"] == planned["total"]
    world = ("eval", "recipes.tiny_world.benchmark:World", "--task-option", "scenario=video")
    few: Sequence[object] = ("-m", tiny, "-n", 1, "--max-new-tokens", 3, "-o", tmp_path)
    done = llava(*world, "--video-token-pool", 2, "--video-token-ratio", 0.5, *few)
    assert done.code == 0, done.err
    about, rows = read(tmp_path / "world.jsonl")
    assert about["geometry"] == "squash, video_token_pool 2, video_token_ratio 0.5"
    assert rows[0]["error"] is None
    other = llava(*world, *few)
    assert (other.code, "video_token_pool 2" in other.err) == (2, True)
