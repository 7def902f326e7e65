"""How well a model's own probabilities tell right answers from wrong ones.

Reliability diagrams and the expected calibration error: Guo et al., arXiv 1706.04599. Risk against
coverage: Geifman and El-Yaniv, arXiv 1705.08500.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..journal import JsonRow

BINS = 10
YES, ANSWER = "P(yes)", "P(answer)"

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bin:
    """Examples whose probability is near each other: its mean, and the share that came true."""

    examples: int
    probability: float
    share: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Probabilities `[N]`, and whether what they are of came true, 1 or 0 `[N]`."""

    name: str
    probabilities: Numbers
    outcomes: Numbers

    @property
    def bins(self) -> list[Bin]:
        """The bins of equal width that have examples; a probability of 1 is in the last one."""
        numbers = np.minimum((self.probabilities * BINS).astype(int), BINS - 1)
        return [
            Bin(len(p), float(p.mean()), float(self.outcomes[numbers == number].mean()))
            for number in np.unique(numbers)
            if len(p := self.probabilities[numbers == number])
        ]

    @property
    def expected_error(self) -> float:
        """Expected calibration error: by how much probability and share differ in a bin, weighted
        by its examples.
        """
        gaps = sum(one.examples * abs(one.probability - one.share) for one in self.bins)
        return float(gaps / len(self.outcomes))

    @property
    def brier(self) -> float:
        """Brier score: the mean squared difference of probability and outcome."""
        return float(((self.probabilities - self.outcomes) ** 2).mean())

    @property
    def risks(self) -> list[tuple[float, float]]:
        """(coverage, share of wrong ones among those), the most probable first.

        Examples of equal probability have one point.
        """
        order = np.argsort(-self.probabilities, kind="stable")
        sure, wrong = self.probabilities[order], np.cumsum(1 - self.outcomes[order])
        ends = np.append(np.flatnonzero(np.diff(sure)), len(sure) - 1)
        return [((i + 1) / len(sure), float(wrong[i] / (i + 1))) for i in ends]

    def drawn(self, chosen: NDArray[np.int64]) -> Calibration:
        """Of a resample."""
        return Calibration(self.name, self.probabilities[chosen], self.outcomes[chosen])

    @property
    def measures(self) -> dict[str, Callable[[Calibration], float]]:
        """What is reported of it, by name."""
        return {
            f"{self.name}: expected calibration error": lambda one: one.expected_error,
            f"{self.name}: Brier score": lambda one: one.brier,
        }


def calibrations(rows: Sequence[JsonRow], baselines: Collection[str] = ()) -> list[Calibration]:
    """Of the rows that have log-probabilities: of yes where the truth is yes or no, and of the
    whole answer. baselines: groups that do not count.
    """
    members = [row for row in rows if row["group"] not in baselines and not row["error"]]
    closed = [row for row in members if "yes" in row and row["truth"].lower() in ("yes", "no")]
    yes = [(row["yes"], row["truth"].lower() == "yes") for row in closed]
    given = [row for row in members if row.get("logprob") is not None and row["score"] is not None]
    answers = [(math.exp(min(0.0, row["logprob"])), row["score"] == 1) for row in given]
    return [
        Calibration(name, *np.array(pairs, dtype=np.float64).T)
        for name, pairs in ((YES, yes), (ANSWER, answers))
        if pairs
    ]
