# SPDX-License-Identifier: Apache-2.0
"""Peak host memory is the same for a file of ten minutes and for one of an hour."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from clips import SIDE, board
from tiny_model import make_model

from hourllava.video import write_video

MINUTES = (10, 60)
FPS = 2

# Each runs in a process of its own, since a peak is never forgotten. The model is small, but each part of it is there.
PRELUDE = """
import json, resource, sys
import torch
torch.set_num_threads(1)

def finish(seconds):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak": peak}))
"""

# Decoder, resize, tower and projector, whose output goes nowhere.
INTAKE = """
from hourllava.model import FrameWriter, load_model
from hourllava.video import open_video
model = load_model(sys.argv[2])
writer, seconds = FrameWriter(model), 0
with torch.no_grad():
    for chunk in open_video(sys.argv[1]).chunks(model.config.vision_config.image_size):
        seconds += len(chunk.frames)
        writer.keys_values(writer.project(writer.encode(chunk.frames)))
finish(seconds)
"""

# The command itself, from the video to the saved memory.
WATCH = """
import contextlib
from pathlib import Path
from safetensors import safe_open
from hourllava.cli import watch
output = Path(sys.argv[1] + ".memory")
with contextlib.redirect_stdout(None):
    assert not watch.watch(Path(sys.argv[1]), output, sys.argv[2], progress=False)
with safe_open(output, "pt") as file:
    finish(file.get_slice("tokens").get_shape()[0])
"""


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, int]]:
    folder = tmp_path_factory.mktemp("clips")
    make_model().save_pretrained(folder / "model")
    for minutes in MINUTES:
        write_video(folder / f"{minutes}.mp4", (board(i) for i in range(minutes * 60 * FPS)), FPS, SIDE)

    def run(code: str, minutes: int) -> dict[str, int]:
        arguments = [str(folder / f"{minutes}.mp4"), str(folder / "model")]
        program = [sys.executable, "-c", PRELUDE + code, *arguments]
        done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    return run


def test_intake_is_flat(measure: Callable[[str, int], dict[str, int]]) -> None:
    short, long = (measure(INTAKE, minutes) for minutes in MINUTES)
    assert [short["seconds"], long["seconds"]] == [60 * minutes for minutes in MINUTES]
    assert long["peak"] <= 1.1 * short["peak"]


def test_watching_is_flat(measure: Callable[[str, int], dict[str, int]]) -> None:
    """An hour's memory is larger than all that the bound leaves: it must have been out of RAM while it was made."""
    short, long = (measure(WATCH, minutes) for minutes in MINUTES)
    assert [short["seconds"], long["seconds"]] == [60 * minutes for minutes in MINUTES]
    assert long["peak"] <= 1.1 * short["peak"]
