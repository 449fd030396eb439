# SPDX-License-Identifier: Apache-2.0
"""Small copies of the four benchmarks' folders, laid out as they are published, and a model that repeats."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from clips import write_clip

from hourllava.model import Answer, HourLlavaForConditionalGeneration, Moment

SECONDS = 6  # of each video


def write_videos(folder: Path, names: Sequence[str]) -> None:
    """A video of SECONDS seconds for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_clip(folder / f"{name}.mp4", list(range(2 * SECONDS)), Fraction(1, 2))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def video_mme_rows() -> list[dict[str, Any]]:
    """Three videos, one of each duration, with two questions each; the right answers are A, B, C, D, A, B."""
    rows = []
    for number, (video, duration) in enumerate([("vidS", "short"), ("vidM", "medium"), ("vidL", "long")]):
        for part in range(2):
            rows.append(
                {
                    "video_id": f"{number + 1:03}",
                    "duration": duration,
                    "domain": "Knowledge" if part else "Life Record",
                    "sub_category": "Law" if part else "Food",
                    "url": f"https://www.youtube.com/watch?v={video}",
                    "videoID": video,
                    "question_id": f"{number + 1:03}-{part + 1}",
                    "task_type": "OCR Problems" if part else "Counting Problem",
                    "question": f"What is seen in {video}, part {part}?",
                    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
                    "answer": "ABCD"[(2 * number + part) % 4],
                }
            )
    return rows


SRT = """1
00:00:01,000 --> 00:00:02,500
<font color="white" size=".72c">hello there</font>

2
00:00:04,000 --> 00:00:05,000
<font color="white" size=".72c">and goodbye</font>
"""


def video_mme(root: Path, videos: Sequence[str] = ("vidS", "vidM", "vidL")) -> Path:
    write_parquet(root / "videomme/test-00000-of-00001.parquet", video_mme_rows())
    write_videos(root / "data", videos)
    (root / "subtitle").mkdir()
    (root / "subtitle/vidS.srt").write_text(SRT)
    return root


def longvideobench_rows() -> list[dict[str, Any]]:
    common = {"topic_category": "KC-Cooking", "view_count": 7}
    first = {
        **common,
        "video_id": "aaa",
        "id": "aaa_0",
        "video_path": "aaa.mp4",
        "subtitle_path": "aaa_en.json",
        "question": "What does the cook take?",
        "candidates": ["salt", "pepper", "a spoon", "a pan", "nothing"],
        "correct_choice": 4,
        "level": "L1-Perception",
        "question_category": "S2O",
        "duration_group": 15,
        "duration": 6.0,
        "starting_timestamp_for_subtitles": 100.0,
    }
    second = {
        **first,
        "id": "bbb_0",
        "video_id": "bbb",
        "video_path": "bbb.mp4",
        "subtitle_path": "bbb_en.json",
        "candidates": ["yes", "no"],
        "correct_choice": 1,
        "question_category": "TOS",
        "level": "L2-Relation",
        "duration_group": 3600,
        "starting_timestamp_for_subtitles": 0,
    }
    return [first, second]


def longvideobench(root: Path) -> Path:
    write_videos(root / "videos", ["aaa", "bbb"])
    (root / "lvb_val.json").write_text(json.dumps(longvideobench_rows()))
    (root / "subtitles").mkdir()
    by_clock = [
        {"start": "00:01:40.500", "end": "00:01:42.500", "line": "take salt"},
        {"start": "00:01:43.900", "end": "00:01:44.200", "line": "quick"},
        {"start": "00:00:10.000", "end": "00:00:12.000", "line": "before the cut"},
    ]
    by_seconds = [{"timestamp": [0.5, 1.6], "text": "one"}, {"timestamp": [3.5, None], "text": "to the end"}]
    (root / "subtitles/aaa_en.json").write_text(json.dumps(by_clock))
    (root / "subtitles/bbb_en.json").write_text(json.dumps(by_seconds))
    return root


def lvbench(root: Path) -> Path:
    options = "\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633"
    lines = [
        {
            "key": "Cm73ma6Ibcs",
            "type": "cartoon",
            "video_info": {"fps": 25.0},
            "qa": [
                {
                    "uid": "55",
                    "question": f"What year appears?{options}",
                    "answer": "D",
                    "question_type": ["key information retrieval", "entity recognition"],
                    "time_reference": "00:15-00:19",
                },
                {
                    "uid": "56",
                    "question": f"Which year is last?{options}",
                    "answer": "A",
                    "question_type": ["reasoning"],
                    "time_reference": "00:01-00:02",
                },
            ],
        }
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "video_info.meta.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_videos(root / "all_videos", ["Cm73ma6Ibcs"])
    return root


TEMPCOMPASS = {
    "multi-choice": ("What is the man doing?\nA. dunking\nB. dribbling\nC. passing", "B. dribbling"),
    "yes_no": ("Is the man dunking?", "no"),
    "caption_matching": (
        "Which caption matches the video better?\nCaption A: A man dunks.\nCaption B: A man dribbles.",
        "Caption B: A man dribbles.",
    ),
}


def tempcompass(root: Path, parquet: bool = True) -> Path:
    """Two videos with a question of each task; in parquet as on the hub, or in the JSON of the code repository."""
    write_videos(root / "videos", ["1034419625", "1034419625_reverse"])
    for task, (question, answer) in TEMPCOMPASS.items():
        rows = [
            {"video_id": video, "question": question, "answer": answer, "dim": aspect}
            for video, aspect in [("1034419625", "action"), ("1034419625_reverse", "direction")]
        ]
        if parquet:
            write_parquet(root / task / "test-00000-of-00001.parquet", rows)
        else:
            (root / "questions").mkdir(exist_ok=True)
            asked = {"question": question, "answer": answer}
            document = {row["video_id"]: {row["dim"]: [asked]} for row in rows}
            (root / f"questions/{task}.json").write_text(json.dumps(document))
    return root


class Parrot:
    """Takes the place of a model's `ask`: says what `reply` gives for a prompt, and keeps what it was asked."""

    def __init__(self, reply: Callable[[str], str] | str) -> None:
        self.reply = reply if callable(reply) else lambda prompt: reply
        self.asked: list[tuple[str, str, dict[str, Any]]] = []  # the memory's path, the prompt, the options

    def __call__(
        self, model: HourLlavaForConditionalGeneration, memory: Any, question: str, max_new_tokens: int, **options: Any
    ) -> Answer:
        self.asked.append((str(memory.path), question, {"max_new_tokens": max_new_tokens, **options}))
        text = self.reply(question)
        mass = torch.full((memory.frames,), 1 / memory.frames)
        return Answer(text, [Moment(1.0, 3.0, 0.5)], mass, {"total": 0.0}, [("A", 1.0)])
