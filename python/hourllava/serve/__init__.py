# SPDX-License-Identifier: Apache-2.0
"""A server: videos are watched once and asked by many, over HTTP."""

from .engine import Began, Ended, Engine, Event, Failed, Ticket, Written
from .wording import Sampling

__all__ = ["Began", "Ended", "Engine", "Event", "Failed", "Sampling", "Ticket", "Written"]
