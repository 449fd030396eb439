# SPDX-License-Identifier: Apache-2.0
"""A server: videos are watched once and asked by many, over HTTP."""

from .engine import Engine
from .questions import Began, Ended, Event, Failed, Ticket, Written
from .remote import RemoteDecoder, RemoteEngine
from .wording import Sampling

__all__ = [
    "Began",
    "Ended",
    "Engine",
    "Event",
    "Failed",
    "RemoteDecoder",
    "RemoteEngine",
    "Sampling",
    "Ticket",
    "Written",
]
