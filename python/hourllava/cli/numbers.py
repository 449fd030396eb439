# SPDX-License-Identifier: Apache-2.0
"""Numbers on the command line."""

import argparse


def positive(text: str) -> int:
    """A whole number above 0; anything else is wrong usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
