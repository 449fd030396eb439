# SPDX-License-Identifier: Apache-2.0
"""Manifests: what they may hold, what becomes of it, and what is said about the rest."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conversations import talk, write_lines

from hourllava.data.failures import FailureLog
from hourllava.data.mixture import load_mixture
from hourllava.data.samples import Media, Sample, memory_name
from hourllava.errors import DataError


def load(tmp_path, *entries):
    return load_mixture(write_lines(tmp_path / "m.jsonl", *entries))


def test_json_lines(tmp_path):
    samples = load(
        tmp_path,
        talk("What is it?", "A cup.", id=7),
        "",
        talk("<image>\nWhat?", "A cup.", "Where?", "There.", id="b", image="a/cup.png"),
        talk("<image> or <image>?", "This.", image=["a.png", "b.png"]),
        talk("<image>\nWhen?", "At noon.", id="v", video="v.mp4"),
        talk("<image>\nWhen?", "At noon.", id="f", features="f.pt"),
    )
    file = tmp_path / "m.jsonl"
    assert samples == [
        Sample("7", (("What is it?", "A cup."),), (), f"{file}:1"),
        Sample(
            "b",
            (("<image>\nWhat?", "A cup."), ("Where?", "There.")),
            (Media("image", tmp_path / "a/cup.png"),),
            f"{file}:3",
        ),
        Sample(
            f"{file}:4",
            (("<image> or <image>?", "This."),),
            (Media("image", tmp_path / "a.png"), Media("image", tmp_path / "b.png")),
            f"{file}:4",
        ),
        Sample("v", (("<image>\nWhen?", "At noon."),), (Media("video", tmp_path / "v.mp4", "v.mp4"),), f"{file}:5"),
        Sample("f", (("<image>\nWhen?", "At noon."),), (Media("features", tmp_path / "f.pt"),), f"{file}:6"),
    ]


@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_lists_and_lines_are_told_apart_by_what_they_hold(tmp_path, name):
    entries = [talk("a?", "b", id=1), talk("c?", "d", id=2)]
    (tmp_path / name).write_text(json.dumps(entries, indent=1))
    as_list = load_mixture(tmp_path / name)
    write_lines(tmp_path / name, *entries)
    as_lines = load_mixture(tmp_path / name)
    assert [s.turns for s in as_list] == [s.turns for s in as_lines] == [(("a?", "b"),), (("c?", "d"),)]
    assert [s.source for s in as_list] == [f"{tmp_path / name}#0", f"{tmp_path / name}#1"]
    assert [s.source for s in as_lines] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Look <image> here", "<image>\nLook  here"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image> What?", "<image> What?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?", "<image>\nWhat?"),
        ("What? QA_GT_caption_based_noisy", "<image>\nWhat? "),
        ("", "<image>\n"),
    ],
)
def test_the_only_mark_stands_in_front(tmp_path, given, kept):
    """As the original does: it is moved to the start of its question, and put there if it is missing."""
    assert load(tmp_path, talk(given, "A cup.", image="a.png"))[0].turns[0][0] == kept


def test_a_mark_stays_in_its_turn(tmp_path):
    sample = load(tmp_path, talk("Hello", "Yes?", "What <image>", "A cup.", image="a.png"))[0]
    assert sample.turns == (("Hello", "Yes?"), ("<image>\nWhat", "A cup."))


def test_a_system_message_is_left_out(tmp_path):
    entry = talk("What?", "A cup.")
    entry["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    assert load(tmp_path, entry)[0].turns == (("What?", "A cup."),)


def test_an_answer_at_the_start_is_left_out(tmp_path):
    """As the original leaves it out: ShareGPT's conversations may begin with what the assistant said before."""
    for before in ([], [{"from": "system", "value": "Be kind."}]):
        entry = talk("What?", "A cup.")
        entry["conversations"][:0] = [*before, {"from": "gpt", "value": "Ask me."}]
        assert load(tmp_path, entry)[0].turns == (("What?", "A cup."),)


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_rows_of_videomarathon(tmp_path, kind):
    """Up to five questions about a video make a conversation, in the order of the rows."""
    rows = [
        {"id": f"q{i}", "video": v, "URL": "u", "question": f"{v}{i}?", "answer": f"{i}", "question_type": "action/oe",
         "data_source": d}
        for i, (v, d) in enumerate([("a.mp4", "ego4d"), ("b.mp4", "ego4d")] * 6 + [("a.mp4", "panda")])
    ]  # fmt: skip
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_text(json.dumps(rows))
    samples = load_mixture(path)
    assert [(s.id, len(s.turns), s.media[0].path) for s in samples] == [
        ("q0", 5, tmp_path / "ego4d/a.mp4"),
        ("q1", 5, tmp_path / "ego4d/b.mp4"),
        ("q10", 1, tmp_path / "ego4d/a.mp4"),
        ("q11", 1, tmp_path / "ego4d/b.mp4"),
        ("q12", 1, tmp_path / "panda/a.mp4"),
    ]
    assert samples[0].turns[0] == ("<image>\na.mp40?", "0")
    assert samples[0].turns[1:] == tuple((f"a.mp4{i}?", f"{i}") for i in (2, 4, 6, 8))
    assert samples[2].source == f"{path}#10"


def test_videos_stand_below_their_data_source(tmp_path):
    entries = [talk("a", "b", video=v, data_source="ego4d") for v in ("x.mp4", "ego4d/x.mp4", "/abs/x.mp4")]
    paths = [s.media[0].path for s in load(tmp_path, *entries)]
    assert paths == [tmp_path / "ego4d/x.mp4", tmp_path / "ego4d/x.mp4", Path("/abs/x.mp4")]


def test_a_memory_is_named_after_its_video():
    names = ["ego4d/x.mp4", "ego4d_x.mp4", "ego4d%2Fx.mp4", ".x.mp4", "%2Ex.mp4", "/x.mp4", "a b.mp4", "x.mp4"]
    folders = [memory_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in folder and not folder.startswith(".") for folder in folders)
    assert folders[0] == "ego4d%2Fx.mp4"


BAD = {
    "not a conversation": ([1], "it is list, not a conversation"),
    "a number": ("3", "it is int, not a conversation"),
    "no JSON": ('{"id": 3', "it is no JSON"),
    "no conversations": ({"text": "x"}, "it has no list of conversations"),
    "empty": (talk(), "it has no list of conversations"),
    "an answer first": (
        {"conversations": [{"from": "gpt", "value": "A cup."}]},
        r"an answer has no question \(message 0\)",
    ),
    "two answers": (
        {"conversations": [{"from": f, "value": "x"} for f in ("human", "gpt", "gpt")]},
        r"an answer has no question \(message 2\)",
    ),
    "two questions": (
        {"conversations": [{"from": f, "value": "x"} for f in ("human", "human", "gpt")]},
        r"a question has no answer \(message 1\)",
    ),
    "no last answer": (talk("a", "b", "c"), "its last question has no answer"),
    "only a system": ({"conversations": [{"from": "system", "value": "x"}]}, "its last question has no answer"),
    "a system between": (
        {"conversations": [{"from": f, "value": "x"} for f in ("human", "gpt", "system", "gpt")]},
        r"a system message stands between others \(message 2\)",
    ),
    "a stranger": ({"conversations": [{"from": "cat", "value": "x"}]}, "message 0 is from 'cat'"),
    "no sender": ({"conversations": [{"value": "x"}]}, "message 0 has no sender or no text"),
    "half a character": (talk("a \ud83d", "b"), "message 0 holds half of a character"),
    "no text": ({"conversations": [{"from": "human", "value": 3}]}, "message 0 has no sender or no text"),
    "an empty answer": (talk("a", " "), r"an answer is empty \(message 1\)"),
    "a mark in an answer": (talk("a", "<image>", image="x"), r"an answer holds an <image> mark \(message 1\)"),
    "a mark for nothing": (talk("<image>\na", "b"), "<image> stands in its questions 1 times for 0 media"),
    "too many marks": (
        talk("<image>\na", "b", "<image>\nc", "d", video="x"),
        "<image> stands in its questions 2 times for 1 video",
    ),
    "too few marks": (
        talk("<image>\na", "b", image=["x", "y"]),
        "<image> stands in its questions 1 times for 2 image",
    ),
    "no marks": (talk("a", "b", image=["x", "y"]), "<image> stands in its questions 0 times for 2 image"),
    "video and image": (talk("<image>a", "b", video="x", image="y"), "it has image and video"),
    "two videos": (talk("<image>a", "b", video=["x", "y"]), "it has 2 videos"),
    "no name": (talk("<image>a", "b", video=3), "its video is no file name"),
    "a name that no file has": (talk("<image>a", "b", image="a\0b"), "its image is no file name"),
    "a letter that no file's name has": (talk("a", "b", video="a\ud800.mp4"), "its video is no file name"),
    "a folder's": (talk("a", "b", video="a.mp4", data_source="\ud800"), "its data_source is no file name"),
    "a row without a question": ({"video": "x", "answer": "b"}, "its question is missing or no text"),
    "a row without a video": ({"question": "a?", "answer": "b"}, "its video is missing or no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_entries_are_named(tmp_path, case):
    entry, message = BAD[case]
    entry = entry if isinstance(entry, str) else json.dumps(entry)
    with pytest.raises(DataError, match=rf"m\.jsonl:2: {message}.*; "):
        load(tmp_path, talk("a", "b"), entry)


def test_an_id_is_told_beside_the_line(tmp_path):
    with pytest.raises(DataError, match=r"m\.jsonl:1 \(id k3\): its last question"):
        load(tmp_path, talk("a", id="k3"))
    with pytest.raises(DataError, match=r"m\.jsonl:1 \(id 5\): its answer is missing"):
        load(tmp_path, {"id": 5, "video": "v.mp4", "question": "a?"})


def test_a_bad_row_does_not_take_its_video_along(tmp_path):
    rows = [{"video": "v", "question": "a?", "answer": a} for a in ("b", None, "c")]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: its answer is missing"):
        load_mixture(path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: it cannot be read \(No such file or directory\); check the path"):
        load_mixture(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"gone\.parquet: it cannot be read \("):
        load_mixture(tmp_path / "gone.parquet")
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(DataError, match=r"empty\.json: it holds no conversation"):
        load_mixture(tmp_path / "empty.json")
    (tmp_path / "cut.json").write_text('[\n{"id": 1},\n{"id"')
    with pytest.raises(DataError, match=r"cut\.json:3: it is no JSON"):
        load_mixture(tmp_path / "cut.json")
    (tmp_path / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(DataError, match=r"latin\.json: it is not UTF-8"):
        load_mixture(tmp_path / "latin.json")
    (tmp_path / "no.parquet").write_text("no parquet at all, but long enough")
    with pytest.raises(DataError, match=r"no\.parquet: it is no parquet file"):
        load_mixture(tmp_path / "no.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"video": ["a"], "answer": ["b"]}), tmp_path / "less.parquet")
    with pytest.raises(DataError, match=r"less\.parquet: it has no column 'question', only video, answer"):
        load_mixture(tmp_path / "less.parquet")


def test_names_that_are_no_utf8_are_written_down(tmp_path):
    gone = talk("<image>\nWhat?", "A cup.", image="gone\udcff.png", id="half \ud83d")
    failures = FailureLog(tmp_path / "failures.jsonl", limit=1.0)
    samples = load_mixture(write_lines(tmp_path / "names.jsonl", gone, talk("a \ud83d", "b", id="\ud83d")), 0, failures)
    with pytest.raises(DataError):
        failures.first_sound([0], lambda number: failed(samples[number]), lambda number: samples[number].id)
    assert [entry["id"] for entry in failures.entries()] == [f"{tmp_path / 'names.jsonl'}:2 (id \ud83d)", "half \ud83d"]
    assert "gone\udcff.png" in failures.entries()[1]["what"]
    assert failures.summary() is not None


def failed(sample):
    raise DataError(sample.media[0].path, "there is no such file", "check the path")
