# SPDX-License-Identifier: Apache-2.0
"""The order of samples: batches of one modality and of similar lengths, and going on in the middle of an epoch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from hourllava.errors import DataError

_POOL = 50  # batches that are drawn before they are sorted by length


class GroupedSampler(Sampler[int]):
    """One rank's sample numbers, `batch_size` after `batch_size`.

    A global batch, one batch for each rank, holds one modality; what is left over of each is mixed, and what fills no
    global batch then is left out for this epoch. Samples of similar length come together: pools of batches are sorted,
    and each global batch is dealt out so that ranks get about the same. All is drawn from the seed and the epoch, so
    ranks agree without talking.

    Args:
        lengths: of each sample, in any unit.
        modalities: of each sample; None mixes them.
        batch_size: samples of a rank's batch.
        world_size, rank: processes that load, and which of them this is.
        seed: of the order.
        streams: of each sample; None is one stream.
        batching: "random" mixes the streams in a batch; "per_stream" keeps every global batch to one.

    Raises:
        DataError: a stream has fewer samples than a global batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        modalities: Sequence[str] | None,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        streams: Sequence[str] | None = None,
        batching: Literal["random", "per_stream"] = "random",
    ) -> None:
        if batching not in ("random", "per_stream"):
            raise DataError("batching", f"there is no {batching!r}", "choose random or per_stream")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        count = len(self.lengths)
        self.modalities = ["" for _ in range(count)] if modalities is None else list(modalities)
        apart = streams is not None and batching == "per_stream"
        self.streams = list(streams) if apart and streams is not None else ["" for _ in range(count)]
        self.batch_size, self.world_size, self.rank, self.seed = batch_size, world_size, rank, seed
        self.batching = batching
        self.epoch = 0
        self._start = self._given = 0  # numbers of this epoch that this rank has got, at its start and so far
        for stream, held in sorted(_groups(range(count), self.streams).items()) or [("", [])]:
            if len(held) < batch_size * world_size:
                what = f"stream {stream!r}" if stream else "data"
                why = f"it has {len(held)} samples, fewer than a batch of {batch_size} for each of {world_size} ranks"
                raise DataError(what, why, "give more data, or take smaller batches")
        sizes = [len(held) // (batch_size * world_size) for held in _groups(range(count), self.streams).values()]
        self._length = sum(sizes) * batch_size

    def __len__(self) -> int:
        """Sample numbers that a rank gets in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        """The epoch from its start; the first time after `load_state_dict`, from where that was."""
        start, self._start = self._start, 0
        self._given = start
        for number in self.order()[start:]:
            self._given += 1
            yield int(number)

    def order(self) -> np.ndarray:
        """This rank's numbers of the whole epoch: (len,) int64."""
        rng = np.random.default_rng([self.seed, self.epoch])
        batches: list[np.ndarray] = []
        for _, held in sorted(_groups(range(len(self.lengths)), self.streams).items()):
            batches += self._batches(rng, held)
        return np.concatenate([batches[i][self.rank] for i in rng.permutation(len(batches))])

    def set_epoch(self, epoch: int) -> None:
        """Draw that epoch's order; to name the epoch that a loaded state is in changes nothing."""
        if epoch != self.epoch:
            self.epoch, self._start, self._given = epoch, 0, 0

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the sampler is.

        Args:
            batches: this rank's batches of the epoch that were used; None takes all that were given out, which is more
                where a loader fetches ahead.
        """
        given = self._given if batches is None else batches * self.batch_size
        return {**self._identity(), "epoch": self.epoch, "given": given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called.

        Raises:
            DataError: the state is of other data, another seed, other batches or another number of ranks.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                why = f"its {name} was {state.get(name)}, but is {value}"
                raise DataError("state of the sampler", why, "resume with the data and the batches it started with")
        self.epoch, self._start, self._given = state["epoch"], state["given"], state["given"]

    def _identity(self) -> dict[str, Any]:
        return {
            "samples": len(self.lengths),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "batching": self.batching,
        }

    def _batches(self, rng: np.random.Generator, held: list[int]) -> list[np.ndarray]:
        """Global batches (world_size, batch_size) of a stream."""
        size = self.batch_size * self.world_size
        rest: list[int] = []
        batches: list[np.ndarray] = []
        for _, alike in sorted(_groups(held, self.modalities).items()):
            drawn = rng.permutation(np.asarray(alike))
            whole = len(drawn) // size * size
            rest += drawn[whole:].tolist()
            batches += self._sorted(drawn[:whole], size)
        drawn = rng.permutation(np.asarray(rest, dtype=np.int64))
        return batches + self._sorted(drawn[: len(drawn) // size * size], size)

    def _sorted(self, drawn: np.ndarray, size: int) -> list[np.ndarray]:
        """Whole global batches of similar lengths, from pools of them."""
        pool = max(1, min(_POOL, len(drawn) // (4 * size))) * size
        batches = []
        for first in range(0, len(drawn), pool):
            part = drawn[first : first + pool]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [self._deal(part[i : i + size]) for i in range(0, len(part), size)]
        return batches

    def _deal(self, batch: np.ndarray) -> np.ndarray:
        """A global batch, longest first, as (world_size, batch_size): dealt out to and fro, for shares alike."""
        rounds = batch.reshape(self.batch_size, self.world_size).copy()
        rounds[1::2] = rounds[1::2, ::-1]
        return rounds.T


def _groups(numbers: Sequence[int], keys: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        groups[keys[number]].append(number)
    return groups
