# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as people write them."""

import re

from hourllava.errors import InputError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


def parse_size(text: str | int) -> int:
    """Bytes of "6GiB", "1.5 GB" or "4096"; a number is bytes already.

    Raises:
        InputError: it is no number above 0, or its unit is unknown.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or not float(match[1]):
        raise InputError(text or "size", "that is no size", "give bytes above 0, as in 6GiB or 500MB")
    known = {name.lower(): size for name, size in UNITS.items()}
    unit = match[2] or "B"
    if unit.lower() not in known:
        raise InputError(text, f"its unit {unit} is unknown", f"use one of {', '.join(UNITS)}")
    return int(float(match[1]) * known[unit.lower()])


def format_size(size: float) -> str:
    """Bytes with three digits and a unit, as in 4.05 GiB."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        count = size / UNITS[unit]
        if count >= 1:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
    return f"{size:.0f} B"
