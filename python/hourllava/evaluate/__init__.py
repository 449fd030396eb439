# SPDX-License-Identifier: Apache-2.0
"""Accuracy: on the paper's benchmarks, and on rendered films of an hour, exactly and under budgets.

The names below are imported when they are first used: lmms-eval finds the model here and need not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hourllava.evaluate.benchmarks import BENCHMARKS, Benchmark, Question
    from hourllava.evaluate.data_folder import DataFolder
    from hourllava.evaluate.hour import HourTest, Tally, evaluate, main
    from hourllava.evaluate.retrieval import RetrievalReport, measure_retrieval, report_table
    from hourllava.evaluate.running import BenchmarkReport, RunOptions, run_benchmark

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "BenchmarkReport",
    "DataFolder",
    "HourTest",
    "Question",
    "RetrievalReport",
    "RunOptions",
    "Tally",
    "evaluate",
    "main",
    "measure_retrieval",
    "report_table",
    "run_benchmark",
]

_HOMES = {
    "benchmarks": ("BENCHMARKS", "Benchmark", "Question"),
    "data_folder": ("DataFolder",),
    "hour": ("HourTest", "Tally", "evaluate", "main"),
    "retrieval": ("RetrievalReport", "measure_retrieval", "report_table"),
    "running": ("BenchmarkReport", "RunOptions", "run_benchmark"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"hourllava.evaluate.{home}"), name)
    raise AttributeError(f"module 'hourllava.evaluate' has no attribute {name!r}")
