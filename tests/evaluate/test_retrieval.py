# SPDX-License-Identifier: Apache-2.0
"""The retrieval report measures what it says, and its default follows its rule."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import make_model

from hourllava.cli import main
from hourllava.evaluate import HourTest, RetrievalReport, measure_retrieval, report_table
from hourllava.evaluate.retrieval import PARTS, Part, recall_of
from hourllava.model import Answer
from hourllava.model.budget import Budget


def report_of(agreements: dict[int, float], recall: float = 1.0, questions: int = 300) -> RetrievalReport:
    report = RetrievalReport(1, 3600, questions, "both", None)
    report.parts = [
        Part(part, 10, 1 if part == 1 else recall, 1, agreement, 1, 1, 0) for part, agreement in agreements.items()
    ]
    return report


def test_rule_of_the_default() -> None:
    assert report_of({1: 1, 2: 1, 4: 0.99, 8: 0.98, 16: 1}).default == "1/4"  # 1/8 breaks it for all below
    assert report_of({1: 1, 2: 0.9, 4: 1}).default is None
    assert report_of({1: 1, 2: 1}).default == "1/2"
    assert report_of({1: 1, 2: 1}, recall=0.94).default is None
    assert report_of({1: 1, 2: 1}, questions=299).default is None
    for report, said in [
        (report_of({1: 1, 2: 1}), "attention: 1/2."),
        (report_of({1: 1, 2: 0.5}), "read all pages."),
        (report_of({1: 1, 2: 1}, questions=24), "24 questions are too few to tell, ask 300."),
    ]:
        assert said in str(report_table(report).caption)


def test_the_default_of_tiny_follows_from_its_reports() -> None:
    """Its share is that of an hour; the pages that it is at least, a power of two, are enough for shorter films."""
    root = Path(__file__).parents[2]
    pages, defaults = {}, {}
    for seconds in (60, 600, 3600):
        told = json.loads(max((root / "benchmarks/results").glob(f"retrieval-*-{seconds}s.json")).read_text())
        report = RetrievalReport(*(told[name] for name in ("films", "seconds", "questions", "mode", "tile")))
        report.parts = [Part(**row) for row in told["parts"]]
        assert [row.part for row in report.parts] == [1, *PARTS]
        assert (told["model"], told["seconds"]) == ("tiny", seconds)
        defaults[seconds] = report.default
        (pages[seconds],) = [row.pages for row in report.parts if report.default == f"1/{row.part}"]
    config = json.loads((root / "python/hourllava/presets/tiny/config.json").read_text())
    budget = Budget.parse(config["memory_budget"])
    assert f"1/{budget.part}" == defaults[3600]
    assert budget.least == 2 ** math.ceil(math.log2(max(pages[60], pages[600])))
    assert all(budget.most(seconds, seconds, 64) >= needed for seconds, needed in pages.items())


def test_recall_is_the_exact_attention_on_the_pages_read() -> None:
    def answer(page_mass: list[list[float]]) -> Answer:
        return Answer("", [], torch.zeros(1), {}, [], torch.tensor(page_mass))

    exact = answer([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert recall_of(exact, exact) == pytest.approx(1)
    assert recall_of(answer([[1.0, 0, 0], [0, 0.5, 0.5]]), exact) == pytest.approx((0.5 + 0.9) / 2)


def test_a_short_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, test = make_model(memory_budget="1/4"), HourTest(videos=1, seconds=150, per_topic=0)
    report = measure_retrieval(model, test, tmp_path, progress=False)
    assert [row.part for row in report.parts] == [1, *PARTS]
    exact, *parts = report.parts
    assert (exact.recall, exact.worst, exact.agreement, exact.saved) == (pytest.approx(1), pytest.approx(1), 1, 0)
    recalls = [row.recall for row in report.parts]
    assert recalls == sorted(recalls, reverse=True)
    for row in parts:
        assert row.pages <= -(-exact.pages // row.part)
        assert 0 <= row.worst <= row.recall <= 1

    def refuse(*_: object) -> None:
        raise AssertionError("a frame was encoded again")

    monkeypatch.setattr(model.model.vision_tower, "forward", refuse)
    again = measure_retrieval(model, test, tmp_path, progress=False)
    for ours, theirs in zip(again.parts, report.parts, strict=True):
        assert (ours.pages, ours.recall, ours.agreement) == (theirs.pages, theirs.recall, theirs.agreement)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = tmp_path / "model", tmp_path / "report.png"
    model = make_model()
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    options = ["--model", str(folder), "--folder", str(tmp_path), "--videos", "1", "--seconds", "40", "--tile", "20"]
    assert main(["retrieval-report", *options, "--plot", str(picture), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["part"] for row in document["parts"]] == [1, *PARTS]
    assert document["tile"] == 20
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert main(["retrieval-report", *options, "--plot", str(tmp_path / "report.svg")]) == 1
    assert "let its name end in .png" in capsys.readouterr().err
    assert main(["retrieval-report", "--seconds", "39"]) == 1
    assert "films of 39 s have no room for what is asked of them; give at least 40" in capsys.readouterr().err
