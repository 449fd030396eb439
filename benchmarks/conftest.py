# SPDX-License-Identifier: Apache-2.0
"""Chooses what a short run measures, prints one table, and keeps the results with the machine they come from."""

import json
import time
from typing import Any

import pytest

from benchmarks.suite import ROOT, machine, rates
from benchmarks.table import as_table, rows_of

RESULTS = ROOT / "benchmarks/results"
RATES = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every shape and length, and not what five minutes allow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: a benchmark that only a full run takes the time for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    short = [item for item in items if "7B" not in item.name and item.get_closest_marker("long") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in short])
    items[:] = short


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[RATES] = rates()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in session.benchmarks if b and "op" in b.extra_info] if session else []
    if not done:
        return
    # The faster of before and after: a machine that was busy once must not make ours look better.
    after = rates()
    found = {name: max(rate, after[name]) for name, rate in config.stash[RATES].items()}
    document = {
        "machine": machine(),
        "rates": found,
        "results": [
            {
                **bench.extra_info,
                "median": bench.stats.median,
                "p25": bench.stats.q1,
                "p75": bench.stats.q3,
                "rounds": bench.stats.rounds,
            }
            for bench in done
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("%Y-%m-%d-%H%M%S.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    terminalreporter.section("ours and its peers")
    for line in as_table(rows_of(document)):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{path.relative_to(ROOT)}; draw it with python -m benchmarks.report")
