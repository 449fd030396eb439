# SPDX-License-Identifier: Apache-2.0
"""`hourllava ask --budget`: less of the memory is read, and what is always read is said by its time."""

import json

import pytest

from hourllava.cli import main
from hourllava.video import clock, seconds_of_clock

QUESTION = "Which colour was the star?"


def ask(clip: str, model: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    assert main(["ask", clip, QUESTION, "--model", model, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_budgets(clip: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    exact = ask(clip, model, capsys)
    assert exact["budget"] is None
    assert ask(clip, model, capsys, "--budget", "999p")["answers"][0]["mass"] == exact["answers"][0]["mass"]
    assert ask(clip, model, capsys, "--budget", "all")["answers"][0]["mass"] == exact["answers"][0]["mass"]
    few = ask(clip, model, capsys, "--budget", "4s", "--keep", "0:05-00:07", "--score", "content")
    assert few["budget"] == {
        "pages": None,
        "seconds": 4.0,
        "part": None,
        "least": 1,
        "mode": "content",
        "tile": None,
        "keep": [[5.0, 7.0]],
    }
    mass = few["answers"][0]["mass"]
    assert sum(share == 0 for share in mass) > 0
    assert min(mass[5:7]) > 0


def test_bad_budgets(clip: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    for options, why in [
        (["--budget", "60"], "write pages as 128p, seconds as 60s, a share as 1/16, or one of 32 pages at least"),
        (["--budget", "0p"], "no size above 0"),
        (["--budget", "8p", "--keep", "5-3"], "there is no second from 5 to 3"),
        (["--budget", "1p", "--keep", "0-9"], "and the budget is 1"),
        (["--keep", "3-5"], "give --budget, too"),
        (["--budget", "all", "--keep", "3-5"], "they choose what a budget reads"),
        (["--tile", "16"], "give --budget, too"),
    ]:
        assert main(["ask", clip, QUESTION, "--model", model, *options]) == 1
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert why in err
    for text in ("noon", "1-", "-1", "1:00--2:00", "nan-3"):
        with pytest.raises(SystemExit):
            main(["ask", clip, QUESTION, "--budget", "8p", f"--keep={text}"])
        assert "no span of time" in capfd.readouterr().err


def test_times_as_they_are_written() -> None:
    for seconds in (0, 59, 60, 3599, 3600, 86399):
        assert seconds_of_clock(clock(seconds)) == seconds
    assert seconds_of_clock("1.5") == 1.5
