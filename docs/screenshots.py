"""Take the screenshots of the documentation with Chromium: web UI, attribution report, bench page.

python docs/screenshots.py        # after `llava demo` and `make web`; needs the extra dev
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from llava_interleave import load
from llava_interleave.attribution import report
from llava_interleave.server.app import create_app
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings

DOCS = Path(__file__).parent
ALBUM = [f"demo/album-{number}.png" for number in (1, 2, 3)]
QUESTION = "In which image is there a yellow star?"
PHONES: list[tuple[str, int, int, Literal["light", "dark"]]] = [
    ("phone", 390, 844, "dark"),
    ("landscape", 844, 390, "light"),
]


def save(page: Page, name: str, width: int) -> None:
    """The page as WebP, `width` pixels wide."""
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    height = round(image.height * width / image.width)
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        DOCS / "images" / f"{name}.webp", quality=82, method=6
    )


def web_ui(browser: Browser) -> None:
    """A conversation, 200 photos, an attribution, and the page on a phone."""
    settings = Settings(port=0)
    server = Server(create_app(load(), settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    page = opened(browser, server.address, 1200, 720)
    ask(page, QUESTION, ALBUM)
    ask(page, "Name the pictures from fewest to most objects.")
    save(page, "web-ui", 1100)
    page.get_by_role("button", name="Which image this answer used").first.click()
    page.wait_for_selector(".attribution li")
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
        page = opened(browser, server.address, width, height, scheme)
        ask(page, QUESTION, ALBUM)
        save(page, f"web-ui-{name}", width)
    server.should_exit = True
    thread.join(20)


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
    page.goto(address)
    page.wait_for_selector("#model-facts li")
    return page


def ask(page: Page, text: str, files: Sequence[str] = ()) -> None:
    """Attach files, ask, and wait for the answer."""
    if files:
        page.set_input_files("#pick-files", files)
        page.wait_for_selector(f".chip:nth-child({len(files)})")
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_selector("#stop", state="visible")
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_timeout(1000)


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
    os.chdir(DOCS.parent)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        web_ui(browser)
        attribution(browser)
        bench(browser)
        browser.close()


if __name__ == "__main__":
    main()
