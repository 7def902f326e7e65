"""Plots by Matplotlib, in kinds and styles for training and others that are held out of it.

`python -m recipes.tiny_world.plots FOLDER`; Matplotlib is no dependency: `other_images` installs
it into a folder of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

Draw = Callable[[Any, np.random.Generator], object]
CMAPS = ("viridis", "gray", "hot", "coolwarm", "jet", "terrain", "Blues")


def some(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def line(ax: Any, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 6))):
        ax.plot(np.cumsum(rng.standard_normal(int(rng.integers(8, 200)))), lw=rng.uniform(0.8, 4))


def scatter(ax: Any, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 5))):
        n = int(rng.integers(5, 150))
        ax.scatter(rng.standard_normal(n), rng.standard_normal(n), s=rng.uniform(5, 120))


def bars(ax: Any, rng: np.random.Generator) -> None:
    n = int(rng.integers(2, 12))
    for index in range(int(rng.integers(1, 4))):
        ax.bar(np.arange(n) + index * 0.25, rng.uniform(1, 10, n), width=0.25)


def histogram(ax: Any, rng: np.random.Generator) -> None:
    ax.hist(rng.standard_normal((400, int(rng.integers(1, 4)))), bins=int(rng.integers(5, 40)))


def heat_map(ax: Any, rng: np.random.Generator) -> None:
    ax.imshow(rng.uniform(size=rng.integers(3, 30, 2)), cmap=some(rng, CMAPS), aspect="auto")


def areas(ax: Any, rng: np.random.Generator) -> None:
    ax.stackplot(range(20), rng.uniform(1, 5, (int(rng.integers(2, 6)), 20)))


def pie(ax: Any, rng: np.random.Generator) -> None:
    n = int(rng.integers(2, 8))
    ax.pie(rng.uniform(1, 5, n), labels=[f"part {i}" for i in range(n)], autopct="%1.0f%%")


def boxes(ax: Any, rng: np.random.Generator) -> None:
    ax.boxplot([rng.standard_normal(50) + i for i in range(int(rng.integers(2, 7)))])


def violins(ax: Any, rng: np.random.Generator) -> None:
    ax.violinplot([rng.standard_normal(50) * (i + 1) for i in range(int(rng.integers(2, 6)))])


def contours(ax: Any, rng: np.random.Generator) -> None:
    y, x = np.mgrid[-2:2:40j, -2:2:40j]
    a, b, c = rng.uniform(0.5, 3, 3)
    ax.contourf(x, y, np.sin(a * x) * np.cos(b * y) + c * x * y / 4, cmap=some(rng, CMAPS))


def arrows(ax: Any, rng: np.random.Generator) -> None:
    y, x = np.mgrid[-2:2:12j, -2:2:12j]
    ax.quiver(x, y, np.sin(rng.uniform(1, 3) * y), np.cos(rng.uniform(1, 3) * x))


def hexagons(ax: Any, rng: np.random.Generator) -> None:
    ax.hexbin(rng.standard_normal(3000), rng.standard_normal(3000), gridsize=18)


def stairs(ax: Any, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 4))):
        ax.step(range(20), np.cumsum(rng.uniform(0, 2, 20)), lw=2)
    ax.errorbar(range(20), rng.uniform(0, 20, 20), yerr=2, fmt="o")


TRAINED: tuple[Draw, ...] = (line, scatter, bars, histogram, heat_map, areas)
HELD_OUT: tuple[Draw, ...] = (pie, boxes, violins, contours, arrows, hexagons, stairs)
STYLES = ("default", "ggplot", "bmh", "dark_background", "classic")
HELD_OUT_STYLES = ("seaborn-v0_8", "fivethirtyeight", "grayscale", "Solarize_Light2")


def write(folder: Path, count: int, kinds: tuple[Draw, ...], styles: tuple[str, ...]) -> None:
    """`count` plots as PNG files."""
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng, lots = np.random.default_rng(number), Random(number)
        with plt.style.context(lots.choice(styles)):
            rows, columns = lots.choice(((1, 1), (1, 1), (1, 1), (1, 2), (2, 2)))
            size = (lots.uniform(4, 9), lots.uniform(3, 7))
            figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, dpi=80)
            for ax in axes.flat:
                lots.choice(kinds)(ax, rng)
                if lots.random() < 0.6:
                    ax.set_title(f"Figure {number}: measured values")
                if lots.random() < 0.4:
                    ax.set_xlabel("time in s")
                    ax.set_ylabel("amplitude")
                if lots.random() < 0.3:
                    ax.grid(visible=True)
                if lots.random() < 0.15:
                    ax.axis("off")
            figure.savefig(folder / f"{number:03}.png")
            plt.close(figure)


if __name__ == "__main__":
    into = Path(sys.argv[1])
    write(into / "train" / "plots", 160, TRAINED, STYLES)
    write(into / "held_out" / "plots", 40, TRAINED, HELD_OUT_STYLES)
    write(into / "held_out" / "new-plots", 40, HELD_OUT, HELD_OUT_STYLES)
