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
ABLATIONS = (
    "setting",
    "prompt",
    "tokens",
    "divergence, nats",
    "same first token",
    "same greedy tokens",
)
LAYERS = ("layer", "largest difference", "relative", "in")


def write(
    path: Path,
    title: str,
    cases: Sequence[ParityCase],
    results: Sequence[AblationResult],
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
        layer_columns=LAYERS,
        layer_rows=layer_rows(cases),
        baseline=BASELINE,
        results=results,
        ablation_columns=ABLATIONS,
        ablation_rows=ablation_rows(results),
    )


def case_rows(cases: Sequence[ParityCase]) -> list[list[str]]:
    return [
        [
            case.name,
            str(case.prompt_tokens),
            _yes(case.same_ids),
            f"{case.layer('pixels').error:.1e}" if case.images else "",
            f"{case.layer('logits').error:.1e}",
            "" if case.kl is None else f"{case.kl:.2g}",
            f"{case.matching}/{case.tokens}",
            _yes(case.passed),
        ]
        for case in cases
    ]


def layer_rows(cases: Sequence[ParityCase]) -> list[list[str]]:
    """For each layer the case with its largest relative error, in the order of the computation."""
    longest = max(cases, key=lambda case: len(case.layers))
    rows = []
    for name in (layer.name for layer in longest.layers):
        worst = max(
            (case for case in cases if case.has(name)), key=lambda case: case.layer(name).relative
        )
        layer = worst.layer(name)
        rows.append([name, f"{layer.error:.1e}", f"{layer.relative:.1e}", worst.name])
    return rows


def ablation_rows(results: Sequence[AblationResult]) -> list[list[str]]:
    return [
        [
            e.setting,
            e.case,
            str(e.prompt_tokens),
            f"{e.kl:.2g}",
            _yes(e.same_top1),
            f"{e.matching}/{e.tokens}",
        ]
        for e in results
    ]


def _yes(true: bool) -> str:
    return "yes" if true else "NO"
