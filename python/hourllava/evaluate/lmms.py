# SPDX-License-Identifier: Apache-2.0
"""Hour-LLaVA as a model of lmms-eval: its tasks about one video each. Imported only when lmms-eval asks for it.

    python -m lmms_eval --model hourllava --model_args pretrained=MODEL,memories=memories --tasks lvbench

The questions of a video are asked one after another of one memory, in whatever order the task has them.
"""

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from torch import distributed as dist
from tqdm import tqdm

from hourllava.errors import HourLlavaError, InputError
from hourllava.memory import VideoMemory
from hourllava.model import best_device, load_model
from hourllava.model.budget import as_budget

from .watched import WatchedVideos

DEFAULT_NEW_TOKENS = 128  # where a task does not say
_log = logging.getLogger(__name__)


class HourLlava(lmms):
    """The model for `--model hourllava`.

    Args:
        pretrained: a preset or a model's directory.
        memories: a repository in which what is watched is kept for the next run; None keeps one video at a time in RAM.
        budget: how much of a memory each question reads, as in `hourllava ask --budget`; None: as the config says.
        device: where it runs; None is a GPU if there is one, of several processes each its own.
        batch_size: 1, as lmms-eval says by default: the questions of a video follow one another.
        max_batch_size: given by lmms-eval, for models that try sizes.

    Raises:
        HourLlavaError: there is no such model or budget, or the batch size is another.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        memories: str | None = None,
        budget: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise HourLlavaError("--batch_size", f"{batch_size} is not 1", "leave it out")
        self.budget = budget
        if budget is not None:
            as_budget(budget)  # a wrong one shows before anything is loaded
        self.device = torch.device(device) if device else best_device()
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", dist.get_node_local_rank(0))
        self.model = load_model(pretrained, device=self.device)
        self._watched = None if memories is None else WatchedVideos(self.model, memories)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests.

        Raises:
            HourLlavaError: a request is about something else than one whole video, wants sampling or beams, or its
                video cannot be read.
        """
        asked = [self._read(request) for request in requests]
        by_video: dict[str, list[int]] = {}
        for number, (video, _, _) in enumerate(asked):
            by_video.setdefault(video, []).append(number)
        results: dict[int, GenerationResult] = {}
        tokens, answering, watching = 0, 0.0, 0.0
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for video, numbers in by_video.items():
                began = time.perf_counter()
                memory = self._memory(Path(video))
                watching += time.perf_counter() - began
                for number in numbers:
                    _, text, options = asked[number]
                    began = time.perf_counter()
                    result = results[number] = self._answer(memory, text, options)
                    answering += time.perf_counter() - began
                    tokens += result.token_counts.output_tokens
                    self.cache_hook.add_partial("generate_until", (text, options), result.text)
                    bar.update()
                del memory  # or there would be two while the next is made
        extra = {"rank": self.rank, "videos": len(by_video), "watching_seconds": watching}
        log_metrics(answering, tokens, tokens / answering if answering else 0.0, extra)
        return [results[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the model writes answers."""
        raise NotImplementedError("hourllava answers generate_until tasks; it gives no likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: each question is asked for itself."""
        raise NotImplementedError("hourllava answers generate_until tasks; it has no multi-round ones")

    def _read(self, request: Instance) -> tuple[str, str, dict[str, Any]]:
        """The video, the text and the options of a request."""
        *_, to_messages, options, number, task, split = request.args
        what = f"{task} {number}"
        messages = to_messages(self.task_dict[task][split][number])
        parts = [part for message in messages for part in message["content"]]
        videos = [part for part in parts if part["type"] == "video"]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        others = {part["type"] for part in parts} - {"video", "text"}
        if len(messages) != 1 or len(videos) != 1 or others or not isinstance(videos[0]["url"], str):
            raise InputError(what, "it is not one question about one video file", "choose a task that asks these")
        if videos[0].get("start_time") is not None or videos[0].get("end_time") is not None:
            raise InputError(what, "it is about a part of a video", "cut that out, or choose another task")
        if options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
            raise InputError(what, "it wants sampling or beams", "answers are greedy: set temperature=0, num_beams=1")
        return videos[0]["url"], text, options

    def _memory(self, video: Path) -> VideoMemory:
        if self._watched is None:
            memory = self.model.watch(video, progress=False)
        else:
            place = hashlib.sha256(os.path.realpath(video).encode()).hexdigest()[:8]  # tasks share some files' names
            memory = self._watched.memory(video, f"{video.stem}-{place}")
        if memory.damage:
            _log.warning("%s: %s", video, memory.damage)
        return memory

    def _answer(self, memory: VideoMemory, text: str, options: dict[str, Any]) -> GenerationResult:
        """The answer up to the first of the texts that end it, and the tokens of all that was written."""
        limit = options.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        written = self.model.ask(memory, text, limit, budget=self.budget).text
        count = len(self.model.tokenizer.encode(written, add_special_tokens=False))
        until = options.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            written = written.partition(end)[0] if end else written
        return GenerationResult(text=written, token_counts=TokenCounts(output_tokens=count))
