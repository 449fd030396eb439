# SPDX-License-Identifier: Apache-2.0
"""A writer is killed at random moments; what it had committed is there, whole, every time.

`PYTHONPATH=tests python tests/memory/test_kill.py 500` does it 500 times.
"""

import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from memories import SmallWriter, make_frames

from hourllava.memory import Repository, verify

CHUNK = 8


def write_until_killed(folder, acknowledge):
    """Append for ever; each acknowledged number of frames was committed before it was said."""
    memory = Repository(folder).open("film", SmallWriter())
    while True:
        memory.append(make_frames(CHUNK, memory.frames))
        os.write(acknowledge, memory.frames.to_bytes(8, "little"))


def kill_a_writer(folder, after, wait):
    """Fork a writer, kill it so many seconds after it began, or after its first commit if told to wait for that, and
    return the last number of frames that it acknowledged."""
    told, acknowledge = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            write_until_killed(folder, acknowledge)
        finally:
            os._exit(1)
    os.close(acknowledge)
    if wait:
        select.select([told], [], [])
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    with os.fdopen(told, "rb") as pipe:
        said = pipe.read()
    return int.from_bytes(said[-8:], "little") if said else 0


def survive(folder, kills, seed=0):
    """Kill writers one after the other on one video, which grows; begin a new one now and then."""
    rng, torn = random.Random(seed), 0
    torch.set_num_threads(1)
    for kill in range(kills):
        repository = Repository(folder / str(kill // 25))
        if kill % 25 == 0:
            repository.add("film", SmallWriter(), pages=kill % 50 == 0)
            held = 0
        wait = kill % 2 == 0
        acknowledged = kill_a_writer(repository.folder, rng.random() * 0.15, wait)
        frames = repository.videos()[0].frames
        assert frames > held or not wait, f"kill {kill} hit a writer that had done nothing"
        assert frames >= max(acknowledged, held), (
            f"kill {kill}: {acknowledged} frames were committed, {frames} are there"
        )
        assert frames % CHUNK == 0
        assert verify(repository, "film") == [], f"kill {kill}"
        memory = repository.open("film", SmallWriter())
        memory.close()
        expected = SmallWriter().project(SmallWriter().encode(make_frames(frames)).bfloat16().float())
        torch.testing.assert_close(memory.tokens, expected)
        files = {path.name for path in (repository.folder / "film").glob("features-*")}
        torn += len(files) > len(repository.catalogue.segments("film"))
        held = frames
    return torn


def test_killed_writers_lose_nothing_committed(tmp_path):
    survive(tmp_path, kills=20)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        torn = survive(Path(place), int(sys.argv[1]), seed=1)
        took = time.perf_counter() - began
    print(
        f"{sys.argv[1]} kills in {took:.0f} s: nothing committed was lost; {torn} left a file behind that never counted"
    )
