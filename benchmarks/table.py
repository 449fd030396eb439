# SPDX-License-Identifier: Apache-2.0
"""A results file as rows: ours beside each peer, and the share of what the machine can do."""

from dataclasses import dataclass
from typing import Any

from benchmarks.suite import OURS

TORCH = ("torch", "grouped", "folded")  # ways to torch's SDPA; the fastest counts


@dataclass(frozen=True)
class Row:
    """One operator, step, shape and dtype."""

    op: str
    step: str
    shape: str
    dtype: str
    seconds: float  # median of ours
    spread: float  # (p75 - p25) / median of ours
    bound: str  # what the machine is compared with: a product or a copy
    share: float  # of that rate
    rate: float  # FLOP/s for a product, bytes/s for a copy
    copy_share: float  # how long a copy of the same bytes takes, as a share of our time
    peers: dict[str, float]  # how many times longer each takes
    peak_bytes: int | None  # that a call takes beyond its arguments

    @property
    def name(self) -> str:
        return ", ".join((self.op, self.step, self.shape, self.dtype))

    def fastest_of_torch(self) -> str | None:
        """The peer that is torch's own kernel, in the way that it is fastest."""
        ways = [name for name in TORCH if name in self.peers]
        return min(ways, key=lambda name: self.peers[name]) if ways else None


def rows_of(document: dict[str, Any]) -> list[Row]:
    """Rows of a results document, where ours was measured, in the order of measuring."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for result in document["results"]:
        key = tuple(str(result[part]) for part in ("op", "step", "shape", "dtype"))
        groups.setdefault(key, {})[result["way"]] = result
    rows = []
    for key, ways in groups.items():
        if OURS not in ways:
            continue
        ours = ways[OURS]
        # The larger of the two floors is the bound: a copy of the same bytes, or a product of as many FLOP.
        floors = {"copy": ours["copy"]}
        product = f"gemm_{ours['dtype']}"
        if product in document["rates"]:
            floors[product] = ours["flop"] / document["rates"][product]
        bound = max(floors, key=lambda name: floors[name])
        rows.append(
            Row(
                *key,
                seconds=ours["median"],
                spread=(ours["p75"] - ours["p25"]) / ours["median"],
                bound=bound,
                share=floors[bound] / ours["median"],
                rate=(ours["bytes"] if bound == "copy" else ours["flop"]) / ours["median"],
                copy_share=floors["copy"] / ours["median"],
                peers={way: result["median"] / ours["median"] for way, result in ways.items() if way != OURS},
                peak_bytes=ours["peak_bytes"],
            )
        )
    return rows


def as_table(rows: list[Row]) -> list[str]:
    """Lines of text, one a row."""
    names = sorted({way for row in rows for way in row.peers})
    wide = max((len(row.name) for row in rows), default=0)
    columns = {name: max(12, len(name) + 4) for name in names}
    head = f"{'':{wide}} {'median':>10} {'spread':>7} {'rate':>13} {'of the machine':>20} {'memory':>10}"
    lines = [head + "".join(f"{'x ' + name:>{columns[name]}}" for name in names)]
    for row in rows:
        time = f"{row.seconds * 1e3:.3g} ms"
        rate = f"{row.rate / 1e9:.0f} GB/s" if row.bound == "copy" else f"{row.rate / 1e12:.3g} TFLOP/s"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB"
        line = f"{row.name:{wide}} {time:>10} {row.spread:>7.0%} {rate:>13} {f'{row.share:.0%} of {row.bound}':>20}"
        peers = "".join(f"{f'{row.peers[n]:.2f}' if n in row.peers else '':>{columns[n]}}" for n in names)
        lines.append((line + f" {memory:>10}" + peers).rstrip())
    return lines
