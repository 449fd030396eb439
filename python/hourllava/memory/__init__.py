# SPDX-License-Identifier: Apache-2.0
"""The memory of a video: pages of keys and values, and their file."""

from .pages import MemoryPages

__all__ = ["MemoryPages"]
