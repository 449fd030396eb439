# SPDX-License-Identifier: Apache-2.0
"""A picture of where in the video each answer comes from."""

import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from hourllava.video import clock

if TYPE_CHECKING:
    from hourllava.model import Answer

INK, EVIDENCE = "#35507a", "#d1495b"
MARKED = 3  # moments marked in each row
ROW_INCHES = 1.7
LABEL_WIDTH, LABEL_HEIGHT = 0.1, 0.15  # of a row


def plot_attention(path: Path, asked: list[tuple[str, "Answer"]], title: str) -> None:
    """Draw one row a question: the share of attention on each second, with its top moments marked.

    Args:
        path: the PNG to write.
        asked: questions and their answers, all about one video.
        title: what the video is called.
    """
    figure = Figure(figsize=(12, 1.0 + ROW_INCHES * len(asked)), dpi=120, layout="constrained")
    rows = figure.subplots(len(asked), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (question, answer) in zip(rows, asked, strict=True):
        _draw(axes, question, answer)
    rows[-1].set_xlabel("time in the video")
    figure.suptitle(f"{title}: share of the question's attention on each second", fontsize=11, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks show as boxes
        figure.savefig(path, format="png")


def _draw(axes: Axes, question: str, answer: "Answer") -> None:
    mass = answer.mass.numpy()
    peak = max(float(mass.max(initial=0.0)), 1e-6)
    axes.stairs(mass, range(len(mass) + 1), fill=True, color=INK)
    axes.stairs(mass, range(len(mass) + 1), color=INK, linewidth=1)  # a second that is thinner than a pixel shows, too
    _mark_moments(axes, answer, peak)
    axes.set_title(textwrap.shorten(f"{question}  →  {answer.text}", 130), loc="left", fontsize=9, parse_math=False)
    axes.set_xlim(0, max(len(mass), 1))
    axes.set_ylim(0, 1.2 * peak)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 1.5, 3, 6, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda second, _: clock(second)))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0 if peak > 0.05 else 1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_moments(axes: Axes, answer: "Answer", peak: float) -> None:
    """A red band and an arrowhead for each top moment; its time and share where no larger moment's label stands."""
    length, labels = max(len(answer.mass), 1), list[tuple[float, float]]()
    for moment in answer.moments[:MARKED]:
        middle = (moment.start + moment.end) / 2
        height = float(answer.mass[int(moment.start) : int(moment.end)].max()) + 0.06 * peak
        axes.axvspan(moment.start, moment.end, color=EVIDENCE, alpha=0.5, linewidth=1.5)
        axes.plot(middle, height, marker="v", color=EVIDENCE, markersize=6, clip_on=False)
        if any(abs(middle - x) < LABEL_WIDTH * length and abs(height - y) < LABEL_HEIGHT * peak for x, y in labels):
            continue
        labels.append((middle, height))
        late = middle > (1 - LABEL_WIDTH) * length
        axes.annotate(
            f"{clock(moment.start)}  {moment.share:.0%}",
            (middle, height),
            xytext=(-7 if late else 7, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            va="center",
            fontsize=8,
            color=EVIDENCE,
        )
