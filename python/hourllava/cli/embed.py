# SPDX-License-Identifier: Apache-2.0
"""`hourllava embed`: the vision features of a whole data set into a repository, by any number of processes."""

import argparse
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from hourllava.cli.cluster import work_on_ray
from hourllava.errors import HourLlavaError

if TYPE_CHECKING:
    from hourllava.data.embedding import Job, Outcome
    from hourllava.memory import Repository

DESCRIPTION = """\
Extract the vision features of every video that MANIFEST names into REPOSITORY, where `hourllava ask REPOSITORY/NAME`
and training find them. What is committed is never done again: after an interruption, the same command goes on.

MANIFEST is a folder of videos, a text file with a path on each line, or a data set's JSON, JSONL, parquet or mixture
YAML. Several machines share the work by ranks, on a file system that all of them see and that has POSIX locks:
under torchrun or srun, `sh -c 'hourllava embed data.yaml -o features --rank $RANK --world $WORLD_SIZE'`. Or a Ray
cluster whose machines see that file system does it: `--ray auto --processes 16`."""
EXIT_OK, EXIT_ERROR, EXIT_LOSS = 0, 1, 3  # as of every command


def add_embed(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `hourllava embed MANIFEST -o REPOSITORY`."""
    raw = argparse.RawDescriptionHelpFormatter
    embed = commands.add_parser(
        "embed", help="extract a data set's vision features once", description=DESCRIPTION, formatter_class=raw
    )
    embed.add_argument("manifest", metavar="MANIFEST", type=Path, help="which videos")
    embed.add_argument(
        "-o", "--output", metavar="REPOSITORY", type=Path, required=True, help="a directory of memories, may be new"
    )
    embed.add_argument("--model", default="tiny", help="a preset or a model's directory (default: tiny)")
    embed.add_argument(
        "--precision",
        choices=("bfloat16", "int8"),
        default="bfloat16",
        help="of the features that are kept (default: bfloat16)",
    )
    embed.add_argument("--processes", metavar="N", type=int, default=1, help="how many on this machine (default: 1)")
    embed.add_argument("--rank", metavar="R", type=int, default=0, help="this machine's number, from 0")
    embed.add_argument("--world", metavar="W", type=int, default=1, help="how many machines there are")
    embed.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="let a Ray cluster do it, with --processes at the same time: its address, auto for the one that runs, or "
        "nothing for one on this machine",
    )
    embed.add_argument(
        "--import",
        dest="imported",
        action="store_true",
        help="MANIFEST names the original's .pt feature files, which the tower of --model made",
    )
    embed.add_argument("--progress", action="store_true", help="show the progress bar even if stderr is no terminal")
    embed.set_defaults(run=run)


@dataclass
class Share:
    """What one process needs to do its part; sent to it whole."""

    jobs: list["Job"]
    number: int  # of the process on this machine
    repository: Path
    model: str
    precision: str
    imported: bool
    processes: int


def run(args: argparse.Namespace) -> int:
    """Embed what falls to this machine, print what became of it, and return the exit code.

    Raises:
        HourLlavaError: nothing can be done, the repository cannot be written, or a process was killed.
    """
    if args.processes < 1 or args.world < 1 or not 0 <= args.rank < args.world:
        what = f"--processes {args.processes} --rank {args.rank} --world {args.world}"
        raise HourLlavaError(what, "these do not fit", "give at least one process, and a rank from 0 below the world")
    from tqdm import tqdm

    from hourllava.data.embedding import Outcome, list_jobs
    from hourllava.memory import Repository
    from hourllava.model.loading import model_folder

    model_folder(args.model)  # that it is missing shows before anything is made
    jobs = list_jobs(args.manifest, args.imported)[args.rank :: args.world]
    repository = Repository(args.output)
    common = (args.output, args.model, args.precision, args.imported)
    shares = [Share(jobs[i :: args.processes], i, *common, args.processes) for i in range(args.processes)]
    outcomes: list[Outcome] = []
    frames = 0
    with tqdm(
        total=len(jobs), unit="video", desc="embedding", disable=not (args.progress or sys.stderr.isatty())
    ) as bar:

        def take(event: int | Outcome) -> None:
            nonlocal frames
            if isinstance(event, int):
                frames += event
                bar.set_postfix_str(f"{frames} s of video")
            else:
                outcomes.append(event)
                bar.update()

        if args.ray is not None and jobs:
            fault = work_on_ray(args.ray, args.processes, jobs, common, take)
        else:
            fault = _work(shares[0], take) if len(shares) == 1 else _work_in_processes(shares, take)
    return _conclude(repository, outcomes, fault)


def _work(share: Share, tell: "Callable[[int | Outcome], None]") -> HourLlavaError | None:
    """Do the jobs of one process; tell the frames as they are done, and what became of each job.

    Returns:
        why it had to stop before the end, or None.
    """
    import torch

    from hourllava.data.embedding import take_in
    from hourllava.memory import Repository
    from hourllava.model import FrameWriter, best_device, load_model

    try:
        model = load_model(share.model, device=best_device(share.number))
        if model.device.type == "cpu" and share.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // share.processes))
        writer, repository = FrameWriter(model), Repository(share.repository)
        size = None if share.imported else model.config.vision_config.image_size
        for job in share.jobs:
            tell(take_in(job, repository, writer, size, share.precision, tell))
    except HourLlavaError as error:
        return error
    return None


def _work_in_processes(shares: list[Share], tell: "Callable[[int | Outcome], None]") -> HourLlavaError | None:
    """`_work` with a process for each share; one that cannot go on stops them all, one that is killed only itself."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads' state, and GPUs forbid it
    processes: dict[Connection, BaseProcess] = {}
    fault = killed = None
    try:
        for share in shares:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(share, sender), daemon=True)
            process.start()
            sender.close()  # so that the pipe ends when the process does
            processes[receiver] = process
        while processes and fault is None:
            for ready in wait(list(processes)):
                assert isinstance(ready, Connection)
                try:
                    event = ready.recv()
                except EOFError:
                    killed = _ending(processes.pop(ready)) or killed
                    continue
                if isinstance(event, HourLlavaError):
                    fault = event
                else:
                    tell(event)
    finally:
        for left in processes.values():
            left.terminate()
            left.join()
    return fault or killed


def _child(share: Share, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends its children
    try:
        fault = _work(share, sender.send)
        if fault is not None:
            sender.send(fault)
    except BrokenPipeError:
        os._exit(1)  # the parent is gone


def _ending(process: BaseProcess) -> HourLlavaError | None:
    process.join()
    if process.exitcode == 0:
        return None
    code = process.exitcode or 0
    how = f"it was killed (signal {-code})" if code < 0 else f"it ended with code {code}"
    todo = "run the same command again: it goes on from what is committed"
    return HourLlavaError(f"process {process.pid}", how, todo)


def _conclude(repository: "Repository", outcomes: "list[Outcome]", fault: HourLlavaError | None) -> int:
    """Print the table and the sums; the exit code."""
    from hourllava.cli.text import print_failures
    from hourllava.video import clock

    if fault is not None and not outcomes:
        raise fault
    states: Counter[str] = Counter(outcome.state for outcome in outcomes)
    words = {"done": "embedded", "held": "there already", "busy": "left to another process", "failed": "failed"}
    counts = ", ".join(f"{states[state]} {word}" for state, word in words.items() if states[state])
    frames = sum(outcome.frames for outcome in outcomes)
    print(f"{repository.folder}: {counts or 'nothing done'}; {clock(frames)} of video are new")
    names = [outcome.job.names[0] for outcome in outcomes if outcome.state in ("done", "held")]
    for line in _sizes(repository, names):
        print(line)
    told = [outcome for outcome in outcomes if outcome.reason]
    print_failures([(outcome.job.id, outcome.state, outcome.reason) for outcome in told])
    if fault is not None:
        raise fault
    if states["failed"]:
        return EXIT_ERROR
    return EXIT_LOSS if told else EXIT_OK


def _sizes(repository: "Repository", names: list[str]) -> Iterator[str]:
    """What the features of these videos take, a line for each precision."""
    from hourllava.video import clock

    videos = [repository.catalogue.video(name) for name in names]
    for precision in sorted({video.precision for video in videos}):
        alike = [video for video in videos if video.precision == precision]
        segments = [segment for video in alike for segment in repository.catalogue.segments(video.name)]
        frames, size = sum(video.frames for video in alike), sum(segment.size for segment in segments)
        error = max((segment.error for segment in segments), default=0.0)
        yield (
            f"{precision}: {clock(frames)} of {len(alike)} videos in {size / 1e6:.1f} MB, "
            f"{size / max(1, frames) / 1e3:.2f} kB a second, rounding error at most {error:.1e}"
        )
