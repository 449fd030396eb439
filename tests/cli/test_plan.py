# SPDX-License-Identifier: Apache-2.0
"""`hourllava plan`: what it says for people and machines, and every bad input in one line."""

import json
import re

import pytest

from hourllava.cli import main


def said(arguments: list[str], capfd: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert main(["plan", *arguments]) == code
    return capfd.readouterr()


def test_a_day_with_the_large_model(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = said(["--hours", "24", "--model", "7b"], capfd)
    assert err == ""
    assert out.startswith("24 hours with 7b: 5,616,000 tokens, 8,768 of them")
    assert "device: weights: 16.2 GiB\n" in out
    assert "device: pages of keys and values: 43.9 GiB\n" in out
    assert "time, a GPU: all: not yet measured\n" in out
    document = json.loads(said(["--hours", "24", "--model", "7B", "--json", "--precision", "int8"], capfd)[0])
    assert document["device"]["weights"] == 8_676_494_880 * 2
    # Keys and values of 4 blocks, 4 heads of 128, 65 rows a second, in bfloat16: pages are a little more.
    rows = 4 * 2 * 4 * 128 * 2 * 5_616_000
    assert rows <= document["device"]["pages"] <= 1.03 * rows
    assert document["disk"]["features"] == 86400 * 64 * (1152 + 4)
    assert document["pages_read"] == document["pages"] == 86400 // 2 + 86400 // 128
    assert document["disk"]["peak"] == sum(document["disk"][what] for what in ("features", "pages", "tokens"))
    assert document["seconds_on_a_gpu"] is document["seconds_on_this_cpu"] is document["budget"] is None


def test_a_question_reads_what_the_config_says(capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = said(["--hours", "1", "--model", "tiny"], capfd)
    assert "a question reads 32 of 1,829 pages" in out


def test_a_budget(capfd: pytest.CaptureFixture[str], model: str) -> None:
    pages = json.loads(said(["--hours", "2", "--model", model, "--json"], capfd)[0])["device"]["pages"]
    fits = json.loads(said(["--hours", "2", "--model", model, "--json", "--budget", str(pages)], capfd)[0])
    assert 2 <= fits["hours_in_budget"] < 2.001
    out, err = said(["--hours", "3", "--model", model, "--budget", str(pages)], capfd, 1)
    assert "up to 2.0 hours" in out
    assert err.count("\n") == 1
    assert "its pages take" in err
    assert "keep to 2.0 hours" in err


def test_a_measured_plan(capfd: pytest.CaptureFixture[str], model: str) -> None:
    """Times are there, above nothing, and grow with the video; how large they are is the machine's affair."""
    seconds = json.loads(said(["--hours", "1", "--model", model, "--json", "--measure"], capfd)[0])[
        "seconds_on_this_cpu"
    ]
    assert set(seconds) == {"decode", "encode", "write", "watch", "first word"}
    assert min(seconds.values()) > 0
    assert seconds["watch"] == pytest.approx(seconds["decode"] + seconds["encode"] + seconds["write"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--hours", "24", "--model", "70b"], "70b: there is no such model; .*tiny.*3b, 7b"),
        (["--hours", "-1"], "-1 hours: that is no length of a video"),
        (["--hours", "0"], "give more than 0"),
        (["--hours", "nan"], "that is no length"),
        (["--hours", "1e9"], "that is no length"),
        (["--hours", "a day"], "hours a day: that is no number; give hours as 24 or 1.5"),
        (["--hours", "1", "--budget", "6parsecs"], "6parsecs: its unit parsecs is unknown; use one of .*GiB"),
        (["--hours", "1", "--budget", "-3"], "-3: that is no size"),
    ],
)
def test_bad_input(arguments: list[str], match: str, capfd: pytest.CaptureFixture[str]) -> None:
    joined = [f"{name}={value}" for name, value in zip(arguments[::2], arguments[1::2], strict=True)]
    out, err = said(joined, capfd, 1)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hourllava: ")
    assert re.search(match, err)
