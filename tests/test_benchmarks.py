# SPDX-License-Identifier: Apache-2.0
"""The benchmarks themselves: wrong values give no result, files are whole, and a picture comes of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.report import draw
from benchmarks.suite import OURS, SHAPES, Bench, Work, attention_in_parts, peak_of, write_results
from benchmarks.table import as_table, rows_of
from benchmarks.targets import as_lines, reached
from hourllava.model import load_model
from hourllava_ext import reference

ROOT = Path(__file__).resolve().parents[1]


class Recorder:
    """Stands in for pytest-benchmark: says whether anything was timed."""

    def __init__(self):
        self.extra_info, self.timed = {}, 0

    def __call__(self, function):
        function()
        self.timed += 1


def bench(ours, tolerance=1e-3, right=lambda: torch.linspace(-2, 2, 9), **more):
    ways = {OURS: ours, "peer": lambda: torch.linspace(-2, 2, 9), "reference": right}
    return Bench("rope", "forward", "3B", torch.float32, Work(bytes=1e6), ways, tolerance, **more)


def test_right_values_are_timed():
    recorder = Recorder()
    bench(lambda: torch.linspace(-2, 2, 9) + 1e-3).run(recorder, OURS)
    assert recorder.timed == 1
    assert recorder.extra_info["way"] == OURS
    assert recorder.extra_info["copy"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.linspace(-2, 2, 9) + 3e-3,
        lambda: torch.zeros(9),
        lambda: torch.full((9,), torch.nan),
        lambda: torch.linspace(-2, 2, 8),
        lambda: (torch.linspace(-2, 2, 9), torch.zeros(1)),
    ],
)
def test_wrong_values_are_never_timed(wrong):
    recorder = Recorder()
    # Ours is held to the reference, not to itself; and a peer to the reference, not to ours.
    with pytest.raises((AssertionError, ValueError)):
        bench(wrong).run(recorder, OURS)
    with pytest.raises((AssertionError, ValueError)):
        bench(lambda: torch.linspace(-2, 2, 9), right=wrong).run(recorder, "peer")
    with pytest.raises((AssertionError, ValueError)):
        bench(lambda: torch.linspace(-2, 2, 9), expected=wrong).run(recorder, OURS)
    assert recorder.timed == 0


def test_peak_is_that_of_the_call():
    freed = [torch.ones(2**18) for _ in range(64)]  # 64 MiB in pieces that the heap keeps
    del freed
    idle, busy = peak_of(lambda: None), peak_of(lambda: torch.ones(2**24))
    if idle is None or busy is None:
        pytest.skip("this system does not tell a process its peak: NOT CHECKED")
    assert idle < 8 << 20
    assert 63 << 20 < busy < 80 << 20


def test_small_values_are_held_to_their_own_size():
    tiny = Bench("rope", "forward", "3B", torch.float32, Work(), {OURS: lambda: torch.zeros(3)}, 0.1)
    tiny.expected = lambda: torch.full((3,), 1e-6)
    with pytest.raises(AssertionError):
        tiny.run(Recorder(), OURS)


def test_who_cannot_run_is_left_out_unless_it_is_ours():
    def broken():
        raise RuntimeError("no kernel")

    case = bench(broken)
    case.ways["peer"] = broken
    with pytest.raises(pytest.skip.Exception, match="peer does not run here: no kernel"):
        case.run(Recorder(), "peer")
    with pytest.raises(RuntimeError, match="no kernel"):
        case.run(Recorder(), OURS)


def test_attention_in_parts_is_the_reference():
    (heads, key_heads), width, pages = SHAPES[2].heads, SHAPES[2].head_dim, 70
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, heads, width, generator=generator)
    keys, values = (torch.randn(pages, key_heads, 4, width, generator=generator) for _ in range(2))
    table = torch.randperm(pages, generator=generator).to(torch.int32)[None]
    args = [query, keys, values, table, torch.full((pages,), 4, dtype=torch.int32)]
    args += [torch.arange(5), torch.tensor([0, 5]), torch.ones(width // 4)]
    torch.testing.assert_close(attention_in_parts(*args), reference.paged_attention(*args)[0])


def test_a_run_keeps_what_is_right_and_draws_it(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "import torch\n"
        "from benchmarks.suite import OURS, Bench, Work\n"
        "def bench_wrong(benchmark):\n"
        "    ways = {OURS: lambda: torch.zeros(2), 'reference': lambda: torch.ones(2)}\n"
        "    Bench('wrong', 'forward', 'tiny', torch.float32, Work(), ways).run(benchmark, OURS)\n"
    )
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-quiet"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=3", f"--benchmark-storage={tmp_path / 'storage'}"]
    command += ["benchmarks/ops/rope.py", str(tmp_path / "wrong.py"), "-k", "wrong or (tiny and forward and float32)"]
    run = subprocess.run([*command, "--results", tmp_path / "kept"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "2 passed" in run.stdout
    assert "1 failed" in run.stdout
    (kept,) = (tmp_path / "kept").glob("*.json")
    document = json.loads(kept.read_text())
    assert {(r["op"], r["way"]) for r in document["results"]} == {("rope", OURS), ("rope", "reference")}
    assert all(0 < r["p25"] <= r["median"] <= r["p75"] for r in document["results"])
    assert all(rate > 0 for rate in document["rates"].values())
    assert {"cpu", "threads", "tier", "torch", "commit", "changed"} <= document["machine"].keys()
    table = kept.with_suffix(".txt").read_text()
    assert "rope, forward, tiny, float32" in table
    assert "of a copy of the same bytes" not in table  # the targets are those of another shape
    assert "wrong" not in table
    target = tmp_path / "picture.png"
    draw(kept, target)
    assert_drawn(target)


def assert_drawn(path):
    """A PNG with no see-through pixel, so that it looks the same on any page, and with something on it."""
    picture = np.asarray(Image.open(path).convert("RGBA"))
    assert bool((picture[..., 3] == 255).all())
    assert tuple(picture[0, 0, :3]) == (255, 255, 255)
    assert float((picture[..., :3] != 255).any(-1).mean()) > 0.02


def result(op, way, median, shape="3B", step="forward", dtype="bfloat16", **more):
    fixed = {"bytes": 1e6, "flop": 0.0, "held_bytes": 0.0, "threads": 2, "calls": 1, "peak_bytes": 1 << 20, "rounds": 5}
    spread = {"median": median, "p25": median * 0.9, "p75": median * 1.1}
    return {"op": op, "way": way, "shape": shape, "step": step, "dtype": dtype, "copy": None, **fixed, **spread, **more}


def document_of(*results):
    machine = {"cpu": "a machine", "threads": 2, "tier": "avx2", "torch": "2.13", "commit": "0" * 40, "gpu": None}
    rates = {"gemm_bfloat16": 1e12, "gemm_float32": 1e11, "copy": 1e10}
    return {"machine": machine, "rates": rates, "results": list(results)}


def lengths():
    for minutes in (1, 60):
        for part, seconds in ((1, 1e-3), (16, 1e-4)):
            shape = f"3B, {minutes} min, 1/{part} of the pages"
            size = {"minutes": minutes, "part": part, "held_bytes": 4e6 * minutes, "copy": 1e-9, "flop": 1.0}
            yield result("paged_attention", OURS, seconds * minutes, shape, **size)
    for threads in (1, 2):
        size = {"minutes": 10, "part": 1, "threads": threads, "copy": 1e-9}
        shape = f"3B, 10 min, 1/1 of the pages, {threads} threads"
        yield result("paged_attention", OURS, 1 / threads, shape, **size)


def test_interrupts_lose_nothing_that_was_measured(tmp_path):
    """The first ends the run; those that come while it writes down what it has change nothing."""
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "benchmarks/ops/rope.py"]
    command += ["-k", "tiny", "--results", str(tmp_path), "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    given = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **given) as run:
        while "PASSED" not in (line := run.stdout.readline()):
            assert line, "it ended before it was interrupted"
        deadline = time.monotonic() + 100
        while run.poll() is None and time.monotonic() < deadline:
            run.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said = run.stdout.read()
    assert run.returncode == pytest.ExitCode.INTERRUPTED, said
    (results,) = tmp_path.glob("*.json")
    assert 1 <= len(json.loads(results.read_text())["results"]) < 8, said
    assert results.with_suffix(".txt").exists()


def test_rows_and_targets():
    document = document_of(
        result("paged_attention", OURS, 1e-3, flop=7e8, copy=1e-5),
        result("paged_attention", "torch", 4e-3),
        result("paged_attention", "folded", 2e-3),
        result("rope", OURS, 1e-4, copy=9e-5),
        result("rope", OURS, 1e-4, dtype="float32", copy=6e-5),
        result("rope", "reference", 5e-4),
        result("forget", "original", 5e-4),  # ours gave no result
        *lengths(),
    )
    rows = rows_of(document)
    first = rows[0]
    assert (first.bound, first.share, first.rate) == ("gemm_bfloat16", pytest.approx(0.7), pytest.approx(7e11))
    assert first.peers == {"torch": pytest.approx(4), "folded": pytest.approx(2)}
    assert first.spread == pytest.approx(0.2)
    assert (rows[1].bound, rows[1].share, rows[1].rate) == ("copy", pytest.approx(0.9), pytest.approx(1e10))
    assert not any(row.op == "forget" for row in rows)
    targets = {target.what: target for target in reached(document, rows)}
    found = {what: (target.measured, target.met) for what, target in targets.items()}
    assert found == {
        "paged_attention forward, bfloat16: times torch's SDPA": (pytest.approx(2), False),
        "paged_attention forward, bfloat16: of the GEMM rate": (pytest.approx(0.7), True),
        "paged_attention, 1/16 of the pages of 60 min: times all of them": (pytest.approx(10), False),
        "rope: of a copy of the same bytes, at least": (pytest.approx(0.6), False),
    }
    lines = as_lines(list(targets.values()))
    assert lines[1].endswith("3 x       2 x  NOT MET, 67% of it (folded)")
    assert lines[2].endswith("60%       70%  met")
    assert lines[4].endswith("NOT MET, 86% of it (forward, float32)")
    assert len(as_table(rows)) == 1 + len(rows)
    document["machine"]["gpu"] = "a GPU"
    assert reached(document, rows) == []


def test_lengths_and_threads_are_drawn(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps(document_of(result("rope", OURS, 1e-4, copy=9e-5), result("rope", "reference", 5e-5), *lengths()))
    )
    draw(tmp_path / "run.json", tmp_path / "run.png")
    assert_drawn(tmp_path / "run.png")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ('{"machine": {}}', "no results file"),
        (json.dumps(document_of()), "no operator in it was measured beside a peer"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, text, why):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        draw(tmp_path / "run.json", tmp_path / "run.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_one_line_says_what_cannot_be_drawn(tmp_path):
    command = [sys.executable, "-B", "-m", "benchmarks.report", tmp_path / "run.json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"{tmp_path / 'run.json'}: cannot be drawn: ")
    assert len(run.stderr.splitlines()) == 1


def test_results_are_whole_or_what_they_were(tmp_path, monkeypatch):
    path = tmp_path / "results/run.json"
    write_results(path, "whole")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_results(path, "half")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_the_whole_path_of_a_minute(tmp_path):
    command = [sys.executable, "-B", "-m", "benchmarks.whole_path", "--minutes", "1", "--heights", "128"]
    command += ["--folder", tmp_path / "films", "--results", tmp_path / "kept"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "of a question that reads all" in run.stdout
    (kept,) = (tmp_path / "kept").iterdir()
    document = json.loads(kept.read_text())
    assert [r["budget"] for r in document["results"]] == ["all", load_model("tiny").config.memory_budget]
    for found in document["results"]:
        assert found["one_core"] > 0
        assert found["all_cores"] > 0
        assert found["first"] > found["second"] > 0
        assert found["peak_mib"] > 100
        assert set(found["stages"]) == {"memaug", "decode_text"}
    parts = document["question"]
    assert 0 < parts["hourllava_ext::paged_attention"] < parts["all"]
    # Two blocks, 2 heads of 48: each of the question's rows meets 31 pages of 128.
    assert parts["flop"] % (2 * 4 * 2 * 48 * 31 * 128) == 0
    assert [path.name for path in (tmp_path / "films").iterdir()] == ["film-128p-1min.mp4"]
