# SPDX-License-Identifier: Apache-2.0
"""Budgets: how they are said, how many pages they are, and what a question then reads."""

import pytest
import torch
from tiny_model import make_model

from hourllava.errors import InputError
from hourllava.memory import MemoryPages
from hourllava.memory.pages import PAGE_SIZE, frame_slots, page_count, video_layout
from hourllava.model import Budget
from hourllava.model.budget import as_budget
from hourllava.model.memaug import CrossAttention, MemoryUse, PageBudget
from hourllava.model.stream import QueryStream
from hourllava_ext import reference

QUESTION = "Which colour was the circle?"
SECONDS = 150


def make_frames(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)


def pages_of(budget, frames=SECONDS, seconds=SECONDS, per_frame=64):
    """What a budget is in a memory whose pages lie in a pool of twice as many, in another order."""
    second, count = torch.arange(frames) * seconds // frames, page_count(frames, per_frame)
    table = torch.arange(2 * count - 1, -1, -2, dtype=torch.int32)[None]
    nothing = torch.empty(0)
    pages = MemoryPages(nothing, nothing, nothing, torch.full((2 * count,), PAGE_SIZE), table)
    return budget.resolve(second, seconds, per_frame, pages)


@pytest.mark.parametrize(
    ("text", "budget", "pages"),
    [
        ("12p", Budget(pages=12), 12),
        ("30s", Budget(seconds=30), page_count(30, 64)),
        (" 1.5s", Budget(seconds=1.5), page_count(2, 64)),
        ("9000s", Budget(seconds=9000), page_count(SECONDS, 64)),
        ("1/16", Budget(part=16), -(-page_count(SECONDS, 64) // 16)),
        ("1/9999", Budget(part=9999), 1),
        (f"1/{10**17}", Budget(part=10**17), 1),
        ("1/16,5p", Budget(part=16, least=5), -(-page_count(SECONDS, 64) // 16)),
        ("1/16, 32p", Budget(part=16, least=32), 32),
        (f"1/16,{10**17}p", Budget(part=16, least=10**17), page_count(SECONDS, 64)),
        (f"{10**17}p", Budget(pages=10**17), page_count(SECONDS, 64)),
        (f"{10**30}s", Budget(seconds=1e30), page_count(SECONDS, 64)),
    ],
)
def test_forms(text, budget, pages):
    assert Budget.parse(text) == budget
    assert pages_of(budget).pages == pages


def test_seconds_of_a_repeated_video():
    """Ten seconds that the memory holds as 128 frames: half of them are half of its pages."""
    assert pages_of(Budget(seconds=5), frames=128, seconds=10).pages == page_count(64, 64)


NO_BUDGETS = ["", "60", "p", "0p", "0s", "1/0", "-4p", "1/2p", "1/2,p", "1/2,4s", "4p,2p", "sixty seconds"]


@pytest.mark.parametrize("text", [*NO_BUDGETS, "9" * 5000 + "p"])
def test_what_is_no_budget(text):
    with pytest.raises(InputError, match="write pages as 128p, seconds as 60s"):
        Budget.parse(text)


def test_bad_choices():
    with pytest.raises(InputError, match="or more than one"):
        Budget(pages=4, seconds=4)
    with pytest.raises(InputError, match="there is no mode rotary; choose both, content, rotated"):
        Budget(pages=4, mode="rotary")
    with pytest.raises(InputError, match="a least of 5 pages is for a share; write it as 1/16,32p"):
        Budget(pages=4, least=5)
    with pytest.raises(InputError, match="a least of 0 pages"):
        Budget.parse("1/2,0p")
    with pytest.raises(InputError, match="a tile of 0 rows"):
        Budget(pages=4, tile=0)
    for span in [(5, 5), (5, 4), (-1, 4)]:
        with pytest.raises(InputError, match="there is no second from"):
            Budget(pages=4, keep=(span,))
    with pytest.raises(InputError, match="takes 77 pages, and the budget is 4"):
        pages_of(Budget(pages=4, keep=((0, 1e9),)))
    with pytest.raises(InputError, match="no second 150 to be always read, the video has 150; name seconds of the"):
        pages_of(Budget(pages=40, keep=((3, 5), (150, 151))))


def test_kept_pages_hold_the_spans():
    keep = pages_of(Budget(pages=40, keep=((2.5, 4), (130, 131)))).keep
    frames = torch.tensor([2, 3, 130])
    expected = (frame_slots(frames, 64)[0] // PAGE_SIZE).unique()
    last = 2 * page_count(SECONDS, 64) - 1
    assert keep.nonzero()[:, 0].tolist() == sorted((last - 2 * expected).tolist())


def test_all_of_it_is_exact_reading():
    model = make_model()
    memory = model.watch(make_frames(SECONDS), progress=False)
    exact = model.ask(memory, QUESTION)
    assert exact.page_mass.shape == (2, memory.num_pages)
    assert exact.page_mass.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    for budget in ("9999p", "150s", "1/1", Budget(part=1, mode="content", tile=7)):
        answer = model.ask(memory, QUESTION, budget=budget)
        torch.testing.assert_close(answer.page_mass, exact.page_mass)
        assert answer.text == exact.text
    again = model.ask(memory, QUESTION, budget="9999p")
    assert (again.top_tokens, again.page_mass.tolist()) == (exact.top_tokens, exact.page_mass.tolist())


def test_the_models_own_budget():
    """What the config says counts where a question does not, and "all" is exact reading in any case."""
    plain, frugal = make_model(), make_model(memory_budget="4p")
    memory = plain.watch(make_frames(SECONDS), progress=False)
    exact, few = plain.ask(memory, QUESTION), plain.ask(memory, QUESTION, budget="4p")
    read = {budget: frugal.ask(memory, QUESTION, budget=budget).page_mass for budget in (None, "all", "9p")}
    assert torch.equal(read[None], few.page_mass)
    assert torch.equal(read["all"], exact.page_mass)
    assert torch.equal(plain.ask(memory, QUESTION, budget="all").page_mass, exact.page_mass)
    assert (read["9p"] > 0).sum(1).tolist() == [9, 9]
    with pytest.raises(InputError, match=r"budget: '32' is no budget; write pages as 128p"):
        as_budget(32)
    with pytest.raises(InputError, match=r"'a lot' is no budget; write .* or all to read all of it"):
        make_model(memory_budget="a lot").ask(memory, QUESTION)


@pytest.mark.parametrize("mode", ["both", "content", "rotated"])
def test_no_more_than_the_budget_is_read(mode):
    model = make_model()
    memory = model.watch(make_frames(SECONDS), progress=False)
    few = model.ask(memory, QUESTION, budget=Budget(pages=4, mode=mode))
    assert (few.page_mass > 0).sum(1).tolist() == [4, 4]
    kept = Budget(pages=4, mode=mode, keep=((20, 22), (90, 91)))
    must = kept.resolve(torch.arange(SECONDS), SECONDS, 64, memory.pages[0]).keep
    answer = model.ask(memory, QUESTION, budget=kept)
    assert bool((answer.page_mass[:, must] > 0).all())
    assert int((answer.page_mass > 0).sum()) == 8


def test_a_short_video_under_a_budget():
    model = make_model(min_frames=48)
    memory = model.watch(make_frames(9), progress=False)
    answer = model.ask(memory, QUESTION, budget=Budget(seconds=2, keep=((3, 4),)))
    assert float(answer.mass[3]) > 0
    assert float(answer.mass.sum()) == pytest.approx(1, abs=1e-5)


def test_tiles_choose_for_themselves():
    """Each tile of rows reads what it would choose alone; the mass is that of the whole sample."""
    model = make_model()
    block: CrossAttention = model.model.vision_resampler.blocks[0].cross_attn
    config, lengths = model.config.text_config, [11, 0, 5]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(lengths), config.hidden_size, generator=generator)
    tokens = torch.randn(90 * 65, config.hidden_size, generator=generator)
    layout = video_layout(90, 64, torch.device("cpu"))
    inv_freq = torch.ones(2)
    weight = torch.rand(len(rows), generator=generator)
    with torch.no_grad():
        pages = block.write(tokens, layout, inv_freq)
        pages = type(pages)(*[getattr(pages, name) for name in pages.__dataclass_fields__ if name != "page_table"],
                            page_table=layout.page_table.expand(3, -1).contiguous())  # fmt: skip
        stream = QueryStream(torch.arange(len(rows)) * 300, torch.tensor([0, 11, 11, 16]), lengths)
        use = MemoryUse(budget=PageBudget(6, "both", tile=4), mass_weight=weight)
        out, lse, mass = block(rows, stream, inv_freq, pages, use)
        expected = torch.zeros(len(pages.page_lengths))
        for first, end in [(0, 4), (4, 8), (8, 11), (11, 15), (15, 16)]:
            query = block.Wq(rows[first:end]).view(end - first, -1, block.head_dim)
            where = stream.position_ids[first:end], torch.tensor([0, end - first]), inv_freq
            table = reference.retrieve(query, *where, pages.key_summary, layout.page_table, pages.page_lengths, 6)
            read = (query, pages.key_pages, pages.value_pages, table, pages.page_lengths, *where)
            attended, sums, share = reference.paged_attention(*read, mass_weight=weight[first:end])
            torch.testing.assert_close(out[first:end], block.Wo(attended.flatten(1)))
            torch.testing.assert_close(lse[:, first:end], sums)
            sample = slice(0, 11) if end <= 11 else slice(11, 16)
            expected[table[0].long()] += share[0] * weight[first:end].sum() / weight[sample].sum()
        torch.testing.assert_close(mass, expected)
