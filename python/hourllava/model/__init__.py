# SPDX-License-Identifier: Apache-2.0
"""The model: configuration, tower, MemAug, forgetting, and watching and asking on top of a memory."""

from .asking import Answer, AskOptions, Moment, Prepared, find_moments, prepare
from .budget import Budget
from .configuration import HourLlavaConfig, tiny_config
from .conversion import convert_decoder, convert_to_original
from .loading import best_device, load_model
from .modeling import HourLlavaForConditionalGeneration
from .parts import parts_table
from .processing import HourLlavaProcessor
from .prompt import build_example, build_prompt
from .subtitles import Subtitles
from .watching import FrameWriter, watch_sharded

__all__ = [
    "Answer",
    "AskOptions",
    "Budget",
    "FrameWriter",
    "HourLlavaConfig",
    "HourLlavaForConditionalGeneration",
    "HourLlavaProcessor",
    "Moment",
    "Prepared",
    "Subtitles",
    "best_device",
    "build_example",
    "build_prompt",
    "convert_decoder",
    "convert_to_original",
    "find_moments",
    "load_model",
    "parts_table",
    "prepare",
    "tiny_config",
    "watch_sharded",
]
