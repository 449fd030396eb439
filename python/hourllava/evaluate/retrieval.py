# SPDX-License-Identifier: Apache-2.0
"""What is lost by reading a part of the memory: attention, answers and time against reading all of it."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from tqdm import tqdm

from hourllava.evaluate.hour import HourTest, choose_questions, rendered
from hourllava.memory import Repository, VideoMemory
from hourllava.model import Answer, Budget, FrameWriter, HourLlavaForConditionalGeneration

PARTS = (2, 4, 8, 16, 32, 64)
# What a default budget has to keep of exact reading: of the answers, and of the attention on average.
AGREEMENT, RECALL = 0.99, 0.95
ENOUGH = 300  # questions: not one wrong of fewer does not show, with a certainty of 95 %, that fewer than 1 % are


@dataclass(frozen=True)
class Part:
    """What a budget of one page in `part` gives; `part` 1 is exact reading."""

    part: int
    pages: float  # read by each block, on average
    recall: float  # of the attention that exact reading gives to all pages, on average over questions and blocks
    worst: float  # the least recall of a question
    agreement: float  # share of the answers that are those of exact reading
    right: float  # share of the answers that are true
    seconds: float  # of MemAug for a question, the median
    saved: float  # of those, against exact reading


@dataclass
class RetrievalReport:
    """Every part, the largest first, and what follows from them."""

    films: int
    seconds: int  # of each film
    questions: int
    mode: str
    tile: int | None
    parts: list[Part] = field(default_factory=list)

    @property
    def default(self) -> str | None:
        """The budget to use by default, as `Budget.parse` reads it; None is exact reading.

        The rule: the smallest at which, and at every larger one, at least 99 % of the answers are those of exact
        reading, and 95 % of the attention is recalled; from at least 300 questions.
        """
        best = 1
        if self.questions < ENOUGH:
            return None
        for row in sorted(self.parts, key=lambda row: row.part):
            if row.agreement < AGREEMENT or row.recall < RECALL:
                break
            best = row.part
        return None if best == 1 else f"1/{best}"


@dataclass(frozen=True)
class _Reply:
    """An answer, and of the dense answer's attention the share that lies on pages that were read for it."""

    text: str
    truth: str
    pages: float
    recall: float
    seconds: float


def measure_retrieval(
    model: HourLlavaForConditionalGeneration,
    test: HourTest,
    folder: Path,
    mode: str = "both",
    tile: int | None = None,
    progress: bool = True,
) -> RetrievalReport:
    """Ask the questions of held-out films under every budget.

    Films and their features are kept in `folder` for the next time.

    Args:
        mode, tile: of the budgets.
    """
    replies: dict[int, list[_Reply]] = {part: [] for part in (1, *PARTS)}
    for index in tqdm(range(test.videos), "films", unit="film", disable=not progress):
        film, path = rendered(test, index, folder)
        memory = _remembered(model, path, test.seconds, folder)
        asked = choose_questions(film, test.per_topic)
        for question in tqdm(asked, "questions", unit="question", leave=False, disable=not progress):
            exact = model.ask(memory, question.text, budget="all")
            replies[1].append(_reply(exact, exact, question.answer))
            for part in PARTS:
                answer = model.ask(memory, question.text, budget=Budget(part=part, mode=mode, tile=tile))
                replies[part].append(_reply(answer, exact, question.answer))
    report = RetrievalReport(test.videos, test.seconds, len(replies[1]), mode, tile)
    report.parts = [_summary(part, own, replies[1]) for part, own in replies.items()]
    return report


def recall_of(answer: Answer, exact: Answer) -> float:
    """Share of the attention of exact reading that fell on pages that the answer's blocks have read, 0 to 1."""
    assert answer.page_mass is not None
    assert exact.page_mass is not None
    read = answer.page_mass > 0
    found = torch.where(read, exact.page_mass, 0).sum(1) / exact.page_mass.sum(1)
    return float(found.mean())


def report_table(report: RetrievalReport) -> Table:
    """The report as a table, one row a budget."""
    how = f"pages scored by {report.mode}" + (f", every {report.tile} query rows for themselves" if report.tile else "")
    shown = Table(title=f"{report.questions} questions, films: {report.films} of {report.seconds} s, {how}")
    for heading in ("budget", "pages", "recall %", "worst %", "as exact %", "right %", "MemAug ms", "time saved %"):
        shown.add_column(heading, justify="right")
    for row in report.parts:
        percent = [f"{100 * share:.1f}" for share in (row.recall, row.worst, row.agreement, row.right)]
        name = "all" if row.part == 1 else f"1/{row.part}"
        shown.add_row(name, f"{row.pages:.0f}", *percent, f"{1000 * row.seconds:.0f}", f"{100 * row.saved:.0f}")
    rule = f"The smallest budget that keeps {AGREEMENT:.0%} of the answers and {RECALL:.0%} of the attention"
    few = f"; {report.questions} questions are too few to tell, ask {ENOUGH}" if report.questions < ENOUGH else ""
    shown.caption = f"{rule}: {report.default or 'none, read all pages'}{few}."
    return shown


def _remembered(model: HourLlavaForConditionalGeneration, path: Path, seconds: int, folder: Path) -> VideoMemory:
    """The memory of a film, whose features are watched once for each vision tower."""
    writer, repository = FrameWriter(model), Repository(folder / "memories")
    name = f"{path.stem}-{writer.tower_fingerprint()[:12]}"
    known = name in [video.name for video in repository.videos()]
    memory = repository.open(name, writer) if known else repository.add(name, writer, source=str(path.absolute()))
    if memory.frames < seconds:
        model.watch(path, progress=False, into=memory)
    memory.close()
    return memory


def _reply(answer: Answer, exact: Answer, truth: str) -> _Reply:
    assert answer.page_mass is not None
    pages = float((answer.page_mass > 0).sum(1).double().mean())
    return _Reply(answer.text, truth, pages, recall_of(answer, exact), answer.timings["memaug"])


def _summary(part: int, own: list[_Reply], exact: list[_Reply]) -> Part:
    count, took = len(own), median(reply.seconds for reply in own)
    return Part(
        part=part,
        pages=sum(reply.pages for reply in own) / count,
        recall=sum(reply.recall for reply in own) / count,
        worst=min(reply.recall for reply in own),
        agreement=sum(a.text == b.text for a, b in zip(own, exact, strict=True)) / count,
        right=sum(reply.text == reply.truth for reply in own) / count,
        seconds=took,
        saved=1 - took / median(reply.seconds for reply in exact),
    )
