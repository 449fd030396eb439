# SPDX-License-Identifier: Apache-2.0
"""Hour-LLaVA as a transformers model: a video's tokens become pages of memory, a few of them become queries, MemAug
lets those read the memory, and the decoder reads the augmented queries in place of the video (SPEC A.3 to A.7)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedTokenizerBase, Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import hourllava_ext as ext
from hourllava.errors import ModelError
from hourllava.memory import VideoMemory
from hourllava.memory.pages import batch_layout

from . import asking, watching
from .asking import Answer, AskOptions
from .configuration import ORIGINAL_IMAGE_TOKEN, HourLlavaConfig
from .forgetting import kept_frames, remembered_frames, spatial_picks, spread_frames
from .memaug import MemAug, MemoryUse
from .prompt import load_tokenizer
from .stream import Interleaved, interleave, pad_rows, query_stream
from .vision import VisionTower


class VideoOptions(TypedDict, total=False):
    """Keyword arguments of `forward` and `generate` that say how the videos are used."""

    picks: list[Tensor] | None  # per sample (T_mem, k) int64: tokens kept of every remembered frame
    query_mask: Tensor | None  # (B, L) bool: text tokens that join MemAug's queries
    memaug: bool  # False sends the kept tokens to the decoder as they are
    use_memory: bool  # False drops MemAug's attention to the memory


@dataclass(frozen=True)
class KeptTokens:
    """The visual tokens that become queries, of all samples end to end."""

    tokens: Tensor  # (V, C)
    position_ids: Tensor  # (V,) int64, each in its own memory
    lengths: list[int]  # per sample


def pop_video_options(kwargs: dict[str, Any]) -> VideoOptions:
    """Move the options of `VideoOptions` out of a forward's keyword arguments."""
    return cast(VideoOptions, {name: kwargs.pop(name) for name in VideoOptions.__annotations__ if name in kwargs})


class HourLlavaModel(Qwen2Model):
    """The decoder's stack with the tower, projector, newline and MemAug beside it, under the original's names."""

    def __init__(self, config: HourLlavaConfig) -> None:
        super().__init__(config.text_config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.mm_projector = nn.Sequential(nn.Linear(config.vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.vision_resampler = MemAug(config.text_config, config.memaug_depth)
        self.vision_tower = None if config.vision_config is None else VisionTower(config.vision_config)
        self.post_init()


class HourLlavaForConditionalGeneration(Qwen2PreTrainedModel, GenerationMixin):
    """Answers questions about videos.

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values_videos: list[Tensor] | None = None,
        video_features: list[Tensor] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One video a sample, its tokens put in place of the sample's single image token.

        Args:
            input_ids: (B, L) int64, right padded.
            attention_mask: (B, L), zero at padding; None means no padding.
            labels: (B, L), -100 where nothing is to be predicted.
            pixel_values_videos: per sample (T, 3, S, S), uint8 RGB or normalised floats.
            video_features: per sample (T, N, Cv) tower outputs, instead of pixels.
            logits_to_keep: only the last so many positions (0: all).
            kwargs: `VideoOptions`, and what the decoder takes (`past_key_values`, `use_cache`, ...). `query_mask` is
                by default where `labels` is -100, or every token when there are no labels.

        Returns:
            loss if labels are given, and logits over the expanded, right padded sequences.

        Raises:
            ModelError: a sample has not exactly one image token, or the model has no tower for pixels.
        """
        options = pop_video_options(kwargs)
        if pixel_values_videos is not None or video_features is not None:
            if input_ids is None:
                raise ModelError("model input", "there are videos but no input_ids", "give the prompts' ids")
            video = self.encode_videos(pixel_values_videos, video_features)
            inputs_embeds, rows = self._embed(input_ids, attention_mask, labels, video, options)
            if labels is not None:
                flat = torch.cat([labels.flatten(), labels.new_full((len(rows.order),), -100)])
                labels = pad_rows(flat[rows.order], rows, -100)
            # Padding stands at the right, where causal attention never looks back from: no mask is needed.
            inputs_embeds, input_ids, attention_mask = pad_rows(inputs_embeds, rows, 0.0), None, None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        pixel_values_videos: list[Tensor] | None = None,
        video_features: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; videos are taken in once, before the first token, as in `forward`."""
        inputs = kwargs.pop("input_ids", inputs)
        if pixel_values_videos is None and video_features is None:
            return super().generate(inputs, **kwargs)  # type: ignore[misc]
        options = pop_video_options(kwargs)
        video = self.encode_videos(pixel_values_videos, video_features)
        packed, rows = self._embed(inputs, kwargs.pop("attention_mask", None), None, video, options)
        embeds = pad_rows(packed, rows, 0.0, left=True)
        mask = pad_rows(torch.ones_like(rows.order), rows, 0, left=True)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)  # type: ignore[misc]

    def encode_videos(self, pixels: list[Tensor] | None, features: list[Tensor] | None) -> list[Tensor]:
        """Projected tokens (T, N, C) of each video, from (T, 3, S, S) pixels or (T, patches, Cv) features."""
        if features is None:
            assert pixels is not None
            if self.model.vision_tower is None:
                raise ModelError("model", "it was built without a vision tower", "give video_features instead")
            features = list(self.model.vision_tower(torch.cat(pixels)).split([len(frames) for frames in pixels]))
        frames = [len(video) for video in features]
        tokens = self.config.video_grid**2
        pooled = [ext.pool_grid(f, self.config.video_grid) if f.shape[1] > tokens else f for f in features]
        return list(self.model.mm_projector(torch.cat(pooled)).split(frames))

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
        """transformers' `save_pretrained`, with the tokenizer beside the weights if there is one."""
        super().save_pretrained(save_directory, **kwargs)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(save_directory)

    def watch(
        self,
        source: watching.Source,
        progress: bool = True,
        on_chunk: Callable[[VideoMemory], None] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> VideoMemory:
        """Take a video in, once.

        Args:
            source: a video file; or frames, one a second, uint8 RGB (T, 3, H, W); or an iterable of such tensors.
            progress: show a bar on stderr.
            on_chunk: called with the memory after each chunk of frames; it may ask questions already.
            folder: keep the memory in files there, so that RAM holds none of it, whatever the video's length; None
                keeps it in RAM. The files have no names and go when the memory goes.

        Returns:
            its memory, attached to this model.

        Raises:
            VideoError: the video cannot be read at all. What is lost of a damaged one is told by `memory.damage`.
            ModelError: the model has no vision tower.
        """
        return watching.watch(self, source, progress, on_chunk, folder)

    def ask(self, memory: VideoMemory, question: str, max_new_tokens: int = 16, **options: Any) -> Answer:
        """Answer a question about a watched video; nothing is decoded or encoded again.

        Args:
            max_new_tokens: the longest answer.
            options: the other fields of `AskOptions`.

        Raises:
            QuestionError: the question is empty.
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

    def _embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        video: list[Tensor],
        options: VideoOptions,
    ) -> tuple[Tensor, Interleaved]:
        """The decoder's input rows, text and augmented visual tokens interleaved: (M, C) packed, and their order."""
        is_image = self.image_tokens(input_ids)
        valid = torch.ones_like(is_image) if attention_mask is None else attention_mask.bool()
        if len(video) != len(input_ids) or not bool(((is_image & valid).sum(1) == 1).all()):
            raise ModelError(
                "model input",
                f"{len(video)} videos for {len(input_ids)} prompts with {int(is_image.sum())} image tokens",
                "give every prompt exactly one image token and one video",
            )
        keep = options.get("query_mask")
        if keep is None:
            keep = torch.ones_like(valid) if labels is None else labels == -100
        text = self.model.embed_tokens(input_ids.masked_fill(is_image, 0)).flatten(0, 1)
        visual, lengths = self._augment(text, is_image, keep & valid & ~is_image, video, options)
        rows = interleave(is_image, valid & ~is_image, lengths)
        return torch.cat([text, visual])[rows.order], rows

    def _augment(
        self, text: Tensor, is_image: Tensor, keep: Tensor, video: list[Tensor], options: VideoOptions
    ) -> tuple[Tensor, list[int]]:
        """The kept visual tokens (V, C) of all samples after MemAug, and how many each sample has."""
        memory = torch.cat([self.remember(tokens) for tokens in video])
        frames = [remembered_frames(self.config, len(tokens)) for tokens in video]
        kept = self.forget(memory, frames, options.get("picks"))
        if not options.get("memaug", True):
            return kept.tokens, kept.lengths
        spans = [count * (memory.shape[1] + 1) for count in frames]
        rows, stream = query_stream(is_image, keep, kept.position_ids, kept.lengths, spans)
        layout = batch_layout(frames, memory.shape[1], memory.device)
        newline = self.model.image_newline.expand(len(memory), -1)
        pages = self.model.vision_resampler.write(torch.cat([memory.flatten(0, 1), newline]), layout)
        queries = torch.cat([text, kept.tokens])[rows.order]
        use = MemoryUse(use_memory=options.get("use_memory", True))
        augmented, _ = self.model.vision_resampler(queries, stream, pages, use)
        return augmented[rows.visual], kept.lengths

    def remember(self, tokens: Tensor) -> Tensor:
        """Projected tokens (T, N, C) as the memory holds them: repeated evenly if there are fewer than `min_frames`."""
        wanted = remembered_frames(self.config, len(tokens))
        return tokens if wanted == len(tokens) else tokens[spread_frames(len(tokens), wanted).to(tokens.device)]

    def forget(self, memory: Tensor, frames: list[int], picks: list[Tensor] | None = None) -> KeptTokens:
        """Keep the queries of a batch of memories.

        Args:
            memory: (sum of frames, N, C), all memories end to end.
            frames: remembered frames of each.
            picks: tokens to keep of every remembered frame of each, (T_mem, k) int64; None applies the config's rule.
        """
        per_frame = memory.shape[1]
        kept = [kept_frames(self.config, count).to(memory.device) for count in frames]
        if picks is None:
            patches = spatial_picks(self.config, torch.cat(kept), per_frame)
        else:
            patches = torch.cat([pick[chosen] for pick, chosen in zip(picks, kept, strict=True)]).to(torch.int64)
        count = torch.tensor(frames)
        first = (count.cumsum(0) - count).repeat_interleave(torch.tensor([len(k) for k in kept])).to(memory.device)
        newline = self.model.image_newline.to(memory.dtype)  # under autocast, tokens are narrower than weights
        tokens, position_ids = ext.forget(memory, torch.cat(kept) + first, patches.contiguous(), newline)
        position_ids = position_ids - first[:, None] * (per_frame + 1)
        lengths = [len(k) * tokens.shape[1] for k in kept]
        return KeptTokens(tokens.flatten(0, 1), position_ids.flatten(), lengths)
