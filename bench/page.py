"""Draw the results of bench/peers.py as one page of charts.

python bench/page.py docs/bench/latest.json docs/bench/index.html
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_interleave import reports


def charts(systems: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for figure in dict.fromkeys(figure for measured in systems.values() for figure in measured):
        higher = "tokens/s" in figure
        rows = {name: measured[figure] for name, measured in systems.items() if figure in measured}
        widest = max(row["most"] for row in rows.values())
        bars = [
            row
            | {"name": name, "text": formatted(row["median"])}
            | {
                f"{key}_width": f"{100 * row[key] / widest:.2f}%"
                for key in ("least", "most", "median")
            }
            for name, row in sorted(rows.items(), key=lambda i: i[1]["median"], reverse=higher)
        ]
        yield {"title": figure, "higher": higher, "bars": bars}


def formatted(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    results = json.loads(source.read_text())
    target.parent.mkdir(parents=True, exist_ok=True)
    reports.write(
        target,
        "bench.html",
        title="Speed compared with other systems",
        about={k: formatted(v) for k, v in (results["about"] | results["ceilings"]).items()},
        charts=list(charts(results["systems"])),
        same=results["first tokens as the last system"],
    )


if __name__ == "__main__":
    main()
