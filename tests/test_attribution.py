"""What an answer leaned on: against attention written out, masks that stand there, and the engine's
own log-probabilities.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from llava_interleave.attribution.attribution import LeaveOut, normalize, to_heatmap
from llava_interleave.attribution.citations import Citation, cite, mark
from llava_interleave.attribution.forward import AttributionRun
from llava_interleave.chat import Chatbot, load
from llava_interleave.cli import app
from llava_interleave.cli.demo import copy_files
from llava_interleave.errors import DataError, OptionError, PromptError
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import ContinuationAttention, Llava, arrange_features
from llava_interleave.options import Options
from llava_interleave.prompt import Media, Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config

SHAPES = {"as 0.5B": {}, "GQA": {"num_kv_heads": 2}, "one key-value head": {"num_kv_heads": 1}}


@pytest.fixture(scope="module", params=SHAPES)
def bot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    config = tiny_config(text={"num_layers": 3, **SHAPES[request.param]})
    return load(
        tiny_checkpoint(tmp_path_factory.mktemp("attribution") / "tiny", config), device="cpu"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(noise.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
    return sorted(folder.iterdir())


class Written:
    """Causal attention written out with a mask: no other token from `first` on sees a key that is
    `hidden`. Keeps all probabilities.
    """

    def __init__(self, hidden: Sequence[int] = (), first: int = 0) -> None:
        self.hidden, self.first = hidden, first
        self.kept: dict[int, Tensor] = {}  # layer -> [H, T, T]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total, repeat = len(q), q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        seen[self.first :, list(self.hidden)] = False
        seen |= torch.eye(total, dtype=torch.bool)
        scores = q.transpose(0, 1) @ k.permute(1, 2, 0) / math.sqrt(q.shape[2])
        self.kept[layer] = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (self.kept[layer] @ v.transpose(0, 1)).transpose(0, 1)


@torch.inference_mode()
def reference(
    model: Llava,
    prompt: Prompt,
    answer: tuple[int, ...],
    vocab: int,
    hidden: Sequence[int] = (),
    first: int = 0,
) -> tuple[Tensor, Written]:
    """Log-probability of each token of an answer after a prompt, read whole, and the attention that
    was paid.
    """
    spans = [(m.start, arrange_features(model.encode(m.pixels), m.layout)) for m in prompt.media]
    attend = Written(hidden, first)
    x = model.embed(torch.tensor([*prompt.tokens, *answer]), spans)
    logits = model.logits(model(x, torch.arange(len(x)), attend))[
        len(prompt) - 1 : -1, :vocab
    ].clone()
    if model.config.image_token_id < vocab:
        logits[:, model.config.image_token_id] = -torch.inf
    return logits.log_softmax(-1)[torch.arange(len(answer)), list(answer)], attend


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_what_is_recorded_is_the_softmax_and_changes_nothing(heads: int, groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(11, heads, 8), torch.randn(11, groups, 8), torch.randn(11, groups, 8)
    recorded, written = (
        ContinuationAttention([11], [[]], None, layers=[2], record=4),
        Written(),
    )
    assert torch.allclose(recorded(2, q, k, v), written(2, q, k, v), atol=1e-6)
    recorded(1, q, k, v)
    assert set(recorded.recorded) == {2}
    kept = recorded.recorded[2]
    assert kept.shape == (4, 11)
    assert torch.allclose(kept.sum(-1), torch.ones(4), atol=1e-6)
    assert torch.allclose(kept, written.kept[2].mean(0)[7:], atol=1e-6)
    assert (kept.triu(8) == 0).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["sdpa", "kernel"]
)
@pytest.mark.parametrize("seed", range(4))
def test_continuations_see_their_ranges(dtype: torch.dtype, tolerance: float, seed: int) -> None:
    """Of a stored sequence and of themselves, whatever the continuation before them saw."""
    rng = Random(seed)
    torch.manual_seed(seed)
    stored, heads, groups, d, passes = 40, 4, 2, 16, 6
    lengths = [rng.randint(1, 20) for _ in range(passes)]
    edges = [sorted(rng.sample(range(stored + 1), 2 * rng.randint(0, 3))) for _ in lengths]
    seen = [list(zip(one[::2], one[1::2], strict=True)) for one in edges]
    q, k, v = (torch.randn(sum(lengths), n, d).to(dtype) for n in (heads, groups, groups))
    keys, values = (torch.randn(stored, groups, d).to(dtype) for _ in range(2))
    attend = ContinuationAttention(lengths, seen, lambda _: (keys, values), layers=[1], record=1)
    for layer in range(2):
        found = attend(layer, q, k, v)
        for ranges, out, *own in zip(
            seen, *(x.split(lengths) for x in (found, q, k, v)), strict=True
        ):
            see = torch.zeros(stored, dtype=torch.bool)
            for start, stop in ranges:
                see[start:stop] = True
            queries, own_k, own_v = own
            all_keys, all_values = torch.cat([keys[see], own_k]), torch.cat([values[see], own_v])
            expected = plain_attention(queries.float(), all_keys.float(), all_values.float())
            assert torch.allclose(out.float(), expected, atol=tolerance)
    recorded = attend.recorded[1]
    assert recorded.shape == (1, sum(stop - start for start, stop in seen[0]) + lengths[0])
    assert recorded.sum() == pytest.approx(1, abs=1e-4)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the last `len(q)` tokens, head by head."""
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, group].t() * q.shape[2] ** -0.5
        out[:, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, group]
    return out


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("leave_out", [True, "exact"])
def test_against_masks_and_the_engine(
    bot: Chatbot, files: list[Path], leave_out: LeaveOut, cached: bool
) -> None:
    """Changes, attention, maps and images of three images, from a network that is asked in the
    plainest way; with and without what the engine has computed.
    """
    turn = bot.turn("First <image> then <image> and <image>?", files)
    answer = bot.chat(turn, max_new_tokens=7, logprobs=0, ignore_eos=True, temperature=50, seed=1)
    if not cached:
        bot.engine.clear()
    found = bot.attribute(turn, answer, layers=[0, 2], leave_out=leave_out)
    prompt, vocab = bot.prompt(turn), bot.processor.tokenizer.size
    assert answer.logprobs is not None
    assert found.logprob == pytest.approx(sum(token.logprob for token in answer.logprobs), abs=1e-4)
    whole, written = reference(bot.model, prompt, answer.tokens, vocab)
    images = [m.start + offset for m in prompt.media for offset in range(m.layout.length)]
    blind, _ = reference(bot.model, prompt, answer.tokens, vocab, images)
    drops = (whole - blind).clamp(min=0)
    assert 0 < int((drops > 0).sum()) < 7
    attention = torch.cat([written.kept[layer] for layer in (0, 2)]).mean(0)
    rows = (attention[len(prompt) - 1 : -1] * (drops / drops.sum())[:, None]).sum(0)
    masses = [rows[m.start : m.start + m.layout.length] for m in prompt.media]
    total = float(sum(mass.sum() for mass in masses))
    for look, media, mass, file in zip(found.images, prompt.media, masses, files, strict=True):
        without, _ = reference(
            bot.model,
            prompt,
            answer.tokens,
            vocab,
            range(media.start, media.start + media.layout.length),
            0 if leave_out == "exact" else max(m.start + m.layout.length for m in prompt.media),
        )
        assert look.change == pytest.approx(float((whole - without).sum()), abs=1e-4)
        assert look.token_changes == pytest.approx((whole - without).numpy(), abs=1e-4)
        assert abs(look.change) > 1e-3
        assert look.attention == pytest.approx(float(mass.sum()) / total, abs=1e-5)
        assert np.allclose(look.heat, mass.view(1, 4, 4) / total, atol=1e-6)
        assert (look.pixels == np.asarray(Image.open(file))[None]).all()
        assert str(file) in look.name
    assert sum(look.share or 0 for look in found.images) == pytest.approx(1)
    assert sum(look.attention for look in found.images) == pytest.approx(1)
    assert sum(float(look.heat.sum()) for look in found.images) == pytest.approx(1, abs=1e-5)
    assert (found.question, found.answer, found.layers) == (
        "First … then … and … ?",
        answer.text,
        (0, 2),
    )
    assert dataclasses.asdict(found)["images"][1]["change"] == found.images[1].change


def test_the_cheap_variant_is_the_same_without_changes(bot: Chatbot, files: list[Path]) -> None:
    turn = bot.turn("Hm?", files)
    answer = bot.chat(turn, max_new_tokens=3)
    dear, cheap = bot.attribute(turn, answer), bot.attribute(turn, answer, leave_out=False)
    assert [look.attention for look in cheap.images] == [look.attention for look in dear.images]
    assert {(look.change, look.share) for look in cheap.images} == {(None, None)}
    assert cheap.logprob == dear.logprob


def test_a_text_is_attributed_as_its_tokens(bot: Chatbot, files: list[Path]) -> None:
    turn = bot.turn("Hm?", files[:2])
    found = bot.attribute(turn, "three shapes")
    tokens = tuple(bot.processor.tokenizer.encode("three shapes"))
    expected, _ = reference(bot.model, bot.prompt(turn), tokens, bot.processor.tokenizer.size)
    assert found.logprob == pytest.approx(float(expected.sum()), abs=1e-4)


def test_images_that_cannot_influence_have_no_change(tmp_path: Path, files: list[Path]) -> None:
    """Where no attention reaches the residual stream; shares are then alike, and finite."""
    bot = load(tiny_checkpoint(tmp_path / "deaf"), device="cpu")
    with torch.no_grad():
        for layer in bot.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    turn = bot.turn("Hm?", files)
    found = bot.attribute(turn, bot.chat(turn, max_new_tokens=4))
    assert [look.change for look in found.images] == pytest.approx([0, 0, 0], abs=1e-5)
    assert sum(look.share or 0 for look in found.images) == pytest.approx(1)


def test_shares() -> None:
    assert normalize([3.0, -5.0, 1.0]) == [0.75, 0.0, 0.25]
    assert normalize([0.0, -1.0]) == [0.5, 0.5]
    assert normalize([0.0]) == [1.0]


def test_views_videos_and_tiles(
    bot: Chatbot, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view is an image with its name, a video one look with a map a frame, tiles lie on the whole
    image. All is read once.
    """
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 90, 3), dtype=np.uint8))
    views = {"type": "views", "views": {"front": str(files[0]), "left": str(files[1])}}
    turn = bot.turn("Hm?", [views, [str(file) for file in files], wide])
    options: Mapping[str, object] = {"anyres": True, "frames": 3}
    estimate, answer = bot.estimate(turn, **options), bot.chat(turn, max_new_tokens=3, **options)
    read: list[str] = []
    for name in ("image", "video", "image_size", "video_times"):
        real = getattr(bot.processor.loader, name)
        monkeypatch.setattr(
            bot.processor.loader,
            name,
            lambda *a, real=real, name=name: read.append(name) or real(*a),
        )
    bot.prompt(turn, **options)
    once = sorted(read)
    found = bot.attribute(turn, answer, **options)
    assert sorted(read) == sorted(once * 2)
    assert [look.name for look in found.images] == [part.name for part in estimate.parts[1:]]
    assert [look.heat.shape for look in found.images] == [
        (1, 4, 4),
        (1, 4, 4),
        (3, 4, 4),
        (1, 4, 4),
    ]
    assert [look.pixels.shape for look in found.images] == [
        (1, 30, 30, 3),
        (1, 30, 30, 3),
        (3, 30, 30, 3),
        (1, 30, 30, 3),
    ]
    assert [look.name.split(":")[0] for look in found.images] == [
        "view front",
        "view left",
        "video 3",
        "image 4",
    ]
    for look in found.images:
        assert float(look.heat.sum()) == pytest.approx(look.attention, abs=1e-5)


def test_tiles_are_folded_to_the_place_they_show() -> None:
    """A window of 2 x 6 features over a whole image of 3 x 3: the middle row has none, its
    neighbours two columns each.
    """
    layout = ImageTokenLayout(3, 1 + 1 * 2, (1, 2), (0, 0, 2, 6))
    weights = torch.cat([torch.zeros(9), torch.arange(12.0)])
    assert to_heatmap(weights, layout).tolist() == [
        [[1.0, 5.0, 9.0], [0.0, 0.0, 0.0], [13.0, 17.0, 21.0]]
    ]


def test_what_has_no_explanation(bot: Chatbot, files: list[Path]) -> None:
    text, turn = bot.turn("Hm?"), bot.turn("Hm?", files)
    answer = bot.chat(turn, max_new_tokens=2)
    with pytest.raises(PromptError, match="tokens of text and no image"):
        bot.attribute(text, bot.chat(text, max_new_tokens=2))
    other = len(bot.prompt(turn, system=""))
    with pytest.raises(
        PromptError, match=f"prompt of {answer.usage.prompt} tokens, but .* make {other}"
    ):
        bot.attribute(turn, answer, system="")
    with pytest.raises(PromptError, match="no tokens"):
        bot.attribute(turn, "")
    with pytest.raises(PromptError, match="context is 4096"):
        bot.attribute(turn, "three shapes " * 2000)
    for layers in ([], [3], [-1], [0.5]):
        with pytest.raises(OptionError, match="from 0 to 2"):
            bot.attribute(turn, answer, layers=layers)
    with pytest.raises(DataError, match="cannot write"):
        bot.attribute(turn, answer).save("/nowhere/at/all.html")


class Page(HTMLParser):
    """Which tags a page opens without closing them, the addresses it names, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.maps = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.maps += ("class", "map") in attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("how", [[], ["--no-stream"], ["--json"]])
def test_the_command_writes_a_page(how: list[str], tmp_path: Path, files: list[Path]) -> None:
    """It parses, names every image, needs no other file and runs nothing; what is printed is what
    it was without it.
    """
    tiny, out = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out.html"
    odd = tmp_path / "<b>&.png"
    odd.write_bytes(files[0].read_bytes())
    attached = [word for file in (*files, odd) for word in ("-a", str(file))]
    words = ["ask", "-m", str(tiny), *attached, "What <i> is it?", "--max-new-tokens", "5", *how]
    plain, done = (
        CliRunner().invoke(app, words),
        CliRunner().invoke(app, [*words, "--attribution", str(out)]),
    )
    assert done.exit_code == 0, done.exception
    assert how == ["--json"] or done.stdout == plain.stdout
    page = Page()
    page.feed(out.read_text("utf-8"))
    assert not {"script", "link", "b", "i"} & set(page.tags)
    assert page.maps == 4
    assert len(page.sources) == 8
    assert all(
        source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        for source in page.sources
    )
    assert all(page.text.count(str(file)) == 2 for file in (*files, odd))
    assert "What <i> is it?" in page.text
    assert page.text.count("nats") == 5 and page.text.count(" likely") == 4


def test_the_command_refuses_what_has_no_page(tmp_path: Path, files: list[Path]) -> None:
    for words in (["Hm?"], ["Hm?", "-a", str(files[0]), "-n", "2"]):
        done = CliRunner().invoke(
            app, ["ask", "-m", "./nowhere", *words, "--attribution", str(tmp_path / "out.html")]
        )
        assert isinstance(done.exception, OptionError)
        assert "--attribution" in str(done.exception)
    assert not (tmp_path / "out.html").exists()


def test_without_the_last_image_both_ways_are_one(bot: Chatbot, files: list[Path]) -> None:
    """All rows that could have taken something from it are computed again."""
    for attached in (files[:1], files):
        turn = bot.turn("Hm?", attached)
        answer = bot.chat(turn, max_new_tokens=5, ignore_eos=True)
        direct, exact = (bot.attribute(turn, answer, leave_out=how) for how in (True, "exact"))
        changes = [one.images[-1].token_changes for one in (direct, exact)]
        assert changes[0] == pytest.approx(changes[1], abs=1e-5)


def test_citations_sum_to_the_attribution(bot: Chatbot, files: list[Path]) -> None:
    text = "One cat. Two dogs, and 3.5 m.\nThe rest is sea"
    turn = bot.turn("Hm?", files)
    prompt, tokenizer = bot.prompt(turn), bot.processor.tokenizer
    tokens = tokenizer.encode(text)
    run = AttributionRun(bot.model, prompt, tokens, tokenizer.size)
    found = cite(run, [tokenizer.token_bytes(token) for token in tokens], text)
    assert [text[one.start : one.end] for one in found] == [one.text for one in found]
    assert "".join(one.text for one in found) == text
    assert [one.text.strip() for one in found] == [
        "One cat.",
        "Two dogs, and 3.5 m.",
        "The rest is sea",
    ]
    sums = [sum(column) for column in zip(*(one.changes for one in found), strict=True)]
    changes = [image.change for image in bot.attribute(turn, text).images]
    assert sums == pytest.approx(changes, abs=1e-4)


class Known:
    """A run whose log-probabilities are known: by the number of the one visible image, if any."""

    def __init__(self, whole: float, hidden: list[float], visible: list[float], none: float):
        media = tiny_media(len(hidden))
        self.prompt, self.none = Prompt([], media), none
        self.by_hidden = {(one,): value for one, value in zip(media, hidden, strict=True)} | {
            tuple(m for m in media if m is not one): value
            for one, value in zip(media, visible, strict=True)
        }
        self.by_hidden[()] = whole

    def without(self, media: Sequence[Media]) -> Tensor:
        return torch.tensor([self.none])

    def directly_without(self, hidden: Sequence[Sequence[Media]]) -> list[Tensor]:
        return [torch.tensor([self.by_hidden.get(tuple(one), self.none)]) for one in hidden]


def tiny_media(count: int) -> tuple[Media, ...]:
    layout = ImageTokenLayout(2, 1)
    return tuple(Media(torch.zeros(0), layout, bytes([i]), i * layout.length) for i in range(count))


@pytest.mark.parametrize(
    ("hidden", "visible", "none", "images"),
    [
        ([-9.0, -1.0, -1.2], [], -9.0, (1,)),
        ([-9.0, -4.9, -5.1], [], -9.0, (1, 3)),  # half of the largest
        ([-1.9, -1.0, -1.0], [-1.9, -1.9, -1.9], -1.5, ()),  # no image is needed
        ([-1.0, -1.1, -1.0], [-1.5, -1.2, -8.0], -9.0, (1, 2)),  # both tell it
    ],
)
def test_which_images_are_cited(
    hidden: list[float], visible: list[float], none: float, images: tuple[int, ...]
) -> None:
    run = Known(-1.0, hidden, visible or hidden, none)
    (found,) = cite(run, [b"A cat."], "A cat.")  # type: ignore[arg-type]
    assert (found.images, found.uncertain) == (images, False)
    assert found.changes == pytest.approx([-1.0 - one for one in hidden], abs=1e-6)
    (compares,) = cite(run, [b"Both."], "Both.")  # type: ignore[arg-type]
    assert compares.uncertain


def test_text_with_its_citations() -> None:
    found = [
        Citation("A star. ", 0, 8, (2,), (0.0, 2.0), False),
        Citation("Hm.\n", 8, 12, (), (0.0, 0.0), False),
        Citation("Both", 12, 16, (1, 2), (3.0, 2.0), True),
    ]
    assert mark("A star. Hm.\nBoth", found) == "A star. [2] Hm.\nBoth [1, 2]"
    assert mark("A star. Hm.\nBoth", []) == "A star. Hm.\nBoth"


def test_the_builtin_model_cites_the_described_image(tmp_path: Path) -> None:
    """In any order of the images, and again from nothing cached; prompts without images too."""
    copy_files(tmp_path)
    builtin = load(device="cpu")
    albums = [str(tmp_path / f"album-{number}.png") for number in (1, 2, 3)]
    seen = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        answer = builtin.ask("Describe the images.", [albums[i] for i in order], cite=True)
        assert answer.citations is not None
        builtin.engine.clear()
        assert (
            answer.cited
            == builtin.ask("Describe the images.", [albums[i] for i in order], cite=True).cited
        )
        image = 0
        for citation in answer.citations:
            image += citation.text.startswith("image ")
            if not citation.text.startswith("image "):
                assert citation.images == (image,), (citation, image)
                seen.add((order[image - 1], citation.text.strip(" .")))
    assert len(seen) == 8
    words = ["--device", "cpu", "--cite", "Describe the images."]
    done = CliRunner().invoke(app, ["ask", *(w for i in order for w in ("-a", albums[i])), *words])
    assert done.stdout.strip() == answer.cited.strip() != answer.text
    alone = builtin.ask("What is a star?", cite=True)
    assert alone.citations and not any(one.images for one in alone.citations)


def test_citations_are_refused_before_the_answer(bot: Chatbot, files: list[Path]) -> None:
    with pytest.raises(OptionError, match="need every image token"):
        bot.stream(bot.turn("Hm?", files), cite=True, image_token_ratio=0.5)
    with pytest.raises(OptionError, match="cite must be true or false"):
        bot.ask("Hm?", files, cite=1)
    with pytest.raises(OptionError, match="cite"):
        bot.each(files, {"a": "What?"}, cite=True)


def test_what_the_engine_lends_stays(bot: Chatbot, files: list[Path]) -> None:
    """Also where another question takes over the memory of the prompt, or the cache is cleared."""
    bot.engine.clear()
    prompt = bot.prompt(bot.turn("What is this? And what?", files))
    bot.answer_prompts([prompt], Options(max_new_tokens=8, ignore_eos=True))
    lent = bot.engine.cached_prompt(prompt)
    assert lent.length == len(prompt)
    before = [[part.clone() for part in lent.stored(layer)] for layer in range(3)]
    assert bot.ask("What is this? And who?", files, max_new_tokens=2).usage.cached > 48
    assert len(bot.engine._prefix_cache.idle) == 1  # it was taken over
    bot.engine.clear()
    for layer, parts in enumerate(before):
        assert all(map(torch.equal, parts, lent.stored(layer)))
    assert all(features is not None for features in lent.features)
    assert bot.engine.cached_prompt(prompt).length == 0
    assert bot.engine.cached_prompt(prompt).features == (None,) * 3
