# SPDX-License-Identifier: Apache-2.0
"""What the tests of the engines share: questions, and who listens to their answers."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from hourllava import VideoMemory
from hourllava.model import AskOptions, HourLlavaForConditionalGeneration, Prepared, prepare
from hourllava.serve import Ended, Event, Failed, Written

QUESTIONS = ["What falls?", "Where does it fall, and when?", "Who saw it?", "Why?"]
DEADLINE = 60  # seconds that no test comes near


@dataclass
class Listener:
    """Collects what happens to one question."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    hook: Callable[[Event], object] = lambda event: None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.hook(event)
        if isinstance(event, Ended | Failed):
            self.done.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Written))

    @property
    def last(self) -> Event:
        assert self.done.wait(DEADLINE)
        return self.events[-1]


def asks(
    model: HourLlavaForConditionalGeneration, memory: VideoMemory, question: str, **options: object
) -> Callable[[], Prepared]:
    return lambda: prepare(model, memory, question, AskOptions(**options))  # type: ignore[arg-type]
