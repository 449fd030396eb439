# SPDX-License-Identifier: Apache-2.0
"""Finding a model: a preset of the package, or a directory that `save_pretrained` wrote."""

import os
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging

from hourllava.errors import ModelError

from .configuration import HourLlavaConfig
from .modeling import HourLlavaForConditionalGeneration

PRESETS = Path(__file__).parent.parent / "presets"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


def load_model(name: str | os.PathLike[str] = "tiny") -> HourLlavaForConditionalGeneration:
    """A model ready to watch and to answer.

    Args:
        name: a preset's name, or a directory that holds config.json, the weights and the tokenizer.

    Raises:
        ModelError: there is no such preset or directory, or it is not whole.
    """
    presets = sorted(folder.parent.name for folder in PRESETS.glob("*/config.json"))
    folder = PRESETS / name if str(name) in presets else Path(name)
    if not folder.is_dir():
        todo = f"give a model's directory or a preset ({', '.join(presets) or 'none is installed'})"
        raise ModelError(name, "there is no such model", todo)
    present = {path.name.removesuffix(".index.json") for path in folder.iterdir()}
    missing = [file for file in NEEDED if file not in present]
    if missing:
        raise ModelError(name, f"{missing[0]} is missing", "give a directory that save_pretrained wrote")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return HourLlavaForConditionalGeneration.from_pretrained(folder).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(name, str(error).splitlines()[0], "give a directory that save_pretrained wrote") from error
    finally:
        if bars:
            logging.enable_progress_bar()


# So that transformers' own Auto classes know a saved model once this package is imported.
AutoConfig.register(HourLlavaConfig.model_type, HourLlavaConfig)
AutoModelForImageTextToText.register(HourLlavaConfig, HourLlavaForConditionalGeneration)
