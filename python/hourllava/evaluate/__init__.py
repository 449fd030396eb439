# SPDX-License-Identifier: Apache-2.0
"""Accuracy on held-out films of an hour, from MP4 files, through the whole path."""

from hourllava.evaluate.hour import HourTest, Tally, evaluate, main

__all__ = ["HourTest", "Tally", "evaluate", "main"]
