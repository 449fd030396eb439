# SPDX-License-Identifier: Apache-2.0
"""Numbers on the command line."""

import argparse
from collections.abc import Callable


def positive(text: str) -> int:
    """A whole number above 0; anything else is wrong usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def whole(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number of a range; anything else is wrong usage."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read
