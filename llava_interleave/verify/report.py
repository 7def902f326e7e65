"""The report of `llava verify` as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..evals.report import PAGE, table
from .ablations import BASELINE, AblationResult
from .parity import ParityCase

CASES = (
    "prompt",
    "tokens",
    "same ids",
    "pixels",
    "logits",
    "divergence, nats",
    "same greedy tokens",
    "passed",
)
EFFECTS = (
    "switch",
    "prompt",
    "tokens",
    "divergence, nats",
    "same likeliest token",
    "same greedy tokens",
)
STAGES = ("stage", "largest difference", "relative", "in")


def write(
    path: Path,
    title: str,
    cases: Sequence[ParityCase],
    effects: Sequence[AblationResult],
    about: dict[str, str],
) -> None:
    """Write the page."""
    path.write_text(
        "".join([PAGE.format(title=escape(title)), *_parts(cases, effects, about)]),
        "utf-8",
        "backslashreplace",
    )


def _parts(
    cases: Sequence[ParityCase], effects: Sequence[AblationResult], about: dict[str, str]
) -> list[str]:
    written = [
        (case.name, who, text)
        for case in cases
        for who, text in (("ours", case.ours), ("transformers", case.theirs))
    ]
    parts = [
        table(("made with", ""), list(about.items())),
        f"<h2>Against {escape(cases[0].standard.told)}</h2>",
        table(CASES, case_rows(cases)),
        f"<p>Passed: {escape(str(cases[0].standard))}.</p>",
        "<h2>Stage by stage</h2><p>Of each stage the prompt in which it differs most; relative to the largest value there.</p>",
        table(STAGES, stage_rows(cases)),
        "<h2>Greedy answers</h2>",
        table(("prompt", "", "text"), written),
    ]
    if effects:
        parts += [
            f"<h2>Why do my numbers differ?</h2><p>The baseline is {escape(BASELINE)}; each row switches one thing.</p>",
            table(EFFECTS, effect_rows(effects)),
            table(("switch", "prompt", "text"), [(e.switch, e.case, e.text) for e in effects]),
        ]
    return parts


def case_rows(cases: Sequence[ParityCase]) -> list[list[str]]:
    return [
        [
            case.name,
            str(case.prompt),
            _yes(case.ids),
            f"{case.stage('pixels').error:.1e}" if case.images else "",
            f"{case.stage('logits').error:.1e}",
            "" if case.kl is None else f"{case.kl:.2g}",
            f"{case.same}/{case.tokens}",
            _yes(case.passed),
        ]
        for case in cases
    ]


def stage_rows(cases: Sequence[ParityCase]) -> list[list[str]]:
    """Of every stage the case in which it is furthest off, in the order of the computation."""
    longest = max(cases, key=lambda case: len(case.stages))
    rows = []
    for name in (stage.name for stage in longest.stages):
        worst = max(
            (case for case in cases if case.has(name)), key=lambda case: case.stage(name).relative
        )
        stage = worst.stage(name)
        rows.append([name, f"{stage.error:.1e}", f"{stage.relative:.1e}", worst.name])
    return rows


def effect_rows(effects: Sequence[AblationResult]) -> list[list[str]]:
    return [
        [e.switch, e.case, str(e.prompt), f"{e.kl:.2g}", _yes(e.likeliest), f"{e.same}/{e.tokens}"]
        for e in effects
    ]


def _yes(true: bool) -> str:
    return "yes" if true else "NO"
