# SPDX-License-Identifier: Apache-2.0
"""Where results are kept: JSON in `benchmarks/results`, with the machine, the versions and the commit behind them."""

import time
from pathlib import Path
from typing import Any

from benchmarks.suite import ROOT, machine, write_json


def keep(name: str, results: list[dict[str, Any]]) -> Path:
    """Write results to a file of their own, and return its path.

    Args:
        name: of the benchmark.
        results: what was measured, a dictionary for each row of the table.
    """
    path = ROOT / "benchmarks/results" / time.strftime(f"{name}-%Y-%m-%d-%H%M%S.json")
    write_json(path, {"machine": machine(), "results": results})
    return path
