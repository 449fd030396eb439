# SPDX-License-Identifier: Apache-2.0
"""Chooses what a short run measures, prints one table, and keeps the results with the machine they come from."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.suite import ROOT, machine, on_gpu, rates, write_json, write_results
from benchmarks.table import as_table, rows_of
from benchmarks.targets import as_lines, reached

RATES = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every shape and length, and not what five minutes allow")
    parser.addoption("--device", default="cpu", help="where to measure: cpu or cuda")
    parser.addoption("--results", default=str(ROOT / "benchmarks/results"), help="the folder of the JSON and the table")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: a benchmark that only a full run takes the time for")
    config.addinivalue_line("markers", "gpu: a benchmark of a size that only a GPU is for")
    # A script in the background leaves interrupts ignored; what was measured until one comes is to be kept.
    signal.signal(signal.SIGINT, _interrupt_once)
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch sees no GPU; measure on the CPU, or where there is one")
    torch.set_default_device(device)


def _interrupt_once(number: int, frame: Any) -> None:
    """`timeout` sends each interrupt twice: the second must not cut short the writing of what was measured."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    fit = [item for item in items if on_gpu() or item.get_closest_marker("gpu") is None]
    short = fit if config.getoption("--full") else [item for item in fit if _is_short(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in short])
    items[:] = short


def _is_short(item: pytest.Item) -> bool:
    # A GPU runs in bfloat16; its ten minutes have no room for what it does not.
    wide = on_gpu() and "torch.float32" in item.name
    return "7B" not in item.name and not wide and item.get_closest_marker("long") is None


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.getoption("collectonly"):
        session.config.stash[RATES] = rates()


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # every way gets the same numbers


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
                "median": bench.stats.median / bench.extra_info["calls"],
                "p25": bench.stats.q1 / bench.extra_info["calls"],
                "p75": bench.stats.q3 / bench.extra_info["calls"],
                "rounds": bench.stats.rounds,
            }
            for bench in done
        ],
    }
    path = Path(config.getoption("--results")) / time.strftime("%Y-%m-%d-%H%M%S.json")
    write_json(path, document)
    rows = rows_of(document)
    lines = as_table(rows)
    if targets := reached(document, rows):
        lines += ["", *as_lines(targets)]
    write_results(path.with_suffix(".txt"), "\n".join(lines) + "\n")
    terminalreporter.section("ours and its peers")
    for line in lines:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{path}; draw it with python -m benchmarks.report {path}")
