# SPDX-License-Identifier: Apache-2.0
"""Recipes are functions: each returns everything that a training run depends on."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, replace
from typing import Any

from hourllava.data.film import FILM_SIZE
from hourllava.errors import RecipeError

PARTS = {
    "vision_tower": "model.vision_tower.",
    "mm_projector": "model.mm_projector.",
    "vision_resampler": "model.vision_resampler.",
    "language_model": "",  # whatever no other part holds: decoder, embeddings and the newline token
}


def told(meaning: str, default: Any = MISSING) -> Any:
    """A field with what `hourllava train RECIPE --help` says of it."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Lesson:
    """``steps`` optimizer steps on batches of ``batch`` films of ``seconds`` seconds (1: an image)."""

    seconds: int
    steps: int
    batch: int


@dataclass(frozen=True)
class Stage:
    """Lessons in order under one learning-rate schedule: linear warm-up, then cosine to a twentieth."""

    name: str
    trains: tuple[str, ...] = told("parts that learn, by commas")  # names of PARTS
    lessons: tuple[Lesson, ...] = told("SECONDSxSTEPSxBATCH of films, by commas; of one second: images")
    learning_rate: float = told("largest rate, after the warm-up", 1e-3)
    warmup_steps: int = told("steps in which the rate rises", 50)
    memaug: bool = told("false: the kept tokens go straight to the decoder", True)
    grounding: float = told("weight of the reward for attention on the pages that show the answer", 0.0)
    event_weight: int = told("how much likelier than another topic it is to be asked what happened in a landscape", 1)
    film_size: int = told("side at which films are drawn; a file's is 128, resized for the tower", 64)
    tower_rate: float = told("the tower's rate beside the others', 5e-6 to 1e-4 in the original's stage 2", 0.05)

    @property
    def steps(self) -> int:
        return sum(lesson.steps for lesson in self.lessons)


@dataclass(frozen=True)
class Recipe:
    """A model's whole training; ``tower_steps`` of tower pre-training come before the first stage."""

    name: str
    stages: tuple[Stage, ...]
    tower_steps: int = told("steps of the tower's own training, before the first stage")
    seed: int = told("of weights, films and questions", 0)
    save_steps: int = told("steps from one checkpoint to the next", 25)
    report_to: str = told("where losses go, by commas", "tensorboard")

    def until(self, count: int) -> "Recipe":
        """What the model after so many stages depends on; after none, its tower is trained."""
        return replace(self, stages=self.stages[:count])


def tiny() -> Recipe:
    """The paper's three stages in miniature, on rendered films, for two CPU cores.

    The original starts from a pre-trained SigLIP and an image model; a start of the same kind is made here first: the
    tower learns to name what each patch shows, and `base` teaches projector and decoder to talk about single images.
    Stages 1 to 3 then train the parts that the original trains. Beyond the original, stages 2 and 3 reward
    attention on the pages that show the answer, which rendered films know: strongly until MemAug finds the events, as
    all it could say of them before is a guess, then weakly.
    """
    images = (Lesson(1, 1000, 64),)
    clips = (Lesson(4, 40, 64), Lesson(8, 200, 48), Lesson(16, 300, 48))
    return Recipe(
        name="tiny",
        tower_steps=3500,
        stages=(
            Stage("base", ("mm_projector", "language_model"), images, learning_rate=2e-3, memaug=False),
            Stage("s1", ("vision_resampler",), (Lesson(1, 200, 64),), learning_rate=2e-3),
            Stage("s2", tuple(PARTS), clips, grounding=1.0),
            *_long_videos(),
            *_films_from_files(),
            *_events_by_landscape(),
        ),
    )


def _long_videos() -> tuple[Stage, ...]:
    """Stage 3 in three rounds: what happened in a landscape, among hundreds of seconds of it, is learned last."""
    parts = ("mm_projector", "vision_resampler", "language_model")
    first = (Lesson(32, 200, 32), Lesson(64, 80, 20), Lesson(128, 60, 12), Lesson(512, 40, 5), Lesson(1800, 25, 2))
    second = (Lesson(16, 80, 48), Lesson(32, 160, 32), Lesson(128, 80, 12), Lesson(512, 40, 5), Lesson(1800, 10, 2))
    third = (Lesson(32, 60, 32), Lesson(128, 100, 12), Lesson(512, 70, 5), Lesson(1800, 15, 2))
    return (
        Stage("s3", parts, first, 7e-4, warmup_steps=20, grounding=0.1),
        Stage("s3-second", parts, second, 7e-4, 20, grounding=0.3, event_weight=4),
        Stage("s3-third", parts, third, 7e-4, 20, grounding=0.3, event_weight=4),
    )


def _films_from_files() -> tuple[Stage, ...]:
    """Pictures as files give them, drawn larger and resized: the tower learns to read them, then long videos again."""
    parts = ("mm_projector", "vision_resampler", "language_model")
    clips = (Lesson(16, 250, 48),)
    films = (Lesson(32, 60, 32), Lesson(128, 60, 12), Lesson(512, 50, 5), Lesson(1800, 25, 2))
    last = (Lesson(32, 80, 32), Lesson(128, 50, 12), Lesson(512, 35, 5), Lesson(1800, 15, 2))
    return (
        Stage(
            "s2-files",
            tuple(PARTS),
            clips,
            1e-3,
            20,
            grounding=1.0,
            event_weight=2,
            film_size=FILM_SIZE,
            tower_rate=0.1,
        ),
        Stage("s3-files", parts, films, 7e-4, 20, grounding=0.3, event_weight=2, film_size=FILM_SIZE),
        Stage("s3-last", parts, last, 5e-4, 15, grounding=0.2, film_size=FILM_SIZE),
    )


def _events_by_landscape() -> tuple[Stage, ...]:
    """What happened in a landscape is learned last, in two rounds: MemAug alone, at a high rate, learns to tell events
    in the landscape that is asked about from those in others, then the decoder what to make of it. All topics end it.
    """
    parts = ("mm_projector", "vision_resampler", "language_model")
    clips = (Lesson(64, 1000, 12),)  # a film of 64 s shows all six landscapes
    films = (Lesson(64, 250, 12), Lesson(128, 50, 12), Lesson(512, 40, 5), Lesson(1800, 15, 2))
    last = (Lesson(64, 500, 12), Lesson(128, 100, 12), Lesson(512, 60, 5), Lesson(1800, 20, 2))
    look = Stage("s3-look", ("vision_resampler",), clips, 3e-3, 20, grounding=1.0, event_weight=40, film_size=FILM_SIZE)
    end = Stage("s3-end", parts, films, 5e-4, 20, grounding=0.3, event_weight=3, film_size=FILM_SIZE)
    return (
        look,
        end,
        replace(look, name="s3-look-again"),
        replace(end, name="s3-end-again"),
        Stage("s3-all", parts, last, 5e-4, 20, grounding=0.2, event_weight=2, film_size=FILM_SIZE),
    )


@dataclass(frozen=True)
class Training:
    """One of the paper's stages: every field can be changed on the command line."""

    name: str
    model: str = told("what it starts from: a directory, or a repository of the hub")
    trains: tuple[str, ...] = told("parts that learn, by commas")  # names of PARTS
    data: str = told("a manifest, a YAML that mixes some, or shards: their folder or address", "")
    shard_cache: float = told("GiB that are kept of shards from elsewhere; 0 keeps all", 0.0)
    learning_rate: float = told("of the decoder, the embeddings and the newline token", 2e-5)
    tower_rate: float = told("learning rate of the vision tower", 5e-6)
    projector_rate: float = told("learning rate of the projector", 1e-4)
    resampler_rate: float = told("learning rate of MemAug", 1e-4)
    batch_size: int = told("samples of an optimizer step, over all processes", 128)
    batch_per_device: int = told("of them, those that a process takes at a time; the rest are accumulated", 1)
    batching: str = told("per_stream: every batch over all processes comes from one stream of the data", "random")
    group_by_modality: bool = told("batches hold one modality; lengths are grouped either way, shards neither", True)
    epochs: float = told("how often all data are seen", 1.0)
    max_steps: int = told("optimizer steps, whatever the epochs; 0: as many as the epochs have", 0)
    warmup_ratio: float = told("share of the steps in which the rates rise", 0.03)
    schedule: str = told("how the rates fall after that", "cosine")
    weight_decay: float = told("of matrices; biases and norms have none", 0.0)
    adam_beta1: float = told("AdamW's memory of gradients", 0.9)
    adam_beta2: float = told("AdamW's memory of their squares", 0.999)
    adam_epsilon: float = told("what AdamW adds to their root", 1e-8)
    clip: float = told("largest norm of the gradients", 1.0)
    max_length: int = told("tokens that the decoder reads", 32768)
    bf16: bool = told("compute in bfloat16", True)
    gradient_checkpointing: bool = told("compute activations again in the backward, which saves memory", True)
    spatial_forgetting: str = told("which tokens of a kept frame become queries", "random")
    memaug_depth: int = told("MemAug's blocks, where the model has none yet", 4)
    image_grid: int = told("images are seen in at most so many tiles to a side", 6)
    image_max_tiles: int = told("the tokens of an image in more tiles than this are scaled down to about so many", 9)
    min_frames: int = told("shorter videos are remembered as so many frames, with repeats", 128)
    max_frames: int = told("frames of a video at most; 0 takes one for every second", 0)
    time_instruction: bool = told("tell a video's length in front of its question", True)
    parallel: str = told("how processes share the work; one alone needs none of it", "zero2")
    memory_parallel: int = told("processes that share each video's memory", 1)
    lora_rank: int = told("0 trains the decoder itself; else adapters of this rank in its place", 0)
    lora_alpha: int = told("adapters count lora_alpha / lora_rank times", 32)
    workers: int = told("processes that load data, for each that trains; no more than there are cores", 4)
    failure_limit: float = told("share of the samples that may fail to load; more of them stop the run", 0.02)
    save_steps: int = told("steps from one checkpoint to the next", 100)
    keep: int = told("checkpoints that stay, the newest", 1)
    report_to: str = told("where losses go, by commas", "tensorboard")
    seed: int = told("of the order of samples, of forgetting and of new weights", 42)

    def accumulation(self, processes: int) -> int:
        """Batches that each of so many processes adds up before an optimizer step.

        Raises:
            RecipeError: `batch_size` cannot be made of them.
        """
        groups, rest = divmod(processes, self.memory_parallel)
        if rest or not groups:
            why = f"{processes} processes do not make groups of {self.memory_parallel}"
            raise RecipeError("--memory-parallel", why, "choose a divisor of the number of processes")
        together = groups * self.batch_per_device
        if self.batch_size % together:
            why = f"{self.batch_size} samples are no multiple of {groups} x {self.batch_per_device} at a time"
            raise RecipeError("--batch-size", why, "change it, --batch-per-device, or the number of processes")
        return self.batch_size // together


def s1_3b() -> Training:
    """Image-language pretraining: MemAug alone learns, on images."""
    return Training(
        name="s1-3b",
        model="jylins/llava-onevision-qwen25-3b-si",
        trains=("vision_resampler",),
        learning_rate=1e-4,
        max_frames=32,
        time_instruction=False,
    )


def s1_7b() -> Training:
    """As `s1_3b`, from the 7B image model that the paper names (the original's script starts it from the 3B one)."""
    return replace(s1_3b(), name="s1-7b", model="lmms-lab/llava-onevision-qwen2-7b-si", batch_per_device=2)


def s2_3b() -> Training:
    """Video-language adaptation: everything learns."""
    return Training(name="s2-3b", model="jylins/hourllava-qwen25-3b-s1", trains=tuple(PARTS))


def s2_7b() -> Training:
    return replace(s2_3b(), name="s2-7b", model="jylins/hourllava-qwen2-7b-s1", learning_rate=1e-5, batch_per_device=2)


def s3_3b() -> Training:
    """Video instruction tuning: the tower rests, so that its features may be made once."""
    return Training(
        name="s3-3b",
        model="jylins/hourllava-qwen25-3b-s2",
        trains=("mm_projector", "vision_resampler", "language_model"),
        batching="per_stream",
        save_steps=1000,
    )


def s3_7b() -> Training:
    return replace(s3_3b(), name="s3-7b", model="jylins/hourllava-qwen2-7b-s2", batch_size=256, batch_per_device=4)


RECIPES: dict[str, Callable[[], Recipe | Training]] = {
    "tiny": tiny,
    "s1-3b": s1_3b,
    "s1-7b": s1_7b,
    "s2-3b": s2_3b,
    "s2-7b": s2_7b,
    "s3-3b": s3_3b,
    "s3-7b": s3_7b,
}
