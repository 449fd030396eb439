# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark: every video is watched once and asked all its questions, and what is missing is told."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hourllava.errors import DataError, HourLlavaError, InputError, QuestionError, VideoError
from hourllava.memory import VideoMemory
from hourllava.model import Answer, HourLlavaForConditionalGeneration

from .answers import AnswerLog
from .benchmarks import Benchmark, Question
from .data_folder import DataFolder
from .scores import Scores
from .watched import WatchedVideos

PACKAGES = ("hourllava", "torch", "transformers", "av")


@dataclass(frozen=True)
class RunOptions:
    """What a user chooses of a run."""

    subtitles: bool = False
    subtitle_frames: int | None = None  # see `Subtitles.seen`
    budget: str | None = None  # as `ask` takes it; None: as the model's config says


@dataclass
class Lost:
    """What could not be asked, or not wholly; every entry names a video or a question, and the reason."""

    missing: list[str] = field(default_factory=list)  # videos that are not in the folder
    unreadable: dict[str, str] = field(default_factory=dict)  # videos, or their subtitles
    damaged: dict[str, str] = field(default_factory=dict)  # videos of which a part could not be read; they were asked
    refused: dict[str, str] = field(default_factory=dict)  # questions that could not be asked

    def __bool__(self) -> bool:
        return bool(self.missing or self.unreadable or self.damaged or self.refused)


@dataclass
class BenchmarkReport:
    """What a run gave."""

    title: str
    settings: dict[str, Any]
    videos: int  # that the benchmark names
    questions: int
    bare: list[str] | None  # videos asked about without subtitles, which have none; None: none were to be read
    lost: Lost
    scores: Scores

    @property
    def available(self) -> int:
        """Videos that could be asked about."""
        return self.videos - len(self.lost.missing) - len(self.lost.unreadable)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the settings, what was there, and the scores."""
        counts = {"named": self.videos, "available": self.available, "without_subtitles": self.bare}
        return {
            "title": self.title,
            "settings": self.settings,
            "videos": counts,
            "questions": {"all": self.questions, "asked": self.scores.total.asked},
            "lost": asdict(self.lost),
            **self.scores.to_dict(),
        }


def run_benchmark(
    model: HourLlavaForConditionalGeneration,
    benchmark: Benchmark,
    folder: DataFolder,
    memories: Path,
    answers: Path,
    options: RunOptions,
    progress: bool = True,
) -> BenchmarkReport:
    """Ask a model the questions of a benchmark.

    Args:
        model: where it is, there it runs.
        benchmark: one of `BENCHMARKS`.
        folder: the benchmark's files.
        memories: the repository in which what was watched is kept, for the next run, too.
        answers: JSON lines with every answer, written as they come; what is answered there is not asked again.
        options: how to ask.
        progress: show a bar on stderr.

    Raises:
        HourLlavaError: there is nothing to ask, the answers there are of other settings, or nothing can be written.
    """
    paths = benchmark.annotations(folder)
    questions = benchmark.questions(paths)
    by_video: dict[str, list[Question]] = {}
    for question in questions:
        by_video.setdefault(question.video, []).append(question)
    lost = Lost(refused={question.id: question.fault for question in questions if question.fault})
    files = {video: folder.video(video) for video in by_video}
    if not any(files.values()):
        why = f"none of the {len(files)} videos is in it" + (f"; {folder.packed}" if folder.packed else "")
        raise DataError(folder.root, why, "download and unpack them there, under the names that the benchmark gives")
    subtitle_files = _subtitle_files(benchmark, folder, by_video) if options.subtitles else {}
    settings = run_settings(model, benchmark, folder, paths, options)
    with AnswerLog(answers, settings) as log:
        run = _Run(model, benchmark, WatchedVideos(model, memories), log, options, lost)
        done = sum(question.id in log.records for question in questions)
        with tqdm(total=len(questions), initial=done, unit="question", desc="asking", disable=not progress) as bar:
            for video, path in files.items():
                left = [q for q in by_video[video] if q.id not in log.records and q.id not in lost.refused]
                if left and path is None:
                    lost.missing.append(video)
                elif left and path is not None:
                    run.ask(video, path, left, subtitle_files.get(video), bar)
        asked = [q for q in questions if q.id in log.records]
        lost.damaged = {q.video: log.records[q.id]["damage"] for q in asked if log.records[q.id]["damage"]}
        replies = [(q.read(log.records[q.id]["reply"]), q.answer, q.groups) for q in asked]
    bare = sorted({q.video for q in asked if not log.records[q.id]["subtitles"]}) if options.subtitles else None
    return BenchmarkReport(benchmark.title, settings, len(files), len(questions), bare, lost, Scores.of(replies))


@dataclass
class _Run:
    model: HourLlavaForConditionalGeneration
    benchmark: Benchmark
    watched: WatchedVideos
    log: AnswerLog
    options: RunOptions
    lost: Lost

    def ask(self, video: str, path: Path, questions: list[Question], subtitles: Path | None, bar: tqdm) -> None:
        """Ask questions about a video, and write the answers down."""
        seconds = 0

        def show(count: int) -> None:
            nonlocal seconds
            seconds += count
            bar.set_postfix_str(f"watching {video}: {seconds} s")

        try:
            memory = self.watched.memory(path, f"{self.benchmark.name}-{video}", show)
            texts = [self._prompt(question, subtitles, memory.frames) for question in questions]
        except (VideoError, DataError) as error:
            self.lost.unreadable[video] = str(error)
            bar.update(len(questions))
            return
        bar.set_postfix_str(video)
        for question, text in zip(questions, texts, strict=True):
            try:
                limit = self.benchmark.max_new_tokens
                answer = self.model.ask(memory, text, limit, budget=self.options.budget)
            except (InputError, QuestionError) as error:
                self.lost.refused[question.id] = str(error)
            else:
                self.log.add(_record(question, answer, memory) | {"subtitles": subtitles is not None})
            bar.update()

    def _prompt(self, question: Question, subtitles: Path | None, seconds: int) -> str:
        read = self.benchmark.read_subtitles
        if subtitles is None or read is None:
            return question.prompt
        try:
            lines = read(subtitles, question)
        except HourLlavaError as error:
            raise DataError(subtitles, f"its subtitles cannot be read ({error.why})", "download them again") from error
        return self.benchmark.join(question, lines, seconds, self.options.subtitle_frames)


def _record(question: Question, answer: Answer, memory: VideoMemory) -> dict[str, Any]:
    """What is kept of an answer."""
    chosen = question.read(answer.text)
    return {
        "id": question.id,
        "video": question.video,
        "reply": answer.text,
        "chosen": chosen,
        "answer": question.answer,
        "right": chosen == question.answer,
        "groups": question.groups,
        "moments": [[moment.start, moment.end, round(moment.share, 6)] for moment in answer.moments],
        "time_reference": question.time_reference,
        "seconds": memory.frames,
        "damage": memory.damage or "",
    }


def _subtitle_files(benchmark: Benchmark, folder: DataFolder, by_video: dict[str, list[Question]]) -> dict[str, Path]:
    """The subtitles of the videos that have any.

    Raises:
        DataError: the benchmark has none, or none is in the folder.
    """
    if benchmark.read_subtitles is None:
        raise DataError("--subtitles", f"{benchmark.title} has none", "leave that out")
    found = {video: folder.file(questions[0].subtitles) for video, questions in by_video.items()}
    files = {video: path for video, path in found.items() if path is not None}
    if not files:
        why = "none of the subtitles is in it" + (f"; {folder.packed}" if folder.packed else "")
        raise DataError(folder.root, why, "download and unpack them there, or leave out --subtitles")
    return files


def run_settings(
    model: HourLlavaForConditionalGeneration,
    benchmark: Benchmark,
    folder: DataFolder,
    annotations: list[Path],
    options: RunOptions,
) -> dict[str, Any]:
    """All that decides about the answers: a run can be repeated from it, and only one that agrees in it goes on."""
    config = model.config
    return {
        "benchmark": benchmark.name,
        "annotations": {str(path.relative_to(folder.root)): _digest([path.read_bytes()]) for path in annotations},
        "prompts": benchmark.prompts,
        "subtitles": options.subtitles,
        "subtitle_frames": options.subtitle_frames,
        "max_new_tokens": benchmark.max_new_tokens,
        "decoding": "greedy",
        "frames_per_second": 1,
        "features": "bfloat16",
        "budget": options.budget or config.memory_budget,
        "temporal_forgetting": config.temporal_forgetting,
        "spatial_forgetting": config.spatial_forgetting,
        "forgetting_seed": config.forgetting_seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _digest([_plain_config(model).encode()]),
        "weights": _digest(_weights(model)),
    }


def versions() -> dict[str, str]:
    """Of what a run rests on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(document, indent=1))
    os.replace(partial, path)


def _plain_config(model: HourLlavaForConditionalGeneration) -> str:
    """The config without what changes from place to place and release to release."""
    left_out = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
    config = model.config.to_dict()
    return json.dumps({key: value for key, value in config.items() if key not in left_out}, sort_keys=True, default=str)


def _weights(model: HourLlavaForConditionalGeneration) -> Iterator[bytes | memoryview]:
    """Every weight, with its name, kind and shape."""
    for name, weight in sorted(model.state_dict().items()):
        yield f"{name} {weight.dtype} {tuple(weight.shape)}".encode()
        yield weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
