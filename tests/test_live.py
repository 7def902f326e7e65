"""Live sessions: equal to a fresh question about the same frames, whatever happened before."""

import io
import itertools
import json
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from httpx import Response
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from llava_interleave.chat import Answer, Chatbot, load
from llava_interleave.cli import app
from llava_interleave.cli.demo import copy_files
from llava_interleave.errors import MediaError, OptionError
from llava_interleave.processing import PreparedImage
from llava_interleave.processing.frame_source import read_frames
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from llava_interleave.testing import tiny_checkpoint
from recipes.tiny_world.draw import write_video

FIELDS = ("text", "tokens", "finish_reason", "logprobs")


def frame(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("live") / "tiny")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Chatbot:
    return load(folder, device="cpu", batch_invariant=True)


def fresh(oracle: Chatbot, messages: list[dict[str, object]], **options: object) -> Answer:
    """The answer with nothing cached, from the images themselves."""
    (turn,) = messages
    content = [
        part | {"image": part["image"].image} if part["type"] == "image" else part
        for part in turn["content"]  # type: ignore[attr-defined]
    ]
    oracle.engine.clear()
    return oracle.chat([{"role": "user", "content": content}], **options)


@pytest.mark.parametrize("times", [False, True])
def test_any_order_of_calls_equals_a_fresh_question(
    folder: Path, oracle: Chatbot, times: bool
) -> None:
    """To the last bit, with little memory, aborted questions and other requests between."""
    bot = load(
        folder, device="cpu", batch_invariant=True, kv_bytes=oracle.engine.bytes_per_token * 400
    )
    live, rng = bot.live(keep=6, least=3, frame_times=times, logprobs=0), random.Random(times)
    seen, most = 0, 0
    for step in range(40):
        match rng.choice(["see", "see", "ask", "abort", "other"]) if step else "see":
            case "see":
                live.see(frame(seen), at=seen / 2)
                seen += 1
                assert [one.at for one in live.frames] == [
                    number / 2 for number in range(seen - len(live.frames), seen)
                ]
            case "ask":
                options = {"max_new_tokens": rng.randint(1, 8), "ignore_eos": True}
                messages = live.messages("What?")
                found = live.ask("What?", **options)
                wanted = fresh(oracle, messages, logprobs=0, **options)
                assert [getattr(found, name) for name in FIELDS] == [
                    getattr(wanted, name) for name in FIELDS
                ]
            case "abort":
                deltas = live.stream("Who?", max_new_tokens=8, ignore_eos=True)
                next(deltas)
                deltas.close()
            case _:
                bot.ask("Hm?", [frame(1000 + step)], max_new_tokens=2)
        most = max(most, len(live.frames))
        bot.engine.check()
    assert seen > 8 and most == 6


def test_frames_are_computed_once(folder: Path) -> None:
    """A frame encodes one image; a question prefills only itself, also after the oldest went."""
    bot = load(folder, device="cpu")
    live = bot.live(keep=4, least=2)
    for number in range(9):
        usage = live.see(frame(number))
        assert bot.engine.load().crops_encoded == number + 1
        assert len(live.frames) == (1, 2, 3, 4, 2, 3, 4, 2, 3)[number]
        counted = live.ask("What?", max_new_tokens=1).usage
        assert counted.prompt - counted.cached < 16
        if number not in (0, 4, 7):
            assert usage.prompt - usage.cached < 16 + 8


def test_prepared_images_make_the_same_prompt(folder: Path) -> None:
    bot = load(folder, device="cpu")
    plain = [frame(1), frame(2)]
    prepared = [PreparedImage(image) for image in plain]
    for options in ({}, {"anyres": True}, {"image_token_pool": 2}, {}):
        for images in (prepared, [*prepared, prepared[0]]):
            found = bot.prompt(
                bot.turn("Hm?", [{"type": "image", "image": i} for i in images]), **options
            )
            wanted = bot.prompt(bot.turn("Hm?", [*plain, plain[0]][: len(images)]), **options)
            assert found.tokens == wanted.tokens
            for one, other in zip(found.media, wanted.media, strict=True):
                assert (one.key, one.start, one.layout) == (other.key, other.start, other.layout)
                assert (one.name, one.label) == (other.name, other.label)
                assert np.array_equal(one.crops, other.crops)


def test_a_failing_frame_leaves_the_session(folder: Path, tmp_path: Path) -> None:
    bot = load(folder, device="cpu")
    live = bot.live(keep=3, least=1, frame_times=True)
    live.see(frame(0), at=0.5)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(MediaError):
        live.see(tmp_path / "broken.png", at=1)
    with pytest.raises(OptionError, match="needs its time"):
        live.see(frame(1))
    assert [one.at for one in live.frames] == [0.5]
    for number in (1, 2, 3):
        live.see(frame(number), at=number)
    assert [one.at for one in live.frames] == [3]
    text = [part["text"] for part in live.messages("Hm?")[0]["content"] if part["type"] == "text"]
    assert text == ["3.00s", "Hm?"]
    for keep, least in ((1, 1), (4, 0), (2.5, 1), (4, 5)):
        with pytest.raises(OptionError, match="0 < least < keep"):
            bot.live(keep=keep, least=least)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="keep at most 2") as refused:
        bot.live(keep=250, least=1, max_new_tokens=100)
    most = int(str(refused.value).split("keep at most ")[1].split(",")[0])
    bot.live(keep=most, least=1, max_new_tokens=100)
    with pytest.raises(OptionError, match=f"keep at most {most},"):
        bot.live(keep=most + 1, least=1, max_new_tokens=100)


def test_sessions_of_several_threads(folder: Path, oracle: Chatbot) -> None:
    """Eight at once, each with questions from another thread while frames come."""
    bot = load(folder, device="cpu", batch_invariant=True)

    def run(number: int) -> list[tuple[list[dict[str, object]], Answer]]:
        live, done = bot.live(keep=3, least=1, logprobs=0), threading.Event()
        found = []

        def ask() -> None:
            while not done.is_set():
                messages = live.messages("What?")
                found.append((messages, bot.chat(messages, live.options, max_new_tokens=2)))

        live.see(frame(100 * number))
        asking = threading.Thread(target=ask)
        asking.start()
        for step in range(1, 4):
            live.see(frame(100 * number + step))
        done.set()
        asking.join()
        return found

    with ThreadPoolExecutor(8) as pool:
        everything = [pair for found in pool.map(run, range(8)) for pair in found]
    assert len(everything) >= 8
    for messages, answer in random.Random(0).sample(everything, 8):
        wanted = fresh(oracle, messages, logprobs=0, max_new_tokens=2)
        assert (answer.tokens, answer.logprobs) == (wanted.tokens, wanted.logprobs)


def watched(*words: str) -> list[str]:
    result = CliRunner().invoke(app, ["watch", *words])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout.splitlines()


def test_watch_prints_changes(tmp_path: Path) -> None:
    """The answers and probabilities are those of a session with the same frames."""
    copy_files(tmp_path / "demo")
    (tmp_path / "frames").mkdir()
    for number in (1, 2, 3):
        shutil.copy(tmp_path / "demo" / f"album-{number}.png", tmp_path / "frames")
    (tmp_path / "frames" / "broken.png").write_bytes(b"no image")
    question, live = "Is there a yellow star?", load().live(keep=3, least=2)
    answers, probabilities = [], []
    for path in sorted((tmp_path / "demo").glob("album-*.png")):
        live.see(path)
        answers.append(live.ask(question).text)
        probabilities.append(live.probability(question))
    words = [str(tmp_path / "frames"), question, "--every", "0", "--keep", "3", "--least", "2"]
    words += ["--count", "4"]
    assert answers == ["no", "yes", "no"]
    assert [line.split(": ")[1] for line in watched(*words)] == answers
    lines = [json.loads(line) for line in watched(*words, "--above", "0.5", "--json")]
    found = [probability >= 0.5 for probability in probabilities]
    assert [line["answer"] for line in lines] == [one for one, _ in itertools.groupby(found)]
    assert [line["probability"] for line in lines][:2] == pytest.approx(probabilities[:2], abs=1e-5)


def test_a_video_file_loses_no_frame_that_is_due(tmp_path: Path) -> None:
    pixels = [np.asarray(frame(number).resize((64, 48))) for number in range(12)]
    write_video(pixels, tmp_path / "clip.mp4", fps=4)
    frames = list(read_frames(str(tmp_path / "clip.mp4"), 0.5))
    assert [at for at, _ in frames] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])


def test_new_files_of_a_folder_are_frames(tmp_path: Path) -> None:
    """Once they are complete, in natural order; other files are none."""
    for number in (2, 10):
        frame(number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    frames = read_frames(str(tmp_path), 0)
    assert [Path(str(path)).name for _, path in itertools.islice(frames, 2)] == ["2.png", "10.png"]
    (tmp_path / "half.png").write_bytes(b"")
    writer = threading.Timer(0.3, lambda: frame(3).save(tmp_path / "3.png"))
    writer.start()
    assert Path(str(next(frames)[1])).name == "3.png"
    writer.join()


def test_a_stream_that_is_too_fast_loses_frames_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg = io.BytesIO()
    for number in range(40):
        frame(number).save(jpeg, "jpeg", quality=95)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(jpeg.getvalue())))
    frames = list(read_frames("-", 0))
    assert 1 <= len(frames) <= 40 and frames[-1][1].size == (60, 40)  # type: ignore[union-attr]
    last = np.asarray(frames[-1][1], np.float32)
    assert abs(last - np.asarray(frame(39), np.float32)).mean() < 60
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    for source in (str(tmp_path / "no.mp4"), "/dev/video99"):
        with pytest.raises(MediaError, match="cannot read"):
            list(read_frames(source, 0))


# HTTP.


def jpeg(number: int, size: tuple[int, int] = (60, 40)) -> bytes:
    file = io.BytesIO()
    frame(number).resize(size).save(file, "png")
    return file.getvalue()


def send(client: TestClient, name: str, number: int, **more: object) -> Response:
    """A frame, as the key `more["key"]`."""
    key, size = more.get("key", ""), more.get("size", (60, 40))
    return client.post(
        f"/v1/live/{name}/frames",
        files={"file": ("frame.png", jpeg(number, size))},  # type: ignore[arg-type]
        data={"at": str(number)},
        headers={"Authorization": f"Bearer {key}"},
    )


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    bot = load(folder, device="cpu")
    settings = Settings(requests_per_minute=100_000, max_media=8, files_mb=1, live_sessions=2)
    with TestClient(create_app(bot, settings), base_url="http://127.0.0.1") as client:
        yield client


def test_sessions_over_http(client: TestClient, oracle: Chatbot) -> None:
    """Answers are the library's, whole and streamed; later messages follow the first question."""
    created = client.post("/v1/live", json={"keep": 3, "least": 2, "frame_times": True}).json()
    name, live = created["id"], oracle.live(keep=3, least=2, frame_times=True)
    assert (created["keep"], created["least"], created["expires_after"]) == (3, 2, 300)
    for number in range(5):
        found = send(client, name, number).json()
        live.see(frame(number), at=number)
        assert found["frames"] == len(live.frames) == (1, 2, 3, 2, 3)[number]
        if number in (1, 2, 4):
            assert found["prefill"]["prompt_tokens"] - found["prefill"]["cached_tokens"] < 40
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 6}
    path = f"/v1/live/{name}/chat/completions"
    answer = client.post(path, json=body).json()
    wanted = fresh(oracle, live.messages("What?"), max_new_tokens=6)
    assert answer["choices"][0]["message"]["content"] == wanted.text
    usage = answer["usage"]
    assert usage["prompt_tokens"] == wanted.usage.prompt
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 40
    streamed = client.post(path, json=body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == wanted.text
    messages = [*live.messages("What?"), {"role": "assistant", "content": "Hm."}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "Why?"}]})
    later = [{"role": "user", "content": "What?"}, *messages[1:]]
    again = client.post(path, json=body | {"messages": later}).json()
    assert again["choices"][0]["message"]["content"] == oracle.chat(messages, max_new_tokens=6).text
    assert client.delete(f"/v1/live/{name}").json() == {
        "id": name,
        "object": "live",
        "deleted": True,
    }
    assert send(client, name, 0).status_code == 404


def test_sessions_are_bounded(client: TestClient) -> None:
    """In number, frames and decoded bytes for each key, and in time."""
    refused = [
        {"keep": 9, "least": 2},
        {"keep": 4, "least": 4},
        {"keep": 1, "least": 1},
        {"keep": 4.5},
        {"keep": 4, "more": 1},
        {"model": "other"},
    ]
    for body in refused:
        assert client.post("/v1/live", json=body).status_code in (400, 404), body
    names = [client.post("/v1/live", json={"keep": 4, "least": 2}).json()["id"] for _ in range(2)]
    full = client.post("/v1/live", json={})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "live_sessions_exceeded")
    assert send(client, names[0], 0).json()["frames"] == 1
    large = send(client, names[0], 1, size=(800, 600))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "live_full")
    assert send(client, names[0], 1).json()["frames"] == 2
    for at in ("nan", "inf", "-1", "1e300", "now"):
        refused_time = client.post(
            f"/v1/live/{names[0]}/frames", files={"file": ("a.png", jpeg(1))}, data={"at": at}
        )
        assert refused_time.status_code == 400, at
    broken = client.post(f"/v1/live/{names[0]}/frames", files={"file": ("a.png", b"no image")})
    assert broken.status_code == 400
    assert client.post(f"/v1/live/{names[0]}/frames", json={}).status_code in (400, 415)
    assert send(client, names[0], 2).json()["frames"] == 3
    empty = client.post(
        f"/v1/live/{names[1]}/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "Hm?"}], "max_tokens": 2},
    )
    assert empty.status_code == 200  # no frame yet: a text question
    (sessions,) = client.app.state.service.live._by_key.values()  # type: ignore[attr-defined]
    for session in sessions.values():
        session.used -= 301
    gone = send(client, names[0], 3)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "live_not_found")
    assert client.post("/v1/live", json={"keep": 4, "least": 2}).status_code == 200


def test_a_session_may_end_while_a_frame_is_prefilled(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the web UI does when it stops."""
    service = client.app.state.service  # type: ignore[attr-defined]
    service.live._by_key.clear()
    name = client.post("/v1/live", json={"keep": 4, "least": 2}).json()["id"]
    decoding, go = threading.Event(), threading.Event()
    image = service.bot.processor.loader.image
    monkeypatch.setattr(
        service.bot.processor.loader,
        "image",
        lambda *data: decoding.set() or (go.wait(20) and image(*data)),
    )
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(send, client, name, 0)
        assert decoding.wait(20)
        assert client.delete(f"/v1/live/{name}").status_code == 200
        service.live._expire()
        go.set()
        assert seen.result().json()["frames"] == 1
    assert send(client, name, 1).status_code == 404


def test_a_key_does_not_see_sessions_of_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-ann-0123456789abcdef ann\nsk-bob-0123456789abcdef bob\n")
    settings = Settings(api_keys=tmp_path / "keys")
    with TestClient(
        create_app(load(folder, device="cpu"), settings), base_url="http://127.0.0.1"
    ) as client:
        ann, bob = ({"Authorization": f"Bearer sk-{n}-0123456789abcdef"} for n in ("ann", "bob"))
        name = client.post("/v1/live", json={}, headers=ann).json()["id"]
        assert send(client, name, 0, key="sk-bob-0123456789abcdef").status_code == 404
        assert send(client, name, 0, key="sk-ann-0123456789abcdef").json()["frames"] == 1
        assert client.delete(f"/v1/live/{name}", headers=bob).status_code == 404
        assert client.delete(f"/v1/live/{name}").status_code == 401
