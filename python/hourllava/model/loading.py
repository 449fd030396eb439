# SPDX-License-Identifier: Apache-2.0
"""Finding a model: a preset of the package, or a directory with a checkpoint, ours or the original's."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from hourllava.errors import ModelError

from .configuration import HourLlavaConfig, OriginalConfig
from .modeling import HourLlavaForConditionalGeneration
from .processing import HourLlavaProcessor
from .prompt import has_tokenizer

PRESETS = Path(__file__).parent.parent / "presets"


def load_model(
    name: str | os.PathLike[str] = "tiny",
    vision_tower: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    decoder: bool = True,
) -> HourLlavaForConditionalGeneration:
    """A model ready to watch and to answer.

    Args:
        name: a preset's name, or a directory that holds config.json, the weights and the tokenizer, as
            `save_pretrained` or the original wrote them.
        vision_tower: a directory with the tower's own repository, for checkpoints that hold no tower.
        device: where it runs; `hourllava.model.best_device()` is a GPU if there is one.
        decoder: False lets go of the decoder's layers and head before the rest goes to the device: it watches and
            prepares questions, and another program, such as vLLM, writes the answers.

    Raises:
        ModelError: there is no such preset or directory, or it is not whole.
    """
    folder = model_folder(name)
    if not has_tokenizer(folder):
        raise ModelError(name, "tokenizer.json is missing", "give a directory that save_pretrained wrote")
    try:
        model = HourLlavaForConditionalGeneration.from_pretrained(folder, vision_tower=vision_tower).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(name, str(error).splitlines()[0], "give a directory that save_pretrained wrote") from error
    if not decoder:
        model.model.layers, model.lm_head = _LeftOut(), _LeftOut()  # type: ignore[assignment]
    return model.to(device)  # type: ignore[arg-type]


class _LeftOut(torch.nn.Module):
    """Stands where a model loaded without its decoder has none; whatever needs it is a ModelError."""

    def __getitem__(self, number: object) -> None:
        raise ModelError("model", "it was loaded without its decoder", "load it with decoder=True")

    def forward(self, *args: object, **kwargs: object) -> None:
        """Raise ModelError."""
        self[0]

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        self[0]


def best_device(number: int | None = None) -> torch.device:
    """A GPU if there is one, else the CPU.

    Args:
        number: of this process among those that share a machine's GPUs; None is its place under torchrun.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = dist.get_node_local_rank(0) if number is None else number
    return torch.device("cuda", number % torch.cuda.device_count())


def model_folder(name: str | os.PathLike[str]) -> Path:
    """The directory of a preset, or the directory of that name.

    Raises:
        ModelError: there is neither.
    """
    presets = sorted(folder.parent.name for folder in PRESETS.glob("*/config.json"))
    folder = PRESETS / name if str(name) in presets else Path(name)
    if not folder.is_dir():
        todo = f"give a model's directory or a preset ({', '.join(presets) or 'none is installed'})"
        raise ModelError(name, "there is no such model", todo)
    return folder


# So that transformers' own Auto classes know a saved model once this package is imported.
AutoConfig.register(HourLlavaConfig.model_type, HourLlavaConfig)
AutoConfig.register(OriginalConfig.model_type, OriginalConfig)
AutoProcessor.register(HourLlavaConfig, HourLlavaProcessor)
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HourLlavaConfig, HourLlavaForConditionalGeneration)
