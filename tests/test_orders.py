"""Several orders of a question's images: prompts, numbers in answers, and the chosen answer."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from starlette.testclient import TestClient

from llava_interleave import Chatbot, data_url, load
from llava_interleave.chat import orders
from llava_interleave.errors import OptionError
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from tests.helpers.cli import llava

DEMO = Path(__file__).parent.parent / "llava_interleave" / "demo_files"
IMAGES = [DEMO / f"album-{n}.png" for n in (1, 2, 3)]
QUESTION = "Which image has the most things?"


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return load()


@pytest.mark.parametrize("preset", ["interleave", "hf", "official"])
@pytest.mark.parametrize("anyres", [False, True])
def test_a_reordered_prompt_is_that_of_reordered_images(
    bot: Chatbot, preset: str, anyres: bool
) -> None:
    """With anyres the images differ in their number of tokens."""
    order = (2, 0, 1)
    sources = [Image.new("RGB", (900, 300)), *IMAGES[:2]]
    form = {"preset": preset, "anyres": anyres}
    given = bot.prompt(bot.turn(QUESTION, sources), **form)
    moved = bot.prompt(bot.turn(QUESTION, [sources[i] for i in order]), **form)
    assert len({m.layout.length for m in given.media}) == 1 + anyres
    found = orders.reordered(given, order)
    assert found.tokens == moved.tokens
    assert [(m.key, m.start) for m in found.media] == [(m.key, m.start) for m in moved.media]


@pytest.mark.parametrize("seed", range(5))
def test_permutations_are_those_of_the_set(seed: int) -> None:
    """However the same images are given, the drawn sequences of images are the same."""
    rng = Random(seed)
    keys = [bytes([rng.randrange(256)]) * 4 for _ in range(5)]
    found = orders.permutations(keys, 6)
    assert len(set(found)) == 6 and found[0] == (0, 1, 2, 3, 4)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in found)
    upload = rng.sample(range(5), 5)
    other = orders.permutations([keys[i] for i in upload], 6)

    def sequences(names: list[bytes], some: list[tuple[int, ...]]) -> list[list[bytes]]:
        return [[names[i] for i in order] for order in some[1:]]

    first, second = sequences(keys, found), sequences([keys[i] for i in upload], other)
    same = [one for one in first if one in second]
    assert len(same) >= 4  # all, but for the order that one of both was given in
    assert len(orders.permutations(keys[:2], 9)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image 1.", "Image 3."),
        ("images 1, 2 and 3 have 2 stars", "images 3, 1 and 2 have 2 stars"),
        ("The second image; the First one", "The first image; the Third one"),
        ('{"image": 2}', '{"image": 1}'),
        ("2", "1"),
        ("image 7", "image 7"),
        ("2 things", "2 things"),
        ("the second star", "the second star"),
        (
            "a cat (1), a dog (2), a hat (3): it is in image 2",
            "a cat (3), a dog (1), a hat (2): it is in image 1",
        ),
        ("image (1), image (2), image (3)", "image (3), image (1), image (2)"),
        ("stars (2), moons (1)", "stars (2), moons (1)"),
    ],
)
def test_answers_name_the_images_as_given(text: str, expected: str) -> None:
    assert orders.as_given(text, (2, 0, 1), QUESTION) == expected
    assert orders.as_given("2", (2, 0, 1), "How many things are there?") == "2"


def test_a_list_that_sorts_the_images() -> None:
    sort = "Name the pictures from fewest to most things."
    assert orders.as_given("5, 1, 3: 2, 3, 1", (2, 0, 1), sort) == "5, 1, 3: 1, 2, 3"
    assert orders.as_given("2, 3", (2, 0, 1), sort) == "2, 3"


def test_the_answer_with_the_highest_mean_probability() -> None:
    """Two orders with one answer outweigh a more probable other one."""

    def found(*pairs: tuple[str, float]) -> int:
        return orders.best(
            [orders.OrderedAnswer((1, 2), text, math.log(p), 1) for text, p in pairs]
        )

    assert found(("a", 0.5), ("b", 0.3), ("b", 0.4)) == 2
    assert found(("a", 0.9), ("b", 0.3), ("b", 0.4)) == 0


@pytest.mark.parametrize("question", [QUESTION, "How many things are there?"])
def test_each_answer_is_that_of_its_order(bot: Chatbot, question: str) -> None:
    answer = bot.ask(question, IMAGES, orders=4)
    assert answer.orders is not None and len(answer.orders) == 4
    for one in answer.orders:
        indices = [number - 1 for number in one.order]
        alone = bot.ask(question, [IMAGES[i] for i in indices], logprobs=0)
        assert one.text == orders.as_given(alone.text, indices, question)
        assert alone.logprobs is not None
        total = sum(token.logprob for token in alone.logprobs)
        assert one.logprob == pytest.approx(total, abs=1e-3)
    assert answer.text == answer.orders[orders.best(answer.orders)].text
    assert answer.usage.generated == sum(one.generated for one in answer.orders)
    assert answer.logprobs is None
    assert bot.ask(question, IMAGES, orders=1).tokens == bot.ask(question, IMAGES).tokens


@pytest.mark.parametrize(
    ("question", "count", "message"),
    [
        ("What is in image 2?", 3, "'image 2'"),
        ("What is in the last one?", 3, "'last'"),
        ("<image> and <image>: which is <image>?", 3, "is between two of them"),
        ("What is it?", 1, "attach two or more"),
    ],
)
def test_questions_that_depend_on_the_order(
    bot: Chatbot, question: str, count: int, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        bot.ask(question, IMAGES[:count], orders=2)


def test_options_that_exclude_orders(bot: Chatbot) -> None:
    for changes in ({"n": 2}, {"cite": True}, {"temperature": 1.0}, {"orders": 0}):
        with pytest.raises(OptionError, match="orders"):
            bot.ask(QUESTION, IMAGES, **({"orders": 2} | changes))
    with pytest.raises(OptionError, match="not attributed"):
        bot.attribute(bot.turn(QUESTION, IMAGES), "image 1", orders=2)
    with pytest.raises(OptionError, match="videos a time"):
        bot.ask(QUESTION, [IMAGES[0], DEMO / "clip.mp4"], orders=2)


def _url(path: Path) -> str:
    return data_url.encode(path.read_bytes(), "image/png")


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(load(), Settings()), base_url="http://127.0.0.1") as client:
        yield client


def test_orders_over_http(bot: Chatbot, client: TestClient) -> None:
    """The text is the library's; a choice of a format holds for all orders; usage is of all."""
    parts = [{"type": "image_url", "image_url": {"url": _url(path)}} for path in IMAGES]
    content = [*parts, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "orders": 3}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    expected = bot.ask(QUESTION, IMAGES, orders=3)
    (choice,) = reply.json()["choices"]
    assert choice["message"]["content"] == expected.text
    assert reply.json()["usage"]["completion_tokens"] == expected.usage.generated
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
    assert "".join(deltas) == expected.text
    limits = {"response_format": {"type": "choice", "choice": ["image 1", "image 2", "image 3"]}}
    assert client.post("/v1/chat/completions", json=body | limits).status_code == 200
    for changes in ({"orders": 9}, {"n": 2}, {"attribution": True}, {"cite": True}):
        refused = client.post("/v1/chat/completions", json=body | changes)
        assert refused.status_code == 400 and "orders" in refused.json()["error"]["message"]


def test_orders_on_the_command_line() -> None:
    done = llava("ask", QUESTION, *IMAGES, "--orders", 2, "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["orders"]) == 2
