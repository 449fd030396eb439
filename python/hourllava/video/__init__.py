# SPDX-License-Identifier: Apache-2.0
"""Video files in, one frame per second and bounded memory; and out, for rendered films."""

from hourllava.video.writer import write_video

__all__ = ["write_video"]
