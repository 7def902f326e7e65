"""Take the screenshots of the documentation with Chromium: web UI, attribution report, bench page.

python docs/screenshots.py        # after `make web`; needs the extra dev
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from llava_interleave import load
from llava_interleave.attribution import report
from llava_interleave.engine import Engine
from llava_interleave.engine.sampler import Pick
from llava_interleave.engine.scheduler import SchedulerOutput
from llava_interleave.server.app import create_app
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings
from llava_interleave.server.web_files import DEMO

DOCS = Path(__file__).resolve().parent
ALBUM = [f"album-{number}.png" for number in (1, 2, 3)]
QUESTION = "In which image is there a yellow star?"
PHONES: list[tuple[str, int, int, Literal["light", "dark"]]] = [
    ("phone", 390, 844, "dark"),
    ("landscape", 844, 390, "light"),
]


SHEETS: dict[str, tuple[int, int, int]] = {"desktop": (1280, 800, 480), "phone": (390, 844, 240)}
"""Width and height of the window, width of a screenshot in the sheet."""


def shot(page: Page, width: int) -> Image.Image:
    """The page, `width` pixels wide."""
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def save(page: Page, name: str, width: int) -> None:
    """The page as WebP."""
    shot(page, width).save(DOCS / "images" / f"{name}.webp", quality=82, method=6)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server of the built-in model."""
    settings = Settings(port=0, shutdown_timeout=0.1, requests_per_minute=100_000)
    server = Server(create_app(load(), settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.address
    server.should_exit = True
    thread.join(20)


def web_ui(browser: Browser, address: str) -> None:
    """A conversation, 200 photos, an attribution, and the page on a phone."""
    page = opened(browser, address, 1200, 720)
    ask(page, QUESTION, ALBUM)
    ask(page, "Name the pictures from fewest to most objects.")
    save(page, "web-ui", 1100)
    show_attribution(page)
    page.locator("#scroll").evaluate("one => one.scrollTo(0, 190)")
    page.wait_for_timeout(500)
    save(page, "web-ui-attribution", 1000)
    page.click("#new")
    with tempfile.TemporaryDirectory() as folder:
        page.set_input_files("#pick-files", photos(Path(folder)))
        page.wait_for_selector(".chip:nth-child(200)")
        page.fill("#text", "Which of these were taken at night?")
        page.wait_for_timeout(1500)
    save(page, "web-ui-many", 1000)
    for name, width, height, scheme in PHONES:
        page = opened(browser, address, width, height, scheme)
        ask(page, QUESTION, ALBUM)
        save(page, f"web-ui-{name}", width)


RUN = Engine._run


def slow_step(engine: Engine, output: SchedulerOutput) -> list[list[Pick]]:
    """A step of the engine that takes long enough for a screenshot."""
    time.sleep(1)
    return RUN(engine, output)


def sheet(browser: Browser, name: str, scheme: Literal["light", "dark"]) -> None:
    """Every state of the page in one image: first look, waiting, answer, two images compared,
    attribution, settings, table.
    """
    width, height, cell = SHEETS[name]
    with serving() as address:
        page = opened(browser, address, width, height, scheme)
        shots = [shot(page, cell)]
        page.route("**/v1/messages/prefill", lambda route: route.abort())
        with mock.patch.object(Engine, "_run", slow_step):
            send(page, QUESTION, ALBUM)
            page.get_by_text("Reading image 1 of 3").wait_for()
            shots.append(shot(page, cell))
        answered(page)
        shots.append(shot(page, cell))
        page.locator("#messages .tile").first.click()
        page.select_option("#compare", index=2)
        page.wait_for_timeout(500)
        shots.append(shot(page, cell))
        page.keyboard.press("Escape")
        show_attribution(page)
        page.locator(".attribution").scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        shots.append(shot(page, cell))
        page.click("#open-settings")
        shots.append(shot(page, cell))
        page.keyboard.press("Escape")
        page.click("#open-table")
        page.get_by_label("Question about each image").fill("How many things are there?")
        page.set_input_files("#table-pick-files", ALBUM)
        page.click("#table-run")
        page.locator("#table-status", has_text="3 images of 3 done").wait_for()
        page.wait_for_timeout(500)
        shots.append(shot(page, cell))
        page.context.close()
    columns = len(shots) if name == "phone" else 4
    rows = -(-len(shots) // columns)
    whole = Image.new("RGB", (columns * (cell + 8), rows * (shots[0].height + 8)), "#8c9299")
    for i, one in enumerate(shots):
        whole.paste(one, (i % columns * (cell + 8) + 4, i // columns * (one.height + 8) + 4))
    whole.save(DOCS / "images" / f"web-ui-{name}-{scheme}.webp", quality=76, method=6)


def opened(
    browser: Browser,
    address: str,
    width: int,
    height: int,
    scheme: Literal["light", "dark"] = "light",
) -> Page:
    """The page in a fresh profile of a window of this size."""
    viewport: ViewportSize = {"width": width, "height": height}
    context = browser.new_context(viewport=viewport, device_scale_factor=2, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(180_000)
    page.goto(address)
    page.wait_for_selector("#model-facts li")
    return page


def send(page: Page, text: str, files: Sequence[str] = ()) -> None:
    """Attach files and send a message."""
    if files:
        page.set_input_files("#pick-files", files)
        page.wait_for_selector(f".chip:nth-child({len(files)})")
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_selector("#stop", state="visible")


def answered(page: Page) -> None:
    """Wait for the end of the answer."""
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_timeout(1000)


def ask(page: Page, text: str, files: Sequence[str] = ()) -> None:
    """Attach files, ask, and wait for the answer."""
    send(page, text, files)
    answered(page)


def show_attribution(page: Page) -> None:
    """Which image the first answer used."""
    page.get_by_role("button", name="Which image this answer used").first.click()
    page.wait_for_selector(".attribution li")


def photos(folder: Path) -> list[Path]:
    """200 drawn skies, in place of photos."""
    rng = np.random.default_rng(0)
    paths = [folder / f"IMG_{i + 1:03}.jpg" for i in range(200)]
    for path in paths:
        top, bottom = rng.integers(0, 200, 3), rng.integers(60, 255, 3)
        slope = np.linspace(0, 1, 90)[:, None, None]
        sky = (top * (1 - slope) + bottom * slope).astype(np.uint8).repeat(120, 1)
        image = Image.fromarray(sky)
        x, y, r = (int(rng.integers(*span)) for span in ((20, 100), (15, 70), (6, 20)))
        ImageDraw.Draw(image).ellipse([x - r, y - r, x + r, y + r], "#fff4c4")
        image.save(path)
    return paths


def attribution(browser: Browser) -> None:
    """The report of `llava ask --attribution`."""
    bot = load()
    messages = bot.turn(QUESTION, ALBUM)
    found = bot.attribute(messages, bot.chat(messages))
    page = browser.new_page(viewport={"width": 900, "height": 920}, device_scale_factor=2)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "why.html")
        report.write(target, found)
        page.goto(target.as_uri())
        save(page, "attribution", 900)


def bench(browser: Browser) -> None:
    """The charts of docs/bench/index.html."""
    page = browser.new_page(viewport={"width": 1000, "height": 700}, device_scale_factor=2)
    page.goto((DOCS / "bench" / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('h2')[0]?.scrollIntoView()")
    save(page, "bench", 1000)


def main() -> None:
    """Write docs/images."""
    os.chdir(DEMO)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in SHEETS:
            sheet(browser, name, "light")
            sheet(browser, name, "dark")
        with serving() as address:
            web_ui(browser, address)
        attribution(browser)
        bench(browser)
        browser.close()


if __name__ == "__main__":
    main()
