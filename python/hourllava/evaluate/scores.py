# SPDX-License-Identifier: Apache-2.0
"""Accuracy, its breakdowns and how sure they are."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054  # standard deviations on either side that hold 95 %


@dataclass
class Score:
    """Counts of a group of questions that were asked."""

    asked: int = 0
    right: int = 0
    unread: int = 0  # replies that choose nothing; they are wrong

    @property
    def accuracy(self) -> float | None:
        """Share of right replies, 0 to 1; None if nothing was asked."""
        return self.right / self.asked if self.asked else None

    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval for a share of independent answers; None if nothing was asked."""
        if not self.asked:
            return None
        n, p, z = self.asked, self.right / self.asked, Z95
        middle = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # Of none or all right answers one bound is the share itself, whatever rounding makes of it.
        return max(0.0, min(p, (middle - half) / scale)), min(1.0, max(p, (middle + half) / scale))

    def add(self, chosen: str | None, answer: str) -> None:
        """Count a reply by what it chooses."""
        self.asked += 1
        self.right += chosen == answer
        self.unread += chosen is None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the counts, the accuracy and the interval."""
        return asdict(self) | {"accuracy": self.accuracy, "interval_95": self.interval()}


@dataclass
class Scores:
    """The total, and each value of each breakdown, in order of appearance."""

    total: Score
    breakdowns: dict[str, dict[str, Score]]

    @classmethod
    def of(cls, replies: Iterable[tuple[str | None, str, tuple[tuple[str, str], ...]]]) -> "Scores":
        """Count replies.

        Args:
            replies: of each what it chooses, the right answer, and the (breakdown, value) pairs of its question; a
                question may have several values of one breakdown, and counts for each.
        """
        scores = cls(Score(), {})
        for chosen, answer, groups in replies:
            scores.total.add(chosen, answer)
            for breakdown, value in groups:
                scores.breakdowns.setdefault(breakdown, {}).setdefault(value, Score()).add(chosen, answer)
        return scores

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = {name: {value: s.to_dict() for value, s in own.items()} for name, own in self.breakdowns.items()}
        return {"total": self.total.to_dict(), "breakdowns": parts}
