# SPDX-License-Identifier: Apache-2.0
"""The processor: chat messages, text, images and videos become what the model's `forward` and `generate` take."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from hourllava.errors import InputError

from .checkpoint import find_folder, read_config, read_json
from .configuration import HourLlavaConfig
from .media import Media, check_messages, distribute, media_of_messages, read_image, read_video
from .prompt import IMAGE, TEMPLATE_TOKENS, is_whole, load_tokenizer, time_instruction

_FILE, _TEMPLATE_FILE = "processor_config.json", "chat_template.jinja"

# ChatML as the model was trained with it: a system message always comes first, and the mark of a turn's only image or
# video stands in front of its text, on a line of its own.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{%- set text = message['content'] %}
{%- if text.count('<image>') == 1 and not text.startswith('<image>') %}
{{- '<image>\\n' + text.replace('<image>', '') | trim }}
{%- else %}
{{- text }}
{%- endif %}
{%- else %}
{%- set seen = message['content'] | rejectattr('type', 'equalto', 'text') | list | length %}
{%- if seen == 1 %}
{{- '<image>\\n' }}
{%- endif %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}
{{- part['text'] }}
{%- elif seen > 1 %}
{{- '<image>\\n' }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


class HourLlavaProcessor(ProcessorMixin):
    """Makes model inputs; it needs no torchvision.

    Args:
        tokenizer: with a token for `<image>`.
        chat_template: Jinja; by default ChatML with the original's system message.
        tile_size: side of the square pictures that the model sees, in pixels.
        patch_size: side of the tower's patches.
        image_grid, image_max_tiles: as in `HourLlavaConfig`.
        time_instruction: tell a video's length in front of the question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        tile_size: int = 384,
        patch_size: int = 14,
        image_grid: int = 6,
        image_max_tiles: int = 9,
        time_instruction: bool = True,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.tile_size, self.patch_size = tile_size, patch_size
        self.image_grid, self.image_max_tiles = image_grid, image_max_tiles
        self.time_instruction = time_instruction

    @classmethod
    def for_config(cls, tokenizer: PreTrainedTokenizerBase, config: HourLlavaConfig) -> "HourLlavaProcessor":
        """The processor of a model."""
        return cls(tokenizer, **_fields(config))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "HourLlavaProcessor":
        """Load what `save_pretrained` wrote; or make the processor that belongs to the model in a directory.

        Args:
            pretrained_model_name_or_path: a directory, or a repository of the hub.
            kwargs: arguments of the class to change, and those of the hub (`revision`, `cache_dir`, ...).

        Raises:
            ModelError: there is no such directory, or it has no tokenizer.
        """
        folder = find_folder(pretrained_model_name_or_path, kwargs)
        template = None
        if (folder / _FILE).is_file():
            told = read_json(folder / _FILE)
            if (folder / _TEMPLATE_FILE).is_file():
                template = (folder / _TEMPLATE_FILE).read_text()
        else:
            told = _fields(read_config(folder))
        told |= {"chat_template": template} | kwargs
        names = (*_fields(HourLlavaConfig()), "chat_template")
        return cls(load_tokenizer(folder), **{name: told[name] for name in names if name in told})

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        video_seconds: Sequence[float] | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_labels: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model for one prompt or a batch.

        Args:
            images: PIL images, files, uint8 tensors (3, H, W) or arrays (H, W, 3); as many as the prompts have
                `<image>` marks, in reading order, or one list a prompt.
            text: prompts with an `<image>` mark for each image and each video.
            videos: files; uint8 tensors (T, 3, H, W) or arrays (T, H, W, 3) of frames, one a second; or lists of
                frames. As `images` are, given for all prompts in a row or one list a prompt.
            video_seconds: how long each video lasts, for the time instruction; by default as long as the file, or as
                many seconds as there are frames.
            padding_side: by default the tokenizer's.
            return_labels: what is to be learnt: the assistant's turns and the template, as the original was trained.
            kwargs: what transformers passes to processors in general (`return_tensors`, `padding`); tensors of one
                length are returned whatever it says.

        Returns:
            `input_ids` and `attention_mask` (B, L) int64, `query_mask` (B, L) bool (the text that joins MemAug's
            queries), `labels` (B, L) int64 if asked for; and for each mark of the batch, in order, `pixel_values`
            (n, 3, S, S) uint8 (frames of a video, tiles of an image), `modalities` ("video" or "image") and
            `image_sizes` ((height, width) of an image).

        Raises:
            InputError: marks and media do not match, or an image cannot be seen; the message names the prompt.
            VideoError: a video cannot be read.
        """
        if text is None:
            raise InputError("text", "it is missing", "give prompts with an <image> mark for each image and video")
        prompts = [text] if isinstance(text, str) else list(text)
        media = distribute(prompts, images, videos)
        return self._inputs(prompts, media, video_seconds, padding_side or self.tokenizer.padding_side, return_labels)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Chat messages, or a batch of them, as text or as the model's inputs.

        Args:
            conversation: messages `{"role": ..., "content": ...}`; content is text, or a list of parts: `{"type":
                "text", "text": ...}`, `{"type": "video", "video": ...}` and `{"type": "image", "image": ...}`, where
                `url` and `path` do as well and the value is anything that `__call__` takes.
            add_generation_prompt: end where the assistant's answer starts.
            tokenize: give the model's inputs and not the text.
            return_dict: with `tokenize`, all inputs and not only `input_ids`.
            processor_kwargs: further arguments of `__call__` (`padding_side`, `return_labels`, `video_seconds`).
            kwargs: more arguments of `__call__`, or variables of the template.

        Raises:
            InputError, VideoError: as `__call__`.
        """
        batch = list(conversation)
        single = not batch or isinstance(batch[0], dict)
        conversations = [batch] if single else batch
        for messages in conversations:
            check_messages(messages)
        known = ("padding_side", "return_labels", "video_seconds")
        options = {name: kwargs.pop(name) for name in known if name in kwargs} | (processor_kwargs or {})
        for ours in ("return_tensors", "padding"):
            kwargs.pop(ours, None)
        prompts = [
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            for messages in conversations
        ]
        if not tokenize:
            return prompts[0] if single else prompts
        media = [media_of_messages(messages) for messages in conversations]
        side = options.get("padding_side") or self.tokenizer.padding_side
        inputs = self._inputs(prompts, media, options.get("video_seconds"), side, options.get("return_labels", False))
        return inputs if return_dict else inputs["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "query_mask", "pixel_values", "modalities", "image_sizes"]

    def _inputs(
        self,
        prompts: list[str],
        media: list[list[Media]],
        video_seconds: Sequence[float] | None,
        side: Literal["left", "right"],
        return_labels: bool,
    ) -> BatchFeature:
        config = HourLlavaConfig(
            vision_config={"image_size": self.tile_size, "patch_size": self.patch_size},
            image_grid=self.image_grid,
            image_max_tiles=self.image_max_tiles,
        )
        durations = iter(video_seconds or [])
        pixels: list[Tensor] = []
        sizes: list[tuple[int, int] | None] = []
        texts = []
        for number, (prompt, seen) in enumerate(zip(prompts, media, strict=True)):
            if not is_whole(prompt):
                why = "it holds half of a character (a lone surrogate)"
                raise InputError(f"prompt {number}", why, "give its text in UTF-8")
            if prompt.count(IMAGE) != len(seen):
                why = f"it has {prompt.count(IMAGE)} {IMAGE} marks for {len(seen)} images and videos"
                raise InputError(f"prompt {number}", why, "give it one mark for each")
            for place, medium in enumerate(seen):
                name = f"image {place} of prompt {number}"
                if medium.kind == "image":
                    tiles, size = read_image(medium.source, config, len(seen) > 1, name)
                else:
                    tiles, seconds = read_video(medium.source, self.tile_size, f"video of prompt {number}")
                    size = None
                    if self.time_instruction and place == 0:
                        instruction = time_instruction(next(durations, seconds), len(tiles))
                        prompt = _tell_time(prompt, instruction)
                pixels.append(tiles)
                sizes.append(size)
            texts.append(prompt)
        data = self._tokens(texts, side, return_labels)
        if pixels:
            kinds = [medium.kind for seen in media for medium in seen]
            data |= {"pixel_values": pixels, "modalities": kinds, "image_sizes": sizes}
        return BatchFeature(data)

    def _tokens(self, texts: Iterable[str], side: Literal["left", "right"], return_labels: bool) -> dict[str, Any]:
        image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        ids = [torch.tensor(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        queries = [self._queries(row.tolist()) & (row != image) for row in ids]

        def padded(rows: list[Tensor], fill: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)

        data: dict[str, Any] = {
            "input_ids": padded(ids, self.tokenizer.pad_token_id or 0),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "query_mask": padded(queries, False),
        }
        if return_labels:
            hidden = [query | (row == image) for row, query in zip(ids, queries, strict=True)]
            labels = [row.masked_fill(hide, -100) for row, hide in zip(ids, hidden, strict=True)]
            data["labels"] = padded(labels, -100)
        return data

    def _queries(self, ids: list[int]) -> Tensor:
        """Which tokens are neither of the template nor in an assistant's turn: (L,) bool."""
        encode = self.tokenizer.encode
        newline, start, end = (encode(token, add_special_tokens=False)[0] for token in TEMPLATE_TOKENS)
        assistant = encode("assistant", add_special_tokens=False)
        answering, queries = False, []
        for place, token in enumerate(ids):
            if token == start:
                answering = ids[place + 1 : place + 1 + len(assistant)] == assistant
            queries.append(not answering and token not in (newline, start, end))
            answering = answering and token != end
        return torch.tensor(queries, dtype=torch.bool)


def _fields(config: HourLlavaConfig) -> dict[str, Any]:
    patch = config.vision_config.patch_size if config.vision_config is not None else 14
    return {
        "tile_size": config.tile_size,
        "patch_size": patch,
        "image_grid": config.image_grid,
        "image_max_tiles": config.image_max_tiles,
        "time_instruction": config.time_instruction,
    }


def _tell_time(prompt: str, instruction: str) -> str:
    before, after = prompt.split(IMAGE, 1)
    return f"{before}{IMAGE}\n{instruction}\n{after.removeprefix(chr(10))}"
