# SPDX-License-Identifier: Apache-2.0
"""The public operators, one file each."""

from hourllava_ext.ops.rope import rope

__all__ = ["rope"]
