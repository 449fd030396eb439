# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu.sh` without a GPU: it refuses in one line, and runs through its steps with a mock interpreter."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.sh"
# Says yes to every question, and takes every step by printing it; those that name what it is told fail.
MOCK = """#!/usr/bin/env bash
[[ $1 == -c ]] && exit 0
echo "step: $*"
[[ -z "{fails}" || "$*" != *"{fails}"* ]]
"""


def run(python: str, *arguments: str, tools: Path = Path()) -> subprocess.CompletedProcess:
    settings = ["env", f"PYTHON={python}", "CUDA_VISIBLE_DEVICES=", "bash", "-c", 'PATH=$0:$PATH exec bash "$@"']
    command = [*settings, str(tools), str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(sys.executable, str(tmp_path / "results"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu.sh: torch sees no GPU; run it on a machine that has one\n"
    assert not (tmp_path / "results").exists()


def test_usage() -> None:
    assert run("/bin/false").stderr.startswith("gpu.sh: /bin/false has no torch; ")
    assert run(sys.executable, "a", "b").stderr.startswith("gpu.sh: one folder at most, got 2; ")


def test_steps(tmp_path: Path) -> None:
    """Every step runs, whichever fails, and the exit code tells."""
    mock, sanitizer = tmp_path / "python", tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/usr/bin/env bash\n")
    sanitizer.chmod(0o755)
    for fails, code in (("", 0), ("bench_hour", 1)):
        mock.write_text(MOCK.format(fails=fails))
        mock.chmod(0o755)
        done = run(str(mock), str(tmp_path / "results"), tools=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        summary = (tmp_path / "results/summary.txt").read_text()
        assert summary in done.stdout
        results = {line.split()[0]: line for line in summary.splitlines()[2:]}
        assert {"carried", "build", "tests", "decoder", "sanitizer", "hour", "operators"} <= set(results)
        assert results["operators"].endswith("  ok" if not fails else "failed (1)")
        assert results["tests"].endswith("  ok")
        assert results["sanitizer"].endswith("  ok")
        assert "tests/gpu" in (tmp_path / "results/tests.log").read_text()
