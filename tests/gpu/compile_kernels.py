# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not here, as launches at the model's shapes would.

A process of its own, since kernels are compiled or interpreted from their definition on:
``python compile_kernels.py cuda:90:32 bfloat16`` prints one JSON object a kernel.
"""

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from hourllava_ext import triton as kernels

TOKENS, HEADS, KEY_HEADS, WIDTH, PAGE = 96, 16, 2, 128, 128


def compile_instead_of_launching(target: GPUTarget) -> None:
    """From here on a launch compiles its kernel for ``target`` and prints what came out."""
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        ptx = compiled.asm.get("ptx", "")
        tensor_cores = "wgmma" in ptx or "mfma" in compiled.asm.get("amdgcn", "")
        rough = re.search(r"\b(div\.(full|approx)|rcp\.approx|r?sqrt\.approx)\S*", ptx)
        binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
        facts = {"kernel": self._fn_name, "shared": compiled.metadata.shared, "bytes": len(binary)}
        print(json.dumps(facts | {"tensor_cores": tensor_cores, "rough": rough and rough[0]}), flush=True)

    JITFunction.run = compile_only
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )


def compile_all(dtype: torch.dtype) -> None:
    rows = torch.zeros(TOKENS, HEADS, WIDTH, dtype=dtype)
    keys = torch.zeros(TOKENS, KEY_HEADS, WIDTH, dtype=dtype)
    positions, inv_freq = torch.arange(TOKENS), torch.ones(WIDTH // 4)
    kernels.rope(rows, positions, inv_freq)
    pages = kernels.page_write(keys, keys, positions, positions, inv_freq, 2, PAGE)
    kernels.page_write_backward(*pages[:2], positions, positions, inv_freq)
    table, lengths, cu_seqlens = torch.zeros(1, 20, dtype=torch.int32), pages[3], torch.tensor([0, TOKENS])
    kernels.retrieve(rows, positions, cu_seqlens, inv_freq, pages[2], table, lengths, 4)
    args = rows, *pages[:2], table, lengths, positions, cu_seqlens, inv_freq
    out, lse, _ = kernels.paged_attention(*args, 0.1, torch.ones(TOKENS))
    kernels.paged_attention_backward(out, lse, *args, out, lse, 0.1)
    parts, sums = torch.zeros(3, *rows.shape, dtype=dtype), torch.zeros(3, HEADS, TOKENS)
    kernels.merge_attention(parts, sums)
    kernels.merge_attention_backward(rows, sums[0], parts, sums)
    tokens = torch.zeros(8, 64, 2048, dtype=dtype)
    frames, patches = torch.arange(3), torch.zeros(3, 16, dtype=torch.int64)
    kept, _ = kernels.forget(tokens, frames, patches, tokens[0, 0])
    kernels.forget_backward(kept, frames, patches, 8, 64)
    pooled = kernels.pool_grid(torch.zeros(2, 729, 1152, dtype=dtype), 8)
    kernels.pool_grid_backward(pooled, 8, 729)
    kernels.keyframe_score(tokens[:, 0])
    kernels.add_norm_backward(
        *[tokens[0]] * 3, tokens[0, 0], *kernels.add_norm(*[tokens[0]] * 2, *[tokens[0, 0]] * 2)[1:]
    )


def compile_heads(width: int, dtype: torch.dtype) -> None:
    """What takes the most shared memory where heads are not as wide as the model's."""
    rows, positions, inv_freq = torch.zeros(TOKENS, HEADS, width, dtype=dtype), torch.arange(TOKENS), torch.ones(8)
    pages, summary = torch.zeros(2, KEY_HEADS, PAGE, width, dtype=dtype), torch.zeros(2, KEY_HEADS, 3, width)
    table, lengths = torch.zeros(1, 20, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, TOKENS])
    kernels.retrieve(rows, positions, cu_seqlens, inv_freq, summary, table, lengths, 4)
    kernels.paged_attention(rows, pages, pages, table, lengths, positions, cu_seqlens, inv_freq, 0.1)


if __name__ == "__main__":
    backend, arch, warp = sys.argv[1].split(":")
    assert not triton.knobs.runtime.interpret
    compile_instead_of_launching(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp)))
    stored = getattr(torch, sys.argv[2])
    compile_all(stored)
    if stored == torch.float32:
        for heads in (32, 256):
            compile_heads(heads, stored)
