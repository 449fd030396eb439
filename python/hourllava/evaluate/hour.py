# SPDX-License-Identifier: Apache-2.0
"""Held-out films of an hour: what the model answers with its memory, without it, and from 64 frames.

Films are rendered to MP4 files once and watched from there, as a user's video would be.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from hourllava.data import TOPICS, Film, Question, chance
from hourllava.memory import VideoMemory
from hourllava.model import HourLlavaForConditionalGeneration, best_device, load_model
from hourllava.model.forgetting import kept_frames
from hourllava.video import open_video

HELD_OUT = 2**50  # number of the first test film: training counts from far below
UNIFORM_FRAMES = 64
ARMS = ("memory", "no memory", "64 frames")


@dataclass(frozen=True)
class HourTest:
    """Which films are asked what."""

    videos: int = 20
    seconds: int = 3600
    per_topic: int = 4  # questions about two-second events, per film and topic where the film has so many
    first_film: int = HELD_OUT


def _zeros() -> dict[str, int]:
    return dict.fromkeys((*TOPICS, "lasting"), 0)


@dataclass
class Tally:
    """Right answers and questions asked, by arm and topic; "lasting" are questions that no short event answers."""

    right: dict[str, dict[str, int]] = field(default_factory=lambda: {arm: _zeros() for arm in ARMS})
    asked: dict[str, int] = field(default_factory=_zeros)
    events_kept: int = 0  # events of which forgetting kept a frame
    events: int = 0

    def accuracy(self, arm: str, topics: tuple[str, ...] = TOPICS) -> float:
        """Share of right answers of an arm over some topics; nan if none was asked."""
        asked = sum(self.asked[t] for t in topics)
        return sum(self.right[arm][t] for t in topics) / asked if asked else float("nan")

    def chance(self, topics: tuple[str, ...] = TOPICS) -> float:
        """What guessing would give for the same questions."""
        asked = sum(self.asked[t] for t in topics)
        return sum(self.asked[t] * chance(t) for t in topics) / asked if asked else float("nan")


def main(videos: int = 20, model: str = "tiny", folder: str = "build/evaluate", out: str | None = None) -> int:
    """Evaluate, print the table, and write every answer to ``out`` (default: ``folder``/results.json)."""
    tally, answers = evaluate(load_model(model, device=best_device()), HourTest(videos=videos), Path(folder))
    Console().print(table(tally))
    report = Path(out) if out else Path(folder) / "results.json"
    report.write_text(json.dumps({"model": model, "tally": asdict(tally), "answers": answers}, indent=1))
    print(f"every answer: {report}")
    return 0


def evaluate(
    model: HourLlavaForConditionalGeneration, test: HourTest, folder: Path
) -> tuple[Tally, list[dict[str, object]]]:
    """Render, watch and ask; returns the counts and a record of every answer."""
    tally, answers = Tally(), []
    progress = tqdm(range(test.videos), "films", unit="film")
    for index in progress:
        film, path = rendered(test, index, folder)
        full, uniform = _watch(model, path)
        _count_kept_events(tally, model, film)
        for question in choose_questions(film, test.per_topic):
            replies = {
                "memory": model.ask(full, question.text).text,
                "no memory": model.ask(full, question.text, use_memory=False).text,
                "64 frames": model.ask(uniform, question.text).text,
            }
            topic = question.topic if question.needle else "lasting"
            tally.asked[topic] += 1
            for arm, reply in replies.items():
                tally.right[arm][topic] += reply == question.answer
            answers.append({"film": index, "topic": topic, **asdict(question), "replies": replies})
        progress.set_postfix({arm: f"{tally.accuracy(arm):.2f}" for arm in ARMS})
    return tally, answers


def rendered(test: HourTest, index: int, folder: Path) -> tuple[Film, Path]:
    """One film of a test and its MP4 file in `folder`, which is made unless it is there."""
    film = Film.random(test.first_film + index, test.seconds)
    path = folder / f"film-{test.seconds}s-{index}.mp4"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        film.write(path, progress=False)
    return film, path


def choose_questions(film: Film, per_topic: int) -> list[Question]:
    """At most ``per_topic`` questions about short events per topic, and all about what lasts; repeatable."""
    rng = np.random.default_rng(film.seed)
    questions = film.questions()
    chosen = [q for q in questions if not q.needle]
    for topic in TOPICS:
        needles = [q for q in questions if q.needle and q.topic == topic]
        chosen += [needles[i] for i in sorted(rng.permutation(len(needles))[:per_topic])]
    return chosen


def table(tally: Tally) -> Table:
    """The counts as a table of percentages, one row a topic."""
    shown = Table(title=f"{sum(tally.asked.values())} questions about films of an hour, % right")
    for heading in ("", "questions", *ARMS, "chance"):
        shown.add_column(heading, justify="left" if not heading else "right")
    rows = {"two-second events": TOPICS, **{f"  {t}": (t,) for t in TOPICS}}
    for name, topics in rows.items():
        percent = [100 * tally.accuracy(arm, topics) for arm in ARMS] + [100 * tally.chance(topics)]
        shown.add_row(name, str(sum(tally.asked[t] for t in topics)), *(f"{p:.1f}" for p in percent))
    lasting = [f"{100 * tally.accuracy(arm, ('lasting',)):.1f}" for arm in ARMS]
    shown.add_row("what lasts", str(tally.asked["lasting"]), *lasting, f"{100 / 6:.1f}")
    if tally.events:
        shown.caption = f"forgetting kept a frame of {100 * tally.events_kept / tally.events:.1f} % of the events"
    return shown


def _watch(model: HourLlavaForConditionalGeneration, path: Path) -> tuple[VideoMemory, VideoMemory]:
    """The memory of the whole video, and of 64 of its seconds at equal distances, in one pass over the file."""
    reader = open_video(path)
    wanted = set(np.linspace(0, reader.frames_expected - 1, UNIFORM_FRAMES, dtype=int).tolist())
    kept: list[Tensor] = []

    def frames() -> Iterator[Tensor]:
        first = 0
        for chunk in reader.chunks(model.config.vision_config.image_size):
            kept.extend(chunk.frames[i] for i in range(len(chunk.frames)) if first + i in wanted)
            first += len(chunk.frames)
            yield chunk.frames

    memory = model.watch(frames(), progress=False)
    return memory, model.watch(torch.stack(kept), progress=False)


def _count_kept_events(tally: Tally, model: HourLlavaForConditionalGeneration, film: Film) -> None:
    kept = set(kept_frames(model.config, film.seconds).tolist())
    tally.events += len(film.events)
    tally.events_kept += sum(not kept.isdisjoint((e.start, e.start + 1)) for e in film.events)
