# SPDX-License-Identifier: Apache-2.0
"""Where rows lie: every slot once, pages opened in order, nothing moved by later frames."""

import pytest
import torch

from hourllava.memory.pages import (
    PAGE_SIZE,
    frame_slots,
    join_layouts,
    page_count,
    row_layout,
    rows_in_use,
    video_layout,
    visual_pages,
)

CPU = torch.device("cpu")


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
    pages, used = visual_pages(frames, per_frame, slots.device)
    assert torch.equal(pages.repeat_interleave(used), page[: frames * per_frame])


@pytest.mark.parametrize("per_frame", [4, 64, 200])
def test_slots_do_not_depend_on_later_frames(per_frame):
    whole, _ = frame_slots(torch.arange(300), per_frame)
    part, _ = frame_slots(torch.arange(130), per_frame)
    assert torch.equal(part[: 130 * per_frame], whole[: 130 * per_frame])
    assert torch.equal(part[130 * per_frame :], whole[300 * per_frame : 300 * per_frame + 130])
    # Pages are numbered as they are first needed, so that a growing memory only ever adds pages at the end.
    assert int(part.max()) // PAGE_SIZE < page_count(130, per_frame)


def test_batch_is_its_memories_one_after_the_other():
    images = torch.tensor([5, 9, 9] * 50)
    layouts = [video_layout(3, 16, CPU), None, row_layout(images), video_layout(140, 16, CPU)]
    joined = join_layouts(layouts, CPU)
    first_row = first_page = 0
    for sample, layout in enumerate(layouts):
        listed = joined.page_table[sample]
        listed = listed[listed >= 0].tolist()
        if layout is None:
            assert listed == []
            continue
        rows = slice(first_row, first_row + len(layout.slots))
        assert torch.equal(joined.slots[rows], layout.slots + first_page * PAGE_SIZE)
        assert torch.equal(joined.position_ids[rows], layout.position_ids)
        assert listed == list(range(first_page, first_page + layout.num_pages))
        first_row, first_page = rows.stop, first_page + layout.num_pages
    assert (joined.num_pages, len(joined.slots)) == (first_page, first_row)


def test_layout_of_one_memory():
    layout = video_layout(140, 16, CPU)
    slots, position_ids = frame_slots(torch.arange(140), 16)
    assert layout.num_pages == page_count(140, 16)
    assert torch.equal(layout.slots, slots)
    assert torch.equal(layout.position_ids, position_ids)
    ids = torch.tensor([7] * 129)
    layout = row_layout(ids)
    assert layout.num_pages == 2
    assert layout.slots.tolist() == list(range(129))
    assert layout.position_ids.equal(ids)
