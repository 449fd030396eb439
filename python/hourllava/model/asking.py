# SPDX-License-Identifier: Apache-2.0
"""Asking: a question's tokens and the kept ones read the memory, the decoder answers, and the attention is evidence."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch import distributed as dist

from hourllava.errors import InputError, QuestionError
from hourllava.memory import HeldMemory, MemoryPages, MemoryPrefix, ShardedMemory, VideoMemory
from hourllava.memory.pages import PAGE_SIZE, video_layout, visual_pages
from hourllava.video import clock

from .budget import Budget, as_budget
from .forgetting import Forgetting, remembered_frames, spread_frames
from .inputs import check_length
from .memaug import MemoryUse
from .prompt import Prompt, build_prompt, check_text, time_instruction
from .remembering import Choice, keep_of_video, repeat_frames
from .sharing import keep_of_shards, whole_memory
from .stream import Interleaved, interleave, query_stream
from .watching import memory_fingerprint, no_autocast

if TYPE_CHECKING:
    from .modeling import HourLlavaForConditionalGeneration

TOP_TOKENS = 5
Memory = VideoMemory | HeldMemory | ShardedMemory  # what can be asked


@dataclass(frozen=True)
class Moment:
    """Neighbouring seconds that the answer rests on."""

    start: float  # seconds
    end: float
    share: float  # of the question's attention to all frames

    def __str__(self) -> str:
        """The time as a player shows it: 12:04, or 12:04-12:06 where it lasts longer than a second."""
        first, last = clock(self.start), clock(max(self.start, self.end - 1))
        return first if first == last else f"{first}-{last}"


@dataclass(frozen=True, eq=False)  # it holds tensors, which compare to tensors
class Answer:
    """An answer and its evidence; `str()` is its text."""

    text: str
    moments: list[Moment]  # largest share first
    mass: Tensor  # (T,) float32: each second's share of the question's attention to frames, summing to 1
    timings: dict[str, float]  # seconds: "memaug", "decode_text", "total"
    top_tokens: list[tuple[str, float]]  # the likeliest first tokens of the answer and their probabilities
    # (blocks, P) each page's share of the question's attention, of the pages on this process; None without memory
    page_mass: Tensor | None = None

    def __str__(self) -> str:
        return self.text

    def cite(self, moments: int = 3) -> str:
        """The text with the times that it rests on, strongest first: `red [12:04-12:05, 33:10]`."""
        times = ", ".join(str(moment) for moment in self.moments[:moments])
        return f"{self.text} [{times}]" if times else self.text


@dataclass(frozen=True)
class AskOptions:
    """How a question is asked; the defaults are the paper's model, answered greedily.

    Args:
        max_new_tokens: the longest answer.
        history: earlier questions about the video and their answers.
        system: the system message; None is the one that the model was trained with.
        budget: how much of the memory each block may read, as `1/16`, `60s`, `128p` or `all`; None: as the config says.
        memaug: False gives the decoder the kept tokens as they are.
        use_memory: False runs MemAug without its attention to the memory.
        temporal_forgetting, spatial_forgetting, forgetting_seed: instead of the config's.
    """

    max_new_tokens: int = 16
    history: Sequence[tuple[str, str]] = ()
    system: str | None = None
    budget: Budget | str | None = None
    memaug: bool = True
    use_memory: bool = True
    temporal_forgetting: str | None = None
    spatial_forgetting: str | None = None
    forgetting_seed: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A question as the decoder reads it, MemAug's part done."""

    embeds: Tensor  # (1, M, C) the decoder's input
    mass: Tensor | None  # as in `Answer`; None where nothing was looked up in a memory of seconds
    page_mass: Tensor | None = None  # as in `Answer`


@torch.no_grad()
def prepare(model: "HourLlavaForConditionalGeneration", memory: Memory, question: str, options: AskOptions) -> Prepared:
    """All of a question but the writing of its answer: forgetting, retrieval and MemAug.

    Raises:
        QuestionError: the question is empty or holds tokens of the template, or the memory is empty.
        InputError: with its history it is longer than the decoder reads.
        MemoryFileError: another model made the memory.
    """
    for text in (question, *(text for turn in options.history for text in turn), options.system or ""):
        check_text(text)
    if not question.strip():
        raise QuestionError("question", "it is empty", "ask something about the video")
    if options.max_new_tokens < 1:
        raise InputError("max_new_tokens", f"it is {options.max_new_tokens}", "give 1 or more")
    memory.check_model(memory_fingerprint(model))
    seen = memory.prefix()
    if not seen.frames:
        raise QuestionError("question", "the memory holds no second yet", "ask again when something has been watched")
    instruction = time_instruction(float(seen.frames), seen.frames) if model.config.time_instruction else None
    history = [(asked.strip(), answer) for asked, answer in options.history]
    prompt = build_prompt(model.tokenizer, question.strip(), instruction, history, options.system)
    with no_autocast(model.device):
        return Prepared(*_prefill(model, seen, Prompt(*(part.to(model.device) for part in prompt)), options))


@torch.no_grad()
def ask(model: "HourLlavaForConditionalGeneration", memory: Memory, question: str, options: AskOptions) -> Answer:
    """See `HourLlavaForConditionalGeneration.ask`."""
    started = time.perf_counter()
    prepared = prepare(model, memory, question, options)
    augmented = time.perf_counter()
    embeds, mass = prepared.embeds, cast(Tensor, prepared.mass)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with no_autocast(model.device):
        written = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # whatever generation_config the checkpoint came with
            eos_token_id=end,
            pad_token_id=end,
            output_logits=True,
            return_dict_in_generate=True,
        )
    text = str(model.tokenizer.decode(written.sequences[0], skip_special_tokens=True)).strip()
    probability, token = written.logits[0][0].float().softmax(-1).topk(TOP_TOKENS)
    top = [(str(model.tokenizer.decode([t])), p) for t, p in zip(token.tolist(), probability.tolist(), strict=True)]
    done = time.perf_counter()
    timings = {"memaug": augmented - started, "decode_text": done - augmented, "total": done - started}
    return Answer(text, find_moments(mass), mass, timings, top, prepared.page_mass)


def _prefill(
    model: "HourLlavaForConditionalGeneration",
    memory: MemoryPrefix,
    prompt: Prompt,
    options: AskOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The decoder's input (1, M, C), each second's share of the question's attention (T,), each page's (blocks, P)."""
    ids, query_mask, question_mask = prompt
    is_image = model.image_tokens(ids)[None]
    frames, per_frame = remembered_frames(model.config, memory.frames), memory.tokens.shape[1]
    if memory.shard and frames > memory.frames:
        memory = whole_memory(memory)
    shard = memory.shard
    tokens = memory.tokens if shard else repeat_frames(model.config, memory.tokens)
    text = model.model.embed_tokens(ids.masked_fill(is_image[0], 0))
    rules = (options.temporal_forgetting, options.spatial_forgetting, options.forgetting_seed)
    behind = query_mask & (is_image[0].cumsum(0) > 0)
    # A memory's tokens may lie elsewhere than its pages and the model: what is kept of them moves, not all.
    choice = Choice(Forgetting.of(model.config, *rules), text[behind].to(tokens.device))
    newline = model.model.image_newline
    keep = newline.to(tokens.device), choice
    kept = keep_of_shards(model.config, memory, *keep) if shard else keep_of_video(model.config, tokens, *keep)
    kept = kept.to(newline.device)
    lengths = [len(kept.tokens)]
    final = interleave(is_image, ~is_image, lengths)
    limit = model.config.text_config.max_position_embeddings
    check_length("question", final.lengths[0] + options.max_new_tokens, lengths[0], limit)
    visual, mass, page_mass = kept.tokens, torch.zeros(memory.frames), None
    if options.memaug:
        span = [frames * (per_frame + 1)]
        rows, stream = query_stream(is_image, query_mask[None], kept.position_ids, lengths, span)
        second = (shard.seconds if shard else seconds_of(memory.frames, frames)).to(newline.device)
        budget = as_budget(options.budget or model.config.memory_budget)
        pages = memory.pages if shard else _pages(model, memory, tokens)
        use = MemoryUse(
            options.use_memory,
            budget.resolve(second, memory.frames, per_frame, pages[0], shard) if budget else None,
            _evidence_rows(rows, question_mask, text.dtype) if options.use_memory else None,
            shard.group if shard else None,
        )
        queries = torch.cat([text, kept.tokens])[rows.order]
        augmented, page_mass = model.model.vision_resampler(queries, stream, pages, use)
        visual = augmented[rows.visual]
        if page_mass is not None:
            page_mass = page_mass[:, pages[0].page_table[0]]
            mass = _mass_of_seconds(page_mass.mean(0), second, memory)
    return torch.cat([text, visual])[final.order][None], mass, page_mass


def _evidence_rows(rows: Interleaved, question_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """How much each query row counts as evidence: the question's own rows say what it looked for, (M,) float32 or
    wider."""
    return question_mask[rows.token].to(torch.promote_types(dtype, torch.float32))


def _pages(model: "HourLlavaForConditionalGeneration", memory: MemoryPrefix, tokens: Tensor) -> list[MemoryPages]:
    """The memory's own pages, which a file gives on the CPU, where the model is; for a video shorter than the model
    remembers, pages of its repeated frames."""
    newline = model.model.image_newline.expand(len(tokens), -1)
    if len(tokens) == memory.frames:
        return [pages.to(newline.device) for pages in memory.pages]
    layout = video_layout(len(tokens), memory.tokens.shape[1], newline.device)
    rows = torch.cat([tokens.flatten(0, 1).to(newline.device), newline])
    return model.model.vision_resampler.write(rows, layout)


def seconds_of(seconds: int, frames: int) -> Tensor:
    """The second (frames,) of a video that each frame of its memory shows: its own unless the video is repeated."""
    return torch.arange(frames) if frames == seconds else spread_frames(seconds, frames)


def _mass_of_seconds(page_mass: Tensor, second: Tensor, memory: MemoryPrefix) -> Tensor:
    """Spread each page's attention evenly over its rows and sum by second, newlines left out: (T,), summing to 1.

    `second` is that of each frame in these pages.
    """
    frames, per_frame = len(second), memory.tokens.shape[1]
    pages, rows = visual_pages(frames, per_frame, page_mass.device)
    share = page_mass.to(torch.float32)[pages] / rows
    by_row = share.repeat_interleave(PAGE_SIZE)[: frames * per_frame]
    by_frame = by_row.view(frames, per_frame).sum(1)
    mass = page_mass.new_zeros(memory.frames, dtype=torch.float32).index_add(0, second, by_frame)
    if memory.shard:
        dist.all_reduce(mass, group=memory.shard.group)
    return (mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)).cpu()


def find_moments(mass: Tensor, limit: int = 5) -> list[Moment]:
    """Runs of seconds that stand out of a share of attention over time (T,): at least twice the mean and a quarter of
    the peak. The runs with the largest shares come first, `limit` of them at most."""
    if not bool(mass.any()):
        return []
    strong = (mass >= 2 * mass.mean()) & (mass >= mass.max() / 4) | (mass == mass.max())
    outside = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(strong.to(torch.int8), prepend=outside, append=outside)
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    total = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    shares = total[ends] - total[starts]
    order = shares.sort(descending=True, stable=True).indices[:limit].tolist()
    return [Moment(float(starts[i]), float(ends[i]), float(shares[i])) for i in order]
