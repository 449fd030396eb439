# SPDX-License-Identifier: Apache-2.0
"""The memory of a video: pages of keys and values that grow, and their file."""

from .pages import MemoryPages
from .pool import scratch_files
from .repository import Repository
from .sharding import least_loaded, sharded_attention
from .upkeep import Problem, repair, verify
from .video_memory import MemoryPrefix, MemoryShape, MemoryWriter, VideoMemory

__all__ = [
    "MemoryPages",
    "MemoryPrefix",
    "MemoryShape",
    "MemoryWriter",
    "Problem",
    "Repository",
    "VideoMemory",
    "least_loaded",
    "repair",
    "scratch_files",
    "sharded_attention",
    "verify",
]
