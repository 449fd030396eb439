# SPDX-License-Identifier: Apache-2.0
"""Memories within a budget: what comes in is what was watched, what is read stays, and the rest makes room."""

import random
import re
import threading

import pytest
import torch
from memories import SmallWriter, make_frames
from tiny_model import make_model

from hourllava.errors import AdmissionError, InputError, MemoryFileError
from hourllava.memory import MemoryPool, Repository, format_size, parse_size
from hourllava.memory.pages import PAGE_SIZE, page_count
from hourllava.model import FrameWriter

WRITER = SmallWriter()
PAGE = WRITER.shape.page_bytes


def content(memory):
    """All that a question could see of a memory, wherever its pages lie: tensors in the order of its own pages."""
    seen = memory.prefix()
    found = [seen.tokens.clone()]
    for pages in seen.pages:
        table = pages.page_table[0].long()
        lengths = pages.page_lengths[table]
        inside = torch.arange(PAGE_SIZE) < lengths[:, None]
        rows = (slab[table].transpose(1, 2)[inside] for slab in (pages.key_pages, pages.value_pages))
        found += [*rows, pages.key_summary[table], lengths]
    return found


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def watch(repository, name, first, frames, writer=WRITER):
    memory = repository.add(name, writer, pages=True)
    memory.append(make_frames(frames, first))
    return memory


def fill(folder, frames):
    """A repository of videos a, b, ... of so many frames each, and what a question sees of each."""
    repository, seen = Repository(folder), {}
    for number, count in enumerate(frames):
        memory = watch(repository, "abcdefgh"[number], 1000 * number, count)
        seen[memory_name(memory)] = content(memory)
        memory.close()
    return repository, seen


def memory_name(memory):
    return memory.path.rsplit("/", 1)[-1]


def pool_of(repository, pages, host_pages=None):
    """A pool of so many pages, all NaN until they are written."""
    pool = MemoryPool(repository, WRITER, pages * PAGE, None if host_pages is None else host_pages * PAGE)
    for tier in (pool._device, pool._host):
        if tier is not None:
            for slab in (*tier.keys, *tier.values, *tier.summaries):
                slab.fill_(float("nan"))
    return pool


def pages_of(frames):
    return page_count(frames, WRITER.shape.per_frame)


@pytest.mark.parametrize("host", [False, True])
def test_what_is_asked_is_what_was_watched(tmp_path, host):
    """Whatever came and went before, and wherever its pages lie by then."""
    frames = [300, 1, 77, 128, 260]
    repository, seen = fill(tmp_path, frames)
    pool = pool_of(repository, pages_of(300) + pages_of(77), 60 if host else None)
    draw = random.Random(0)
    for _ in range(40):
        name = draw.choice(sorted(seen))
        with pool.use(name) as memory:
            assert memory.frames == frames["abcde".index(name)]
            assert_same(content(memory), seen[name])
    for tier, usage in zip((pool._device, pool._host), pool.usage(), strict=False):
        slabs = [*tier.keys, *tier.values, *tier.summaries, tier.lengths]
        assert sum(slab.nbytes for slab in slabs) <= usage.budget
        assert usage.used == usage.reclaimable > 0
        assert usage.memories


def test_the_least_recently_asked_makes_room(tmp_path):
    repository, seen = fill(tmp_path, [100, 100, 100])
    pool = pool_of(repository, 2 * pages_of(100))

    def held_after(name):
        with pool.use(name) as memory:
            assert_same(content(memory), seen[name])
        return pool.usage()[0].memories

    assert [held_after(name) for name in "abacbb"] == [
        ("a",),
        ("a", "b"),
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
        ("b", "c"),
    ]


def test_what_is_read_is_never_moved(tmp_path):
    """Over the budget: one line with the numbers, and nothing of what is being read has changed."""
    repository, seen = fill(tmp_path, [100, 100, 100, 900])
    pool = pool_of(repository, 2 * pages_of(100) + 1)
    with pool.use("a") as memory, pool.use("b"):
        with pytest.raises(AdmissionError, match="ask again when running questions are done") as caught, pool.use("c"):
            pass
        sizes = re.findall(r"\d[\d.]* [KM]iB", str(caught.value))
        pages = [pages_of(100), 2 * pages_of(100) + 1, 1, 0]  # asked, budget, free, could be freed
        assert [*sizes, "0 B"] == [format_size(n * PAGE) for n in pages]
        assert_same(content(memory), seen["a"])
        with pool.use("a") as again:
            assert again is memory
    assert pool.usage()[0].memories == ("a", "b")
    with pool.use("c"):
        assert pool.usage()[0].memories == ("a", "c")
    with pytest.raises(AdmissionError, match="; raise the budget"), pool.use("d"):
        pass
    assert pool.usage()[0].memories == ("a", "c")


def test_the_host_keeps_what_the_device_cannot(tmp_path):
    """A memory that comes back from the host is not read from the disk again: there it is wrong by now."""
    repository, seen = fill(tmp_path, [100, 100, 400])
    pool = pool_of(repository, pages_of(400), pages_of(100))
    for name in ("a", "b", "c"):
        with pool.use(name):
            pass
    assert [usage.memories for usage in pool.usage()] == [("c",), ("b",)]
    for path in tmp_path.glob("b/blocks.*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pool.use("b") as memory:
        assert_same(content(memory), seen["b"])
    assert [usage.memories for usage in pool.usage()] == [("b",), ()]  # c is too long for the host
    with pool.use("a") as memory:
        assert_same(content(memory), seen["a"])


def test_a_memory_grows_while_it_is_read(tmp_path):
    """A question goes on seeing what was there when it was asked; pages that are full are not brought in again."""
    repository = Repository(tmp_path)
    live = watch(repository, "a", 0, 70)
    pool = pool_of(repository, 80)
    before = content(live)
    with pool.use("a") as short:
        for frames in (1, 7, 100, 3):
            live.append(make_frames(frames, live.frames))
            with pool.use("a") as longer:
                assert longer.frames == live.frames
                assert_same(content(longer), content(live))
                assert_same(content(short), before)
                shared = set(short.pages[0].page_table[0].tolist()) & set(longer.pages[0].page_table[0].tolist())
                assert len(shared) == pages_of(70) - 2
    with pool.use("a") as memory:
        assert_same(content(memory), content(live))
    assert pool.usage()[0].used == pages_of(live.frames) * PAGE


def test_a_memory_grows_while_it_is_on_the_host(tmp_path):
    repository, _ = fill(tmp_path, [100])
    live = watch(repository, "live", 500, 70)
    pool = pool_of(repository, pages_of(150), 40)
    for name in ("live", "a"):
        with pool.use(name):
            pass
    assert [usage.memories for usage in pool.usage()] == [("a",), ("live",)]
    live.append(make_frames(60, 570))
    with pool.use("live") as memory:
        assert_same(content(memory), content(live))
    assert [usage.memories for usage in pool.usage()] == [("live",), ("a",)]


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("maker", [WRITER, SmallWriter(seed=1)], ids=["same model", "other model"])
def test_features_alone_are_enough(tmp_path, precision, maker):
    """Pages are made as they come in, of this model, whoever took the video in, and no file of that stays."""
    repository = Repository(tmp_path)
    live = repository.add("a", maker, precision, pages=maker is not WRITER)
    pool = pool_of(repository, 60, 20)
    for frames in (70, 1, 64):
        live.append(make_frames(frames, live.frames))
        with pool.use("a") as memory:
            assert_same(content(memory), content(repository.open("a", WRITER, append=False)))
            assert memory.fingerprint == WRITER.fingerprint()
    assert not list(tmp_path.glob(".hourllava-*"))
    damaged = sorted((tmp_path / "a").glob("features-*"))[-1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    pool.forget("a")
    with pytest.raises(MemoryFileError, match="memory repair"), pool.use("a"):
        pass
    assert pool.usage()[0].used == 0


def test_growing_out_of_the_budget(tmp_path):
    repository = Repository(tmp_path)
    live = watch(repository, "a", 0, 70)
    pool = pool_of(repository, pages_of(100))
    with pool.use("a"):
        pass
    live.append(make_frames(30, 70))  # fits only without the two pages that it replaces
    with pool.use("a") as memory:
        assert_same(content(memory), content(live))
    live.append(make_frames(100, 100))
    with pytest.raises(AdmissionError), pool.use("a"):
        pass


def test_another_video_of_the_same_name(tmp_path):
    repository, _ = fill(tmp_path, [100])
    pool = pool_of(repository, 40)
    with pool.use("a"):
        pass
    repository.delete("a")
    with pytest.raises(MemoryFileError, match="no such video"), pool.use("a"):
        pass
    assert pool.usage()[0].memories == ()
    for frames in (50, 200):
        memory = watch(repository, "a", 5000, frames)
        with pool.use("a") as held:
            assert_same(content(held), content(memory))
        memory.close()
        repository.delete("a")


def test_threads_ask_while_frames_arrive(tmp_path):
    """Readers of many memories, more than fit, while one of them grows."""
    repository, seen = fill(tmp_path, [120, 90, 60, 33])
    live = watch(repository, "live", 7000, 1)
    grown = {1: content(live)}
    pool = pool_of(repository, pages_of(120) + pages_of(90), 3 * pages_of(60))
    wrong, asked, refused = [], [], []

    def ask(seed):
        draw = random.Random(seed)
        for _ in range(60):
            name = draw.choice([*sorted(seen), "live"])
            try:
                with pool.use(name) as memory:
                    mine = content(memory)
                    expected = seen[name] if name in seen else grown[memory.frames]
                    wrong.extend([name] * (not all(map(torch.equal, mine, expected))))
                asked.append(name)
            except AdmissionError:
                refused.append(name)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    alone = Repository(tmp_path / "alone").add("live", WRITER, pages=True)
    alone.append(make_frames(1, 7000))
    for frames in range(2, 40):
        alone.append(make_frames(1, 7000 + frames - 1))
        grown[frames] = content(alone)
        live.append(make_frames(1, 7000 + frames - 1))
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {*asked} == {*seen, "live"}
    total, free, reclaimable = pool._device.allocator.counts()
    assert free + reclaimable == total  # nobody has kept a pin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_the_memory_itself(tmp_path, dtype):
    """Bit for bit, text and evidence, with pages strewn over a pool that others used before; also of a video that is
    shorter than the model remembers."""
    model = make_model(min_frames=40).to(dtype)
    writer = FrameWriter(model)
    repository = Repository(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name, frames in (("a", 90), ("b", 33), ("c", 200)):
        pictures = torch.randint(0, 256, (frames, 3, 64, 64), generator=generator, dtype=torch.uint8)
        repository.add(name, writer, pages=True).append(pictures)
    pool = MemoryPool(repository, writer, writer.shape.page_bytes * 150)
    for name in "abcacbac":
        with pool.use(name) as memory:
            ours = model.ask(memory, "Which colour was the star?", max_new_tokens=4)
        theirs = model.ask(repository.open(name), "Which colour was the star?", max_new_tokens=4)
        assert (ours.text, ours.moments, ours.top_tokens) == (theirs.text, theirs.moments, theirs.top_tokens)
        assert torch.equal(ours.mass, theirs.mass)


def test_what_a_pool_cannot_hold(tmp_path):
    repository, _ = fill(tmp_path, [100])
    pool = pool_of(repository, 40)
    repository.add("empty", WRITER, pages=True)
    repository.add("other", SmallWriter(per_frame=9), pages=True).append(make_frames(3))
    for name, match in {
        "empty": "no frame yet",
        "other": "another vision tower",
        "none": "it holds",
    }.items():
        with pytest.raises(MemoryFileError, match=match), pool.use(name):
            pass
    path = next(tmp_path.glob("a/*value_pages*"))
    data = path.read_bytes()
    path.write_bytes(data[: PAGE_SIZE * 2])
    with pytest.raises(MemoryFileError, match=r"shorter than it should be.*memory repair"), pool.use("a"):
        pass
    assert pool.usage()[0].used == 0
    path.write_bytes(data)
    with pool.use("a"):
        pass


def test_budgets():
    assert [parse_size(text) for text in ("4096", "6GiB", " 1.5 kb", "2MiB", 7)] == [4096, 6 << 30, 1500, 2 << 20, 7]
    for text, match in {
        "6 parsecs": "unit parsecs is unknown.*GiB",
        "": "no size",
        "-1GB": "no size",
        "0": "no size",
    }.items():
        with pytest.raises(InputError, match=match):
            parse_size(text)
    assert [format_size(n) for n in (12, 2048, 6 << 30, 1000 << 20)] == ["12 B", "2 KiB", "6 GiB", "1000 MiB"]
    with pytest.raises(AdmissionError, match=r"a page takes .*KiB; give more"):
        MemoryPool(Repository, WRITER, "1kB")
    with pytest.raises(AdmissionError, match="cannot be allocated"):
        MemoryPool(Repository, WRITER, "4000TiB")
