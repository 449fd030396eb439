# SPDX-License-Identifier: Apache-2.0
"""Hour-LLaVA as a transformers model: tokens of videos and images become pages of memory, a few become queries, MemAug
lets those read the memory, and the decoder reads the augmented queries in place of the pictures."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedTokenizerBase, Qwen2PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hourllava.errors import InputError, ModelError
from hourllava.memory import VideoMemory
from hourllava.memory.pages import join_layouts

from . import asking, blank, pretrained, watching
from .asking import Answer, AskOptions
from .configuration import ORIGINAL_IMAGE_TOKEN, HourLlavaConfig
from .forgetting import Forgetting
from .inputs import (
    Visual,
    VisualOptions,
    check_content,
    check_lengths,
    check_targets,
    group_by_sample,
    is_prompt,
    pop_visual_options,
    read_visuals,
)
from .memaug import MemoryUse
from .network import HourLlavaModel
from .processing import HourLlavaProcessor
from .prompt import has_tokenizer, load_tokenizer
from .remembering import Choice, Remembered, remember
from .sharing import Share
from .stream import Interleaved, interleave, left_padding, pad_rows, query_stream


class HourLlavaForConditionalGeneration(Qwen2PreTrainedModel, GenerationMixin):
    """Answers questions about videos and images.

    `forward` trains or scores whole batches; `generate` continues them. For one long video and many questions, see
    `watch` and `ask`, which keep the video's memory between questions.
    """

    config: HourLlavaConfig  # type: ignore[assignment]
    config_class = HourLlavaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HourLlavaConfig) -> None:
        super().__init__(config)
        decoder = config.text_config
        self.model = HourLlavaModel(config)
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.fingerprint_cache: tuple[tuple, str] | None = None  # see `watching.memory_fingerprint`
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Sequence[Tensor] | None = None,
        vision_features: Sequence[Tensor] | None = None,
        modalities: Sequence[str] | None = None,
        image_sizes: Sequence[tuple[int, int] | None] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Visual tokens put in place of the <image> marks: one video a sample, one image in tiles, several images of
        one tile each, or none; samples of a batch may differ.

        Args:
            input_ids, attention_mask, labels: (B, L), padded at either side; labels are -100 where nothing is learnt.
            pixel_values: for each mark, in reading order over the batch, the frames of a video or the tiles of an image
                (n, 3, S, S), uint8 RGB or normalised floats; or (n, N, Cv) tower outputs for some of them.
            vision_features: (n, N, Cv) tower outputs for all marks; a video's may be pooled already.
            modalities: "video" or "image" for each mark; None means videos.
            image_sizes: the (height, width) of each tiled image, None for the others.
            logits_to_keep: only the last so many positions (0: all).
            kwargs: `VisualOptions`, and what the decoder takes (`past_key_values`, `use_cache`, ...). `query_mask` is
                by default where `labels` is -100, or every token when there are no labels.

        Returns:
            loss if labels are given, and logits over the expanded sequences, padded at the side that `input_ids` is.

        Raises:
            InputError: marks and visual inputs of a sample do not match, it is longer than the decoder reads, or its
                labels are all ignored; or there is something to see, but the cache holds a prompt already.
            ModelError: the model has no tower for pixels.
        """
        options = pop_visual_options(kwargs)
        targets = kwargs.pop("num_items_in_batch", None)  # of the whole step, where gradients are accumulated
        visuals = read_visuals(pixel_values, vision_features, modalities, image_sizes)
        if visuals and input_ids is None:
            raise InputError("model input", "there are images or videos, but no input_ids", "give the prompts' ids")
        if is_prompt(kwargs.get("past_key_values"), attention_mask, visuals) and input_ids is not None:
            inputs_embeds, labels, rows = self._expand(input_ids, attention_mask, labels, visuals, options)
            # Causal attention never looks at padding at the right: only padding at the left needs a mask.
            attention_mask, position_ids = (None, None) if rows is None else left_padding(rows)
            input_ids = None
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits, labels, vocabulary, num_items_in_batch=targets)
        rest = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        pixel_values: Sequence[Tensor] | None = None,
        vision_features: Sequence[Tensor] | None = None,
        modalities: Sequence[str] | None = None,
        image_sizes: Sequence[tuple[int, int] | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; images and videos are taken in once, and only what comes after them is returned."""
        inputs = kwargs.pop("input_ids", inputs)
        visuals = read_visuals(pixel_values, vision_features, modalities, image_sizes)
        options = pop_visual_options(kwargs)
        if self.training and self.model.gradient_checkpointing:
            raise ModelError("model", "it trains with checkpointing, which keeps no cache", "call model.eval() first")
        if not visuals:
            return super().generate(inputs, **kwargs)  # type: ignore[misc]
        packed, rows = self.embed(inputs, kwargs.pop("attention_mask", None), None, visuals, options)
        kwargs |= {"inputs_embeds": pad_rows(packed, rows, 0.0, left=True), "attention_mask": left_padding(rows)[0]}
        return super().generate(**kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        vision_tower: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `from_pretrained`, for checkpoints of ours and of the original's; see `pretrained`.

        Args:
            pretrained_model_name_or_path: a directory, or a repository of the hub.
            vision_tower: a directory with the tower's own repository, for checkpoints that hold none.
            kwargs: fields of the config to change, what transformers takes (`dtype`, `device_map`, ...), and
                `new_resampler`: how many blocks MemAug, as it is before training, gets where the checkpoint has none.

        Raises:
            ModelError: there is no such model, a file is missing or damaged, or tensors do not fit.
        """
        load = super().from_pretrained
        return pretrained.load(cls, load, pretrained_model_name_or_path, *args, vision_tower=vision_tower, **kwargs)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved beside the weights, or the one that was set.

        Raises:
            ModelError: there is neither.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name_or_path or "")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """transformers' `save_pretrained`, with the processor beside the weights if there is a tokenizer."""
        super().save_pretrained(save_directory, **kwargs)
        if self._tokenizer is not None or has_tokenizer(self.name_or_path or ""):
            HourLlavaProcessor.for_config(self.tokenizer, self.config).save_pretrained(save_directory)

    def watch(
        self,
        source: watching.Source,
        progress: bool = True,
        on_chunk: Callable[[VideoMemory], None] | None = None,
        into: VideoMemory | str | os.PathLike[str] | None = None,
    ) -> VideoMemory:
        """Take a video in, once.

        Args:
            source: a video file, or a reader of one or of a folder of frames; a `LiveReader`, which goes on; or frames,
                one a second, uint8 RGB (T, 3, H, W); or an iterable of such tensors. Threads may ask a
                memory that is given as `into` meanwhile.
            progress: show a bar on stderr.
            on_chunk: called with the memory after each chunk of frames, skipped ones too; it may ask questions already.
            into: a memory to go on with, of which the source's first `frames` seconds are skipped; or a folder, to keep
                the memory in nameless files there, so that RAM holds none of it; None keeps it in RAM.

        Returns:
            its memory, attached to this model.

        Raises:
            VideoError: the video cannot be read at all. What is lost of a damaged one is told by `memory.damage`.
            ModelError: the model has no vision tower.
        """
        return watching.watch(self, source, progress, on_chunk, into)

    def ask(self, memory: asking.Memory, question: str, max_new_tokens: int = 16, **options: Any) -> Answer:
        """Answer a question about a watched video; nothing is decoded or encoded again.

        A sharded memory is asked by all its processes at once, and all get the answer.

        Args:
            max_new_tokens: the longest answer.
            options: the other fields of `hourllava.model.AskOptions`, such as `history` and `budget`.

        Raises:
            QuestionError: the question is empty, or the memory is.
            MemoryFileError: another model made the memory.
            ModelError: the model has no tokenizer.
        """
        return asking.ask(self, memory, question, AskOptions(max_new_tokens, **options))

    def attach(self, memory: VideoMemory) -> None:
        """Let `memory.append` encode frames with this model; needed after `VideoMemory.load`.

        Raises:
            MemoryFileError: another model made the memory.
        """
        memory.attach(watching.FrameWriter(self))

    def image_tokens(self, input_ids: Tensor) -> Tensor:
        """(B, L) bool: where visual tokens go."""
        return (input_ids == self.config.image_token_id) | (input_ids == ORIGINAL_IMAGE_TOKEN)

    def _expand(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        visuals: list[Visual],
        options: VisualOptions,
    ) -> tuple[Tensor, Tensor | None, Interleaved | None]:
        """The decoder's input (B, longest, C) and the labels for it, and the rows if they are padded at the left."""
        packed, rows = self.embed(input_ids, attention_mask, labels, visuals, options)
        left = attention_mask is not None and not bool(attention_mask[:, 0].all())
        if labels is not None:
            flat = torch.cat([labels.flatten(), labels.new_full((len(rows.order),), -100)])
            # Nothing stands before a first token but padding, which cannot teach it.
            labels = pad_rows(flat[rows.order].masked_fill(rows.rank == 0, -100), rows, -100, left)
        return pad_rows(packed, rows, 0.0, left), labels, rows if left else None

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        visuals: list[Visual],
        options: VisualOptions,
    ) -> tuple[Tensor, Interleaved]:
        """The decoder's input rows, text and augmented visual tokens interleaved: (M, C) packed, and their order."""
        is_image = self.image_tokens(input_ids)
        valid = torch.ones_like(is_image) if attention_mask is None else attention_mask.bool()
        marks = is_image & valid
        groups = group_by_sample(marks, visuals)
        check_content(groups, self.config)
        if labels is not None:
            check_targets((labels != -100) & valid & ~marks)
        keep = options.get("query_mask")
        if keep is None:
            keep = torch.ones_like(valid) if labels is None else labels == -100
        text = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))
        lengths: list[int] = []
        packed = text.flatten(0, 1)
        if visuals:
            visual, lengths = self._augment(text, marks, keep.bool() & valid & ~is_image, groups, options)
            packed = torch.cat([packed, visual])
        rows = interleave(marks, valid & ~is_image, lengths)
        check_lengths(rows.lengths, lengths, groups, self.config.text_config.max_position_embeddings)
        packed = packed[rows.order]
        if self.training and not visuals:
            seen = blank.visual(self.config, self.model.image_newline)
            mark = torch.ones(1, 1, dtype=torch.bool, device=text.device)
            tokens, _ = self._augment(self.model.image_newline[None, None], mark, ~mark, [[seen]], options)
            packed = packed + 0 * tokens.sum()
        return packed, rows

    def _augment(
        self, text: Tensor, marks: Tensor, keep: Tensor, groups: list[list[Visual]], options: VisualOptions
    ) -> tuple[Tensor, list[int]]:
        """The kept visual tokens (V, C) of all samples after MemAug, and how many each mark has."""
        group = options.get("memory_group")
        share = None if group is None else Share.of(group)
        remembered = self._remember(text, marks, keep, groups, options, share)
        memories = [memory for memory in remembered if memory]
        kept = [kept for memory in memories for kept in memory.kept]
        lengths = [len(k.position_ids) for k in kept]
        visual = torch.cat([k.tokens for k in kept]) if share is None else share.gather(kept)
        if not options.get("memaug", True):
            return visual, lengths
        position_ids = torch.cat([k.position_ids for k in kept])
        rows, stream = query_stream(marks, keep, position_ids, lengths, [k.span for k in kept])
        layout = join_layouts([memory.layout if memory else None for memory in remembered], visual.device)
        tokens = [memory.tokens for memory in memories]
        pages = self.model.vision_resampler.write(tokens[0] if len(tokens) == 1 else torch.cat(tokens), layout)
        queries = torch.cat([text.flatten(0, 1), visual])[rows.order]
        use = MemoryUse(use_memory=options.get("use_memory", True), group=group)
        pages = pages if share is None else share.scale(pages)
        augmented, _ = self.model.vision_resampler(queries, stream, pages, use)
        return augmented[rows.visual], lengths

    def _remember(
        self,
        text: Tensor,
        marks: Tensor,
        keep: Tensor,
        groups: list[list[Visual]],
        options: VisualOptions,
        share: Share | None,
    ) -> list[Remembered | None]:
        """Each sample's memory, None where there is nothing to see; with `share`, this process' part of it."""
        visuals = [visual for group in groups for visual in group]
        seen = visuals if share is None else [share.cut(self.config, visual) for visual in visuals]
        encoded = iter(self.model.project(seen, self.config.video_grid, options.get("tower_passes", 0)))
        forgetting, newline = self.forgetting(options), self.model.image_newline
        frame_picks = iter(options.get("frame_picks") or [None] * len(visuals))
        spatial_picks = iter(options.get("spatial_picks") or [None] * len(visuals))
        behind = keep & (marks.cumsum(1) > 0)
        memories: list[Remembered | None] = []
        for number, group in enumerate(groups):
            if not group:
                memories.append(None)
                continue
            given = [next(encoded) for _ in group]
            question = text[number][behind[number]]
            choices = [Choice(forgetting, question, f, next(frame_picks), next(spatial_picks)) for f, _ in given]
            tokens = [t for _, t in given]
            line = newline.to(tokens[0].dtype)
            if share is not None and group[0].modality == "video":
                frames = len(group[0].content)
                memories.append(share.remember_video(self.config, frames, tokens[0], line, choices[0]))
            else:
                memory = remember(self.config, group, tokens, line, choices)
                memories.append(memory if share is None else share.own(memory, number))
        return memories

    def forgetting(self, options: VisualOptions) -> Forgetting:
        """The rules of forgetting: those of a call where it names some, else the config's."""
        named = (options.get("temporal_forgetting"), options.get("spatial_forgetting"), options.get("forgetting_seed"))
        return Forgetting.of(self.config, *named)
