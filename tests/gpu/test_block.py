# SPDX-License-Identifier: Apache-2.0
"""MemAug on a GPU: nothing in its forward waits for the device, and a CUDA graph replays it."""

import pytest
import torch

from hourllava.memory.pages import video_layout
from hourllava.model import tiny_config
from hourllava.model.memaug import MemAug, MemoryUse
from hourllava.model.stream import QueryStream

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU: replay is NOT TESTED; tests/model/test_memaug.py tests its condition"
)
LENGTH, FRAMES = 40, 60


@pytest.mark.parametrize("budget", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_graph_replays_a_question_of_fixed_length(dtype: torch.dtype, budget: int | None) -> None:
    config, device = tiny_config().text_config, torch.device("cuda")
    memaug = MemAug(config, 2).to(device, dtype)
    tokens = torch.randn(FRAMES * 17, config.hidden_size, dtype=dtype, device=device)
    pages = memaug.write(tokens, video_layout(FRAMES, 16, device))
    bounds = torch.tensor([0, LENGTH], device=device)
    stream = QueryStream(torch.arange(LENGTH, device=device), bounds, [LENGTH])
    use = MemoryUse(budget_pages=budget, mass_weight=torch.rand(LENGTH, device=device))
    first, second = torch.randn(2, LENGTH, config.hidden_size, dtype=dtype, device=device)
    expected = memaug(second, stream, pages, use)
    torch.cuda.set_sync_debug_mode("error")
    try:
        memaug(first, stream, pages, use)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    queries, graph, aside = first.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        memaug(queries, stream, pages, use)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        out, mass = memaug(queries, stream, pages, use)
    queries.copy_(second)
    graph.replay()
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(mass, expected[1])  # shares of a page are added up in no fixed order
