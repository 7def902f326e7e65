"""The report of `llava verify` as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import reports
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
    reports.write(
        path,
        "verify.html",
        title=title,
        about=about,
        cases=cases,
        case_columns=CASES,
        case_rows=case_rows(cases),
        stage_columns=STAGES,
        stage_rows=stage_rows(cases),
        baseline=BASELINE,
        effects=effects,
        effect_columns=EFFECTS,
        effect_rows=effect_rows(effects),
    )


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
