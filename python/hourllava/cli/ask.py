# SPDX-License-Identifier: Apache-2.0
"""`hourllava ask`: watch a video or open a memory, ask, and show answers with their evidence."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hourllava.cli.watch import check_picture, take_in, warn_of_loss
from hourllava.errors import HourLlavaError, MemoryFileError, QuestionError

if TYPE_CHECKING:
    from hourllava.memory import ShardedMemory, VideoMemory
    from hourllava.model import Answer, Budget


@dataclass(frozen=True)
class AskRequest:
    """One call of `hourllava ask`."""

    video: Path
    questions: list[str]
    model: str
    plot: Path | None
    evidence: Path | None
    json: bool
    progress: bool
    subtitles: Path | None = None
    budget: "Budget | str | None" = None  # None: what the model's config says


def ask(request: AskRequest) -> bool:
    """Answer on stdout, as text or JSON; True if part of the video was lost.

    Raises:
        HourLlavaError: anything that keeps the questions from being answered.
    """
    for number, question in enumerate(request.questions, 1):
        if not question.strip():
            raise QuestionError(f"question {number}", "it is empty", "ask something about the video")
    for picture in (request.plot, request.evidence):
        if picture:
            check_picture(picture)
    if request.plot and request.evidence and request.plot.resolve() == request.evidence.resolve():
        raise HourLlavaError("--plot and --evidence", "they name the same file", "give each a name of its own")
    from tqdm import tqdm

    from hourllava.cli.evidence import film_of, write_contact_sheet
    from hourllava.cli.together import processes, take_part
    from hourllava.memory import Repository
    from hourllava.model import Subtitles, best_device, load_model
    from hourllava.model.budget import as_budget

    if Repository.is_at(request.video):
        raise MemoryFileError(request.video, "it holds many memories", f"name one, as {request.video}/NAME")
    subtitles = Subtitles.read(request.subtitles) if request.subtitles else Subtitles(())
    model = load_model(request.model, device=best_device())
    with processes() as rank:
        take = take_in if rank is None else take_part
        memory, times = take(model, request.video, request.progress and not rank)
        film = film_of(request.video, memory) if request.evidence else None
        budget = request.budget or model.config.memory_budget
        asked = [subtitles.join(question.strip(), memory.frames) for question in request.questions]
        bar = tqdm(asked, "answering", unit="question", disable=not request.progress or bool(rank))
        answers = [model.ask(memory, question, budget=budget) for question in bar]
    if rank:
        return False  # the first process speaks for all
    answered = list(zip(request.questions, answers, strict=True))
    if request.plot:
        from hourllava.cli.plot import plot_attention

        plot_attention(request.plot, answered, request.video.name)
    if request.evidence and film:
        write_contact_sheet(request.evidence, answered, film)
    if request.json:
        print(json.dumps(_document(request, memory, as_budget(budget), times, answers), ensure_ascii=False))
    else:
        from hourllava.cli.text import print_answers, print_times

        print_answers(request.questions, answers)
        totals = {f"question {i}": answer.timings["total"] for i, answer in enumerate(answers, 1)}
        print_times(times | totals)
    return warn_of_loss(memory)


def _document(
    request: AskRequest,
    memory: "VideoMemory | ShardedMemory",
    budget: "Budget | None",
    times: dict[str, float],
    answers: list["Answer"],
) -> dict[str, Any]:
    """Everything that the text shows, and the whole curve of attention, for machines."""
    return {
        "video": str(request.video),
        "model": request.model,
        "seconds": memory.frames,
        "damage": memory.damage,
        "budget": asdict(budget) if budget else None,
        "watch": times,
        "plot": str(request.plot) if request.plot else None,
        "evidence": str(request.evidence) if request.evidence else None,
        "answers": [
            {
                "question": question,
                "answer": answer.text,
                "moments": [{"start": m.start, "end": m.end, "share": m.share} for m in answer.moments],
                "mass": [round(share, 8) for share in answer.mass.tolist()],
                "likely": [{"token": token, "probability": p} for token, p in answer.top_tokens],
                "timings": {stage: took for stage, took in answer.timings.items() if stage != "total"},
            }
            for question, answer in zip(request.questions, answers, strict=True)
        ],
    }
