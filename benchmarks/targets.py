# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels are meant to reach, and what a results file says of it: at the 3B shape, all in one run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.table import Row

MEMORY_BOUND = ("page_write", "forget", "pool_grid", "keyframe_score", "rope")


@dataclass(frozen=True)
class Target:
    """One target and what was measured for it."""

    what: str
    wanted: float
    measured: float
    share: bool = False  # of the machine's rate; else so many times faster
    where: str = ""  # the row that was measured, where it is the lowest of several

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted


def reached(document: dict[str, Any], rows: list[Row]) -> list[Target]:
    """The targets of which everything was measured; none on a GPU, which has targets of its own."""
    if document["machine"].get("gpu"):
        return []
    found = {(row.op, row.step, row.shape, row.dtype): row for row in rows}
    return [*_attention(found, document), *_originals(found), *_memory_bound(rows)]


def as_lines(targets: list[Target]) -> list[str]:
    """Lines of text, one a target."""
    wide = max(len(target.what) for target in targets)
    lines = [f"{'target':{wide}} {'wanted':>8} {'measured':>9}"]
    for target in targets:
        show: Callable[[float], str] = (lambda x: f"{x:.0%}") if target.share else (lambda x: f"{x:.3g} x")
        verdict = "met" if target.met else f"NOT MET, {target.measured / target.wanted:.0%} of it"
        where = f" ({target.where})" if target.where else ""
        lines.append(f"{target.what:{wide}} {show(target.wanted):>8} {show(target.measured):>9}  {verdict}{where}")
    return lines


def _attention(found: dict[tuple[str, ...], Row], document: dict[str, Any]) -> Iterator[Target]:
    for step, dtype, wanted in (
        ("forward", "bfloat16", 3.0),
        ("forward", "float32", 1.2),
        ("backward", "bfloat16", 4.0),
        ("backward", "float32", 2.0),
    ):
        row = found.get(("paged_attention", step, "3B", dtype))
        if row and (fastest := row.fastest_of_torch()):
            yield Target(
                f"paged_attention {step}, {dtype}: times torch's SDPA", wanted, row.peers[fastest], where=fastest
            )
    row, gemm = found.get(("paged_attention", "forward", "3B", "bfloat16")), document["rates"].get("gemm_bfloat16")
    if row and gemm and row.bound != "copy":
        yield Target("paged_attention forward, bfloat16: of the GEMM rate", 0.6, row.rate / gemm, share=True)
    # The longest video that both were measured for.
    lengths = [(r.shape.removesuffix(", 1/16 of the pages"), r) for r in found.values() if "1/16 of" in r.shape]
    both = [(name, r, found.get((r.op, r.step, f"{name}, 1/1 of the pages", r.dtype))) for name, r in lengths]
    for name, part, whole in both[-1:]:
        if whole:
            what = f"paged_attention, 1/16 of the pages of {name.removeprefix('3B, ')}: times all of them"
            yield Target(what, 12.0, whole.seconds / part.seconds)


def _originals(found: dict[tuple[str, ...], Row]) -> Iterator[Target]:
    for op, wanted in (("keyframe_score", 100.0), ("forget", 20.0)):
        rows = [found.get((op, "forward", "3B", dtype)) for dtype in ("bfloat16", "float32")]
        measured = [(row.peers["original"], row) for row in rows if row and "original" in row.peers]
        if measured:
            times, row = min(measured, key=lambda pair: pair[0])
            yield Target(f"{op}: times the original's formula", wanted, times, where=row.dtype)


def _memory_bound(rows: list[Row]) -> Iterator[Target]:
    for op in MEMORY_BOUND:
        ours = [row for row in rows if row.op == op and row.shape == "3B"]
        if ours:
            lowest = min(ours, key=lambda row: row.copy_share)
            what, where = f"{op}: of a copy of the same bytes, at least", f"{lowest.step}, {lowest.dtype}"
            yield Target(what, 0.7, lowest.copy_share, share=True, where=where)
