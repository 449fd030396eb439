# SPDX-License-Identifier: Apache-2.0
"""The `hourllava` command."""

from hourllava.cli.command import main

__all__ = ["main"]
