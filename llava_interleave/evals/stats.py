"""Means with confidence intervals, and two runs compared example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..journal import JsonRow
from .calibration import Calibration, calibrations
from .run import scored_rows
from .task import AggregateMetrics, Task

RESAMPLES = 1000
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its 95 % interval (percentile bootstrap over examples, Efron 1979); failed:
    examples without an answer.
    """

    name: str
    kind: str  # group, category, average, all or metric
    mean: float
    low: float
    high: float
    examples: int
    failed: int


def summary(task: Task, rows: Sequence[JsonRow]) -> list[Mean]:
    """The mean of every group, every category, the average and all examples, and the task's
    metrics, in the task's order.
    """
    scores = _by_group(rows)
    failed: dict[str, int] = {}
    for row in rows:
        failed[row["group"]] = failed.get(row["group"], 0) + bool(row["error"])
    means = [_mean(name, "group", [name], scores, failed, _mean_of_groups) for name in scores]
    # A category's data sets are added in the order they come in the results, as published: it
    # decides the last digit.
    members = {
        name: [group for group in scores if group in groups]
        for name, groups in task.categories.items()
    }
    members = {name: groups for name, groups in members.items() if groups}
    means += [
        _mean(name, "category", groups, scores, failed, _mean_of_groups)
        for name, groups in members.items()
    ]
    if task.average and set(task.average) <= members.keys():
        groups = [group for name in task.average for group in members[name]]

        def mean(drawn: Mapping[str, float]) -> float:
            return sum(
                _mean_of_groups({g: drawn[g] for g in members[name]}) for name in task.average
            ) / len(task.average)

        means.append(_mean("average", "average", groups, scores, failed, mean))
    elif not task.categories and len(scores) > 1:
        means.append(_mean("average", "average", list(scores), scores, failed, _mean_of_groups))
        sizes = {name: len(values) for name, values in scores.items()}
        total = sum(sizes.values())

        def mean_of_all(drawn: Mapping[str, float]) -> float:
            return sum(drawn[name] * sizes[name] for name in sizes) / total

        means.append(_mean("all examples", "all", list(scores), scores, failed, mean_of_all))
    means += _metrics(task.metrics, rows, failed) if task.metrics else ()
    means += task.measures(scored_rows(rows)) if task.measures else ()
    return [*means, *_calibration(calibrations(rows, task.baselines), failed)]


def _calibration(found: Sequence[Calibration], failed: Mapping[str, int]) -> Iterator[Mean]:
    for one in found:
        size, rng = len(one.outcomes), np.random.default_rng(0)
        draws = [one.drawn(rng.integers(0, size, size)) for _ in range(RESAMPLES)]
        for name, of in one.measures.items():
            low, high = np.percentile([of(drawn) for drawn in draws], (2.5, 97.5))
            unanswered = sum(failed.values())
            yield Mean(name, "metric", of(one), float(low), float(high), size, unanswered)


def _by_group(rows: Sequence[JsonRow]) -> Scores:
    groups: dict[str, list[float]] = {}
    for row in scored_rows(rows):
        groups.setdefault(row["group"], []).append(row["score"])
    return {name: np.array(values) for name, values in groups.items()}


def _mean_of_groups(means: Mapping[str, float]) -> float:
    return sum(means.values()) / len(means)


def _mean(
    name: str,
    kind: str,
    groups: list[str],
    scores: Scores,
    failed: Mapping[str, int],
    mean: Callable[[Mapping[str, float]], float],
) -> Mean:
    rng = np.random.default_rng(0)
    drawn = [
        mean({g: float(rng.choice(scores[g], len(scores[g])).mean()) for g in groups})
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(drawn, (2.5, 97.5))
    value = mean({g: float(np.mean(scores[g])) for g in groups})
    examples = sum(len(scores[g]) for g in groups)
    return Mean(
        name, kind, value, float(low), float(high), examples, sum(failed[g] for g in groups)
    )


def _metrics(
    metrics: AggregateMetrics, rows: Sequence[JsonRow], failed: Mapping[str, int]
) -> Iterator[Mean]:
    """The metrics of every group and of all examples; an undefined one (0 / 0) is 0."""
    groups: dict[str, list[JsonRow]] = {}
    for row in scored_rows(rows):
        groups.setdefault(row["group"], []).append(row)
    if len(groups) > 1:
        groups["all examples"] = scored_rows(rows)
    for name, members in groups.items():
        counts = np.array([metrics.count(row) for row in members], dtype=np.float64)
        rng = np.random.default_rng(0)
        draws = [
            counts[rng.integers(0, len(counts), len(counts))].sum(axis=0) for _ in range(RESAMPLES)
        ]
        sums = np.array([counts.sum(axis=0), *draws]).T
        unanswered = failed.get(name, sum(failed.values()))
        for metric, of in metrics.of.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                value, *drawn = np.nan_to_num(of(sums)).tolist()
            low, high = np.percentile(drawn, (2.5, 97.5))
            yield Mean(
                f"{name}: {metric}",
                "metric",
                value,
                float(low),
                float(high),
                len(members),
                unanswered,
            )


@dataclass(frozen=True, slots=True)
class Difference:
    """B against A on the same examples.

    low, high: 95 % interval of the difference (bootstrap over pairs). better, worse: examples where
    B scores more, or less. p: probability of so uneven a split if both were alike (two-sided sign
    test; for right and wrong McNemar's exact test).
    """

    name: str
    a: float
    b: float
    low: float
    high: float
    pairs: int
    better: int
    worse: int
    p: float


def compare(a: Sequence[JsonRow], b: Sequence[JsonRow]) -> list[Difference]:
    """The differences by group and over all examples that both runs scored_rows. Raises `DataError`
    where there is none.
    """
    of_a, of_b = ({row["id"]: row for row in scored_rows(rows)} for rows in (a, b))
    both = [name for name in of_a if name in of_b]
    if not both:
        raise DataError(
            f"the two runs have no example in common: {len(of_a)} and {len(of_b)} rows with other "
            "ids"
        )
    groups: dict[str, list[str]] = {}
    for name in both:
        groups.setdefault(of_a[name]["group"], []).append(name)
    if len(groups) > 1:
        groups["all examples"] = both
    return [
        _difference(
            group, *(np.array([rows[name]["score"] for name in names]) for rows in (of_a, of_b))
        )
        for group, names in groups.items()
    ]


def _difference(name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> Difference:
    gained, rng = b - a, np.random.default_rng(0)
    drawn = [rng.choice(gained, len(gained)).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    better, worse = int((gained > 0).sum()), int((gained < 0).sum())
    p = sign_test(better, worse)
    return Difference(
        name, float(a.mean()), float(b.mean()), float(low), float(high), len(a), better, worse, p
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided probability of a split at least as uneven under a fair coin."""
    n = better + worse
    ways = total = 1  # n over 0, n over 1, ...: whole numbers of any size
    for k in range(min(better, worse)):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)
