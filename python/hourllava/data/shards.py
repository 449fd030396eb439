# SPDX-License-Identifier: Apache-2.0
"""Samples in shards: written once, read from a folder or an object store, in an order that can be gone on with."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hourllava.errors import DataError, HourLlavaError

from .dataset import ConversationDataset
from .encodings import decode
from .failures import FailureLog
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
    failures: FailureLog | None = None,
) -> int:
    """Write samples to MDS shards.

    Args:
        samples: as `load_mixture` gives them.
        out: a folder without shards.
        features: "inside" copies the features of videos, as they are kept, and the files of images; "path" keeps their
            absolute paths.
        size_limit: bytes after which a shard is full.
        failures: takes up samples whose features or images cannot be read, which are left out; None lets the first of
            them raise.

    Returns:
        the number of samples that were written.

    Raises:
        DataError: the folder holds shards already, a video has no features, or the disk is full; an index, without
            which shards are none, is written only when all is well.
        DataError: features or an image cannot be read; names the sample.
    """
    writer = ShardWriter(out, COLUMNS, size_limit)
    count = 0
    for sample in samples:
        try:
            row = to_row(sample, features == "inside")
        except HourLlavaError as error:
            named = DataError(sample.named, f"{error.what}: {error.why}", error.todo)
            if failures is None:
                raise named from error
            failures.record(sample.id, named)
            continue
        if failures is not None:
            failures.loaded()
        writer.write(row, sample.id)
        count += 1
    writer.close()
    return count


class ShardDataset(IterableDataset[Any]):
    """The samples of a folder of shards, in an order that follows from the seed and the epoch alone.

    Without `conversations` they are as the shards hold them, `ShardSample`s; with them they are the model's inputs, as
    a `ConversationDataset` gives them. A sample that fails is then written to its log of failures, if it has one, and
    the next in the order of writing that does not fail takes its place.

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
        conversations: say how a sample becomes an item; their own samples are not looked at.

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
        conversations: ConversationDataset | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            why = f"batch size {batch_size}, rank {rank} of {world}"
            raise DataError(local, f"it cannot be divided by {why}", "give positive numbers, and a rank below world")
        self.files = ShardFiles(local, remote, cache_limit)
        self.shuffle_seed, self.batch_size = shuffle_seed, batch_size
        self.rank, self.world, self.conversations = rank, world, conversations
        self.failures = None if conversations is None else conversations.failures
        self.epoch = 0
        self.taken = 0  # samples of the epoch, by all ranks together
        self._ends = np.cumsum([shard.samples for shard in self.files.shards])
        if self._ends[-1] < world:
            raise DataError(local, f"it has {self._ends[-1]} samples for {world} ranks", "use fewer ranks")
        self._offsets: dict[int, np.ndarray] = {}
        if self.failures is not None:
            self.failures.expect(int(self._ends[-1]))

    def __len__(self) -> int:
        """Samples of an epoch that fall to one rank."""
        return int(self._ends[-1]) // self.world

    def __getitem__(self, number: int) -> Any:
        """The sample of a number in the order of writing, or what takes its place.

        Raises:
            IndexError: there are fewer.
            DataError: it fails and there is no log of failures, too many have failed, or 16 fail in a row.
        """
        if self.failures is None:
            return self.load(number)
        total = int(self._ends[-1])
        self._place(number)
        return self.failures.first_sound(((number + step) % total for step in range(total)), self.load, self._identity)

    def load(self, number: int) -> Any:
        """A sample itself.

        Raises:
            IndexError: there are fewer.
            DataError: it is damaged, or cannot be used.
        """
        found = self.read(number)
        return found if self.conversations is None else self.conversations.make_item(found.sample, found.held)

    def read(self, number: int) -> ShardSample:
        """A sample as the shards hold it.

        Raises:
            IndexError: there are fewer.
            DataError: it is damaged.
        """
        shard, inside = self._place(number)
        with self.files.open(self.files.shards[shard]) as file:
            if shard not in self._offsets:
                self._offsets[shard] = read_offsets(file, self.files.shards[shard])
            row = read_row(file, self.files.shards[shard], self._offsets[shard], inside)
        what, columns = self._named(number), self.files.shards[shard].columns
        return of_row({c.name: decode(c.encoding, row[c.name], f"{what} {c.name}") for c in columns}, what)

    def __iter__(self) -> Iterator[Any]:
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

    def _place(self, number: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's number in it."""
        if not 0 <= number < self._ends[-1]:
            raise IndexError(f"sample {number} of {self._ends[-1]}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + self.files.shards[shard].samples

    def _named(self, number: int) -> str:
        shard, inside = self._place(number)
        return f"{self.files.local / self.files.shards[shard].file} sample {inside}"

    def _identity(self, number: int) -> str:
        """A sample's id, or where it is if that cannot be read."""
        try:
            return self.read(number).sample.id
        except DataError:
            return self._named(number)

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
        self, dataset: ShardDataset, workers: int = 0, collate: Callable[[list[Any]], Any] | None = None
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


def _as_list(samples: list[Any]) -> list[Any]:
    return samples
