"""The page in a real browser against a real server: the whole flow, and what must never happen."""

import base64
import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, Request, expect  # noqa: E402

from llava_interleave.chat import ImageAttribution, load  # noqa: E402
from llava_interleave.engine import Engine  # noqa: E402
from llava_interleave.processing import FrameSampling, Loader  # noqa: E402
from llava_interleave.server.app import create_app  # noqa: E402
from llava_interleave.server.run import Server  # noqa: E402
from llava_interleave.server.settings import Settings  # noqa: E402
from llava_interleave.testing import tiny_checkpoint  # noqa: E402
from recipes.tiny_world.draw import write_video  # noqa: E402

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
expect.set_options(timeout=20_000)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium on this machine: apt install chromium"
    ),
]


def serve(folder: Path, **fields: object) -> Iterator[str]:
    settings = Settings(port=0, **fields)
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
    yield from serve(folder, max_tokens=100)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        yield page


@contextlib.contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """A fresh profile; the test fails on any error of a script and on any request to another host."""
    context = browser.new_context()
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda message: (
            faults.append(message.text) if "Content Security Policy" in message.text else None
        ),
    )

    def asked(request: Request) -> None:
        if not request.url.startswith((address, "blob:", "data:")):
            faults.append(request.url)

    page.on("request", asked)
    page.goto(address)
    expect(page.locator("#model option")).to_have_count(1)
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


def ask(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.click("#send")
    expect(page.locator("#text")).to_have_value("")
    expect(page.locator("#send")).to_be_visible(timeout=20_000)
    expect(page.locator("#messages > li.assistant").last.locator(".meta")).to_contain_text(
        "prompt tokens"
    )


def test_a_conversation_about_several_images(page: Page, files: list[Path]) -> None:
    """Attach, order, name the place in the text, see the budget, ask, ask again with reuse, find it
    all after a reload.
    """
    page.set_input_files("#pick-files", files)
    expect(page.locator(".chip")).to_have_count(3)
    expect(page.locator("#budget-text")).to_contain_text(re.compile(r"[\d,]+ of 4,096 tokens"))
    page.fill("#text", "Compare ")
    page.locator(".chip .number").nth(2).click()
    expect(page.locator("#text")).to_have_value("Compare [image 3]")
    page.get_by_label("Move image 3, blue.png to the left").click()
    expect(page.locator("#text")).to_have_value("Compare [image 2]")
    assert page.locator(".chip img").nth(1).get_attribute("alt") == "blue.png"
    ask(page, page.input_value("#text") + " with the others.")
    said = page.locator("#messages > li.user .content")
    assert said.locator("img").count() == 3
    assert [img.get_attribute("alt") for img in said.locator("img").all()] == [
        "red.png",
        "green.png",
        "blue.png",
    ]
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "And now?")
    assert [message["role"] for message in json.loads(sent.value.post_data)["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    reused = page.locator("#messages > li.assistant").last.locator(".meta").inner_text()
    assert int(re.search(r"(\d+) cached", reused)[1]) > 0
    page.reload()
    page.locator("#chats button.open").first.click()
    expect(page.locator("#messages > li")).to_have_count(4)
    expect(page.locator("#messages img")).to_have_count(3)


def test_the_parts_sent_are_the_ones_composed(page: Page, files: list[Path]) -> None:
    page.set_input_files("#pick-files", files)
    page.get_by_label("Name of the view in image 1").fill("front")
    page.get_by_label("Name of the view in image 2").fill("left")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Is [image 3] new?")
    parts = json.loads(sent.value.post_data)["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["views", "text", "image_url", "text"]
    assert list(parts[0]["views"]) == ["front", "left"]
    assert parts[2]["image_url"]["url"].startswith("file-")
    assert [part.get("text") for part in parts] == [None, "Is ", None, " new?"]


def test_files_are_dropped_pasted_picked_by_folder_and_dragged_into_order(
    page: Page, files: list[Path], tmp_path: Path
) -> None:
    def names() -> list[str | None]:
        return [img.get_attribute("alt") for img in page.locator(".chip img").all()]

    (tmp_path / "shots" / "more").mkdir(parents=True)
    for name in ("2.png", "10.png", "more/1.png", "notes.txt"):
        (tmp_path / "shots" / name).write_bytes(
            files[0].read_bytes() if name.endswith("png") else b"text"
        )
    page.set_input_files("#pick-folder", tmp_path / "shots")
    expect(page.locator(".chip")).to_have_count(3)
    assert names() == ["2.png", "10.png", "1.png"]
    (tmp_path / "shots" / "notes.txt").unlink()
    drop(page, [tmp_path / "shots", files[2]])
    expect(page.locator(".chip")).to_have_count(7)
    expect(page.locator("#drop")).to_be_hidden()
    assert names()[3:] == ["2.png", "10.png", "1.png", "blue.png"]
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
            document.getElementById("text").dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
        }""",
        base64.b64encode(files[1].read_bytes()).decode(),
    )
    expect(page.locator(".chip")).to_have_count(8)
    page.fill("#text", "See [image 2] and [image 1]")
    page.locator(".chip img").nth(0).drag_to(page.locator(".chip img").nth(2))
    expect(page.locator("#text")).to_have_value("See [image 1] and [image 3]")
    assert names()[:3] == ["10.png", "1.png", "2.png"]


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
                "Input.dispatchDragEvent", {"type": step, "x": 400, "y": 200, "data": data}
            )
            page.wait_for_timeout(100)


def test_which_image_an_answer_used(
    browser: Browser, folder: Path, files: list[Path], tmp_path: Path
) -> None:
    """Shares, maps and frames are the library's; shown at the press of a button, hidden at the
    next.
    """
    rng = np.random.default_rng(0)
    write_video(
        [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(16)], tmp_path / "v.mp4"
    )
    for address in serve(folder, max_tokens=12):
        with opened(browser, address) as page:
            page.set_input_files("#pick-files", [*files[:2], tmp_path / "v.mp4"])
            page.locator("#frames").fill("3")
            ask(page, "Which one?")
            page.locator("#frames").evaluate(
                "(slider) => { slider.value = 5; }"
            )  # the answer was given with 3
            button = page.get_by_role("button", name="Which image this answer used")
            with page.expect_request("**/v1/messages/attribution") as sent:
                button.click()
            told = page.locator(".attribution li")
            expect(told).to_have_count(3)
            expect(page.locator(".attribution .frame")).to_have_count(2 + 3)
            expect(button).to_have_attribute("aria-expanded", "true")
            asked = json.loads(sent.value.post_data)
            known = attribution(folder, asked, [*files[:2], tmp_path / "v.mp4"])
            shares = page.locator(".attribution strong + meter + strong").all_inner_texts()
            assert [share.strip() for share in shares] == [
                f"{round(100 * look.share)} %" for look in known
            ]
            for item, look in zip(told.all(), known, strict=True):
                assert (
                    f"{abs(look.change):.2f} nats {'more likely' if look.change < 0 else 'less likely'}"
                    in item.inner_text()
                )
                assert f"{round(100 * look.attention)} % of the attention" in item.inner_text()
            most = max(look.heat.max() for look in known)
            veils = page.locator(".heatmap").evaluate_all("""(all) => all.map((veil) => {
                const { data } = veil.getContext("2d").getImageData(0, 0, veil.width, veil.height);
                return [...data].filter((_, i) => i % 4 === 3);
            })""")
            for veil, heat in zip(
                veils, np.concatenate([look.heat for look in known]), strict=True
            ):
                assert np.allclose(veil, 255 * 0.85 * (1 - np.sqrt(heat.ravel() / most)), atol=2)
            page.get_by_label("images without maps").check()
            expect(page.locator(".heatmap").first).to_be_hidden()
            button.press("Enter")
            expect(page.locator(".attribution")).to_have_count(0)
            expect(button).to_have_attribute("aria-expanded", "false")


def attribution(
    folder: Path, asked: dict[str, Any], sources: list[Path]
) -> tuple[ImageAttribution, ...]:
    *messages, answer = asked["messages"]
    parts, given = messages[0]["content"], iter(sources)
    content = [
        p if p["type"] == "text" else {"type": p["type"].removesuffix("_url"), "path": next(given)}
        for p in parts
    ]
    bot = load(folder, device="cpu")
    return bot.attribute(
        [{"role": "user", "content": content}], answer["content"], frames=asked["frames"]
    ).images


def test_without_a_mouse(page: Page, files: list[Path]) -> None:
    def focused(name: str) -> bool:
        return page.evaluate("(name) => document.activeElement.ariaLabel === name", name)

    page.set_input_files("#pick-files", files[:2])
    expect(page.locator(".chip")).to_have_count(2)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("What of ")
    for name in ("Move image 2, green.png to the left", "Put image 1, green.png into the text"):
        for _ in range(20):
            if focused(name):
                break
            page.keyboard.press("Shift+Tab")
        assert focused(name)
        page.keyboard.press("Enter")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("?")
    page.keyboard.press("Enter")
    expect(page.locator("#messages > li.user .content")).to_contain_text("What of ?")
    assert page.locator("#messages > li.user img").evaluate_all(
        "(all) => all.map((i) => i.alt)"
    ) == ["red.png", "green.png"]
    expect(page.locator("#messages > li.assistant .meta")).to_contain_text(
        "prompt tokens", timeout=20_000
    )


def test_a_mark_without_a_file_is_reported_before_the_request(
    page: Page, files: list[Path]
) -> None:
    page.set_input_files("#pick-files", files[:2])
    page.fill("#text", "What of [image 3]?")
    page.click("#send")
    expect(page.locator("#error")).to_have_text("the text has [image 3], but 2 files are attached")
    expect(page.locator("#messages > li")).to_have_count(0)
    expect(page.locator("#text")).to_have_value("What of [image 3]?")


def test_frames_of_a_video_are_shown_before_they_are_sent(page: Page, tmp_path: Path) -> None:
    """The very ones that the server looks at, by their times and by what is in them."""
    write_video(
        [np.full((64, 64, 3), 10 * i, dtype=np.uint8) for i in range(16)], tmp_path / "v.mp4"
    )
    page.set_input_files("#pick-files", tmp_path / "v.mp4")
    expect(page.locator(".strip canvas")).to_have_count(16)
    page.locator("#frames").fill("3")
    page.locator("#frames").dispatch_event("change")
    clip = Loader().video((tmp_path / "v.mp4").read_bytes(), FrameSampling(frames=3))
    shown = page.locator(".strip canvas")
    expect(shown.nth(2)).to_have_attribute("title", f"{clip.times[2]:.2f} s")  # not the old ones
    expect(shown).to_have_count(3)
    assert [shown.nth(i).get_attribute("title") for i in range(3)] == [
        f"{time:.2f} s" for time in clip.times
    ]
    grey = "(canvas) => canvas.getContext('2d').getImageData(9, 9, 1, 1).data[0]"
    assert [shown.nth(i).evaluate(grey) for i in range(3)] == pytest.approx(
        [frame.getpixel((9, 9))[0] for frame in clip.frames], abs=4
    )
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What happens?")
    assert json.loads(sent.value.post_data)["frames"] == 3


def test_retry_and_edit_make_branches(page: Page, files: list[Path]) -> None:
    page.set_input_files("#pick-files", files[:1])
    ask(page, "First?")
    page.get_by_label("Answer again as a new branch").click()
    expect(page.locator("#messages > li.assistant .meta")).to_contain_text("2 of 2")
    page.get_by_label("Edit this message as a new branch").click()
    expect(page.locator("#text")).to_have_value("[image 1]First?")
    ask(page, "[image 1]Second?")
    expect(page.locator("#messages > li.user .content")).to_contain_text("Second?")
    page.get_by_label("The previous version").first.click()
    expect(page.locator("#messages > li.user .content")).to_contain_text("First?")
    expect(page.locator("#messages > li.assistant .meta")).to_contain_text("2 of 2")


def test_an_edited_message_says_which_file_it_has_lost(page: Page, files: list[Path]) -> None:
    """A browser may drop what a page keeps; the edited question was sent without its image, and
    nobody was told.
    """
    page.set_input_files("#pick-files", files[:1])
    ask(page, "First?")
    page.evaluate("""() => new Promise((done) => {
        indexedDB.open("llava-interleave", 1).onsuccess = (event) => {
            const change = event.target.result.transaction("files", "readwrite");
            change.objectStore("files").clear();
            change.oncomplete = done;
        };
    })""")
    expect(page.locator("#budget")).to_be_hidden()
    page.get_by_label("Edit this message as a new branch").click()
    expect(
        page.locator("#budget")
    ).to_be_visible()  # counting what is left does not take the word back
    expect(page.locator("#error")).to_contain_text(
        "red.png is no longer in this browser and is left out"
    )


def test_a_corrected_error_disappears(page: Page, files: list[Path]) -> None:
    page.set_input_files("#pick-files", files[:1])
    page.fill("#text", "See [image 2]")
    expect(page.locator("#error")).to_contain_text(
        "the text has [image 2], but 1 files are attached"
    )
    page.fill("#text", "See [image 1]")
    expect(page.locator("#error")).to_be_hidden()


def test_stop_keeps_what_was_written(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step
    # Slower, or it is over before it is stopped.
    monkeypatch.setattr(
        Engine, "step", lambda engine, patience: time.sleep(0.2) or step(engine, patience)
    )
    page.fill("#text", "Tell me a long story.")
    page.click("#send")
    expect(page.locator("#messages")).to_have_attribute(
        "aria-busy", "true"
    )  # not read out word by word
    page.click("#stop", timeout=10_000)
    expect(page.locator("#messages")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#messages > li.assistant .meta")).to_contain_text("stopped")
    monkeypatch.undo()
    ask(page, "Go on.")


def test_export_and_import(page: Page, files: list[Path], tmp_path: Path) -> None:
    page.set_input_files("#pick-files", files[:2])
    ask(page, "Which is red?")
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete the chat Which is red?").click()
    expect(page.locator("#chats li")).to_have_count(0)
    page.set_input_files("#import-file", path)
    page.locator("#chats button.open").click()
    expect(page.locator("#messages img")).to_have_count(2)
    broken = json.loads(path.read_text())
    node = next(iter(broken["chats"][0]["nodes"].values()))
    node["parent"] = node["id"]
    path.write_text(json.dumps(broken))
    page.set_input_files("#import-file", path)
    expect(page.locator("#error")).to_have_text("a chat in this file is damaged")


def test_answers_become_markdown_and_never_html(page: Page) -> None:
    found = page.evaluate("""async () => {
        const { markdown } = await import("./markdown.js");
        const box = document.createElement("div");
        box.append(markdown("# Head\\n<img src=x onerror=alert(1)> **bold** `code`\\n- one\\n- [good](https://a.b/c)\\n" +
            "- [bad](javascript:alert(1))\\n```\\n<script>alert(1)</script>\\n```"));
        return box.innerHTML;
    }""")
    assert "<h2>Head</h2>" in found
    assert "<strong>bold</strong>" in found
    assert '<a href="https://a.b/c"' in found
    assert "<img" not in found
    assert "<script" not in found
    assert 'href="javascript' not in found


def test_the_page_requests_a_key_and_keeps_it_for_the_tab(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 32)
    for address in serve(folder, api_keys=keys):
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "k" * 32)
        page.keyboard.press("Enter")
        expect(page.locator("#model option")).to_have_count(1)
        ask(page, "Hello?")
        page.reload()
        expect(page.locator("#model option")).to_have_count(1)
        page.close()


def test_nothing_overflows_on_a_phone_and_everything_has_a_name(
    browser: Browser, address: str, files: list[Path]
) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page.goto(address)
    page.set_input_files("#pick-files", files)
    expect(page.locator(".chip")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator("#sidebar")).not_to_be_visible()
    page.click("#menu")
    expect(page.locator("#sidebar")).to_be_visible()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input:not([type=file]), select, textarea")]
        .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)""")
    assert nameless == []
    page.close()
