# SPDX-License-Identifier: Apache-2.0
"""Who holds which pages of a pool: free list, reference counts and order of eviction, in C++ and without the GIL."""

import ctypes
from typing import NoReturn

import torch
from torch import Tensor

from .library import LIBRARY


def _load() -> ctypes.CDLL:
    binary = ctypes.CDLL(str(LIBRARY))
    handle, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
    signatures = {
        "new": (handle, [number]),
        "delete": (None, [handle]),
        "take": (number, [handle, handle, number, number, handle]),
        "pin": (flag, [handle, number]),
        "unpin": (flag, [handle, number]),
        "evict": (number, [handle, number, handle, number]),
        "release": (flag, [handle, number]),
        "counts": (None, [handle, handle]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(binary, f"hourllava_ext_pages_{name}")
        function.restype, function.argtypes = result, arguments
    return binary


_BINARY = _load()
UNHELD = -2  # what `take` returns for a shared page that nobody holds


class PageAllocator:
    """Numbers pages from 0 on and hands them out in leases.

    A lease is the set of pages that one memory lies in. Leases may share pages, as when a longer memory replaces a
    shorter one that is still being read; a page is free when no lease holds it. A pinned lease keeps its pages whatever
    is asked meanwhile. Any thread may call any method at any time.

    Args:
        pages: how many there are.

    Raises:
        ValueError: that number is negative, or there is no RAM for it.
    """

    def __init__(self, pages: int) -> None:
        self._pages = _BINARY.hourllava_ext_pages_new(pages)
        self._total = pages
        if not self._pages:
            raise ValueError(f"page_allocator: there cannot be {pages} pages")

    def __del__(self) -> None:
        if getattr(self, "_pages", None):
            _BINARY.hourllava_ext_pages_delete(self._pages)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "page_allocator: its leases belong to one process and cannot be copied or pickled; make another"
        )

    def take(self, fresh: int, shared: Tensor | None = None) -> tuple[int, Tensor] | None:
        """A new lease, pinned once, of `fresh` free pages and of `shared` ones, int64 (n,), that other leases hold.

        Returns:
            its number and the free pages it got, int64 (fresh,); None, and nothing is changed, if there are too few.

        Raises:
            ValueError: `fresh` is negative, `shared` is not int64 (n,) on the CPU, or no lease holds a page of it.
        """
        shared = torch.empty(0, dtype=torch.int64, device="cpu") if shared is None else shared.contiguous()
        if shared.dtype != torch.int64 or shared.dim() != 1 or shared.device.type != "cpu":
            told = f"{shared.dtype} {tuple(shared.shape)} on {shared.device}"
            raise ValueError(f"page_allocator: shared pages must be int64 (n,) on the CPU, got {told}")
        if fresh < 0:
            raise ValueError(f"page_allocator: nobody can take {fresh} pages")
        pages = torch.empty(fresh, dtype=torch.int64, device="cpu")
        lease = _BINARY.hourllava_ext_pages_take(self._pages, shared.data_ptr(), len(shared), fresh, pages.data_ptr())
        if lease == UNHELD:
            raise ValueError(
                "page_allocator: a shared page is held by no lease; share pages of leases not yet released"
            )
        return None if lease < 0 else (lease, pages)

    def pin(self, lease: int) -> bool:
        """Keep a lease's pages until `unpin`; it becomes the last to be evicted. False if it is gone."""
        return _BINARY.hourllava_ext_pages_pin(self._pages, lease)

    def unpin(self, lease: int) -> bool:
        """Undo one `pin`. False if there is none to undo."""
        return _BINARY.hourllava_ext_pages_unpin(self._pages, lease)

    def evict(self, wanted: int) -> list[int] | None:
        """Choose leases, the least recently pinned first and none that is pinned, so that with their pages at least
        `wanted` would be free. They cannot be pinned any more, and keep their pages until each is released.

        Returns:
            the leases, none of them if enough pages are free already; None, and none is chosen, if all would not do.
        """
        leases = torch.empty(self._total, dtype=torch.int64, device="cpu")  # none has less than a page
        chosen = _BINARY.hourllava_ext_pages_evict(self._pages, wanted, leases.data_ptr(), len(leases))
        return None if chosen < 0 else leases[:chosen].tolist()

    def release(self, lease: int) -> bool:
        """Give a lease's pages back: now, or as soon as it is not pinned any more. False if it is gone already."""
        return _BINARY.hourllava_ext_pages_release(self._pages, lease)

    def counts(self) -> tuple[int, int, int]:
        """Pages in all, free pages, and pages that evicting everything which is not pinned would free."""
        counts = torch.empty(3, dtype=torch.int64, device="cpu")
        _BINARY.hourllava_ext_pages_counts(self._pages, counts.data_ptr())
        total, free, reclaimable = counts.tolist()
        return total, free, reclaimable
