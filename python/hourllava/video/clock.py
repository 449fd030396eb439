# SPDX-License-Identifier: Apache-2.0
"""How times are written."""


def clock(seconds: float) -> str:
    """Write a time as mm:ss, or h:mm:ss from one hour on; fractions are cut off, as on a player's clock."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


def seconds_of_clock(text: str) -> float:
    """Read a time as `clock` writes it, or a number of seconds.

    Raises:
        ValueError: it is neither.
    """
    seconds = 0.0
    for part in text.split(":"):
        value = float(part)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{text!r} is no time")
        seconds = 60 * seconds + value
    return seconds
