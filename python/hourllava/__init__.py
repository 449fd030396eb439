# SPDX-License-Identifier: Apache-2.0
"""Ask questions about hour-long video.

    model = load_model("tiny")
    memory = model.watch("film.mp4")
    print(model.ask(memory, "Which colour was the triangle?"))

The names below are imported when they are first used: `hourllava --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hourllava import registration as _registration  # noqa: F401  (importing it registers the model)

if TYPE_CHECKING:
    from hourllava.errors import HourLlavaError
    from hourllava.memory import VideoMemory
    from hourllava.model import (
        HourLlavaConfig,
        HourLlavaForConditionalGeneration,
        HourLlavaProcessor,
        Subtitles,
        load_model,
    )

__all__ = [
    "HourLlavaConfig",
    "HourLlavaError",
    "HourLlavaForConditionalGeneration",
    "HourLlavaProcessor",
    "Subtitles",
    "VideoMemory",
    "load_model",
]

_HOME = {"HourLlavaError": "hourllava.errors", "VideoMemory": "hourllava.memory"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hourllava' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "hourllava.model")), name)
