# SPDX-License-Identifier: Apache-2.0
"""Samples in shards: written once, read from a folder or an object store, in an order that can be gone on with."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hourllava.errors import DataError

from .collator import Collator
from .dataset import ConversationDataset
from .encodings import decode
from .mds import ShardWriter, read_offsets, read_row
from .samples import Sample
from .shard_files import ShardFiles
from .shard_rows import COLUMNS, ShardSample, of_row, to_row

SIZE_LIMIT = 1 << 26


def write_shards(
    samples: Iterable[Sample],
    out: str | os.PathLike[str],
    features: Literal["inside", "path"] = "inside",
    size_limit: int = SIZE_LIMIT,
) -> int:
    """Write samples to MDS shards.

    Args:
        samples: as `load_mixture` gives them.
        out: a folder without shards.
        features: "inside" copies the features of videos, as they are kept, and the files of images; "path" keeps their
            absolute paths.
        size_limit: bytes after which a shard is full.

    Returns:
        the number of samples.

    Raises:
        DataError: the folder holds shards already, a video has no features, or the disk is full; an index, without
            which shards are none, is written only when all is well.
        HourLlavaError: features or an image cannot be read.
    """
    writer = ShardWriter(out, COLUMNS, size_limit)
    count = 0
    for sample in samples:
        writer.write(to_row(sample, features == "inside"), sample.id)
        count += 1
    writer.close()
    return count


class ShardDataset(IterableDataset[ShardSample]):
    """The samples of a folder of shards, in an order that follows from the seed and the epoch alone.

    `dataset[i]` reads one sample; iterating gives a rank's share of an epoch, from where the last iteration or
    `load_state_dict` left off, and the next epoch after that. Rank r of W takes every W-th sample: when the state is
    loaded by another number of ranks, or with another batch size, the rest of the epoch is the same samples in the same
    order. Fewer than W samples at the end of an epoch are left out, so that all ranks have as many.

    Args:
        local: the folder, or where shards of `remote` are kept for a while.
        remote: where they are: a folder or any address that fsspec knows (s3://bucket/folder).
        cache_limit: bytes that may be kept of `remote`; None is no limit.
        shuffle_seed: None keeps the order in which the samples were written. With a cache limit, samples are shuffled
            within groups of shards that take half of it, and the groups among themselves.
        batch_size: samples of a batch; worker processes of a `ShardLoader` take turns by batches.
        rank, world: this process's number, and how many share an epoch.
        tower: fingerprint of the vision tower that all features must be of; None takes any.

    Raises:
        DataError: there is no index, or it is damaged. Reading raises it for a damaged shard or sample.
    """

    def __init__(
        self,
        local: str | os.PathLike[str],
        remote: str | os.PathLike[str] | None = None,
        cache_limit: int | None = None,
        shuffle_seed: int | None = None,
        batch_size: int = 1,
        rank: int = 0,
        world: int = 1,
        tower: str | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            why = f"batch size {batch_size}, rank {rank} of {world}"
            raise DataError(local, f"it cannot be divided by {why}", "give positive numbers, and a rank below world")
        self.files = ShardFiles(local, remote, cache_limit)
        self.shuffle_seed, self.batch_size = shuffle_seed, batch_size
        self.rank, self.world, self.tower = rank, world, tower
        self.epoch = 0
        self.taken = 0  # samples of the epoch, by all ranks together
        self._ends = np.cumsum([shard.samples for shard in self.files.shards])
        if self._ends[-1] < world:
            raise DataError(local, f"it has {self._ends[-1]} samples for {world} ranks", "use fewer ranks")
        self._offsets: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Samples of an epoch that fall to one rank."""
        return int(self._ends[-1]) // self.world

    def __getitem__(self, number: int) -> ShardSample:
        """The sample of a number in the order of writing.

        Raises:
            IndexError: there are fewer.
            DataError: it is damaged, or of another vision tower.
        """
        row, what = self._row(number)
        return of_row(row, what, self.tower)

    def __iter__(self) -> Iterator[ShardSample]:
        if self.taken > int(self._ends[-1]) - self.world:
            self.epoch, self.taken = self.epoch + 1, 0
        start = self.taken
        mine = self.order()[start:][self.rank :: self.world][: (int(self._ends[-1]) - start) // self.world]
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, sample in enumerate(mine.tolist()):
            if place // self.batch_size % workers == number:
                found = self[sample]
                self.taken = start + (place + 1) * self.world
                yield found

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is; the same for every rank after as many samples."""
        return {"epoch": self.epoch, "taken": self.taken, "order": self._order_digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            DataError: it is of other shards, or of another order.
        """
        if state["order"] != self._order_digest():
            why = "the state is of other shards, another shuffle_seed or another cache_limit"
            raise DataError(self.files.local, why, "give those that it was saved with")
        self.epoch, self.taken = int(state["epoch"]), int(state["taken"])

    def _row(self, number: int) -> tuple[dict[str, Any], str]:
        """The decoded columns of a sample, and its place for messages."""
        if not 0 <= number < self._ends[-1]:
            raise IndexError(f"sample {number} of {self._ends[-1]}")
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard = self.files.shards[place]
        inside = number - int(self._ends[place]) + shard.samples
        with self.files.open(shard) as file:
            if place not in self._offsets:
                self._offsets[place] = read_offsets(file, shard)
            row = read_row(file, shard, self._offsets[place], inside)
        what = f"{self.files.local / shard.file} sample {inside}"
        return {c.name: decode(c.encoding, row[c.name], f"{what} {c.name}") for c in shard.columns}, what

    def order(self) -> np.ndarray:
        """Numbers of all samples, in this epoch's order."""
        total = int(self._ends[-1])
        if self.shuffle_seed is None:
            return np.arange(total)
        rng = np.random.default_rng([self.shuffle_seed, self.epoch])
        groups: list[list[np.ndarray]] = [[]]
        room = limit = float("inf") if self.files.cache_limit is None else self.files.cache_limit / 2
        for place in rng.permutation(len(self.files.shards)):
            shard = self.files.shards[place]
            if groups[-1] and shard.size > room:
                groups.append([])
                room = limit
            room -= shard.size
            groups[-1].append(np.arange(self._ends[place] - shard.samples, self._ends[place]))
        return np.concatenate([rng.permutation(np.concatenate(group)) for group in groups])

    def _order_digest(self) -> str:
        shards = [(shard.file, shard.size, shard.samples, shard.hashes) for shard in self.files.shards]
        limit = None if self.shuffle_seed is None else self.files.cache_limit
        return hashlib.sha256(json.dumps([self.shuffle_seed, limit, shards]).encode()).hexdigest()


class ShardLoader(DataLoader):
    """Batches of a `ShardDataset`, the same with any number of worker processes; its state is that of what it gave out.

    Args:
        dataset: whose `batch_size` it takes.
        workers: processes that read ahead.
        collate: makes a batch of a list of samples; by default it is the list.
    """

    def __init__(
        self, dataset: ShardDataset, workers: int = 0, collate: Callable[[list[ShardSample]], Any] | None = None
    ) -> None:
        super().__init__(dataset, dataset.batch_size, num_workers=workers, collate_fn=collate or _as_list)
        self._shards = dataset

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the rest of the epoch, or of the next if there is no rest."""
        dataset = self._shards
        if dataset.taken > int(dataset._ends[-1]) - dataset.world:
            dataset.epoch, dataset.taken = dataset.epoch + 1, 0
        start, left = dataset.taken, (int(dataset._ends[-1]) - dataset.taken) // dataset.world
        for number, batch in enumerate(super().__iter__(), 1):
            # Workers have copies of the dataset, and are ahead of what was given out.
            dataset.taken = start + min(number * dataset.batch_size, left) * dataset.world
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """`ShardDataset.state_dict`, after the last batch that was given out."""
        return self._shards.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`ShardDataset.load_state_dict`, before iterating."""
        self._shards.load_state_dict(state)


class ShardCollator:
    """Makes batches of a `ShardLoader`'s samples, as `Collator` does of the items of a `ConversationDataset`.

    Args:
        conversations: says how a sample becomes an item; its own samples are not looked at.
        collator: puts items together.
    """

    def __init__(self, conversations: ConversationDataset, collator: Collator) -> None:
        self.conversations, self.collator = conversations, collator

    def __call__(self, samples: list[ShardSample]) -> dict[str, Any]:
        """The batch.

        Raises:
            DataError: a sample cannot be used; names it.
        """
        return self.collator([self.conversations.make_item(found.sample, found.held) for found in samples])


def _as_list(samples: list[ShardSample]) -> list[ShardSample]:
    return samples
