# SPDX-License-Identifier: Apache-2.0
"""A memory spread over processes: values, every gradient, answers and evidence as in one process, by the error rule."""

import pytest
import torch
from tiny_model import make_model
from tools import assert_error_rule
from torch import distributed as dist
from torch import multiprocessing

from hourllava.errors import HourLlavaError, InputError, MemoryFileError, VideoError
from hourllava.memory import MemoryPages, Repository, ShardedMemory, sharded_attention
from hourllava.memory.pages import frame_slots
from hourllava.memory.sharding import page_mass
from hourllava.model import FrameWriter, watch_sharded
from hourllava.model.budget import Budget
from hourllava.video import LiveReader
from hourllava_ext import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUESTION = "Which colour was the star?"
SECONDS, EARLIER = 300, 140  # of the video, and when it is asked for the first time
BUDGETS = {
    "a half": "1/2",
    "one page": "1p",
    "a minute": "60s",
    "always read": Budget(pages=9, keep=((3.0, 5.0), (130.0, 131.0))),
    "tiles": Budget(part=4, tile=3, mode="content"),
}
PAGES, ROWS, KV_HEADS, HEADS, WIDTH, QUERIES = 11, 128, 2, 4, 16, 23


def make_inputs(dtype):
    """Queries of two samples, and pages of which each sample lists some."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = torch.full((PAGES,), ROWS, dtype=torch.int32)
    lengths[[3, 10]] = torch.tensor([5, 70], dtype=torch.int32)
    table = torch.tensor([[0, 1, 2, 3, 4, 5, 6, -1], [4, 7, 8, 9, 10, -1, -1, -1]], dtype=torch.int32)
    return {
        "query": draw(QUERIES, HEADS, WIDTH),
        "keys": draw(PAGES, KV_HEADS, ROWS, WIDTH),
        "values": draw(PAGES, KV_HEADS, ROWS, WIDTH),
        "lengths": lengths,
        "table": table,
        "where": (torch.arange(QUERIES), torch.tensor([0, 9, QUERIES]), 1 / 10 ** torch.arange(4.0)),
        "weight": torch.rand(QUERIES, generator=generator) * (torch.arange(QUERIES) % 3 == 0),
        "cotangents": (draw(QUERIES, HEADS, WIDTH), draw(HEADS, QUERIES)),
    }


def share(table, rank, ranks):
    """The pages (P,) bool that a rank owns, and the table in its own numbers."""
    mine = torch.arange(PAGES) % ranks == rank
    place = torch.where(mine, mine.cumsum(0) - 1, -1)
    return mine, torch.where(table >= 0, place[table.long()], -1).to(torch.int32)


class Counted:
    """Counts the calls of torch.distributed's collectives."""

    def __init__(self):
        self.calls = 0
        for name in ("all_gather", "all_reduce"):
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, function):
        def count(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return count

    def during(self, work):
        """What a call gives, and how many collectives it took."""
        before = self.calls
        return work(), self.calls - before


def attend(rank, ranks, dtype, counted):
    """Outputs, gradients and mass of one rank, which owns the pages whose number leaves the rest `rank`."""
    inputs = make_inputs(dtype)
    mine, table = share(inputs["table"], rank, ranks)
    leaves = [x.clone().requires_grad_() for x in (inputs["query"], inputs["keys"][mine], inputs["values"][mine])]
    free = torch.arange(ROWS) >= inputs["lengths"][mine][:, None]
    leaves[1].data.transpose(1, 2)[free] = float("nan")
    pages = MemoryPages(leaves[1], leaves[2], torch.empty(0), inputs["lengths"][mine], table)
    (out, lse), forward = counted.during(lambda: sharded_attention(leaves[0], pages, *inputs["where"]))
    cotangents = [c.to(x.dtype) for c, x in zip(inputs["cotangents"], (out, lse), strict=True)]
    gradients, backward = counted.during(lambda: torch.autograd.grad((out, lse), leaves, cotangents))
    with torch.no_grad():
        mass = page_mass(leaves[0], lse, pages, *inputs["where"], inputs["weight"])
    values = [out.detach(), lse.detach(), *gradients, mass]
    return {"values": values, "collectives": (forward, backward)}


def pictures(count=SECONDS):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)


def rows_of(memory, frames):
    """What frames of a memory wrote: tokens, and each block's keys and values, (n, N + 1, ...)."""
    slots, _ = frame_slots(frames, memory.shape.per_frame)
    found = [memory.tokens[frames]]
    for pages in memory.pages:
        found += [x[slots // 128, :, slots % 128] for x in (pages.key_pages, pages.value_pages)]
    return [x.clone() for x in found]


def shown(answer):
    return {"text": answer.text, "top": answer.top_tokens, "mass": answer.mass, "moments": answer.moments}


def read_in_part(model, memory, budget):
    """What is said under a budget, and how many pages each block has attended to here."""
    answer = model.ask(memory, QUESTION, budget=budget)
    return shown(answer), (answer.page_mass > 0).sum(1)


def ask_together(ranks, folder, counted):
    """A video that is watched, asked, appended to and asked again; what was said, and what each rank holds."""
    model, found = make_model(), {}
    memory = watch_sharded(model, pictures(EARLIER), progress=False)
    found["earlier"] = shown(model.ask(memory, QUESTION))
    for first, end in [(EARLIER, 141), (141, 200), (200, SECONDS)]:
        memory.append(pictures()[first:end])
    answer, found["collectives"] = counted.during(lambda: model.ask(memory, QUESTION))
    found["all"] = shown(answer)
    found["frames"] = (memory.frames, memory.own.frames)
    own = memory.prefix().shard.seconds
    found["seconds"], found["rows"] = own, rows_of(memory.own, torch.arange(len(own)))
    with torch.no_grad():
        found["random"] = shown(model.ask(memory, QUESTION, temporal_forgetting="random", forgetting_seed=3))
        found["alone"] = shown(model.ask(memory, QUESTION, use_memory=False))
        for case, budget in BUDGETS.items():
            (found[case], read), collectives = counted.during(lambda given=budget: read_in_part(model, memory, given))
            found[f"{case}: read"] = read, collectives
    with pytest.raises(InputError, match="question forgetting"):
        model.ask(memory, QUESTION, temporal_forgetting="question")
    with pytest.raises(VideoError, match="another part of a stream; let one process follow it with --into"):
        watch_sharded(model, LiveReader("udp://127.0.0.1:1"))
    kept = Repository(folder).open_sharded("film", FrameWriter(model))
    found["kept"] = shown(model.ask(kept, QUESTION))
    with pytest.raises(MemoryFileError, match="another vision tower"):
        Repository(folder).open_sharded("film", FrameWriter(make_model(1)))
    repeated = make_model(min_frames=200)
    for seconds in (3, 150):
        short = watch_sharded(repeated, pictures(seconds), progress=False)
        found[f"repeated {seconds}"] = shown(repeated.ask(short, QUESTION))
    busy = ShardedMemory(FrameWriter(model), held=100 * (ranks - dist.get_rank()))
    busy.append_features(torch.zeros(130, 64, 64))
    found["busy"] = busy.own.frames
    return found


def run_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    counted = Counted()
    found = {dtype: attend(rank, ranks, dtype, counted) for dtype in DTYPES}
    found["asked"] = ask_together(ranks, f"{folder}/memories", counted)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def got(request, tmp_path_factory):
    """What each of 2 and of 4 processes found; starting them is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    model = make_model()
    memory = Repository(folder / "memories").add("film", FrameWriter(model))
    model.watch(pictures(), progress=False, into=memory)
    memory.close()
    multiprocessing.spawn(run_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def one_process(dtype, inputs):
    """The same in plain torch, all pages in one place."""
    query, keys, values = leaves = [inputs[name].to(dtype).requires_grad_() for name in ("query", "keys", "values")]
    rest = (inputs["table"], inputs["lengths"], *inputs["where"])
    out, lse, mass = reference.paged_attention(query, keys, values, *rest, mass_weight=inputs["weight"])
    cotangents = [c.to(x.dtype) for c, x in zip(inputs["cotangents"], (out, lse), strict=True)]
    gradients = torch.autograd.grad((out, lse), leaves, cotangents)
    return [out.detach(), lse.detach(), *gradients, mass.detach()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_processes_are_one(dtype, got):
    inputs = make_inputs(dtype)
    plain, exact = one_process(dtype, inputs), one_process(torch.float64, inputs)
    names = ("out", "lse", "grad query", "grad keys", "grad values")
    for rank, found in enumerate(got):
        mine = torch.arange(PAGES) % len(got) == rank
        for number, name in enumerate(names):
            chosen = mine if number > 2 else slice(None)
            values = (found[dtype]["values"][number], plain[number][chosen], exact[number][chosen])
            assert_error_rule(*values, f"{name} of rank {rank}")
        assert found[dtype]["collectives"] == (1, 1)
    for other in got[1:]:
        for mine, theirs in zip(got[0][dtype]["values"][:3], other[dtype]["values"][:3], strict=True):
            assert torch.equal(mine, theirs)
    mass = sum(found[dtype]["values"][5] for found in got)
    assert_error_rule(mass, plain[5], exact[5], "mass")
    assert mass.sum(1).tolist() == pytest.approx([1, 1], rel=1e-5)


def test_without_a_group_it_says_how_to_have_one(tmp_path):
    writer = FrameWriter(make_model())
    Repository(tmp_path).add("film", writer).close()
    for make in (lambda: ShardedMemory(writer), lambda: Repository(tmp_path).open_sharded("film", writer)):
        with pytest.raises(HourLlavaError, match=r"there is no group .*call torch.distributed.init_process_group"):
            make()


def assert_same_answer(found, expected):
    """The words and moments, and numbers to a rounding or two."""
    assert found["text"] == expected["text"]
    assert [word for word, _ in found["top"]] == [word for word, _ in expected["top"]]
    assert [p for _, p in found["top"]] == pytest.approx([p for _, p in expected["top"]], rel=1e-4)
    assert [(m.start, m.end) for m in found["moments"]] == [(m.start, m.end) for m in expected["moments"]]
    torch.testing.assert_close(found["mass"], expected["mass"], rtol=1e-4, atol=1e-8)


def test_answers_and_evidence_are_those_of_one_process(got, tmp_path):
    model, repeated = make_model(), make_model(min_frames=200)
    memory = model.watch(pictures(EARLIER), progress=False)
    expected = {"earlier": shown(model.ask(memory, QUESTION))}
    memory.append(pictures()[EARLIER:])
    expected["all"] = shown(model.ask(memory, QUESTION))
    expected["random"] = shown(model.ask(memory, QUESTION, temporal_forgetting="random", forgetting_seed=3))
    expected["alone"] = shown(model.ask(memory, QUESTION, use_memory=False))
    kept = Repository(tmp_path).add("film", FrameWriter(model))
    model.watch(pictures(), progress=False, into=kept)
    expected["kept"] = shown(model.ask(kept, QUESTION))
    for seconds in (3, 150):
        short = repeated.watch(pictures(seconds), progress=False)
        expected[f"repeated {seconds}"] = shown(repeated.ask(short, QUESTION))
    expected |= {case: read_in_part(model, memory, budget)[0] for case, budget in BUDGETS.items()}
    for found in got:
        for case, answer in expected.items():
            assert_same_answer(found["asked"][case], answer)
            assert str(found["asked"][case]) == str(got[0]["asked"][case])
        # One a block, one for the kept tokens and one for the evidence.
        assert found["asked"]["collectives"] == model.config.memaug_depth + 2


def test_a_budget_chooses_what_one_process_would(got):
    """Pages are those of one process, so that blocks read as many, whoever holds them; a choice takes one collective
    a block."""
    model = make_model()
    memory = model.watch(pictures(), progress=False)
    for case, budget in BUDGETS.items():
        _, read = read_in_part(model, memory, budget)
        shares, collectives = zip(*(found["asked"][f"{case}: read"] for found in got), strict=True)
        assert torch.equal(sum(shares), read), case
        assert 0 < int(read.max()) < len(memory.pages[0].page_lengths)
        assert set(collectives) == {2 * model.config.memaug_depth + 2}


def test_evidence_by_the_error_rule(got):
    model = make_model()
    memory = model.watch(pictures(), progress=False)
    plain = model.ask(memory, QUESTION).mass
    double = model.double()
    exact = double.ask(double.watch(pictures(), progress=False), QUESTION).mass
    for found in got:
        assert_error_rule(found["asked"]["all"]["mass"], plain, exact, "mass")


def test_every_second_is_somewhere_once_bit_for_bit(got):
    memory = make_model().watch(pictures(), progress=False)
    seconds = torch.cat([found["asked"]["seconds"] for found in got])
    assert sorted(seconds.tolist()) == list(range(SECONDS))
    for found in got:
        total, own = found["asked"]["frames"]
        assert (total, own) == (SECONDS, len(found["asked"]["seconds"]))
        assert abs(own - SECONDS / len(got)) <= 128
        mine = found["asked"]["seconds"]
        whole = rows_of(memory, torch.arange(SECONDS))
        per_frame = memory.shape.per_frame
        rows = torch.cat([(mine[:, None] * per_frame + torch.arange(per_frame)).flatten(), SECONDS * per_frame + mine])
        for number, (ours, theirs) in enumerate(zip(found["asked"]["rows"], whole, strict=True)):
            assert torch.equal(ours, theirs[mine if number == 0 else rows])


def test_the_least_loaded_rank_is_given_the_next_frames(got):
    """Runs of 128 and 2 s: the last rank, which holds 100 frames less than the next, is given the first."""
    expected = [0] * (len(got) - 2) + [2, 128]
    assert [found["asked"]["busy"] for found in got] == expected
