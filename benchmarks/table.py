# SPDX-License-Identifier: Apache-2.0
"""A results file as rows: ours beside each peer, and the share of what the machine can do."""

from dataclasses import dataclass
from typing import Any

from benchmarks.suite import OURS


@dataclass(frozen=True)
class Row:
    """One operator, step, shape and dtype."""

    name: str
    seconds: float  # median of ours
    spread: float  # (p75 - p25) / median of ours
    bound: str  # what the machine is compared with: a product or a copy
    share: float  # of that rate
    rate: float  # FLOP/s for a product, bytes/s for a copy
    peers: dict[str, float]  # how many times longer each takes


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
        # The larger of the two floors is the bound.
        floors = {"copy": ours["bytes"] / document["rates"]["copy"]}
        product = f"gemm_{ours['dtype']}"
        if product in document["rates"]:
            floors[product] = ours["flop"] / document["rates"][product]
        bound = max(floors, key=lambda name: floors[name])
        peers = {way: result["median"] / ours["median"] for way, result in ways.items() if way != OURS}
        spread = (ours["p75"] - ours["p25"]) / ours["median"]
        rate = (ours["bytes"] if bound == "copy" else ours["flop"]) / ours["median"]
        rows.append(Row(", ".join(key), ours["median"], spread, bound, floors[bound] / ours["median"], rate, peers))
    return rows


def as_table(rows: list[Row]) -> list[str]:
    """Lines of text, one a row."""
    names = sorted({way for row in rows for way in row.peers})
    wide = max(len(row.name) for row in rows)
    head = f"{'':{wide}} {'median':>10} {'spread':>7} {'rate':>13} {'of the machine':>20}"
    lines = [head + "".join(f"{'x ' + name:>12}" for name in names)]
    for row in rows:
        time = f"{row.seconds * 1e3:.3g} ms"
        rate = f"{row.rate / 1e9:.0f} GB/s" if row.bound == "copy" else f"{row.rate / 1e12:.3g} TFLOP/s"
        line = f"{row.name:{wide}} {time:>10} {row.spread:>7.0%} {rate:>13} {f'{row.share:.0%} of {row.bound}':>20}"
        lines.append(line + "".join(f"{row.peers[n]:>12.2f}" if n in row.peers else f"{'':>12}" for n in names))
    return lines
