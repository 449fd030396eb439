# SPDX-License-Identifier: Apache-2.0
"""The memory of a video: pages of keys and values that grow, and their file."""

from .pages import MemoryPages
from .video_memory import MemoryShape, MemoryWriter, VideoMemory

__all__ = ["MemoryPages", "MemoryShape", "MemoryWriter", "VideoMemory"]
