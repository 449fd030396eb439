# SPDX-License-Identifier: Apache-2.0
"""MemAug, the memory and the forgetting as plain modules for other people's models; README.md beside this file shows
how they are put in."""

from .frames import Forgetting, FrameMemory
from .resampler import MemAug

__all__ = ["Forgetting", "FrameMemory", "MemAug"]
