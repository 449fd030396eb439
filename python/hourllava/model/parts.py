# SPDX-License-Identifier: Apache-2.0
"""What of a model trains: its parts by name, and a table of them to print before hours are spent."""

from collections.abc import Mapping

from torch import nn

# Parts of the model by what stands in the names of their parameters; the rest is the decoder.
PARTS = {
    "vision tower": "vision_tower.",
    "projector": "mm_projector.",
    "newline": "image_newline",
    "MemAug": "vision_resampler.",
    "embeddings": "embed_tokens.",
    "head": "lm_head.",
}
DECODER = "decoder"


def parts_table(model: nn.Module, rates: Mapping[str, float] | None = None) -> str:
    """A line for each part of the model with the parameters that it has and that train, LoRA's own apart.

    Args:
        model: a `HourLlavaForConditionalGeneration`, or what PEFT made of one.
        rates: learning rates of parameters, by name; they are shown in a column of their own.
    """
    rows: dict[str, list[int]] = {part: [0, 0] for part in (*PARTS, DECODER)}
    shown: dict[str, set[float]] = {}
    for name, parameter in model.named_parameters():
        part = next((part for part, mark in PARTS.items() if mark in name), DECODER)
        if ".lora_" in name:
            part = f"LoRA in {part}"
        row = rows.setdefault(part, [0, 0])
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves each process a part of it
        row[0] += count
        row[1] += count * parameter.requires_grad
        if rates and name in rates:
            shown.setdefault(part, set()).add(rates[name])
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'part':24}{'parameters':>16}{'train':>16}{'share':>10}" + f"{'rate':>10}" * bool(rates)]
    for part, (count, training) in rows.items():
        if count:
            rate = ", ".join(f"{rate:g}" for rate in sorted(shown.get(part, ())))
            lines.append(f"{part:24}{count:16,}{training:16,}{training / count:10.2%}{rate:>{10 if rates else 0}}")
    return "\n".join(lines)
