# SPDX-License-Identifier: Apache-2.0
"""`hourllava watch --into` and `hourllava memory`: a repository from the first film to the last."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from clips import CLIP_SECONDS, write_clip
from memories import full_disk

from hourllava.cli import main
from hourllava.memory import Repository

QUESTION = "Which colour was the star?"


def test_a_repository(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place, options = tmp_path / "memories", ["--model", model]

    def said(*arguments: str, code: int = 0) -> str:
        assert main(list(arguments)) == code
        return "".join(capfd.readouterr())

    assert f"00:{CLIP_SECONDS} of it new" in said("watch", clip, "--into", str(place), "--pages", *options)
    assert "00:00 of it new" in said("watch", clip, "--into", str(place), *options)  # gone on with, and complete
    said("watch", clip, "--into", str(place), "--name", "small", "--precision", "int8", *options)
    other = ["watch", clip, "--into", str(place), *options, "--precision", "int8"]
    assert "it is kept with bfloat16 features and ready pages; leave out" in said(*other, code=1)
    assert "it is kept with int8 features and no ready pages" in said(*other, "--name", "small", "--pages", code=1)
    assert [line.split(":")[0] for line in said("memory", "list", str(place)).splitlines()] == ["clip", "small"]
    assert "int8" in said("memory", "info", str(place), "small")
    assert "2 videos are sound" in said("memory", "verify", str(place))
    assert "1 video is sound" in said("memory", "verify", str(place), "small")
    answers = [
        json.loads(said("ask", str(source), QUESTION, "--json", *options))["answers"][0]["mass"]
        for source in (clip, place / "clip", place / "small")
    ]
    for ours in answers[1:]:
        assert ours == pytest.approx(answers[0], abs=0.01)
    file = tmp_path / "clip.memory"
    said("memory", "export", str(place), "clip", "-o", str(file), *options)
    assert json.loads(said("ask", str(file), QUESTION, "--json", *options))["answers"][0]["mass"] == answers[1]
    segment = next((place / "small").glob("features-*"))
    segment.write_bytes(segment.read_bytes()[:-1])
    assert "damaged in 1 places" in said("memory", "verify", str(place), code=1)
    assert "watch the video again" in said("memory", "repair", str(place), "small")
    said("memory", "delete", str(place), "small")
    assert "clip" in said("memory", "list", str(place))
    assert "there is no such video" in said("memory", "info", str(place), "small", code=1)


def test_a_full_disk(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, whatever the disk has no room for any more: the catalogue, features or pages; then it goes on."""
    place = tmp_path / "memories"
    watch = ["watch", clip, "--into", str(place), "--pages", "--model", model]
    for size in (1000, 40_000, 400_000):
        with full_disk(size):
            assert main(watch) == 1
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"hourllava: {place}")
        assert "; free some space" in err
    assert main(["memory", "verify", str(place)]) == 0
    assert main(watch) == 0
    assert f"00:{CLIP_SECONDS} of it new" in capfd.readouterr().out


def test_wrong_names(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line each, and nothing is written, in the repository or beside it."""
    place, outside = tmp_path / "memories", tmp_path / "outside"
    Repository(place)
    watch, into = ["watch", clip, "--model", model], ["--into", str(place), "--name"]
    for arguments, why in [
        *[([*watch, *into, name], "is no name for a folder") for name in ("../x", "a/b", ".", "..", "", str(outside))],
        ([*watch, *into, os.fsdecode(b"caf\xe9")], "only names and paths in UTF-8"),
        (["watch", str(tmp_path / "no.mp4"), *into, "no", "--model", model], "there is no such file"),
        (["watch", "rtsp://me:pw@cam/1", *into, "x"], "rtsp://cam/1: it is an address and no file; add --follow"),
        ([*watch, "-o", str(outside), "--name", "x"], "they say how a repository keeps a video; give --into"),
        ([*watch, "-o", str(outside), "--pages"], "they say how a repository keeps a video; give --into"),
        (["ask", str(place), QUESTION, "--model", model], f"it holds many memories; name one, as {place}/NAME"),
        (["ask", str(place / "clip"), QUESTION, "--model", model], f"no such video in {place}; it holds none"),
        *[(["memory", action, str(place), ".."], "there is no such video") for action in ("info", "verify", "repair")],
        (["memory", "delete", str(place), "../outside"], "there is no such video"),
        (["memory", "export", str(place), "x", "-o", str(tmp_path / "no" / "x")], "there is no folder"),
        (["memory", "export", str(place), "x", "-o", str(outside), "--model", model], "there is no such video"),
    ]:
        assert main(arguments) == 1, arguments
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert why in err
    assert Repository(place).videos() == []
    assert [path.name for path in tmp_path.iterdir()] == ["memories"]


def test_another_film_of_the_same_name(
    clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is not taken for the rest of the first; the same film is, by whichever path."""
    place, other = tmp_path / "memories", tmp_path / "other" / "clip.mp4"
    other.parent.mkdir()
    write_clip(other, range(20 * CLIP_SECONDS), Fraction(1, 10), options={"g": "20"})
    (tmp_path / "link.mp4").symlink_to(clip)
    into = ["--into", str(place), "--name", "clip", "--model", model]
    assert main(["watch", clip, *into]) == 0
    assert main(["watch", str(tmp_path / "link.mp4"), *into]) == 0
    capfd.readouterr()
    assert main(["watch", str(other), *into]) == 1
    why = f"it is the memory of {clip} and not of {other}; choose another --name than clip, or delete it first"
    assert capfd.readouterr() == ("", f"hourllava: {place}/clip: {why}\n")
    assert Repository(place).videos()[0].frames == CLIP_SECONDS


def test_no_repository(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "list", str(tmp_path)]) == 1
    assert "there is no repository there" in capfd.readouterr().err
