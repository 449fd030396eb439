# SPDX-License-Identifier: Apache-2.0
"""Shards as training data: read by number, so that a run which goes on reads nothing of what it has had."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from hourllava.data.shards import ShardDataset


class ShardSampler(Sampler[int]):
    """A process' numbers in the order in which shards are read: a batch for each process in turn.

    Args:
        shards: of one process that has them all.
        batch_size: samples of a process' batch.
        world, rank: processes that share an epoch, and which of them this is.
    """

    def __init__(self, shards: ShardDataset, batch_size: int, world: int, rank: int) -> None:
        self.shards, self.batch_size, self.world, self.rank = shards, batch_size, world, rank

    def __len__(self) -> int:
        return len(self.shards) // (self.batch_size * self.world) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        together = self.batch_size * self.world
        order = self.shards.order()
        whole = order[: len(order) // together * together].reshape(-1, self.world, self.batch_size)
        return iter(whole[:, self.rank].flatten().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Draw another order."""
        self.shards.epoch = epoch
