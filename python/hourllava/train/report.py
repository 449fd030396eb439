# SPDX-License-Identifier: Apache-2.0
"""What a run looks like: a bar while it goes on, rates for TensorBoard and Weights & Biases, a picture at the end."""

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hourllava.train.processes import over_all

TOKENS, SECONDS, MEMORY = "tokens_per_second", "video_seconds_per_second", "peak_memory_gib"
RIGHT = "right"  # share of answers, or names, that a batch of films gets right
PICTURE = "training.png"
_PANELS = {
    "loss": "loss",
    "learning_rate": "learning rate",
    TOKENS: "tokens / s",
    SECONDS: "seconds of video / s",
    MEMORY: "peak memory (GiB)",
}
_INK = "#35507a"


class Meter:
    """Counts what goes through the model, and tells rates over all processes since it last did."""

    def __init__(self, device: torch.device, share: float = 1.0) -> None:
        """`share`: how much of what a process counts is its own, where several work on the same samples."""
        self.device, self.share = device, share
        self._start()

    def add(self, tokens: int, frames: int) -> None:
        """Count decoder tokens and frames, one for each second, of a batch."""
        self.tokens += tokens
        self.frames += frames

    def rates(self) -> dict[str, float]:
        """Tokens and seconds of video a second, and the peak memory of any process; starts anew."""
        took = max(time.perf_counter() - self.since, 1e-9)
        counts = [over_all(self.share * count, self.device) / took for count in (self.tokens, self.frames)]
        memory = over_all(_peak_memory(self.device), self.device, torch.distributed.ReduceOp.MAX)
        self._start()
        return {TOKENS: counts[0], SECONDS: counts[1], MEMORY: memory / 2**30}

    def _start(self) -> None:
        self.tokens = self.frames = 0
        self.since = time.perf_counter()


class Bar(ProgressCallback):
    """The Trainer's bar, with the run's name and the last loss in it rather than a line for every step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(args.run_name)

    def end(self) -> None:
        """Leave the bar as it is, and the line that it stands on."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{logs.get(TOKENS, 0):.0f}"}
            if RIGHT in logs:
                shown[RIGHT] = f"{logs[RIGHT]:.2f}"
            self.training_bar.set_postfix(shown)


class Picture(TrainerCallback):
    """Draws the run into its folder after its last step, from the first on even if it was interrupted between."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        whole = state.global_step >= state.max_steps  # a run that was asked to end has no time for it
        if whole and state.is_world_process_zero and args.output_dir is not None:
            draw(state.log_history, Path(args.output_dir) / PICTURE)


def draw(history: Sequence[dict[str, float]], path: Path) -> None:
    """One panel above the other: loss, rate, and what was got through, over the steps.

    Args:
        history: the Trainer's entries, those with a "loss" are drawn.
        path: the PNG to write.
    """
    entries = [entry for entry in history if "loss" in entry]
    steps = [entry["step"] for entry in entries]
    figure = Figure(figsize=(9, 1.8 * len(_PANELS)), dpi=110, layout="constrained")
    rows = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (name, title) in zip(rows, _PANELS.items(), strict=True):
        axes.plot(steps, [entry.get(name, float("nan")) for entry in entries], color=_INK, linewidth=1.2)
        axes.set_ylabel(title, fontsize=8)
        axes.tick_params(labelsize=8)
        if name in (TOKENS, SECONDS, MEMORY):
            axes.set_ylim(bottom=0)  # what is measured from nothing; a loss or a rate is not
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("step")
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _peak_memory(device: torch.device) -> float:
    """Bytes that this process has held at most: of the GPU, or of the machine's memory where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
