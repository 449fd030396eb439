# SPDX-License-Identifier: Apache-2.0
"""How logits become text: choosing tokens, and giving out their text as soon as it is certain."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How an answer is written; greedily unless the temperature is above 0."""

    max_new_tokens: int | None = None  # None: as many as the decoder has room for
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None  # None: another answer each time
    stop: tuple[str, ...] = ()  # texts that end the answer, and do not belong to it


class Chooser:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._warpers: list[LogitsProcessor] = []
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token () int64 for logits (V,)."""
        if not self._warpers:
            return logits.argmax()
        scores = logits.float()[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random)[0]


class Wording:
    """The text of one answer, token by token: whole characters, without white space at its ends, and without what may
    become a text that ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._streamed = 0  # letters of their text that the stream gave
        self._stop = stop
        self._held = ""  # not given out yet
        self._begun = self.stopped = False

    def add(self, token: int) -> str:
        """What a further token makes certain; `stopped` tells that one of the stop texts has come."""
        self._tokens.append(token)
        fresh = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._streamed += len(fresh)
        self._held += fresh
        ends = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, self._held[: min(ends)]
            return self._given(self._held.rstrip())
        held = max([0, *(_overlap(self._held, text) for text in self._stop)])
        certain = self._held[: len(self._held) - held].rstrip()
        return self._given(certain)

    def rest(self) -> str:
        """What was held back, when no more will come: half a character, too, as what stands for it."""
        self._held += str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))[self._streamed :]
        return self._given(self._held.rstrip())

    def _given(self, text: str) -> str:
        self._held = self._held[len(text) :]
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop text begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
