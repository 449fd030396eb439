# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' files are read as they are published, and what is wrong with them is told in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import benchmark_folders as folders
import pytest

from hourllava.errors import DataError
from hourllava.evaluate import BENCHMARKS, DataFolder, Question


def questions_of(name: str, root: Path) -> list[Question]:
    benchmark = BENCHMARKS[name]
    return benchmark.questions(benchmark.annotations(DataFolder(root)))


@pytest.fixture(autouse=True)
def _no_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a video is only a name."""

    def touch(folder: Path, names: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / f"{name}.mp4").touch()

    monkeypatch.setattr(folders, "write_videos", touch)


def test_video_mme(tmp_path: Path) -> None:
    questions = questions_of("videomme", folders.video_mme(tmp_path))
    assert [question.id for question in questions] == ["001-1", "001-2", "002-1", "002-2", "003-1", "003-2"]
    first, second = questions[:2]
    assert first.prompt == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat is seen in vidS, part 0?\nA. One.\nB. Two.\nC. Three.\n"
        "D. Four.\nThe best answer is:"
    )
    assert (first.video, first.answer, first.subtitles) == ("vidS", "A", "vidS.srt")
    assert second.groups == (
        ("duration", "short"),
        ("task", "OCR Problems"),
        ("domain", "Knowledge"),
        ("sub-category", "Law"),
    )
    assert second.read("The best answer is B.") == second.answer == "B"


def test_video_mme_subtitles_stand_before_the_question(tmp_path: Path) -> None:
    folder, benchmark = DataFolder(folders.video_mme(tmp_path)), BENCHMARKS["videomme"]
    question = questions_of("videomme", tmp_path)[0]
    path = folder.file(question.subtitles)
    assert path is not None
    assert benchmark.read_subtitles is not None
    subtitles = benchmark.read_subtitles(path, question)
    head = "This video's subtitles are listed below:\n"
    assert benchmark.join(question, subtitles, 6, None) == f"{head}hello there\nand goodbye\n{question.prompt}"
    assert benchmark.join(question, subtitles, 6, 2) == question.prompt  # of seconds 0 and 5, none has a line


def test_longvideobench(tmp_path: Path) -> None:
    first, second = questions_of("longvideobench", folders.longvideobench(tmp_path))
    assert first.prompt == (
        "Question: What does the cook take?\nA. salt\nB. pepper\nC. a spoon\nD. a pan\nE. nothing\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.id, first.video, first.answer, first.read("E")) == ("aaa_0", "aaa", "E", "E")
    assert first.groups == (("duration", "8-15 s"), ("category", "S2O"), ("level", "L1-Perception"))
    assert (second.answer, second.read("C"), second.groups[0]) == ("B", None, ("duration", "900-3600 s"))


def test_longvideobench_parquet_asks_the_same(tmp_path: Path) -> None:
    listed = questions_of("longvideobench", folders.longvideobench(tmp_path / "json"))
    rows = []
    for row in folders.longvideobench_rows():
        options = [*row.pop("candidates"), *["N/A"] * 5][:5]
        del row["level"]
        rows.append(row | {f"option{number}": option for number, option in enumerate(options)})
    folders.write_parquet(tmp_path / "parquet/validation-00000-of-00001.parquet", rows)
    for ours, theirs in zip(questions_of("longvideobench", tmp_path / "parquet"), listed, strict=True):
        assert (ours.id, ours.prompt, ours.answer) == (theirs.id, theirs.prompt, theirs.answer)
        assert ours.groups == theirs.groups[:2]


def test_longvideobench_subtitles(tmp_path: Path) -> None:
    """Of a clip, only its own; those of a moment count as a second long; without an introduction."""
    folder, benchmark = DataFolder(folders.longvideobench(tmp_path)), BENCHMARKS["longvideobench"]
    texts = []
    for question in questions_of("longvideobench", tmp_path):
        path = folder.file(question.subtitles)
        assert path is not None
        assert benchmark.read_subtitles is not None
        subtitles = benchmark.read_subtitles(path, question)
        texts.append(benchmark.join(question, subtitles, 6, None).removesuffix(question.prompt))
    assert texts == ["take salt\nquick\n", "one\nto the end\n"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"timestamp": [None, 2.0], "text": "x"}, "it says no time"),
        ({"timestamp": [1.0, 2.0]}, "its text is missing"),
        ({"start": "soon", "end": "00:00:02", "line": "x"}, "its start 'soon' is no time"),
        ({"line": "x"}, "its start is missing"),
    ],
)
def test_bad_json_subtitles(row: dict, said: str, tmp_path: Path) -> None:
    question = questions_of("longvideobench", folders.longvideobench(tmp_path))[0]
    path, read = tmp_path / "bad.json", BENCHMARKS["longvideobench"].read_subtitles
    path.write_text(json.dumps([row]))
    assert read is not None
    with pytest.raises(DataError, match=said):
        read(path, question)


def test_lvbench(tmp_path: Path) -> None:
    first, second = questions_of("lvbench", folders.lvbench(tmp_path))
    assert first.prompt == (
        "What year appears?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633\nAnswer the question with the option letter"
    )
    assert (first.id, first.video, first.answer, first.time_reference) == ("55", "Cm73ma6Ibcs", "D", "00:15-00:19")
    path = tmp_path / "video_info.meta.jsonl"
    path.write_text(path.read_text().replace("What year", "What\u2028year"))  # no end of a line in JSON lines
    assert questions_of("lvbench", tmp_path)[0].prompt == first.prompt.replace("What year", "What\u2028year")
    assert first.groups == (
        ("capability", "key information retrieval"),
        ("capability", "entity recognition"),
        ("video", "cartoon"),
    )
    assert second.read("(A) 1636") == second.answer


@pytest.mark.parametrize("parquet", [True, False])
def test_tempcompass(parquet: bool, tmp_path: Path) -> None:
    questions = questions_of("tempcompass", folders.tempcompass(tmp_path, parquet))
    assert [question.id for question in questions] == [
        f"{task}/{video}/{aspect}/1"
        for task in ("multi-choice", "yes_no", "caption_matching")
        for video, aspect in [("1034419625", "action"), ("1034419625_reverse", "direction")]
    ]
    choice, _, yes_no, _, caption, last = questions
    assert choice.prompt.endswith("C. passing\nPlease directly give the best option:")
    assert yes_no.prompt == "Is the man dunking?\nPlease answer yes or no:"
    assert caption.prompt.endswith("Caption B: A man dribbles.\nPlease directly give the best option:")
    assert [question.answer for question in (choice, yes_no, caption)] == ["B", "no", "Caption B"]
    assert [choice.read("B. dribbling"), yes_no.read("No."), caption.read("B")] == ["B", "no", "Caption B"]
    assert last.groups == (
        ("task", "caption_matching"),
        ("aspect", "direction"),
        ("task, aspect", "caption_matching, direction"),
    )


def test_a_question_whose_answer_is_none_of_its_choices_has_a_fault(tmp_path: Path) -> None:
    """Tables this large hold a slip here and there: the question is left out and told, the others are asked."""
    folders.tempcompass(tmp_path, parquet=False)
    asked = [{"question": "Is it?", "answer": "maybe"}, {"question": "Is it?", "answer": "yes"}]
    (tmp_path / "questions/yes_no.json").write_text(json.dumps({"1": {"action": asked}}))
    faults = {question.id: question.fault for question in questions_of("tempcompass", tmp_path)}
    assert faults.pop("yes_no/1/action/1") == "its answer, 'maybe', is none of its choices"
    assert set(faults.values()) == {""}


def without(name: str) -> Callable[[Path], None]:
    """Takes a column out of Video-MME's table."""

    def change(root: Path) -> None:
        rows = [{key: value for key, value in row.items() if key != name} for row in folders.video_mme_rows()]
        folders.write_parquet(root / "videomme/test-00000-of-00001.parquet", rows)

    return change


def twice(root: Path) -> None:
    folders.write_parquet(root / "videomme/test-00000-of-00001.parquet", [folders.video_mme_rows()[0]] * 2)


def no_parquet(root: Path) -> None:
    (root / "videomme/test-00000-of-00001.parquet").write_text("<html>404</html>")


def empty(root: Path) -> None:
    folders.write_parquet(root / "videomme/test-00000-of-00001.parquet", folders.video_mme_rows())
    import pyarrow.parquet

    path = root / "videomme/test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("answer"), "parquet#0: its answer is missing; download it again"),
        (without("options"), "its options is missing"),
        (twice, "two questions are called 001-1"),
        (no_parquet, "it is no parquet file"),
        (empty, "it holds no question"),
    ],
)
def test_bad_parquet(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folders.video_mme(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError) as raised:
        questions_of("videomme", tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("lvbench", "video_info.meta.jsonl", "{", "video_info.meta.jsonl#0: it is no JSON"),
        ("lvbench", "video_info.meta.jsonl", "[]", "it is no list of questions"),
        ("lvbench", "video_info.meta.jsonl", '{"key": "x", "type": "tv", "qa": {}}', "its qa is {}"),
        ("longvideobench", "lvb_val.json", "{}", "it is no list of questions"),
        ("longvideobench", "lvb_val.json", "\xff", "it is not UTF-8 text"),
        ("longvideobench", "lvb_val.json", '[{"id": "x"}]', "its correct_choice is missing"),
        ("longvideobench", "lvb_val.json", '[{"candidates": ["a"], "correct_choice": 1}]', "is none of 1 candidates"),
        ("lvbench", "video_info.meta.jsonl", '{"key": "x", "type": "tv", "qa": ["?"]}', "its question_type is missing"),
        ("tempcompass", "questions/yes_no.json", "[]", "it holds no videos"),
        ("tempcompass", "questions/yes_no.json", '{"1": {"action": ["?"]}}', "action#0: its question is missing"),
    ],
)
def test_bad_json(name: str, file: str, text: str, said: str, tmp_path: Path) -> None:
    folders.tempcompass(tmp_path, parquet=False)
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as raised:
        questions_of(name, tmp_path)
    assert said in str(raised.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        DataFolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no videomme/test-\*.parquet or test-\*.parquet in it; download the dataset"):
        questions_of("videomme", tmp_path)
    folders.tempcompass(tmp_path)
    (tmp_path / "yes_no/test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"there is no yes_no/test-\*.parquet or questions/yes_no.json in it"):
        questions_of("tempcompass", tmp_path)


def test_a_folder_finds_files_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for name in ("a/b/x.MKV", "a/one.srt", ".cache/y.mp4", "a/._x.mp4", "videos_chunked_01.zip", "v.tar.part.aa"):
        (tmp_path / name).touch()
    (tmp_path / "a/loop").symlink_to(tmp_path)
    elsewhere = tmp_path / "a/b"
    (tmp_path / "linked").symlink_to(elsewhere)
    folder = DataFolder(tmp_path)
    assert folder.video("x") == elsewhere / "x.MKV"
    assert folder.video("y") is None
    assert folder.file("one.srt") == tmp_path / "a/one.srt"
    assert folder.packed == "v.tar.part.aa and 1 more may still have to be unpacked"
    (tmp_path / "x.mp4").touch()
    with pytest.raises(DataError, match=r"x.mp4 and a/b/x.MKV are both called x; keep the one"):
        DataFolder(tmp_path).video("x")
