"""The page in a real browser against a real server: every flow and state, and what must never
happen.
"""

import base64
import contextlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Locator, Page, Request, Route, expect  # noqa: E402

from llava_interleave.chat import BUILTIN, load  # noqa: E402
from llava_interleave.cli.demo import copy_files  # noqa: E402
from llava_interleave.engine import Engine  # noqa: E402
from llava_interleave.processing import FrameSampling, Loader  # noqa: E402
from llava_interleave.server.app import create_app  # noqa: E402
from llava_interleave.server.run import Server  # noqa: E402
from llava_interleave.server.settings import Settings  # noqa: E402
from llava_interleave.server.web_files import BUILD  # noqa: E402
from llava_interleave.testing import tiny_checkpoint  # noqa: E402
from recipes.tiny_world.draw import write_video  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
expect.set_options(timeout=20_000)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine: apt install chromium"
    ),
]


@contextlib.contextmanager
def serve(folder: Path, port: int = 0, **fields: object) -> Iterator[str]:
    settings = Settings(port=port, shutdown_timeout=0.1, **fields)
    server = Server(create_app(load(folder, device="cpu"), settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.address
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serve(folder, max_tokens=100, requests_per_minute=100_000) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        yield page


@contextlib.contextmanager
def opened(browser: Browser, address: str, **profile: Any) -> Iterator[Page]:
    """A fresh profile; the test fails on any error of a script, on a breach of the content policy,
    and on any request to another host.
    """
    context = browser.new_context(base_url=address, **profile)
    faults: list[str] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: faults.append(f"{error} {error.stack}"))
        page.on(
            "console",
            lambda message: (
                faults.append(message.text) if "Content Security Policy" in message.text else None
            ),
        )

        def requested(request: Request) -> None:
            if not request.url.startswith((address, "blob:", "data:")):
                faults.append(request.url)

        page.on("request", requested)

    context.on("page", watch)
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#model")).not_to_have_text("…")
    yield page
    context.close()
    assert faults == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    made = [folder / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in made:
        Image.new("RGB", (60, 40), path.stem).save(path)
    return made


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    write_video([np.full((64, 64, 3), 10 * i, dtype=np.uint8) for i in range(16)], path)
    return path


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how long each step of the engine takes in addition."""
    run, seconds = Engine._run, [0.0]
    monkeypatch.setattr(
        Engine, "_run", lambda engine, output: time.sleep(seconds[0]) or run(engine, output)
    )

    def set_seconds(value: float) -> None:
        seconds[0] = value

    return set_seconds


def write(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.click("#send")


def ask(page: Page, text: str) -> None:
    before = page.locator("#messages > li.assistant").count()
    write(page, text)
    expect(page.locator("#messages > li.assistant")).to_have_count(before + 1)
    finished(page)


def finished(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#messages > li.assistant .facts").last).to_contain_text("prompt token")


def attach(page: Page, paths: list[Path] | Path, count: int | None = None) -> None:
    page.set_input_files("#pick-files", paths)
    if count is None:
        count = len(paths) if isinstance(paths, list) else 1
    expect(page.locator(".chip")).to_have_count(count)


def alts(page: Page) -> list[str]:
    """The attached files, in order, by what is said about them."""
    labels = page.locator(".chip").evaluate_all("all => all.map(one => one.ariaLabel)")
    return [label.split(", ")[-1] for label in labels]


def titles(page: Page) -> list[str]:
    """The images of the conversation, in order."""
    return page.locator("#messages .tile").evaluate_all("all => all.map(one => one.title)")


def body_of(request: Request) -> dict[str, Any]:
    return json.loads(request.post_data)


def answer(page: Page) -> Locator:
    return page.locator("#messages > li.assistant").last


def text(page: Page) -> str:
    """Of the last answer: random weights may write what cannot be seen."""
    return page.evaluate("""async () => {
        const { state } = await import("./state.js");
        const { branch, textOf } = await import("./tree.js");
        const last = branch(state.chat).at(-1);
        return last?.role === "assistant" ? textOf(last) : "";
    }""")


def begun(page: Page) -> None:
    """Wait until the answer has some text."""
    deadline = time.monotonic() + 30
    while len(text(page)) < 3:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


# --- many images -------------------------------------------------------------------------------


def test_a_conversation_about_several_images(page: Page, files: list[Path]) -> None:
    """Attach, order, name the place in the text, see the budget, ask, ask again with reuse, find it
    all after a reload, under the same address.
    """
    attach(page, files)
    expect(page.locator("#budget-text")).to_contain_text(re.compile(r"\d+ of 4,096 tokens"))
    page.fill("#text", "Compare ")
    page.locator(".chip .number").nth(2).click()
    expect(page.locator("#text")).to_have_value("Compare [image 3]")
    page.locator(".chip .number").nth(2).press("Alt+ArrowLeft")
    expect(page.locator("#text")).to_have_value("Compare [image 2]")
    assert alts(page) == ["red.png", "blue.png", "green.png"]
    ask(page, page.input_value("#text") + " with the others.")
    assert titles(page) == ["red.png", "green.png", "blue.png"]  # those without a place first
    assert page.locator("#messages .badge").all_inner_texts() == ["1", "2", "3"]
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "And what of image 2?")
    assert [message["role"] for message in body_of(sent.value)["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    reused = answer(page).locator(".facts").inner_text()
    assert int(re.search(r"(\d+) cached", reused)[1]) > 0
    address = page.url
    assert "#" in address
    page.reload()
    expect(page.locator("#messages > li")).to_have_count(4)
    expect(page.locator("#messages .tile")).to_have_count(3)
    assert page.url == address
    page.locator("#messages .reference", has_text="image 2").click()
    expect(page.locator("#viewer-title")).to_have_text("image 2, green.png")


def test_the_parts_sent_are_the_ones_composed(page: Page, files: list[Path]) -> None:
    attach(page, files)
    page.get_by_label("Name of the view in image 1").fill("front")
    page.get_by_label("Name of the view in image 2").fill("left")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Is [image 3] new?")
    parts = body_of(sent.value)["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["views", "text", "image_url", "text"]
    assert list(parts[0]["views"]) == ["front", "left"]
    assert parts[2]["image_url"]["url"].startswith("file-")
    assert [part.get("text") for part in parts] == [None, "Is ", None, " new?"]
    attach(page, files[:1])
    expect(page.locator(".chip .number")).to_have_text("4")  # it goes on behind the conversation
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Is [image 4] the same as [image 1]?")
    last = body_of(sent.value)["messages"][-1]["content"]
    assert [part.get("text") for part in last] == ["Is ", None, " the same as [image 1]?"]


def test_an_image_that_the_browser_cannot_decode_comes_from_the_server(
    page: Page, tmp_path: Path
) -> None:
    """iPhones write HEIC, scanners TIFF: Chromium showed their names alone."""
    Image.new("RGB", (600, 300), "red").save(tmp_path / "scan.tif")
    attach(page, tmp_path / "scan.tif")
    thumb = page.locator(".chip .tile img")
    expect(thumb).to_have_js_property("naturalWidth", 288)
    page.locator(".chip .tile").click()
    expect(page.locator(".pane img")).to_have_js_property("naturalWidth", 600)
    expect(page.locator(".pane figcaption")).to_have_text("1 · as the server reads it")


def test_files_are_dropped_pasted_picked_by_folder_and_dragged_into_order(
    page: Page, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "shots" / "more").mkdir(parents=True)
    for name in ("2.png", "10.png", "more/1.png", "notes.txt"):
        (tmp_path / "shots" / name).write_bytes(
            files[0].read_bytes() if name.endswith("png") else b"text"
        )
    page.set_input_files("#pick-folder", tmp_path / "shots")
    expect(page.locator(".chip")).to_have_count(3)
    assert alts(page) == ["2.png", "10.png", "1.png"]
    drop(page, [tmp_path / "shots", files[2]])
    expect(page.locator(".chip")).to_have_count(7)
    expect(page.locator("#drop")).to_be_hidden()
    assert alts(page)[3:] == ["2.png", "10.png", "1.png", "blue.png"]
    expect(page.locator("#error")).to_have_text("notes.txt is not an image or a video")
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
            document.activeElement.blur();
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true, bubbles: true }));
        }""",
        base64.b64encode(files[1].read_bytes()).decode(),
    )
    expect(page.locator(".chip")).to_have_count(8)
    page.fill("#text", "See [image 2] and [image 1]")
    page.locator(".chip .tile").nth(0).drag_to(page.locator(".chip .tile").nth(2))
    expect(page.locator("#text")).to_have_value("See [image 1] and [image 3]")
    assert alts(page)[:3] == ["10.png", "1.png", "2.png"]
    page.fill("#text", "")
    page.locator(".chip .tile").nth(1).drag_to(page.locator("#text"))
    expect(page.locator("#text")).to_have_value("[image 2]")


def drop(page: Page, paths: list[Path]) -> None:
    """As from a file manager. Chromium takes nothing that is let go before it knows that the page
    would take it.
    """
    devtools = page.context.new_cdp_session(page)
    page.evaluate("() => addEventListener('drop', () => (window.taken = true), true)")
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    while not page.evaluate("() => window.taken"):
        for step in ("dragEnter", "dragOver", "dragOver", "drop"):
            devtools.send(
                "Input.dispatchDragEvent", {"type": step, "x": 300, "y": 200, "data": data}
            )
            page.wait_for_timeout(100)


def test_two_hundred_photos(page: Page, tmp_path: Path) -> None:
    """All are shown with their numbers, sorted, and too many are known before anything is sent."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"p{i}.png" for i in range(200)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(path)
    attach(page, [*reversed(paths)])
    expect(page.locator("#budget")).to_contain_text(
        "200 images and videos in this chat", timeout=60_000
    )
    expect(page.locator("#budget")).to_contain_text("this server takes 32. Remove 168.")
    expect(page.locator("#send")).to_be_disabled()
    assert page.locator(".chip .number").all_inner_texts() == [str(i + 1) for i in range(200)]
    page.get_by_role("button", name="Sort by name").click()
    assert alts(page) == [path.name for path in paths]
    page.get_by_role("button", name="Keep the first 32").click()
    expect(page.locator(".chip")).to_have_count(32)
    page.get_by_label("Select image 1, p0.png").check()
    page.get_by_label("Select image 3, p2.png").check()
    page.get_by_role("button", name="Move right").click()
    assert alts(page)[:4] == ["p1.png", "p3.png", "p0.png", "p2.png"]
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator(".chip")).to_have_count(30)
    ask(page, "How many?")
    expect(page.locator("#messages .tile")).to_have_count(24)
    page.get_by_role("button", name="Show all 30 images").click()
    assert page.locator("#messages .badge").all_inner_texts() == [str(i + 1) for i in range(30)]
    attach(page, paths[:3])
    expect(page.locator("#budget")).to_contain_text("33 images and videos in this chat")
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("#attached")).to_be_hidden()


def test_the_budget_is_known_in_the_page_and_exact_once_counted(
    page: Page, files: list[Path]
) -> None:
    attach(page, files)
    with page.expect_response("**/v1/messages/count") as counted:
        page.fill("#text", "What?")
    total = counted.value.json()["total"]
    shown = page.locator("#budget-text")
    expect(shown).not_to_contain_text("about")
    assert abs(int(shown.inner_text().split()[0]) - total - 2) <= 2  # "What?"
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.fill("#text", "What is to be seen in these? " * 3)
    page.wait_for_timeout(1000)
    assert requests == []  # typing asks the server nothing
    page.fill("#text", "long " * 4000)
    expect(page.locator("#budget")).to_contain_text("exceed the context of 4,096")
    expect(page.locator("#send")).to_be_disabled()


def test_images_are_prefilled_as_they_are_dropped(page: Page, files: list[Path]) -> None:
    """The question then has them in the cache, at its first token."""
    with page.expect_response("**/v1/messages/prefill") as prefilled:
        attach(page, files)
    assert prefilled.value.json()["prompt_tokens"] > 27
    ask(page, "Which is red?")
    cached = int(re.search(r"(\d+) cached", answer(page).locator(".facts").inner_text())[1])
    assert cached > 27


def test_files_that_cannot_be_read_are_named_before_anything_is_sent(
    page: Page, files: list[Path], tmp_path: Path
) -> None:
    """Those that are no images, by their upload; those that are damaged, by the prefill. A drawing
    becomes a PNG.
    """
    other, cut, drawing = (tmp_path / name for name in ("other.png", "cut.png", "drawing.svg"))
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><circle r="9"/></svg>'
    )
    other.write_bytes(b"text")
    cut.write_bytes(files[0].read_bytes()[:60])
    attach(page, [files[0], other, files[1], cut, drawing])
    shown = page.locator("#budget-text")
    expect(shown).to_contain_text("image 2, other.png: the file is neither an image")
    expect(page.locator("#send")).to_be_disabled()
    page.get_by_role("button", name="Remove unreadable").click()
    expect(shown).to_have_text("image 3, cut.png: the image is damaged or cut short")
    expect(page.locator(".chip.unreadable")).to_have_attribute("aria-label", "image 3, cut.png")
    page.get_by_role("button", name="Remove unreadable").click()
    assert alts(page) == ["red.png", "green.png", "drawing.svg"]
    expect(page.locator("#send")).to_be_enabled()
    expect(shown).to_contain_text("tokens")


def test_uploads_wait_for_a_rate_limit(page: Page, files: list[Path]) -> None:
    refused: list[str] = []

    def limit(route: Route) -> None:
        refused.append(route.request.url)
        if len(refused) > 2:
            route.continue_()
        else:
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"error": {}})

    page.route("**/v1/files", limit)
    attach(page, files[:2])
    ask(page, "Which is red?")
    assert len(refused) == 4


def test_frames_of_a_video_are_shown_before_they_are_sent(page: Page, video: Path) -> None:
    """The very ones that the server looks at, by their times and by what is in them."""
    attach(page, video)
    expect(page.locator(".chip .frames")).to_have_text("16 frames")
    page.locator(".chip .tile").click()
    page.get_by_label("Number of frames").fill("3")
    clip = Loader().video(video.read_bytes(), FrameSampling(frames=3))
    shown = page.locator("#stage .frame")
    expect(shown).to_have_count(3)
    expect(shown.locator("canvas").nth(2)).to_have_attribute("title", f"{clip.times[2]:.2f} s")
    grey = "(canvas) => canvas.getContext('2d').getImageData(9, 9, 1, 1).data[0]"
    assert [shown.nth(i).locator("canvas").evaluate(grey) for i in range(3)] == pytest.approx(
        [frame.getpixel((9, 9))[0] for frame in clip.frames], abs=4
    )
    shown.nth(1).click()
    at = page.locator("#stage video").evaluate("(video) => video.currentTime")
    assert at == pytest.approx(clip.times[1], abs=0.01)
    page.get_by_label("Start at the video's position").click()
    page.keyboard.press("Escape")
    expect(page.locator(".chip .frames")).to_have_text("3 frames")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What happens?")
    part = body_of(sent.value)["messages"][0]["content"][0]
    assert (part["type"], part["frames"]) == ("video_url", 3)
    assert part["start"] == pytest.approx(clip.times[1], abs=0.06)


def test_images_are_enlarged_compared_and_zoomed(page: Page, files: list[Path]) -> None:
    attach(page, files)
    ask(page, "Compare.")
    first = page.locator("#messages .tile").first
    first.press("Enter")
    expect(page.locator("#stage img")).to_have_count(1)
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-title")).to_have_text("image 2, green.png")
    page.select_option("#compare", label="3: blue.png")
    expect(page.locator("#viewer-title")).to_have_text("image 2, green.png and image 3, blue.png")
    expect(page.locator("#stage img")).to_have_count(2)
    page.keyboard.press("+")
    expect(page.locator("#zoom")).to_have_text("125 %")
    moved = page.locator("#stage div.layer").evaluate_all(
        "all => all.map(one => one.style.transform)"
    )
    assert moved[0] == moved[1] and "scale(1.25)" in moved[0]
    page.keyboard.press("0")
    expect(page.locator("#zoom")).to_have_text("100 %")
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(first).to_be_focused()


def test_photos_from_the_camera(page: Page) -> None:
    page.click("#open-camera")
    expect(page.locator("#camera")).to_be_visible()
    page.wait_for_function("() => document.getElementById('camera-view').videoWidth > 0")
    page.click("#camera-take")
    expect(page.locator("#camera-count")).to_have_text("1 taken")
    page.click("#camera-take")
    expect(page.locator("#camera-count")).to_have_text("2 taken")
    page.get_by_role("button", name="Done").click()
    assert alts(page) == ["photo-1.jpg", "photo-2.jpg"]
    assert page.evaluate("document.getElementById('camera-view').srcObject.active") is False


@pytest.mark.parametrize(("width", "height", "scheme"), [(390, 844, "dark"), (1280, 800, "light")])
def test_live_questions_about_the_camera(
    browser: Browser, address: str, width: int, height: int, scheme: Any
) -> None:
    """Frames are sent while it is watched; the session ends with the dialog."""
    profile = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with opened(browser, address, **profile, reduced_motion="reduce") as page:
        page.click("#open-camera")
        page.wait_for_function("() => document.getElementById('camera-view').videoWidth > 0")
        page.click("#camera-live")
        expect(page.locator("#live-frames")).to_contain_text("the last 2 frames")
        expect(page.locator("#live-question")).to_be_focused()
        with page.expect_request("**/v1/live/*/chat/completions") as sent:
            page.keyboard.type("What is it?")
            page.keyboard.press("Enter")
        assert body_of(sent.value)["messages"] == [{"role": "user", "content": "What is it?"}]
        page.wait_for_function(
            "() => !['', '…'].includes(document.getElementById('live-answer').textContent)"
        )
        check_state(page, "live")
        with page.expect_response(
            lambda response: response.request.method == "DELETE" and "/v1/live/" in response.url
        ) as ended:
            page.click("#camera-live")
        assert ended.value.status == 200
        expect(page.locator("#live")).to_be_hidden()
        page.click("#camera-live")
        expect(page.locator("#live-frames")).to_contain_text("the last 1 frame")
        with page.expect_request(lambda request: request.method == "DELETE"):
            page.get_by_role("button", name="Done").click()


# --- never lose work ---------------------------------------------------------------------------


def test_a_draft_survives_a_reload_and_a_new_chat(page: Page, files: list[Path]) -> None:
    attach(page, files[:2])
    page.get_by_label("Name of the view in image 2").fill("left")
    page.fill("#text", "Not sent yet")
    page.reload()
    expect(page.locator("#text")).to_have_value("Not sent yet")
    expect(page.locator(".chip")).to_have_count(2)
    expect(page.get_by_label("Name of the view in image 2")).to_have_value("left")
    page.click("#new")
    expect(page.locator("#text")).to_have_value("")
    expect(page.locator("#attached")).to_be_hidden()
    page.locator("#chats button.open", has_text="Draft: Not sent yet").click()
    expect(page.locator(".chip")).to_have_count(2)
    page.go_back()
    expect(page.locator("#text")).to_have_value("")
    page.go_forward()
    expect(page.locator("#text")).to_have_value("Not sent yet")


def test_a_broken_off_answer_is_kept_and_continued(
    page: Page, slow: Callable[[float], None]
) -> None:
    """The page is closed during an answer: question and partial answer stay, and *Continue* goes on
    from there. A second tab does not call it broken off while the first still writes.
    """
    slow(0.2)
    write(page, "Tell me a long story.")
    begun(page)
    page.wait_for_timeout(600)  # saved every 400 ms
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("#messages > li")).to_have_count(2)
    expect(other.locator(".broken")).to_be_hidden()
    page.close()
    expect(other.locator(".broken")).to_contain_text("broke off when the page was closed")
    kept = text(other)
    assert kept
    slow(0)
    with other.expect_request("**/v1/chat/completions") as sent:
        other.get_by_role("button", name="Continue this answer").click()
    body = body_of(sent.value)
    assert body["continue_final_message"] is True
    assert body["messages"][-1]["role"] == "assistant"
    assert body["messages"][-1]["content"] == kept
    finished(other)
    assert text(other).startswith(kept) and len(text(other)) > len(kept)
    expect(other.locator("#messages > li")).to_have_count(2)


def test_an_answer_goes_on_where_another_tab_saves_its_chat(
    page: Page, slow: Callable[[float], None]
) -> None:
    """A chat that another tab saved before the first token was read again, and the answer then
    written to a message that was no longer in it: neither shown nor kept.
    """
    other = page.context.new_page()
    other.goto(page.url)
    slow(1.0)
    with page.expect_request("**/v1/chat/completions"):
        write(page, "Tell me a story.")
    name = page.url.partition("#")[2]
    other.evaluate(
        "id => new BroadcastChannel('llava-interleave').postMessage({ kind: 'chat', id })", name
    )
    page.wait_for_timeout(300)
    slow(0)
    finished(page)
    answer = text(page)
    assert answer
    page.reload()
    expect(page.locator("#messages > li")).to_have_count(2)
    assert text(page) == answer


def test_a_server_that_is_restarted_during_an_answer(
    browser: Browser, folder: Path, files: list[Path], slow: Callable[[float], None]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slow(0.2)
    with contextlib.ExitStack() as both:
        first = both.enter_context(contextlib.ExitStack())
        address = first.enter_context(serve(folder, port, max_tokens=200))
        page = both.enter_context(opened(browser, address))
        attach(page, files[:1])
        write(page, "Tell me a long story.")
        begun(page)
        page.fill("#text", "The next question")
        first.close()
        expect(page.locator("#offline")).to_be_visible()
        expect(page.locator(".broken")).to_contain_text("This answer broke off")
        expect(page.locator("#text")).to_have_value("The next question")
        page.click("#send")
        expect(page.locator("#error")).to_contain_text("the message is kept")
        expect(page.locator("#messages > li")).to_have_count(2)
        kept = text(page)
        slow(0)
        both.enter_context(serve(folder, port, max_tokens=20))
        expect(page.locator("#offline")).to_be_hidden()
        page.get_by_role("button", name="Continue this answer").click()
        finished(page)
        assert text(page).startswith(kept) and len(text(page)) > len(kept)
        ask(page, page.input_value("#text"))  # its file has to be sent again
        expect(page.locator("#messages > li")).to_have_count(4)


def test_two_tabs_lose_nothing(page: Page, slow: Callable[[float], None]) -> None:
    """Both ask in the same chat: both answers are there, as branches. Drafts and deletions
    follow.
    """
    ask(page, "One")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("#messages > li")).to_have_count(2)
    slow(0.3)
    write(page, "Two")
    begun(page)
    expect(other.locator("#messages > li")).to_have_count(4)  # it follows
    write(other, "Three")
    expect(other.locator("#error")).to_contain_text("another tab is still writing")
    page.keyboard.press("Escape")
    slow(0)
    other.evaluate("import('./store.js').then(({ onChange }) => onChange(() => {}))")  # deaf
    write(page, "Four")
    other.click("#send")
    for tab in (page, other):
        tab.bring_to_front()
        finished(tab)
        expect(tab.locator("#messages > li.user .meta").last).to_contain_text("of 2")
        tab.reload()
        expect(tab.locator("#messages > li.user .meta").last).to_contain_text("of 2")
    page.bring_to_front()
    page.fill("#text", "seen in both")
    page.wait_for_timeout(500)
    other.reload()
    expect(other.locator("#text")).to_have_value("seen in both")


def test_stop_keeps_what_was_written(page: Page, slow: Callable[[float], None]) -> None:
    slow(0.2)
    write(page, "Tell me a long story.")
    expect(page.locator("#messages")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".status")).to_contain_text("Writing")
    begun(page)
    page.keyboard.press("Escape")
    expect(page.locator("#messages")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".broken")).to_contain_text("You stopped this answer.")
    slow(0)
    ask(page, "Go on.")


def test_what_is_waited_for(page: Page, slow: Callable[[float], None], tmp_path: Path) -> None:
    """Which image is being read, and for how long."""
    page.route("**/v1/messages/prefill", lambda route: route.abort())
    paths = [tmp_path / f"{colour}.png" for colour in ("brown", "olive", "navy")]
    for path in paths:  # that no other test has brought into the cache
        Image.new("RGB", (60, 40), path.stem).save(path)
    attach(page, paths)
    slow(1.0)
    page.fill("#text", "What?")
    page.evaluate(
        """() => { window.said = new Set(); new MutationObserver(() => {
            const line = document.querySelector(".status"); if (line) said.add(line.textContent);
        }).observe(document.getElementById("messages"), { subtree: true, childList: true, characterData: true }); }"""
    )
    page.click("#send")
    begun(page)
    slow(0)
    finished(page)
    said = page.evaluate("[...said]")
    assert any(re.match(r"Reading image \d of 3", words) for words in said), said
    assert any("1 s" in words for words in said), said


def test_another_chat_goes_on_while_one_answers(page: Page, slow: Callable[[float], None]) -> None:
    slow(0.1)
    write(page, "Tell me a long story.")
    begun(page)
    page.click("#new")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#chats .dot")).to_have_count(1)
    slow(0)
    expect(page.locator("#chats .dot")).to_have_count(0)
    page.locator("#chats button.open", has_text="Tell me a long story.").click()
    finished(page)


# --- conversation ------------------------------------------------------------------------------


def test_editing_is_a_mode_that_can_be_left(page: Page, files: list[Path]) -> None:
    """It makes a branch; what was being written comes back."""
    attach(page, files[:2])
    ask(page, "One?")
    page.fill("#text", "begun")
    page.get_by_label("Edit this message as a new branch").click()
    expect(page.locator("#editing")).to_be_visible()
    expect(page.locator("#text")).to_have_value("One?")
    assert alts(page) == ["red.png", "green.png"]
    page.keyboard.press("Escape")
    expect(page.locator("#editing")).to_be_hidden()
    expect(page.locator("#text")).to_have_value("begun")
    page.get_by_label("Edit this message as a new branch").click()
    ask_edited = page.locator("#messages > li.user .meta")
    page.fill("#text", "Two?")
    page.click("#send")
    expect(ask_edited).to_contain_text("2 of 2")
    finished(page)
    expect(page.locator("#text")).to_have_value("begun")
    page.get_by_label("The previous version").click()
    expect(page.locator("#messages > li.user .content")).to_contain_text("One?")
    page.get_by_label("Answer again as a new branch").click()
    expect(answer(page).locator(".meta")).to_contain_text("2 of 2")


def test_a_file_that_is_gone_is_left_out_of_an_edit(page: Page, files: list[Path]) -> None:
    attach(page, files[:2])
    ask(page, "Which?")
    page.evaluate("""() => new Promise((done) => {
        indexedDB.open("llava-interleave").onsuccess = (event) => {
            const change = event.target.result.transaction("files", "readwrite");
            change.objectStore("files").clear();
            change.oncomplete = done;
        };
    })""")
    page.get_by_label("Edit this message as a new branch").click()
    expect(page.locator("#error")).to_contain_text("is no longer in this browser and is left out")


def test_a_mark_without_a_file_is_told_before_anything_is_sent(
    page: Page, files: list[Path]
) -> None:
    attach(page, files[:2])
    page.fill("#text", "What of [image 3]?")
    page.click("#send")
    expect(page.locator("#error")).to_have_text(
        "the text has [image 3], but the last attachment is number 2"
    )
    expect(page.locator("#messages > li")).to_have_count(0)
    expect(page.locator("#text")).to_have_value("What of [image 3]?")
    page.fill("#text", "See [image 1]")
    expect(page.locator("#error")).to_be_hidden()


def test_chats_are_renamed_pinned_found_deleted_and_brought_back(page: Page) -> None:
    ask(page, "About apples")
    page.click("#new")
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "About pears")
    titles = page.locator("#chats button.open")
    expect(titles).to_have_text(["About pears", "About apples"])
    page.get_by_label("Actions for About apples").click()
    page.get_by_label("Pin the chat About apples").click()
    expect(titles).to_have_text(["About apples", "About pears"])
    page.get_by_label("Actions for About pears").click()
    page.get_by_label("Rename the chat About pears").click()
    page.get_by_label("Title of the chat").fill("Fruit")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Fruit")
    page.fill("#search", "pears")  # in a message
    expect(titles).to_have_text(["Fruit"])
    page.fill("#search", "")
    page.get_by_label("Actions for Fruit").click()
    page.get_by_label("Delete the chat Fruit").click()
    expect(titles).to_have_text(["About apples"])
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["About apples", "Fruit"])
    expect(page.locator("#messages > li")).to_have_count(2)


def test_export_share_and_import(
    browser: Browser, address: str, page: Page, files: list[Path], tmp_path: Path
) -> None:
    """Another browser has the chat with its images again, from the JSON and from the web page."""
    attach(page, files[:2])
    ask(page, "Which is </script><b>red</b>?")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "chats.json")
    page.locator("#chats button[aria-expanded]").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("Share the chat")).click()
    shared = tmp_path / download.value.suggested_filename
    download.value.save_as(shared)
    html = shared.read_text()
    assert html.count("<script") == 1 and "</script><b>" not in html
    cut_off = page.get_by_text("Cut off at the length limit.").count()
    assert html.count("This answer is not complete.") == cut_off
    assert len(re.findall(r'<img[^>]* src="data:image/png;base64,', html)) == 2
    for path in (tmp_path / "chats.json", shared):
        with opened(browser, address) as other:
            other.set_input_files("#import-file", path)
            expect(other.locator("#messages .tile img[src]")).to_have_count(2)
            expect(other.locator("#messages > li.user p")).to_have_text(
                "Which is </script><b>red</b>?"
            )
    broken = json.loads((tmp_path / "chats.json").read_text())
    node = next(iter(broken["chats"][0]["nodes"].values()))
    node["parent"] = node["id"]
    (tmp_path / "chats.json").write_text(json.dumps(broken))
    page.set_input_files("#import-file", tmp_path / "chats.json")
    expect(page.locator("#error")).to_have_text("a chat in this file is damaged")
    del node["parent"]
    node |= {"attribution": 5, "usage": "much", "times": 1, "onload": "alert(1)"}
    node["parts"][0] |= {"times": "now", "label": {"a": 1}}
    key = next(part["key"] for part in node["parts"] if "key" in part)
    broken["files"][key] = broken["files"][key][:-24] + "AAAAAAAA" + broken["files"][key][-16:]
    (tmp_path / "chats.json").write_text(json.dumps(broken))
    page.set_input_files("#import-file", tmp_path / "chats.json")
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#messages .tile")).to_have_count(2)  # what is wrong is left out
    stored = page.evaluate(
        """async (key) => [...new Uint8Array(await (await (await import("./store.js")).file(key)).arrayBuffer())]""",
        key,
    )
    assert bytes(stored) in [path.read_bytes() for path in files]  # and nothing is replaced


def test_settings_of_a_chat_are_sent(page: Page) -> None:
    page.click("#open-settings")
    page.get_by_label("System prompt").fill("Answer in one word.")
    page.get_by_label("Preset").select_option("Balanced")
    expect(page.get_by_role("spinbutton", name="Temperature")).to_have_value("0.7")
    page.get_by_label("Length in tokens").fill("3")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Theme").select_option("dark")
    page.get_by_role("button", name="Save").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What?")
    body = body_of(sent.value)
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.7, 3, 5)
    expect(page.locator(".broken")).to_contain_text("Cut off at the length limit.")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.reload()
    expect(page.locator("#messages > li")).to_have_count(2)
    page.click("#open-settings")
    expect(page.get_by_label("Seed")).to_have_value("5")
    page.keyboard.press("Escape")
    page.click("#model")
    expect(page.locator("#models")).to_contain_text("4,096 tokens of context")


MARKDOWN = r"""# Head
<img src=x onerror=alert(1)> **bold** `code` and $x_1^2$, \(y\), $5 or $10
- one
- [good](https://a.b/c)
- [bad](javascript:alert(1))

| a | b |
|---|--:|
| 1 | 2 |

![remote](https://a.b/pixel.png)

```python
print("<script>alert(1)</script>")
```
"""


@pytest.mark.parametrize("rich", [True, False], ids=["built", "plain"])
def test_answers_become_markdown_and_never_html(page: Page, rich: bool) -> None:
    """Both forms of markdown.js: the one that `make web` builds, and that of a bare clone."""
    if rich and not (BUILD / "markdown.js").is_file():
        pytest.skip("the page was not built: make web")
    if not rich:
        plain = BUILD.parent / "markdown.js"
        page.route("**/markdown.js", lambda route: route.fulfill(path=plain))
        page.reload()
        expect(page.locator("#plain")).to_be_visible()
    found = page.evaluate(
        """async (text) => {
        const { markdown } = await import("./markdown.js");
        const box = document.createElement("div");
        box.append(markdown(text));
        return box.innerHTML;
    }""",
        MARKDOWN,
    )
    assert re.search("<h[12]>Head</h[12]>", found)
    assert "<strong>bold</strong>" in found
    assert '<a href="https://a.b/c"' in found
    assert "<img" not in found and "<script" not in found and 'href="javascript' not in found
    if rich:
        assert '<td class="align-right">2</td>' in found
        assert found.count('class="katex"') == 2 and "$5 or $10" in found
        assert "hljs-built_in" in found


# --- which image? ------------------------------------------------------------------------------


def test_which_image_an_answer_used(
    browser: Browser, folder: Path, files: list[Path], video: Path
) -> None:
    """Shares and maps are the library's, in words; hidden at the next press of the button."""
    with serve(folder, max_tokens=12) as address, opened(browser, address) as page:
        attach(page, [*files[:2], video])
        expect(page.locator(".chip .frames")).to_have_text("16 frames")
        page.locator(".chip .tile").nth(2).click()
        page.get_by_label("Number of frames").fill("3")
        page.keyboard.press("Escape")
        expect(page.locator(".chip .frames")).to_have_text("3 frames")
        ask(page, "Which one?")
        button = page.get_by_role("button", name="Which image this answer used")
        with (
            page.expect_request("**/v1/messages/attribution") as sent,
            page.expect_response("**/v1/messages/attribution") as attributed_by_server,
        ):
            button.click()
        rows = page.locator(".attribution li")
        expect(rows).to_have_count(3)
        expect(button).to_have_attribute("aria-expanded", "true")
        images = attributed(folder, body_of(sent.value), [*files[:2], video])
        assert page.locator(".attribution .share").all_inner_texts() == [
            f"{round(100 * image.share) if image.change > 0 else 0} %" for image in images
        ]
        for row, image in zip(rows.all(), images, strict=True):
            times = float(np.exp(abs(image.change)))
            words = "about as likely" if abs(image.change) < 0.2 else "times"
            assert words in row.inner_text() and times > 0
            assert (
                f"It got {round(100 * image.attention)} % of the answer's attention"
                in row.inner_text()
            )
        most = max(image.heat.max() for image in images)
        veil = page.locator(".attribution .heatmap").first.evaluate("""(veil) => {
            const { data } = veil.getContext("2d").getImageData(0, 0, veil.width, veil.height);
            return [...data].filter((_, i) => i % 4 === 3);
        }""")
        assert np.allclose(veil, 255 * 0.85 * (1 - np.sqrt(images[0].heat.ravel() / most)), atol=2)
        sentences = [one["text"] for one in attributed_by_server.value.json()["sentences"]]
        expect(page.locator(".sentence")).to_have_count(len(sentences) if len(sentences) > 1 else 0)
        rows.nth(1).locator(".tile").click()
        expect(page.locator("#stage .heatmap")).to_be_visible()
        page.get_by_role("slider", name="Heat map").fill("0")
        assert (
            page.locator("#stage .heatmap").evaluate("one => getComputedStyle(one).opacity") == "0"
        )
        page.click("#next")
        expect(page.locator("#stage .frame .heatmap")).to_have_count(3)
        page.keyboard.press("Escape")
        page.reload()  # it is kept with the answer
        page.get_by_role("button", name="Which image this answer used").click()
        expect(page.locator(".attribution li")).to_have_count(3)
        button.press("Enter")
        expect(page.locator(".attribution")).to_have_count(0)
        expect(button).to_have_attribute("aria-expanded", "false")


def test_an_answer_cites_its_images(browser: Browser, tmp_path: Path) -> None:
    """As a setting of the chat; a number enlarges its image, and the text that is copied has none."""
    copy_files(tmp_path)
    profile = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with (
        serve(BUILTIN) as address,
        opened(browser, address, **profile, reduced_motion="reduce") as page,
    ):
        albums = [tmp_path / f"album-{number}.png" for number in (1, 2)]
        cited = load(BUILTIN).ask("Describe the images.", albums, cite=True).citations
        images = ["".join(map(str, one.images)) for one in cited or () if one.images]
        attach(page, albums)
        page.click("#open-settings")
        page.get_by_label("cite the images").check()
        page.get_by_role("button", name="Save").click()
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "Describe the images.")
        assert body_of(sent.value)["cite"] is True
        numbers = page.locator("sup.citations")
        expect(numbers).to_have_text(images)
        check_state(page, "citations")
        numbers.get_by_text("2").last.click()
        expect(page.locator("#viewer")).to_be_visible()
        expect(page.locator("#viewer")).to_contain_text("album-2.png")
        page.keyboard.press("Escape")
        page.reload()
        expect(numbers).to_have_text(images)
        found = page.evaluate(
            r"""async () => {
            const { marked, linkCitations } = await import("./citations.js");
            const { markdown } = await import("./markdown.js");
            const cite = (start_index, end_index) => ({ start_index, end_index, images: [2, 3], uncertain: true });
            const box = document.createElement("div");
            box.append(markdown(marked("\u{1F600} Yes. `a. b`", [cite(0, 7), cite(7, 10), cite(10, 13)])));
            linkCitations(box, () => {});
            return [box.textContent.trim(), marked("\uE0001\uE001", [])];
        }"""
        )
        assert found == ["\U0001f600 Yes.23 a. b23", "1"]


def attributed(folder: Path, request: dict[str, Any], sources: list[Path]) -> Any:
    *messages, last = request["messages"]
    given = iter(sources)
    content = [
        part
        if part["type"] == "text"
        else {k: v for k, v in part.items() if k in ("frames", "start", "end")}
        | {"type": part["type"].removesuffix("_url"), "path": next(given)}
        for part in messages[0]["content"]
    ]
    bot = load(folder, device="cpu")
    return bot.attribute([{"role": "user", "content": content}], last["content"]).images


# --- first look, keys, access ------------------------------------------------------------------


def test_the_first_look(page: Page) -> None:
    """What this is, the model and what it can do, examples with the demo's images."""
    expect(page.locator("#welcome h2")).to_have_text("Ask about many images at once")
    expect(page.locator("#model-facts")).to_contain_text("4,096 tokens of context, 16 an image")
    expect(page.locator("#toy")).to_be_hidden()  # this is not the built-in model
    expect(page.locator(".example")).to_have_count(4)
    assert page.locator(".example img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
    page.fill("#text", "kept")
    page.locator(".example", has_text="See all sides").click()
    finished(page)
    captions = page.locator("#messages .tile .caption").all_inner_texts()
    assert captions == ["front", "right", "back", "left"]
    expect(page.locator("#chats")).to_contain_text("Draft: kept")
    models = page.request.get("/v1/models").json()["data"]
    builtin = {"data": [{**one, "builtin": True} for one in models]}
    page.route("**/v1/models", lambda route: route.fulfill(json=builtin))
    page.reload()
    expect(page.locator("#toy")).to_contain_text("llava serve -m photos")
    expect(page.locator("#toy")).to_contain_text("llava serve -m llava-hf/")


def test_a_key_is_asked_for_and_kept_for_the_tab(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 32)
    with serve(folder, api_keys=keys, max_tokens=20) as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "k" * 32)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        ask(page, "Hello?")
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")
        page.close()


def test_without_a_mouse(page: Page, files: list[Path]) -> None:
    attach(page, files[:2])
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("What of ")
    for name in ("Put image 2, green.png into the text", "Select image 2, green.png"):
        for _ in range(20):
            if page.evaluate("document.activeElement.ariaLabel") == name:
                break
            page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.ariaLabel") == name
    page.keyboard.press("Space")
    expect(page.locator("#tools")).to_contain_text("1 selected")
    page.keyboard.press("Alt+ArrowLeft")
    assert alts(page) == ["green.png", "red.png"]
    # The focus stays with the image.
    assert page.evaluate("document.activeElement.ariaLabel") == "Select image 1, green.png"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("?")
    page.keyboard.press("Enter")
    finished(page)
    page.keyboard.press("Control+Shift+E")
    expect(page.locator("#editing")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    page.keyboard.press("Control+k")
    expect(page.locator("#search")).to_be_focused()


AXE = (
    (package_files("axe_playwright_python") / "axe.min.js").read_text()
    if CHROMIUM and pytest.importorskip("axe_playwright_python")
    else ""
)
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
LAYOUT_RULES = ["target-size", "scrollable-region-focusable", "color-contrast"]
"""Those that another size can break."""
SIZES = [(1280, 800, "light"), (390, 844, "dark"), (844, 390, "light"), (640, 400, "dark")]
"""Desktop, phone, phone on its side, and the desktop at 200 %."""


def check_state(page: Page, state: str) -> None:
    """WCAG 2.2 AA by axe-core, targets of 24 px, nothing wider than the window."""
    page.evaluate(AXE)
    full = page.viewport_size["height"] >= 800
    rules = {"type": "tag", "values": RULES} if full else {"type": "rule", "values": LAYOUT_RULES}
    found = page.evaluate("(runOnly) => axe.run({ runOnly })", rules)
    violations = [
        (state, rule["id"], [node["html"][:200] for node in rule["nodes"][:3]])
        for rule in found["violations"]
    ]
    assert violations == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
    small = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, summary")]
        .filter((one) => one.checkVisibility({ visibilityProperty: true }) && !one.matches(".reference, [hidden]"))
        .map((one) => [one.outerHTML.slice(0, 120), one.getBoundingClientRect()])
        .filter(([, box]) => box.width && (box.width < 23.5 || box.height < 23.5)).map(([html]) => html)""")
    assert small == [], state
    if not page.locator("dialog[open]").count():
        box = page.locator("#text").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"], state


@pytest.mark.parametrize(("width", "height", "scheme"), SIZES)
def test_accessible_in_every_state(
    browser: Browser,
    address: str,
    files: list[Path],
    slow: Callable[[float], None],
    width: int,
    height: int,
    scheme: Any,
) -> None:
    profile = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with opened(browser, address, **profile, reduced_motion="reduce") as page:
        check_state(page, "first look")
        attach(page, files)
        page.fill("#text", "Compare image 1 with **image 2**.")
        page.get_by_label("Select image 2").check()
        check_state(page, "attached")
        slow(0.2)
        page.click("#send")
        begun(page)
        check_state(page, "waiting")
        page.click("#stop")
        expect(page.locator(".broken")).to_be_visible()
        check_state(page, "broken off")
        slow(0)
        page.get_by_role("button", name="Which image this answer used").click()
        expect(page.locator(".attribution li")).to_have_count(3)
        check_state(page, "attribution")
        page.locator(".attribution .tile").first.click()
        page.select_option("#compare", index=1)
        expect(page.locator("#stage img")).to_have_count(2)
        check_state(page, "compare")
        page.keyboard.press("Escape")
        page.get_by_label("Edit this message as a new branch").click()
        check_state(page, "editing")
        page.keyboard.press("Escape")
        for opener in ("#open-settings", "#model", "#help"):
            page.click(opener)
            check_state(page, opener)
            page.keyboard.press("Escape")
            expect(page.locator(opener)).to_be_focused()
        page.set_input_files("#pick-files", Path(__file__))
        check_state(page, "an error")
        if width <= 736:
            page.click("#menu")
            expect(page.locator("#sidebar")).to_be_visible()
        page.locator("#chats button[aria-expanded]").click()
        check_state(page, "sidebar")


def test_a_table_of_a_folder(browser: Browser, tmp_path: Path) -> None:
    """It grows, is sorted, filtered, corrected and exported; a new column computes only itself."""
    copy_files(tmp_path)
    images = [tmp_path / f"album-{number}.png" for number in (1, 2, 3)]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with (
        serve(BUILTIN, requests_per_minute=100_000) as address,
        opened(browser, address, viewport={"width": 390, "height": 800}) as page,
    ):
        sent: list[Any] = []
        page.on(
            "request",
            lambda one: sent.append(one.post_data_json) if one.url.endswith("/table") else None,
        )
        page.locator("#open-table").click()
        table = page.get_by_role("dialog", name="Table")
        first = table.locator("#table-columns li").first
        first.get_by_label("Name").fill("things")
        first.get_by_label("Question").fill("How many things are there?")
        first.get_by_label("Type").select_option("int")
        page.locator("#table-pick-files").set_input_files([*images])
        drop(page, [tmp_path / "broken.png"])
        rows = table.locator("tbody tr")
        expect(rows).to_have_count(4)
        table.get_by_role("button", name="Compute").click()
        expect(table.locator("#table-status")).to_contain_text(
            "3 images of 4 done, 1 with an error"
        )
        names = rows.locator("th")
        table.get_by_role("button", name="things").click()
        expect(names).to_have_text(["album-1.png", "album-2.png", "album-3.png", "broken.png"])
        table.get_by_role("button", name="things").click()
        expect(names).to_have_text(["album-3.png", "album-2.png", "album-1.png", "broken.png"])
        table.get_by_label("Filter things").fill("> 1")
        expect(names).to_have_text(["album-3.png", "album-2.png"])
        rows.first.get_by_role("button").click()
        field = rows.first.get_by_role("spinbutton")
        field.fill("7")
        field.press("Enter")
        expect(rows.first.locator("td")).to_have_class("corrected")
        with page.expect_download() as download:
            table.get_by_role("button", name="Export JSONL").click()
        lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]
        assert [(one["things"], one["things_corrected"]) for one in lines] == [
            (7, True),
            (3, False),
        ]
        assert lines[0]["things_probability"] is None and lines[1]["things_probability"] > 0.9
        table.get_by_label("Filter things").fill("")
        table.get_by_role("button", name="Column", exact=True).click()
        second = table.locator("#table-columns li").nth(1)
        second.get_by_label("Name").fill("star")
        second.get_by_label("Question").fill("Is there a star?")
        second.get_by_label("Type").select_option("bool")
        sent.clear()
        table.get_by_role("button", name="Compute").click()
        expect(rows.filter(has_text="album-3.png").locator("td")).to_have_text(["7", "yes"])
        expect(table.locator("#table-status")).to_contain_text("3 images of 4 done")
        assert [column["name"] for column in sent[0]["columns"]] == ["things", "star"]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        with page.expect_download() as download:
            table.get_by_role("button", name="Export CSV").click()
        head, *body = download.value.path().read_text().splitlines()
        assert head.startswith(
            "file,things,things_probability,things_allowed,things_corrected,star"
        )
        assert len(body) == 4 and "broken.png" in body[-1]
