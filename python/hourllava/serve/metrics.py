# SPDX-License-Identifier: Apache-2.0
"""What Prometheus asks for: requests, answers and their times, videos, and how full the pool is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .jobs import State

if TYPE_CHECKING:
    from .library import Library
    from .questions import Questions

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        requests: by route and status.
        first_text: seconds from a question to the first text of its answer.
        answer: seconds from a question to the end of its answer.
        prompt_tokens: rows that the decoder has read of questions.
        completion_tokens: tokens of answers.
    """

    def __init__(self, engine: "Questions", library: "Library") -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("hourllava_requests", "Responses.", ("route", "status"), registry=registry)
        self.first_text = Histogram(
            "hourllava_first_text_seconds", "From a question to its first text.", buckets=_SECONDS, registry=registry
        )
        self.answer = Histogram(
            "hourllava_answer_seconds", "From a question to the end of its answer.", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("hourllava_prompt_tokens", "Rows of questions.", registry=registry)
        self.completion_tokens = Counter("hourllava_completion_tokens", "Tokens of answers.", registry=registry)
        registry.register(_State(engine, library))

    def text(self) -> bytes:
        """All of them in Prometheus' format; looks into the repository."""
        return generate_latest(self._registry)


class _State(Collector):
    """What is true at the moment of asking."""

    def __init__(self, engine: "Questions", library: "Library") -> None:
        self._engine, self._library = engine, library

    def describe(self) -> list[Metric]:
        return []  # so that registering it asks for nothing

    def collect(self) -> Iterator[Metric]:
        waiting, running = self._engine.counts()
        yield GaugeMetricFamily("hourllava_questions_waiting", "Questions that wait for their turn.", waiting)
        yield GaugeMetricFamily("hourllava_answers_running", "Answers that are being written.", running)
        statuses = self._library.statuses()
        videos = GaugeMetricFamily("hourllava_videos", "Videos by state.", labels=("state",))
        for state in get_args(State):
            videos.add_metric((state,), sum(status.state == state for status in statuses))
        yield videos
        seconds = sum(status.frames for status in statuses)
        yield GaugeMetricFamily("hourllava_video_seconds", "Seconds of video that can be asked about.", seconds)
        used = GaugeMetricFamily("hourllava_pool_used_bytes", "Bytes of the pool that hold pages.", labels=("tier",))
        budget = GaugeMetricFamily("hourllava_pool_budget_bytes", "Bytes of the pool.", labels=("tier",))
        for tier in self._library.usage():
            used.add_metric((tier.tier,), tier.used)
            budget.add_metric((tier.tier,), tier.budget)
        yield from (used, budget)
