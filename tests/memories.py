# SPDX-License-Identifier: Apache-2.0
"""What the tests of the memory share: a writer that is a few matrices and no model, its frames, and a full disk."""

import contextlib
import resource

import torch

from hourllava.memory import MemoryShape

SIDE = 8


class SmallWriter:
    """Features are pixels; everything after them is one product each."""

    batch = 16
    feature_width = 12
    device = torch.device("cpu")

    def __init__(self, seed=0, per_frame=16):
        self.shape = MemoryShape(per_frame, width=10, blocks=2, kv_heads=2, head_dim=8, dtype=torch.float32)
        self.inv_freq = 1 / 100 ** (torch.arange(2) / 2)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(self.feature_width, 10, generator=generator)
        self.newline = torch.randn(1, 10, generator=generator)
        self.weights = [torch.randn(10, 2 * 2 * 8, generator=generator) for _ in range(2)]

    def fingerprint(self):
        return f"writer {self.seed}"

    def tower_fingerprint(self):
        return f"tower {self.shape.per_frame}"

    def encode(self, frames):
        pixels = frames.float().flatten(1) / 255 - 0.5
        return pixels[:, : self.shape.per_frame * self.feature_width].unflatten(1, (self.shape.per_frame, -1)) + 1e-3

    def project(self, features):
        return features @ self.projection

    def keys_values(self, tokens):
        rows = torch.cat([tokens.flatten(0, 1), self.newline.expand(len(tokens), -1)])
        return [(rows @ weight).view(len(rows), 2, 2, 8).unbind(1) for weight in self.weights]


def make_frames(count, first=0):
    """(count, 3, 8, 8) uint8, a function of the frame's number."""
    number = torch.arange(first, first + count)[:, None] * 7919 + torch.arange(3 * SIDE * SIDE) * 104729
    return (number % 251).to(torch.uint8).view(count, 3, SIDE, SIDE)


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes meanwhile, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
