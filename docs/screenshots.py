"""Take the screenshots of the documentation with Chromium: web UI, attribution report, bench page.

python docs/screenshots.py        # after `llava demo`; needs the extras dev and serve
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from llava_interleave import load
from llava_interleave.attribution import report
from llava_interleave.server.app import create_app
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings

DOCS = Path(__file__).parent
ALBUM = [f"demo/album-{number}.png" for number in (1, 2, 3)]
QUESTION = "In which image is there a yellow star?"


def save(page: Page, name: str, width: int) -> None:
    """The page as WebP, `width` pixels wide."""
    image = Image.open(BytesIO(page.screenshot())).convert("RGB")
    height = round(image.height * width / image.width)
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        DOCS / "images" / f"{name}.webp", quality=82, method=6
    )


def web_ui(browser: Browser) -> None:
    """Three images in order, a question and its answer."""
    settings = Settings(port=0)
    server = Server(create_app(load(), settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    page = browser.new_page(viewport={"width": 1100, "height": 640}, device_scale_factor=2)
    page.goto(server.address)
    for files, text in ((ALBUM, QUESTION), ([], "Name the pictures from fewest to most objects.")):
        if files:
            page.set_input_files("#pick-files", files)
            page.wait_for_function(
                "count => document.querySelectorAll('#attached > li').length == count",
                arg=len(files),
            )
        page.fill("#text", text)
        page.click("#send")
        page.wait_for_selector("#stop", state="hidden")
        page.wait_for_timeout(1500)
    save(page, "web-ui", 1100)
    server.should_exit = True
    thread.join(20)


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
