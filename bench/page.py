"""Draw what bench/peers.py wrote as one page of charts that loads nothing from elsewhere.

python bench/page.py bench/latest.json docs/bench/index.html
"""

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from llava_interleave.evals.report import PAGE, table

STYLE = """<style>.bars{display:grid;grid-template-columns:13rem 1fr 13rem;gap:.2rem .8rem;align-items:center}
.track{position:relative;height:1.1rem;background:#8882}.bar{height:100%;background:#999}.ours{background:#2a7}
.spread{position:absolute;top:35%;height:30%;background:#0008}small{opacity:.7}</style>
"""


def page(found: dict[str, Any]) -> Iterator[str]:
    yield PAGE.format(title="Speed beside others") + STYLE
    yield "<p>Systems took turns on one machine in one run. Bars are medians; the dark line goes from the least to the most. "
    yield "The share is that of what the machine gives: of its fastest matrix product for pictures and prompts, of its reading "
    yield "speed for decoding.</p>"
    yield table(
        ("machine", ""),
        [(key, shown(value)) for key, value in (found["about"] | found["ceilings"]).items()],
    )
    for figure in dict.fromkeys(
        figure for system in found["systems"].values() for figure in system
    ):
        yield from chart(
            figure,
            {name: system[figure] for name, system in found["systems"].items() if figure in system},
        )
    same = [(name, str(count)) for name, count in found["first tokens as the last system"].items()]
    yield table(
        ("how many of 8 tokens are those of the last system, before the first that is not", ""),
        same,
    )


def chart(figure: str, systems: dict[str, dict[str, Any]]) -> Iterator[str]:
    more = "tokens/s" in figure
    widest = max(one["most"] for one in systems.values())
    yield f"<h2>{escape(figure)}</h2><p><small>{'more' if more else 'less'} is better</small></p><div class=bars>"
    for name, one in sorted(systems.items(), key=lambda pair: pair[1]["median"], reverse=more):
        at, end, bar = (f"{100 * one[key] / widest:.2f}%" for key in ("least", "most", "median"))
        ours = " ours" * name.startswith("llava ")
        share = "" if one["share"] is None else f", {one['share']:.0%} of the ceiling"
        yield f"<span>{escape(name)}</span><div class=track><div class='bar{ours}' style='width:{bar}'></div>"
        yield f"<div class=spread style='left:{at};width:calc({end} - {at})'></div></div>"
        yield f"<span>{shown(one['median'])} <small>of {one['times']}{share}</small></span>"
    yield "</div>\n"


def shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(page(json.loads(source.read_text()))), "utf-8")


if __name__ == "__main__":
    main()
