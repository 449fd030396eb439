# SPDX-License-Identifier: Apache-2.0
"""Shards as training data: read by number, so that a run which goes on reads nothing of what it has had."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from hourllava.data.dataset import ConversationDataset
from hourllava.data.shards import ShardDataset


class ShardConversations:
    """The samples of shards as items, as a `ConversationDataset` gives them.

    Args:
        shards: where they are.
        conversations: says how a sample becomes an item; its own samples are not looked at.
    """

    def __init__(self, shards: ShardDataset, conversations: ConversationDataset) -> None:
        self.shards, self.conversations = shards, conversations

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Any:
        found = self.shards[number]
        return self.conversations.make_item(found.sample, found.held)


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
