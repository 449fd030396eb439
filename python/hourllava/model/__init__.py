# SPDX-License-Identifier: Apache-2.0
"""The model: configuration, tower, MemAug, forgetting, and watching and asking on top of a memory."""

from .asking import Answer, AskOptions, Moment
from .configuration import HourLlavaConfig, tiny_config
from .loading import load_model
from .modeling import HourLlavaForConditionalGeneration
from .prompt import build_example, build_prompt
from .watching import FrameWriter

__all__ = [
    "Answer",
    "AskOptions",
    "FrameWriter",
    "HourLlavaConfig",
    "HourLlavaForConditionalGeneration",
    "Moment",
    "build_example",
    "build_prompt",
    "load_model",
    "tiny_config",
]
