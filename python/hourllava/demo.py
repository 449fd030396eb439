# SPDX-License-Identifier: Apache-2.0
"""What `make demo` runs: a film of one hour is rendered once, watched once, and asked one question of each topic.

The film is asked through the command line, as a user would, and its answers stand beside what really happened.
"""

import json
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hourllava.cli.text import print_times
from hourllava.data import TOPICS, Film, Question
from hourllava.data.film import EVENT_SECONDS
from hourllava.errors import HourLlavaError
from hourllava.model import Moment
from hourllava.video import clock

FOLDER = Path("build/demo")
SEED = 2**51  # training and evaluation draw other films
SECONDS = 3600


def main() -> int:
    """Run the demo from the repository root and return the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    began = time.perf_counter()
    try:
        film = Film.random(SEED, SECONDS)
        video = render(film, console)
        questions = one_of_each_topic(film)
        picture = FOLDER / "attention.png"
        result = ask(video, questions, picture, console)
        show_answers(questions, result, console)
        show_times(result, console)
    except HourLlavaError as error:
        print(f"hourllava: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(f"Attention over the hour: [bold]{picture}[/]")
    console.print(f"The whole demo took {time.perf_counter() - began:.0f} s.")
    return 0


def render(film: Film, console: Console) -> Path:
    """Write the film unless an earlier run already did; its name tells films apart."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    video = FOLDER / f"hour-{zlib.crc32(repr(film).encode()):08x}.mp4"
    if not video.exists():
        console.print(f"Rendering a film of {clock(film.seconds)} with {len(film.events)} events of two seconds ...")
        film.write(video)
    console.print(f"The film: [bold]{video}[/], {video.stat().st_size / 1e6:.1f} MB")
    return video


def one_of_each_topic(film: Film) -> list[Question]:
    """Six questions that only a two-second event answers, about different events where the film has enough."""
    needles = [q for q in film.questions() if q.needle]
    chosen: list[Question] = []
    # The topic with the fewest questions chooses first.
    for topic in sorted(TOPICS, key=lambda t: sum(q.topic == t for q in needles)):
        used = {q.second for q in chosen}
        chosen.append(min((q for q in needles if q.topic == topic), key=lambda q: q.second in used))
    return sorted(chosen, key=lambda q: TOPICS.index(q.topic))


def ask(video: Path, questions: list[Question], picture: Path, console: Console) -> dict[str, Any]:
    """Run `hourllava ask --json`; its progress goes to the terminal, its answers come back."""
    arguments = ["ask", str(video), *(q.text for q in questions), "--plot", str(picture), "--json", "--progress"]
    console.print(f"\n$ {shlex.join(['hourllava', *arguments])}\n", markup=False, highlight=False, soft_wrap=True)
    console.file.flush()
    picture.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "hourllava", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        why = f"`hourllava ask` ended with exit code {done.returncode}"
        raise HourLlavaError("demo", why, "its own message above says what to do")
    if not picture.exists():
        raise HourLlavaError(picture, "`hourllava ask` has not drawn it", "run `hourllava doctor`")
    return json.loads(done.stdout)


def show_answers(questions: list[Question], result: dict[str, Any], console: Console) -> None:
    """Each answer beside the truth, and where attention rests beside where the event was."""
    table = Table("topic", "question", "answer", "truth", "", "attention rests most on", "the event was at")
    right = 0
    for question, answer in zip(questions, result["answers"], strict=True):
        same = answer["answer"] == question.answer
        right += same
        moments = [f"{moment} ({moment.share:.0%})" for moment in (Moment(**m) for m in answer["moments"])]
        event = ""
        if question.second is not None:
            share = sum(answer["mass"][question.second : question.second + EVENT_SECONDS])
            event = f"{clock(question.second)} ({share:.0%})"
        mark = "[green]right[/]" if same else "[red]wrong[/]"
        where = moments[0] if moments else "nothing"
        table.add_row(question.topic, question.text, answer["answer"], question.answer, mark, where, event)
    console.print(table)
    console.print("In brackets: the share of the question's attention to the hour.")
    console.print(f"{right} of {len(questions)} right.\n")


def show_times(result: dict[str, Any], console: Console) -> None:
    """Seconds of each stage, and how much sooner the second answer comes than the first."""
    asked = [sum(answer["timings"].values()) for answer in result["answers"]]
    print_times(result["watch"] | {f"question {number}": seconds for number, seconds in enumerate(asked, 1)})
    first = sum(result["watch"].values()) + asked[0]
    console.print(
        f"\nThe first answer took {first:.1f} s, because the hour had to be watched; the second took {asked[1]:.2f} s, "
        f"[bold]{first / asked[1]:.0f} times less[/]: no frame was decoded or encoded again."
    )


if __name__ == "__main__":
    sys.exit(main())
