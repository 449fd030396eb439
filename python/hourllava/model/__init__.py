# SPDX-License-Identifier: Apache-2.0
"""The model: configuration, tower, MemAug, forgetting, and watching and asking on top of a memory."""

from .configuration import HourLlavaConfig, tiny_config
from .modeling import HourLlavaForConditionalGeneration
from .prompt import build_example, build_prompt

__all__ = ["HourLlavaConfig", "HourLlavaForConditionalGeneration", "build_example", "build_prompt", "tiny_config"]
