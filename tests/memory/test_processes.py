# SPDX-License-Identifier: Apache-2.0
"""Two processes read a video of a repository while a third appends to it: each sees whole prefixes, and none waits."""

import os
import traceback

import pytest
import torch
from memories import SmallWriter, make_frames

from hourllava.memory import Repository

FRAMES, OPENED = 150, 12


def in_process(work):
    """Run `work` in a process of its own; call what this returns to wait for it, True if all went well."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("pages", [False, True])
def test_two_read_while_one_appends(tmp_path, pages):
    Repository(tmp_path / "alone").add("film", SmallWriter()).append(make_frames(FRAMES))
    whole = Repository(tmp_path / "alone").open("film", SmallWriter(), append=False)
    Repository(tmp_path).add("film", SmallWriter(), pages=pages).close()

    def append():
        memory = Repository(tmp_path).open("film", SmallWriter())
        for number in range(FRAMES):
            memory.append(make_frames(1, number))

    def read():
        seen = set()
        while not {FRAMES} <= seen or len(seen) < OPENED:
            memory = Repository(tmp_path).open("film", None if pages else SmallWriter(), append=False)
            prefix, frames = memory.prefix(), memory.frames
            assert torch.equal(prefix.tokens, whole.tokens[:frames])
            for ours, theirs in zip(prefix.pages, whole.pages, strict=True):
                inside = torch.arange(128) < ours.page_lengths[:, None]
                for mine, full in [(ours.key_pages, theirs.key_pages), (ours.value_pages, theirs.value_pages)]:
                    rows = (x[: len(inside)].transpose(1, 2)[inside] for x in (mine, full))
                    assert torch.equal(*rows)
            if frames == FRAMES:
                break
            seen.add(frames)
        assert len(seen) > 2, "the writer was too quick to be seen"

    ended = [in_process(work) for work in (append, read, read)]
    assert [wait() for wait in ended] == [True, True, True]
    assert Repository(tmp_path).videos()[0].frames == FRAMES
