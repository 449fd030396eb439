# SPDX-License-Identifier: Apache-2.0
"""The model written out a second time, from what is known of the original: one sample, head and segment at a time.

Shares nothing with the library but the weights and the decoder, which is stock transformers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

IGNORE = -100


@dataclass
class Entry:
    """What stands at one mark, and the patches that spatial forgetting kept of it: one tensor a sampling call."""

    modality: str
    features: torch.Tensor  # (n, N, Cv)
    size: tuple[int, int] | None  # height, width
    picks: list[torch.Tensor]


class Oracle:
    """`run` gives the decoder's input, the query stream's and the memory's position ids, and the decoder's labels."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.newline = model.model.image_newline[None]

    def run(self, ids, labels, entries, image_id):
        labels = torch.full_like(ids, IGNORE) if labels is None else labels
        pieces, targets, start = [], [], 0
        for mark in [*(ids == image_id).nonzero()[:, 0].tolist(), len(ids)]:
            pieces.append(ids[start:mark])
            targets.append(labels[start:mark])
            start = mark + 1
        words = [self.model.model.embed_tokens(piece) for piece in pieces]
        if not entries:
            return words[0], None, None, targets[0]
        queries, memory, memory_ids = self.see(entries)
        rows, positions, shown, largest = [], [], [], -1
        for number, (word, target) in enumerate(zip(words, targets, strict=True)):
            kept = word[target == IGNORE]
            rows.append(kept)
            positions += [largest + 1 + i for i in range(len(kept))]
            largest = max([largest, *positions[-len(kept) :]]) if len(kept) else largest
            if number < len(queries):
                tokens, token_ids = queries[number]
                shown.append((sum(map(len, rows)), len(tokens)))
                rows.append(tokens)
                positions += [largest + 1 + i for i in token_ids]
                largest = max(positions)
        out = self.memaug(torch.cat(rows), torch.tensor(positions), memory, torch.tensor(memory_ids))
        final, final_labels = [words[0]], [targets[0]]
        for (first, length), word, target in zip(shown, words[1:], targets[1:], strict=True):
            final += [out[first : first + length], word]
            final_labels += [torch.full((length,), IGNORE), target]
        return torch.cat(final), torch.tensor(positions), torch.tensor(memory_ids), torch.cat(final_labels)

    def see(self, entries):
        """Query tokens and ids of each mark, and the memory's tokens and ids."""
        if entries[0].modality == "video":
            return self.see_video(entries[0])
        if len(entries) == 1 and len(entries[0].features) > 1:
            return self.see_tiles(entries[0])
        return self.see_images(entries)

    def see_video(self, entry):
        features = entry.features
        if features.shape[1] > 64:
            side = math.isqrt(features.shape[1])
            image = features.view(len(features), side, side, -1).permute(0, 3, 1, 2)
            features = F.interpolate(image, size=(8, 8), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.model.model.mm_projector(features)
        if len(tokens) < self.config.min_frames:
            tokens = tokens[np.linspace(0, len(tokens) - 1, self.config.min_frames, dtype=int)]
        total = len(tokens)
        kept = np.linspace(0, total - 1, max(1, min(self.config.max_kept_frames, total // 4)), dtype=int)
        query, query_ids = [], []
        for t in kept.tolist():
            for j in entry.picks[0][t].tolist():
                query.append(tokens[t, j])
                query_ids.append(65 * t + j)
            query.append(self.newline[0])
            query_ids.append(65 * t + 64)
        memory = [torch.cat([tokens[t], self.newline]) for t in range(total)]
        return [(torch.stack(query), query_ids)], torch.cat(memory), list(range(65 * total))

    def see_images(self, entries):
        each = entries[0].features.shape[1]
        last = each * len(entries)
        queries, memory, memory_ids = [], [], []
        for i, entry in enumerate(entries):
            tokens = self.model.model.mm_projector(entry.features[0])
            picks = entry.picks[0].tolist()
            queries.append((torch.cat([tokens[picks], self.newline]), [each * i + j for j in picks] + [last]))
            memory += [tokens, self.newline]
            memory_ids += [*range(each * i, each * (i + 1)), last]
        return queries, torch.cat(memory), memory_ids

    def see_tiles(self, entry):
        tokens = self.model.model.mm_projector(entry.features)
        side = math.isqrt(tokens.shape[1])
        grid = self.unpadded(tokens[1:].view(-1, side, side, tokens.shape[-1]), entry.size)
        height, width = grid.shape[:2]
        row = torch.linspace(0, height - 1, side).round().long().tolist()
        column = torch.linspace(0, width - 1, side).round().long().tolist()
        base_ids = [r * width + c for r in row for c in column]
        memory, memory_ids = [tokens[0]], list(base_ids)
        for r in range(height):
            memory += [grid[r], self.newline]
            memory_ids += [r * width + c for c in range(width)] + [height * width]
        base, rest = entry.picks
        query, query_ids = [tokens[0][base]], [base_ids[j] for j in base.tolist()]
        for r in range(height):
            mine = [j for j in rest.tolist() if j // width == r]
            if mine:
                query += [grid.flatten(0, 1)[mine], self.newline]
                query_ids += [*mine, height * width]
        return [(torch.cat(query), query_ids)], torch.cat(memory), memory_ids

    def unpadded(self, tiles, size):
        height, width = size
        rows, columns = best_grid(height, width, self.config.tile_size, self.config.image_grid)
        side = tiles.shape[1]
        lines = [torch.cat(list(tiles[r * columns : (r + 1) * columns]), 1) for r in range(rows)]
        grid = torch.cat(lines, 0)
        if width / height > grid.shape[1] / grid.shape[0]:
            pad = (grid.shape[0] - int(height * (grid.shape[1] / width))) // 2
            grid = grid[pad : grid.shape[0] - pad]
        else:
            pad = (grid.shape[1] - int(width * (grid.shape[0] / height))) // 2
            grid = grid[:, pad : grid.shape[1] - pad]
        times = math.sqrt(grid.shape[0] * grid.shape[1] / (self.config.image_max_tiles * side**2))
        if times > 1.1:
            smaller = [int(grid.shape[0] // times), int(grid.shape[1] // times)]
            grid = F.interpolate(grid.permute(2, 0, 1)[None], smaller, mode="bilinear")[0].permute(1, 2, 0)
        return grid

    def memaug(self, x, at, memory, memory_at):
        text = self.config.text_config
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        width = text.hidden_size // heads
        own = kv_heads * width
        for block in self.model.model.vision_resampler.layers:
            q, k, v = block.self_attn.Wqkv(x).split([heads * width, own, own], 1)
            x = block.norm1(x + block.self_attn.Wo(self.attend(q, k, v, at, at)))
            k, v = block.cross_attn.Wkv(memory).split([own, own], 1)
            q = block.cross_attn.Wq(x)
            x = block.norm2(x + block.cross_attn.Wo(self.attend(q, k, v, at, memory_at)))
            x = block.norm3(x + block.mlp(x))
        return x

    def attend(self, q, k, v, at, key_at):
        text = self.config.text_config
        width = text.hidden_size // text.num_attention_heads
        group = text.num_attention_heads // text.num_key_value_heads
        outs = []
        for head in range(text.num_attention_heads):
            shared = slice(head // group * width, (head // group + 1) * width)
            query = self.turn(q[:, head * width : (head + 1) * width], at)
            weights = (query @ self.turn(k[:, shared], key_at).T / math.sqrt(width)).softmax(-1)
            outs.append(weights @ v[:, shared])
        return torch.cat(outs, 1)

    def turn(self, x, positions):
        half = x.shape[1] // 4
        theta = self.config.text_config.rope_parameters["rope_theta"]
        frequency = 1 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
        angle = torch.outer(positions.float(), frequency)
        first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], 1)


def best_grid(height, width, tile, most):
    """Rows and columns whose canvas shows most of an image, and of these wastes least."""
    best = None
    for columns in range(1, most + 1):
        for rows in range(1, most + 1):
            scale = min(columns * tile / width, rows * tile / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            waste = columns * rows * tile**2 - shown
            if best is None or shown > best[0] or (shown == best[0] and waste < best[1]):
                best = shown, waste, rows, columns
    return best[2:]
