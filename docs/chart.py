"""Draw the chart of the README and of performance.md from the results of bench/peers.py.

python docs/chart.py docs/bench/latest.json docs/images/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SYSTEMS = {
    "llava int4": "LLaVA-Interleave int4",
    "llava int8": "LLaVA-Interleave int8",
    "openvino int4": "OpenVINO int4",
    "llama.cpp q4_0": "llama.cpp Q4_0",
    "vllm bfloat16": "vLLM bfloat16",
    "transformers bfloat16": "transformers bfloat16",
}
PANELS = (
    ("first token, 2 images, s", "Time to first token, 2 images", "s"),
    ("decode after 2 images, tokens/s", "Decoding after 2 images", "tokens/s"),
    (
        "second question about the same 2 images, s to first token",
        "First token of a second question",
        "s",
    ),
)
WIDTH, LABEL, BAR, ROW, GAP, TOP = 880, 160, 150, 24, 80, 58
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f; }
.title { font-weight: 600; } .small { font-size: 11.5px; fill: #59636e; }
.track { fill: #8882; } .bar { fill: #9aa4ae; } .ours { fill: #00897b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; } .bar { fill: #6e7781; } .ours { fill: #26a69a; }
}
"""


def chart(results: dict[str, Any]) -> str:
    """The SVG: one panel per figure, one bar per system."""
    height = TOP + ROW * len(SYSTEMS) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="Speed of six systems">',
        f"<style>{STYLE}</style>",
    ]
    for row, label in enumerate(SYSTEMS.values()):
        parts.append(f'<text x="0" y="{TOP + ROW * row + 15}">{label}</text>')
    for column, (figure, title, unit) in enumerate(PANELS):
        x = LABEL + column * (BAR + GAP)
        better = "higher is better" if unit == "tokens/s" else "lower is better"
        parts.append(f'<text x="{x}" y="18" class="title">{title}</text>')
        parts.append(f'<text x="{x}" y="36" class="small">{unit}, {better}</text>')
        medians = {name: results["systems"][name][figure]["median"] for name in SYSTEMS}
        for row, (name, median) in enumerate(medians.items()):
            y = TOP + ROW * row
            width = max(1.5, BAR * median / max(medians.values()))
            kind = "ours" if name.startswith("llava") else "bar"
            parts.append(
                f'<rect class="track" x="{x}" y="{y + 3}" width="{BAR}" height="15" rx="2"/>'
                f'<rect class="{kind}" x="{x}" y="{y + 3}" width="{width:.1f}" height="15" rx="2"/>'
                f'<text x="{x + BAR + 6}" y="{y + 15}">{median:.3g}</text>'
            )
    about = results["about"]
    note = (
        f"0.5B model, {about['threads']} cores of an {about['processor']} with AVX-512, "
        "medians of one run in which the systems took turns"
    )
    parts.append(f'<text x="0" y="{height - 8}" class="small">{note}</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(chart(json.loads(source.read_text("utf-8"))), "utf-8")
