# SPDX-License-Identifier: Apache-2.0
"""Accuracy on held-out films of an hour, from MP4 files, through the whole path; exactly, and under budgets."""

from hourllava.evaluate.hour import HourTest, Tally, evaluate, main
from hourllava.evaluate.retrieval import RetrievalReport, measure_retrieval, report_table

__all__ = ["HourTest", "RetrievalReport", "Tally", "evaluate", "main", "measure_retrieval", "report_table"]
