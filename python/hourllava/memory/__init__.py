# SPDX-License-Identifier: Apache-2.0
"""The memory of a video: pages of keys and values that grow, and their file."""

from .embedding import Embedding, link, packed_features
from .memory_pool import HeldMemory, MemoryPool, TierUsage
from .pages import MemoryPages
from .pool import scratch_files
from .repository import Repository
from .segments import PRECISIONS, fill_features, unpack_features
from .sharded_memory import ShardedMemory
from .sharding import Shard, sharded_attention
from .sizes import format_size, parse_size
from .upkeep import Problem, repair, verify
from .video_memory import MemoryPrefix, VideoMemory
from .writer import MemoryShape, MemoryWriter

__all__ = [
    "PRECISIONS",
    "Embedding",
    "HeldMemory",
    "MemoryPages",
    "MemoryPool",
    "MemoryPrefix",
    "MemoryShape",
    "MemoryWriter",
    "Problem",
    "Repository",
    "Shard",
    "ShardedMemory",
    "TierUsage",
    "VideoMemory",
    "fill_features",
    "format_size",
    "link",
    "packed_features",
    "parse_size",
    "repair",
    "scratch_files",
    "sharded_attention",
    "unpack_features",
    "verify",
]
