# SPDX-License-Identifier: Apache-2.0
"""The paper's four benchmarks: how their files are read, what is asked, and how replies are read.

Prompts are those of each benchmark's own code or documents; where there is none (LVBench), lmms-eval's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hourllava.errors import DataError
from hourllava.model.subtitles import Cue, Subtitles
from hourllava.video import seconds_of_clock

from .data_folder import DataFolder, field, read_json, read_rows
from .replies import LETTERS, read_caption, read_first_letter, read_letter, read_yes_no

Groups = tuple[tuple[str, str], ...]
Number = (int, float)


@dataclass(frozen=True)
class Question:
    """One question about one video."""

    id: str  # unique in its benchmark
    video: str  # name of the video's file, without suffix
    prompt: str  # what is asked, without subtitles
    answer: str  # as `read` gives it
    read: Callable[[str], str | None]  # what a reply chooses; None if that cannot be told
    groups: Groups  # (breakdown, value): which counts it belongs to
    subtitles: str = ""  # name of the file; empty if there is none
    subtitles_from: float = 0.0  # the second of that file at which the video begins
    seconds: float | None = None  # of the video, where the benchmark says so
    time_reference: str = ""  # where in the video the answer is seen, where the benchmark says so

    @property
    def fault(self) -> str:
        """Why no reply could be right, or ""."""
        return (
            "" if self.read(self.answer) == self.answer else f"its answer, {self.answer!r:.60}, is none of its choices"
        )


@dataclass(frozen=True)
class Benchmark:
    """What is particular to a benchmark."""

    name: str
    title: str
    annotation: tuple[str, ...]  # patterns of the file or files with the questions, the best first
    published: str  # where they are published
    prompts: dict[str, str]  # by kind of question
    max_new_tokens: int
    read: Callable[[Path, dict[str, str]], list[Question]]
    read_subtitles: Callable[[Path, Question], Subtitles] | None = None
    introduces_subtitles: bool = True  # whether a line stands before them

    def annotations(self, folder: DataFolder) -> list[Path]:
        """The files with the questions, of every kind.

        Raises:
            DataError: there is none.
        """
        paths = []
        for kind in self.prompts:
            patterns = [pattern.format(kind=kind) for pattern in self.annotation]
            found = folder.find(*patterns)
            if not found:
                why = f"there is no {' or '.join(patterns)} in it"
                raise DataError(folder.root, why, f"download {self.published} into it")
            paths += found
        return paths

    def questions(self, paths: list[Path]) -> list[Question]:
        """Every question.

        Raises:
            DataError: a file is damaged, holds something else, or two questions have one id.
        """
        questions = [question for path in paths for question in self.read(path, self.prompts)]
        seen: set[str] = set()
        for question in questions:
            if question.id in seen:
                raise DataError(paths[0], f"two questions are called {question.id}", "download it again")
            seen.add(question.id)
        if not questions:
            raise DataError(paths[0], "it holds no question", "download it again")
        return questions

    def join(self, question: Question, subtitles: Subtitles, seconds: int, sampled: int | None) -> str:
        """The prompt behind the subtitles that are on screen at the seconds looked at; see `Subtitles.seen`."""
        if self.introduces_subtitles:
            return subtitles.join(question.prompt, seconds, sampled)
        return "\n".join([*subtitles.seen(seconds, sampled), question.prompt])


def _video_mme(path: Path, prompts: dict[str, str]) -> list[Question]:
    questions = []
    for source, row in read_rows(path):
        options = field(row, "options", list, source)
        text = field(row, "question", str, source)
        video = field(row, "videoID", str, source)
        shown = {"duration": "duration", "task": "task_type", "domain": "domain", "sub-category": "sub_category"}
        questions.append(
            Question(
                id=field(row, "question_id", str, source),
                video=video,
                prompt=prompts[""].format(question=text, options="\n".join(map(str, options))),
                answer=field(row, "answer", str, source),
                read=read_letter,
                groups=tuple((name, field(row, column, str, source)) for name, column in shown.items()),
                subtitles=f"{video}.srt",
            )
        )
    return questions


DURATIONS = {15: "8-15 s", 60: "15-60 s", 600: "180-600 s", 3600: "900-3600 s"}  # by LongVideoBench's numbers of them


def _longvideobench(path: Path, prompts: dict[str, str]) -> list[Question]:
    """The validation split; that of the test has no answers. JSON has a list of candidates, parquet five columns."""
    questions = []
    for source, row in read_rows(path):
        given = row.get("candidates") or [row.get(f"option{number}") for number in range(5)]
        options = [option for option in given if isinstance(option, str) and option != "N/A"]
        right = field(row, "correct_choice", int, source)
        if not 0 <= right < len(options) <= len(LETTERS):
            why = f"its correct_choice {right} is none of {len(options)} candidates"
            raise DataError(source, why, "use the validation split: that of the test has no answers")
        group = field(row, "duration_group", int, source)
        groups = [("duration", DURATIONS.get(group, f"up to {group} s"))]
        groups.append(("category", field(row, "question_category", str, source)))
        if isinstance(row.get("level"), str):
            groups.append(("level", row["level"]))
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        questions.append(
            Question(
                id=field(row, "id", str, source),
                video=Path(field(row, "video_path", str, source)).stem,
                prompt=prompts[""].format(question=field(row, "question", str, source), options=listed),
                answer=LETTERS[right],
                read=partial(read_letter, choices=len(options)),
                groups=tuple(groups),
                subtitles=Path(row.get("subtitle_path") or "").name,
                subtitles_from=float(field(row, "starting_timestamp_for_subtitles", Number, source)),
                seconds=float(field(row, "duration", Number, source)),
            )
        )
    return questions


def _lvbench(path: Path, prompts: dict[str, str]) -> list[Question]:
    """A line for each video, with its questions, whose text holds their options."""
    questions = []
    for source, row in read_rows(path):
        kind, video = field(row, "type", str, source), field(row, "key", str, source)
        for asked in field(row, "qa", list, source):
            capabilities = field(asked, "question_type", list, source)
            questions.append(
                Question(
                    id=str(field(asked, "uid", (str, int), source)),
                    video=video,
                    prompt=prompts[""].format(question=field(asked, "question", str, source)),
                    answer=field(asked, "answer", str, source),
                    read=read_letter,
                    groups=(*(("capability", str(name)) for name in capabilities), ("video", kind)),
                    time_reference=str(asked.get("time_reference") or ""),
                )
            )
    return questions


def _tempcompass(path: Path, prompts: dict[str, str]) -> list[Question]:
    """The questions of one task: parquet in a folder of its name, or the JSON of the benchmark's code repository."""
    task = path.stem if path.suffix == ".json" else path.parent.name
    questions, counts = [], dict[tuple[str, str], int]()
    for source, video, aspect, row in _tempcompass_rows(path):
        text, answer = field(row, "question", str, source), field(row, "answer", str, source)
        number = counts[video, aspect] = counts.get((video, aspect), 0) + 1
        readers: dict[str, tuple[Callable[[str], str | None], str]] = {
            "multi-choice": (read_first_letter, answer[:1]),
            "yes_no": (read_yes_no, answer),
            "caption_matching": (partial(read_caption, question=text), answer.partition(":")[0]),
        }
        read, right = readers[task]
        groups = (("task", task), ("aspect", aspect), ("task, aspect", f"{task}, {aspect}"))
        prompt = prompts[task].format(question=text)
        questions.append(Question(f"{task}/{video}/{aspect}/{number}", video, prompt, right, read, groups))
    return questions


def _tempcompass_rows(path: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Place, video, aspect and fields of each question."""
    if path.suffix == ".parquet":
        for source, row in read_rows(path):
            yield source, field(row, "video_id", str, source), field(row, "dim", str, source), row
        return
    document = read_json(path)
    if not isinstance(document, dict):
        raise DataError(path, "it holds no videos", "download it again")
    for video in document:
        aspects = field(document, video, dict, str(path))
        for aspect in aspects:
            for number, row in enumerate(field(aspects, aspect, list, f"{path}, {video}")):
                yield f"{path}, {video}, {aspect}#{number}", video, aspect, row


def _read_srt(path: Path, question: Question) -> Subtitles:
    return Subtitles.read(path)


def _read_json_subtitles(path: Path, question: Question) -> Subtitles:
    """LongVideoBench's: a list of {"start", "end", "line"} by clock, or of {"timestamp": [start, end], "text"}.

    The benchmark's code puts each line between the pictures around it. A memory is one place in the prompt, so here the
    lines stand behind it, in order of time. A line counts as a second long at least, as there.
    """
    cues, rows = [], read_rows(path)
    for source, row in rows:
        if "timestamp" in row:
            start, end = (*field(row, "timestamp", list, source), None, None)[:2]
            text = field(row, "text", str, source)
        else:
            start, end = _clock(row, "start", source), _clock(row, "end", source)
            text = field(row, "line", str, source)
        if not isinstance(start, Number):
            raise DataError(source, "it says no time", "download it again")
        begins = float(start) - question.subtitles_from
        # The last line of some files has no end: it lasts as long as the video.
        ends = float(end) - question.subtitles_from if isinstance(end, Number) else (question.seconds or begins)
        if ends - begins < 1:
            begins, ends = (begins + ends) / 2 - 0.5, (begins + ends) / 2 + 0.5
        cues.append(Cue(begins, ends, text))
    return Subtitles(tuple(cues))


def _clock(row: dict[str, Any], name: str, source: str) -> float:
    text = field(row, name, str, source)
    try:
        return seconds_of_clock(text)
    except ValueError as error:
        raise DataError(source, f"its {name} {text!r:.60} is no time", "download it again") from error


_BEST_OPTION = "{question}\nPlease directly give the best option:"
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "tempcompass",
            "TempCompass",
            ("{kind}/test-*.parquet", "questions/{kind}.json"),
            "the dataset TempCompass, its parquet files or its questions/*.json,",
            {
                "multi-choice": _BEST_OPTION,
                "yes_no": "{question}\nPlease answer yes or no:",
                "caption_matching": _BEST_OPTION,
            },
            128,
            _tempcompass,
        ),
        Benchmark(
            "longvideobench",
            "LongVideoBench, validation",
            ("lvb_val.json", "validation-*.parquet"),
            "the dataset longvideobench/LongVideoBench",
            {"": "Question: {question}\n{options}\nAnswer with the option's letter from the given choices directly."},
            32,
            _longvideobench,
            _read_json_subtitles,
            introduces_subtitles=False,
        ),
        Benchmark(
            "videomme",
            "Video-MME",
            ("videomme/test-*.parquet", "test-*.parquet"),
            "the dataset lmms-lab/Video-MME",
            {
                "": "Select the best answer to the following multiple-choice question based on the video. Respond with "
                "only the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
            },
            16,
            _video_mme,
            _read_srt,
        ),
        Benchmark(
            "lvbench",
            "LVBench",
            ("video_info.meta.jsonl",),
            "video_info.meta.jsonl of the dataset zai-org/LVBench",
            {"": "{question}\nAnswer the question with the option letter"},
            16,
            _lvbench,
        ),
    )
}
