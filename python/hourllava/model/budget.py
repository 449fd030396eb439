# SPDX-License-Identifier: Apache-2.0
"""How much of a memory a question may read: stated in pages, seconds or a share, resolved to pages of that memory."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hourllava.errors import InputError
from hourllava.memory import Shard
from hourllava.memory.pages import PAGE_SIZE, MemoryPages, frame_slots, page_count, rows_in_use

from .memaug import PageBudget

MODES = ("both", "content", "rotated")
FORMS = "write pages as 128p, seconds as 60s, a share as 1/16, or one of 32 pages at least as 1/16,32p"
ALL = "all"  # exact reading


@dataclass(frozen=True)
class Budget:
    """The most that each MemAug block may read, for every choice that it makes: one of pages, seconds and part.

    Which pages those are, `retrieve` decides from their summaries, block by block.

    Raises:
        InputError: not one of the three is given, a number is too small, the mode is unknown, a span is empty.
    """

    pages: int | None = None
    seconds: float | None = None
    part: int | None = None  # one page in so many,
    least: int = 1  # and this many pages at least: a small share of a short video is none at all
    mode: str = "both"  # dims that score a page: those that know positions ("rotated"), the others ("content"), or both
    tile: int | None = None  # neighbouring query rows that share a choice; None: all of a question's
    keep: tuple[tuple[float, float], ...] = ()  # spans of seconds that are read whatever their score

    def __post_init__(self) -> None:
        given = [size for size in (self.pages, self.seconds, self.part) if size is not None]
        if len(given) != 1 or not given[0] > 0:
            raise InputError("budget", "it has no size above 0, or more than one", FORMS)
        if self.least < 1 or (self.least > 1 and self.part is None):
            raise InputError("budget", f"a least of {self.least} pages is for a share", "write it as 1/16,32p")
        if self.mode not in MODES:
            raise InputError("budget", f"there is no mode {self.mode}", f"choose {', '.join(MODES)}")
        if self.tile is not None and self.tile < 1:
            raise InputError("budget", f"a tile of {self.tile} rows holds no query", "give it at least 1")
        for start, end in self.keep:
            if not 0 <= start < end:
                raise InputError(
                    "budget", f"there is no second from {start:g} to {end:g}", "give the earlier one first"
                )

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """A budget of `128p` (pages), `60s` (seconds), `1/16` (of the pages) or `1/16,32p` (32 pages at least).

        Raises:
            InputError: it is none of these.
        """
        share = r"1/(?P<part>\d{1,18})(, ?(?P<least>\d{1,18})p)?"
        found = re.fullmatch(rf"(?P<pages>\d{{1,18}})p|(?P<seconds>\d+(\.\d+)?)s|{share}", text.strip())
        if found is None:
            raise InputError("budget", f"{text!r} is no budget", f"{FORMS}, or all to read all of it")
        pages, seconds, part, least = (found[name] for name in ("pages", "seconds", "part", "least"))
        if pages is not None:
            return cls(pages=int(pages))
        return cls(seconds=float(seconds)) if seconds is not None else cls(part=int(part), least=int(least or 1))

    def resolve(
        self, second: Tensor, seconds: int, per_frame: int, pages: MemoryPages, shard: Shard | None = None
    ) -> PageBudget:
        """The budget in pages of one memory.

        Args:
            second: (T,) int64, the second of the video that each frame of the memory shows; short videos are repeated.
            seconds: of the video.
            per_frame: visual tokens of a frame.
            pages: where the memory lies; its table lists every page in order.
            shard: which process holds which second, if many do; `second` and `pages` are then this one's.

        Raises:
            InputError: what is always read does not fit, or is no part of the video.
        """
        parts = [second] if shard is None else [part.to(second.device) for part in shard.parts]
        most, kept = self.most(seconds, sum(map(len, parts)), per_frame), None
        for start, _ in self.keep:
            if start >= seconds:
                why = f"there is no second {start:g} to be always read, the video has {seconds}"
                raise InputError("budget", why, "name seconds of the video")
        if self.keep:
            kept = torch.cat([self._kept_pages(part, per_frame) for part in parts])
            count = int(kept.sum())
            if count > most:
                why = f"what is always read takes {count} pages, and the budget is {most}"
                raise InputError("budget", why, "give a larger budget, or keep less")
        if shard is not None:
            lengths = tuple(rows_in_use(len(part), per_frame, second.device) for part in parts)
            return PageBudget(most, self.mode, self.tile, kept, lengths)
        if kept is not None:
            listed = pages.page_table[0].to(torch.int64)
            kept = kept.new_zeros(len(pages.page_lengths)).index_put((listed,), kept)
        return PageBudget(most, self.mode, self.tile, kept)

    def most(self, seconds: int, frames: int, per_frame: int) -> int:
        """Pages that may be read of a memory of so many frames, which show a video of so many seconds."""
        every = page_count(frames, per_frame)
        if self.pages is not None:
            return min(self.pages, every)
        if self.part is not None:
            return min(max(-(-every // self.part), self.least), every)
        assert self.seconds is not None
        return page_count(math.ceil(min(self.seconds / seconds, 1) * frames), per_frame)

    def _kept_pages(self, second: Tensor, per_frame: int) -> Tensor:
        """Which pages (P,) bool hold anything of the spans; a span ends before its last second."""
        inside = torch.zeros_like(second, dtype=torch.bool)
        for start, end in self.keep:
            inside |= (second + 1 > start) & (second < end)
        slots, _ = frame_slots(inside.nonzero()[:, 0], per_frame)
        pages = torch.zeros(page_count(len(second), per_frame), dtype=torch.bool, device=second.device)
        return pages.index_fill(0, slots // PAGE_SIZE, True)


def as_budget(given: "Budget | str") -> Budget | None:
    """What `ask` is given as its budget, an object or its short form; None for "all", which reads every page."""
    if given == ALL:
        return None
    return given if isinstance(given, Budget) else Budget.parse(str(given))
