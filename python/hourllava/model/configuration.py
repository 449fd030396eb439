# SPDX-License-Identifier: Apache-2.0
"""The configuration of Hour-LLaVA: a Qwen2 decoder, a SigLIP tower, and how a video is remembered and forgotten."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from .original import fields_of_original, is_original

# What the original puts into `input_ids` where visual tokens go.
ORIGINAL_IMAGE_TOKEN = -200
FORGETTING_RULES = {
    "temporal_forgetting": ("uniform", "random", "keyframe", "question"),
    "spatial_forgetting": ("uniform", "random"),
}


class HourLlavaConfig(PreTrainedConfig):
    """Configuration of `HourLlavaForConditionalGeneration`.

    Args:
        text_config: the decoder; MemAug copies its width, heads and rotary base.
        vision_config: the tower, with as many layers as are run (26 for so400m), or None when features are given.
        vision_width: channels of the tower's output; taken from `vision_config` when there is one.
        memaug_depth: number of MemAug blocks.
        video_grid: a frame becomes video_grid x video_grid tokens.
        min_frames: shorter videos are remembered as this many frames, with repeats.
        max_kept_frames, temporal_ratio: of T frames, max(1, min(max_kept_frames, T // temporal_ratio)) become queries.
        spatial_ratio: share of a kept frame's tokens that become queries.
        temporal_forgetting: which frames of a video become queries: "uniform", "random" (by `forgetting_seed`),
            "keyframe" (those least like their neighbours) or "question" (those most like the question's words).
        spatial_forgetting: "uniform" (a regular grid) or "random" (seeded by `forgetting_seed` and the frame's number).
        tile_size: pixels of an image tile's side; taken from `vision_config` when there is one.
        image_grid: an image is seen in at most image_grid x image_grid tiles.
        image_max_tiles: the tokens of more tiles than this are scaled down to about so many.
        image_token_id: id of the token that the visual tokens replace; the original's -200 is always understood too.
        time_instruction: whether prompts tell the video's length.
        memory_budget: how much of a memory `ask` reads where the call does not say: `all`, or what
            `hourllava retrieval-report` finds to be enough, as `128p`, `60s`, `1/16` or `1/16,32p`.
        head_is_stored: the checkpoint that this came from holds the tied head a second time.
        original: the original's config.json that this came from, for the way back.
    """

    model_type = "hour_llava"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}

    text_config: Any = None  # Qwen2Config, or a dict to make one of
    vision_config: Any = None  # SiglipVisionConfig, a dict to make one of, or None
    vision_width: int = 1152
    memaug_depth: int = 4
    video_grid: int = 8
    min_frames: int = 128
    max_kept_frames: int = 512
    temporal_ratio: int = 4
    spatial_ratio: float = 0.25
    temporal_forgetting: str = "uniform"
    spatial_forgetting: str = "uniform"
    tile_size: int = 384
    image_grid: int = 6
    image_max_tiles: int = 9
    forgetting_seed: int = 0
    image_token_id: int = ORIGINAL_IMAGE_TOKEN
    time_instruction: bool = False
    memory_budget: str = "all"
    tie_word_embeddings: bool = False
    head_is_stored: bool = False
    original: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = Qwen2Config(**(self.text_config or {}))
        if isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)
        if self.vision_config is not None:
            # The tower's pooling head is never used; asking for none keeps it out of memory and of checkpoints.
            self.vision_config.vision_use_head = False
            self.vision_width = self.vision_config.hidden_size
            self.tile_size = self.vision_config.image_size
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for name, rules in FORGETTING_RULES.items():
            if getattr(self, name) not in rules:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(rules)}")

    @property
    def patches_per_side(self) -> int:
        """Patches of a tile's side: 27 for so400m."""
        patch = 14 if self.vision_config is None else self.vision_config.patch_size
        return self.tile_size // patch

    @classmethod
    def from_original(cls, flat: dict[str, Any]) -> "HourLlavaConfig":
        """Convert the original's flat config.json, which keeps the decoder's fields at the top level.

        Raises:
            ModelError: a size of the decoder is missing.
        """
        return cls(**fields_of_original(flat))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`; a config.json of the original's is understood, whatever its `model_type`."""
        if is_original(config_dict):
            config_dict = cls.from_original(config_dict).to_dict()
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' `get_config_dict`, in our layout: it would warn of the original's `model_type`."""
        told, kwargs = super().get_config_dict(*args, **kwargs)
        other = is_original(told) and told.get("model_type") != cls.model_type
        return cls.from_original(told).to_dict() if other else told, kwargs


class OriginalConfig(HourLlavaConfig):
    """What AutoConfig finds under the original's `model_type`; reading one gives a `HourLlavaConfig`."""

    model_type = "hour_llava_qwen"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return HourLlavaConfig.from_dict(config_dict, **kwargs)


def tiny_config(vocab_size: int = 512, **changes: Any) -> HourLlavaConfig:
    """Half a million parameters that still make 64 tokens of every frame; `changes` override fields."""
    decoder = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.1,  # about width ** -0.5: with the usual 0.02 so narrow a model attends to nothing for long
        tie_word_embeddings=False,
    )
    tower = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
    )
    fields = {"memaug_depth": 2, "min_frames": 1, "max_kept_frames": 32, **changes}
    return HourLlavaConfig(text_config=decoder, vision_config=tower, **fields)
