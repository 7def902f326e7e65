"""Every script of examples/ runs on the demo's files, and is short."""

import runpy
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_interleave.cli import demo

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "ask": ["demo/before.png", "demo/after.png"],
    "attribution": ["why.html", "demo/album-1.png", "demo/album-2.png"],
    "batch": ["demo/shapes.png", "demo/letters.png", "demo/before.png"],
    "compare_two": ["demo/before.png", "demo/after.png"],
    "finetune_lora": ["pictures", "tuned", "1"],
    "serve_client": ["demo/shapes.png", "SERVER"],
    "stream": ["demo/shapes.png"],
    "video": ["demo/clip.mp4"],
}


@pytest.fixture
def server() -> Iterator[str]:
    pytest.importorskip("fastapi")
    from llava_interleave.chat import load
    from llava_interleave.server.app import create_app
    from llava_interleave.server.run import Server
    from llava_interleave.server.settings import Settings

    settings = Settings(port=0)
    server = Server(create_app(load(device="cpu"), settings), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.address
    server.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    demo.copy_files(tmp_path / "demo")
    for name, files in (("album", ("album-1", "album-2")), ("scene", ("front", "back"))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(f"demo/{file}.png", f"pictures/{name}")
    arguments = [
        request.getfixturevalue("server") if argument == "SERVER" else argument
        for argument in ARGUMENTS[path.stem]
    ]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
