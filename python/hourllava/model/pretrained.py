# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained`: what the files of a checkpoint hold is compared with what the model needs before any weight is
read; then transformers loads them, and a tower that lies elsewhere is put in.

Weights of the dtype that is asked for stay mapped from their files; others are converted one by one. Either way the
host holds about one copy.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .checkpoint import copy_tensors, find_folder, open_checkpoint, own_report, read_config
from .configuration import ORIGINAL_IMAGE_TOKEN, HourLlavaConfig
from .prompt import IMAGE, has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .modeling import HourLlavaForConditionalGeneration


def load(
    network: type["HourLlavaForConditionalGeneration"],
    load_weights: Callable[..., Any],
    name: str | os.PathLike[str] | None,
    *args: Any,
    vision_tower: str | os.PathLike[str] | None,
    new_resampler: int | None = None,
    **kwargs: Any,
) -> Any:
    """See `HourLlavaForConditionalGeneration.from_pretrained`; `load_weights` is transformers' own."""
    if name is None:  # a state_dict is given instead
        return load_weights(None, *args, **kwargs)
    folder = find_folder(name, kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        fields = [field for field in kwargs if field in HourLlavaConfig.__annotations__]
        config = read_config(folder, **{field: kwargs.pop(field) for field in fields})
    opened = open_checkpoint(folder, network, config, vision_tower, new_resampler)
    with own_report():
        loaded = load_weights(folder, *args, config=opened.config, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info it is a pair
    copy_tensors(opened.from_elsewhere, model)
    if opened.config.image_token_id == ORIGINAL_IMAGE_TOKEN and has_tokenizer(folder):
        model.tokenizer = load_tokenizer(folder)
        model.config.image_token_id = model.tokenizer.convert_tokens_to_ids(IMAGE)
    return loaded
