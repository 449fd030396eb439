# SPDX-License-Identifier: Apache-2.0
"""How times are written."""


def clock(seconds: float) -> str:
    """Write a time as mm:ss, or h:mm:ss from one hour on; fractions are cut off, as on a player's clock."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
