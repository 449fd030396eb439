# SPDX-License-Identifier: Apache-2.0
"""The resize in front of the tower, on the CPU and as other devices compute it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hourllava.video import resize_frames
from hourllava.video.resize import _stretch_in_float


class Resizes(TorchDispatchMode):
    """What the resizes that run are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "upsample_bicubic2d_aa" in func.name():
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(97, 131), (384, 200), (30, 31)])
def test_in_float_as_on_uint8(shape: tuple[int, int]) -> None:
    frames = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    frames[1] = (torch.arange(shape[1]) // 7 % 2 * 255).to(torch.uint8)  # edges that overshoot
    ours, exact = _stretch_in_float(frames, 96), resize_frames(frames, 96)
    assert ours.dtype == exact.dtype == torch.uint8
    assert (ours.int() - exact.int()).abs().max() <= 1
    assert ours[1].min() == 0
    assert ours[1].max() == 255


def test_other_devices_get_floating_point() -> None:
    """What CUDA has no kernel of is not asked of it."""
    with Resizes() as resizes:
        out = resize_frames(torch.empty(2, 3, 50, 60, dtype=torch.uint8, device="meta"), 32)
    assert set(resizes.seen) == {torch.float32}
    assert (out.dtype, out.shape) == (torch.uint8, (2, 3, 32, 32))


def test_nothing_to_do() -> None:
    frames = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert resize_frames(frames, 32) is frames
