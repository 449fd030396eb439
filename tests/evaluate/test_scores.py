# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of accuracy and its breakdowns."""

import pytest

from hourllava.evaluate.scores import Score, Scores


def test_breakdowns_count_a_question_once_for_each_of_its_values() -> None:
    replies = [
        ("A", "A", (("task", "x"), ("task", "y"), ("length", "long"))),
        ("B", "A", (("task", "x"), ("length", "short"))),
        (None, "C", (("task", "y"), ("length", "long"))),
    ]
    scores = Scores.of(replies)
    assert scores.total == Score(asked=3, right=1, unread=1)
    assert scores.breakdowns == {
        "task": {"x": Score(2, 1, 0), "y": Score(2, 1, 1)},
        "length": {"long": Score(2, 1, 1), "short": Score(1, 0, 0)},
    }
    assert scores.total.accuracy == pytest.approx(1 / 3)
    told = scores.to_dict()
    assert told["total"]["accuracy"] == pytest.approx(1 / 3)
    assert told["breakdowns"]["task"]["y"] == {
        "asked": 2,
        "right": 1,
        "unread": 1,
        "accuracy": 0.5,
        "interval_95": Score(2, 1).interval(),
    }


@pytest.mark.parametrize(
    # Wilson's interval solves (share - p)^2 = z^2 p (1 - p) / n for p.
    ("right", "asked"),
    [(0, 10), (10, 10), (5, 10), (1, 3), (640, 2700)],
)
def test_interval_solves_its_equation(right: int, asked: int) -> None:
    span = Score(asked, right).interval()
    assert span is not None
    share = right / asked
    for bound in span:
        assert 0 <= bound <= 1
        assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / asked, rel=1e-5, abs=1e-12)
    assert span[0] <= share <= span[1]
    assert span[0] < span[1]


def test_nothing_asked_has_no_accuracy() -> None:
    empty = Scores.of([])
    assert (empty.total.accuracy, empty.total.interval(), empty.breakdowns) == (None, None, {})
