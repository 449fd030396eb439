# SPDX-License-Identifier: Apache-2.0
"""Where rows lie: every slot once, pages opened in order, nothing moved by later frames."""

import pytest
import torch

from hourllava.memory.pages import PAGE_SIZE, batch_layout, frame_slots, page_count, rows_in_use


@pytest.mark.parametrize("per_frame", [1, 4, 49, 64, 128, 200])
@pytest.mark.parametrize("frames", [1, 2, 127, 128, 129, 700])
def test_slots_fill_pages_without_gaps(frames, per_frame):
    slots, position_ids = frame_slots(torch.arange(frames), per_frame)
    assert len(slots) == len(slots.unique()) == frames * (per_frame + 1)
    assert torch.equal(position_ids.sort().values, torch.arange(frames * (per_frame + 1)))
    page = slots // PAGE_SIZE
    assert torch.equal(page.unique(), torch.arange(page_count(frames, per_frame)))
    # At most one page of either kind is not full, and every page is filled from its first row on.
    rows = torch.bincount(page)
    assert int((rows < PAGE_SIZE).sum()) <= 2
    assert torch.equal(rows_in_use(frames, per_frame, slots.device), rows.to(torch.int32))
    assert torch.equal(slots.sort().values % PAGE_SIZE, torch.cat([torch.arange(n) for n in rows.tolist()]))


@pytest.mark.parametrize("per_frame", [4, 64, 200])
def test_slots_do_not_depend_on_later_frames(per_frame):
    whole, _ = frame_slots(torch.arange(300), per_frame)
    part, _ = frame_slots(torch.arange(130), per_frame)
    assert torch.equal(part[: 130 * per_frame], whole[: 130 * per_frame])
    assert torch.equal(part[130 * per_frame :], whole[300 * per_frame : 300 * per_frame + 130])
    # Pages are numbered as they are first needed, so that a growing memory only ever adds pages at the end.
    assert int(part.max()) // PAGE_SIZE < page_count(130, per_frame)


def test_batch_is_its_memories_one_after_the_other():
    frames, per_frame = [3, 140, 1], 16
    layout = batch_layout(frames, per_frame, torch.device("cpu"))
    pages = [page_count(n, per_frame) for n in frames]
    assert layout.num_pages == sum(pages)
    visual, newline = layout.slots.split([sum(frames) * per_frame, sum(frames)])
    visual_ids, newline_ids = layout.position_ids.split([sum(frames) * per_frame, sum(frames)])
    first_frame = first_page = 0
    for sample, count in enumerate(frames):
        slots, position_ids = frame_slots(torch.arange(count), per_frame)
        lines = slice(first_frame, first_frame + count)
        rows = slice(lines.start * per_frame, lines.stop * per_frame)
        assert torch.equal(torch.cat([visual[rows], newline[lines]]), slots + first_page * PAGE_SIZE)
        assert torch.equal(torch.cat([visual_ids[rows], newline_ids[lines]]), position_ids)
        listed = layout.page_table[sample]
        assert listed[listed >= 0].tolist() == list(range(first_page, first_page + pages[sample]))
        first_frame, first_page = first_frame + count, first_page + pages[sample]
