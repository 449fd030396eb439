# SPDX-License-Identifier: Apache-2.0
"""`hourllava memory`: what a repository holds, and keeping it in order."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hourllava.errors import MemoryFileError

if TYPE_CHECKING:
    from hourllava.memory import Repository
    from hourllava.memory.catalogue import Video

ACTIONS = {
    "list": "the videos it holds",
    "info": "everything the catalogue says of a video",
    "verify": "read every byte and compare it with its checksum",
    "repair": "cut off what is damaged, remove what nothing needs",
    "export": "write a video's memory to one file",
    "delete": "forget a video",
}


def add_memory(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `hourllava memory ACTION REPOSITORY [NAME]`."""
    memory = commands.add_parser("memory", help="look after a repository of memories")
    actions = memory.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    for action, text in ACTIONS.items():
        parser = actions.add_parser(action, help=text, description=f"{text[0].upper()}{text[1:]}.")
        parser.add_argument("repository", metavar="REPOSITORY", type=Path, help="its directory")
        if action in ("verify", "repair"):
            parser.add_argument("name", metavar="NAME", nargs="?", help="one video (default: all)")
        elif action != "list":
            parser.add_argument("name", metavar="NAME", help="the video")
        if action == "export":
            parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the file to write")
            parser.add_argument("--model", default="tiny", help="a preset or a model's directory (default: tiny)")
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do one action and return the exit code.

    Raises:
        HourLlavaError: it cannot be done, or `verify` found something.
    """
    from hourllava.memory import Repository

    if not Repository.is_at(args.repository):
        why = "there is no repository there"
        raise MemoryFileError(args.repository, why, "name a directory that `hourllava watch --into` made")
    repository = Repository(args.repository)
    names = [args.name] if getattr(args, "name", None) else [video.name for video in repository.videos()]
    if args.action == "list":
        _list(repository)
    elif args.action == "info":
        _info(repository, args.name)
    elif args.action == "verify":
        _verify(repository, names)
    elif args.action == "repair":
        from hourllava.memory import repair

        for name in names:
            print("\n".join(repair(repository, name)) or f"{name}: nothing to do")
    elif args.action == "export":
        _export(repository, args.name, args.output, args.model)
    else:
        repository.delete(args.name)
        print(f"{args.name}: forgotten")
    return 0


def size_of(repository: "Repository", video: "Video") -> int:
    """Bytes that a video takes on the disk."""
    return sum(path.stat().st_blocks * 512 for path in (repository.folder / video.name).iterdir())


def _list(repository: "Repository") -> None:
    from hourllava.video import clock

    for video in repository.videos():
        kept = f"{video.precision} features" + (" and ready pages" if video.pages else "")
        print(f"{video.name}: {clock(video.frames)}, {size_of(repository, video) / 1e6:.1f} MB, {kept}")


def _info(repository: "Repository", name: str) -> None:
    from hourllava.video import clock

    video = repository.catalogue.video(name)
    segments = repository.catalogue.segments(name)
    when = "%Y-%m-%d %H:%M:%S"
    shown = {
        "video": f"{video.name}, from {video.source or 'frames'}",
        "length": f"{clock(video.frames)} in {len(segments)} segments",
        "size": f"{size_of(repository, video) / 1e6:.1f} MB",
        "features": f"{video.per_frame} x {video.feature_width} a second, {video.precision}",
        "error": f"{max((s.error for s in segments), default=0.0):.2e} of the features' own size (root mean square)",
        "ready pages": f"{video.blocks} blocks, {video.kv_heads} x {video.head_dim}" if video.pages else "none",
        "model": video.model,
        "vision tower": video.tower,
        "begun": time.strftime(when, time.localtime(video.created)),
        "last append": time.strftime(when, time.localtime(video.changed)) if video.changed else "never",
        "damage": video.damage or "none",
    }
    print("\n".join(f"{word}: {value}" for word, value in shown.items()))


def _verify(repository: "Repository", names: list[str]) -> None:
    from hourllava.memory import verify

    wrong = repository.catalogue.check()
    if wrong is not None:
        raise MemoryFileError(repository.catalogue.path, f"it is damaged ({wrong})", "take it from a backup")
    problems = [problem for name in names for problem in verify(repository, name)]
    for problem in problems:
        print(f"{problem.video}: {problem.what}")
    if problems:
        why = f"it is damaged in {len(problems)} places"
        raise MemoryFileError(repository.folder, why, "run `hourllava memory repair`")
    print(f"{repository.folder}: {'1 video is' if len(names) == 1 else f'{len(names)} videos are'} sound")


def _export(repository: "Repository", name: str, output: Path, model: str) -> None:
    from hourllava.cli.watch import check_output
    from hourllava.model import FrameWriter, best_device, load_model

    check_output(output)
    repository.export(name, output, FrameWriter(load_model(model, device=best_device())))
    print(f"{output}: the memory of {name}, {output.stat().st_size / 1e6:.1f} MB")
