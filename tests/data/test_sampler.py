# SPDX-License-Identifier: Apache-2.0
"""The order of samples: what a batch holds, what ranks agree on, and where an epoch goes on."""

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hourllava.data.sampler import GroupedSampler
from hourllava.errors import DataError

COUNT = 203
RNG = np.random.default_rng(5)
LENGTHS = RNG.integers(1, 1000, COUNT).tolist()
MODALITIES = RNG.choice(["text", "image", "images", "video"], COUNT, p=[0.5, 0.3, 0.05, 0.15]).tolist()
STREAMS = RNG.choice(["short", "long"], COUNT, p=[0.6, 0.4]).tolist()


def ranks(batch_size=3, world_size=4, seed=0, epoch=0, **options):
    """Global batches (steps, world_size, batch_size) as every rank draws its own."""
    options = {"lengths": LENGTHS, "modalities": MODALITIES, **options}
    samplers = [
        GroupedSampler(batch_size=batch_size, world_size=world_size, rank=rank, seed=seed, **options)
        for rank in range(world_size)
    ]
    drawn = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(sampler)
    return np.asarray(drawn).reshape(world_size, -1, batch_size).transpose(1, 0, 2)


def test_an_epoch_holds_each_sample_once_but_for_the_last_few():
    batches = ranks()
    assert len(set(batches.flatten().tolist())) == batches.size == COUNT // 12 * 12


def test_a_global_batch_holds_one_modality():
    kinds = [Counter(MODALITIES[i] for i in batch.flatten()) for batch in ranks()]
    mixed = [kind for kind in kinds if len(kind) > 1]
    leftovers = sum(count % 12 for count in Counter(MODALITIES).values())
    assert len(mixed) <= leftovers // 12
    assert sum(len(kind) == 1 for kind in kinds) == sum(count // 12 for count in Counter(MODALITIES).values())


def test_without_modalities_all_mix():
    assert any(len({MODALITIES[i] for i in batch.flatten()}) > 2 for batch in ranks(modalities=None))


def test_similar_lengths_come_together():
    lengths = np.asarray(LENGTHS)
    grouped = ranks(modalities=None)
    spread = np.ptp(lengths[grouped.reshape(len(grouped), -1)], axis=1).mean()
    assert spread < 0.5 * np.ptp(lengths)
    loads = lengths[grouped].sum(2)  # of each rank in each step
    assert (np.ptp(loads, axis=1) <= 2 * np.ptp(lengths[grouped.reshape(len(grouped), -1)], axis=1)).all()
    assert np.ptp(loads, axis=1).mean() < 0.25 * loads.mean()


def test_the_order_is_a_function_of_seed_and_epoch():
    assert np.array_equal(ranks(seed=1, epoch=2), ranks(seed=1, epoch=2))
    assert not np.array_equal(ranks(seed=1, epoch=2), ranks(seed=1, epoch=3))
    assert not np.array_equal(ranks(seed=1, epoch=2), ranks(seed=2, epoch=2))


def test_per_stream_batches_hold_one_stream():
    batches = ranks(streams=STREAMS, batching="per_stream")
    held = [{STREAMS[i] for i in batch.flatten()} for batch in batches]
    assert all(len(streams) == 1 for streams in held)
    assert Counter(next(iter(s)) for s in held) == {s: n // 12 for s, n in Counter(STREAMS).items()}
    # Streams take turns at random, not one after the other.
    assert [next(iter(s)) for s in held] != sorted(next(iter(s)) for s in held)


def test_random_batches_mix_streams():
    batches = ranks(streams=STREAMS, modalities=None, batching="random")
    assert any(len({STREAMS[i] for i in batch.flatten()}) == 2 for batch in batches)
    assert batches.size == COUNT // 12 * 12


def sampler_of(rank=1, **options):
    return GroupedSampler(LENGTHS, MODALITIES, batch_size=3, world_size=2, rank=rank, **options)


@pytest.mark.parametrize("batches", [0, 1, 7])
def test_going_on_in_the_middle_of_an_epoch(batches):
    """Whatever a loader has fetched ahead, what was used counts."""
    whole = sampler_of()
    whole.set_epoch(4)
    expected = list(whole)
    first = sampler_of()
    first.set_epoch(4)
    loader = iter(DataLoader(range(COUNT), batch_size=3, sampler=first, num_workers=0))
    used = [next(loader).tolist() for _ in range(batches)]
    state = first.state_dict(batches)
    second = sampler_of()
    second.load_state_dict(state)
    second.set_epoch(4)
    rest = list(second)
    assert [number for batch in used for number in batch] + rest == expected
    assert second.state_dict()["given"] == len(expected)
    assert list(second) == expected  # the next time it starts at the front again
    second.set_epoch(5)
    assert list(second) != expected


def test_state_counts_what_was_given_out():
    sampler = sampler_of()
    numbers = iter(sampler)
    for _ in range(5):
        next(numbers)
    assert sampler.state_dict() == {
        "samples": COUNT,
        "batch_size": 3,
        "world_size": 2,
        "seed": 0,
        "batching": "random",
        "epoch": 0,
        "given": 5,
    }


@pytest.mark.parametrize("change", [{"seed": 3}, {"batching": "per_stream", "streams": STREAMS}])
def test_another_run_s_state(change):
    with pytest.raises(DataError, match=r"state of the sampler: its (seed|batching) was .*; resume with"):
        sampler_of().load_state_dict(sampler_of(**change).state_dict())


def test_bad_arguments():
    with pytest.raises(DataError, match="there is no 'alternating'; choose random or per_stream"):
        sampler_of(batching="alternating")
    with pytest.raises(DataError, match="data: it has 5 samples, fewer than a batch of 3 for each of 2 ranks"):
        GroupedSampler([1] * 5, None, batch_size=3, world_size=2)
    with pytest.raises(DataError, match="data: it has 0 samples"):
        GroupedSampler([], [], batch_size=1)
    with pytest.raises(DataError, match="stream 'b': it has 1 samples"):
        GroupedSampler([1] * 5, None, batch_size=2, streams=["a"] * 4 + ["b"], batching="per_stream")
