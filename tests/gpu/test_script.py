# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu.sh` without a GPU: it refuses in one line, and runs through its steps with a mock interpreter."""

import re
import subprocess
import sys
from pathlib import Path

import hourllava_ext

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.sh"
# Says yes to every question, and takes every step by printing it; those that name what it is told fail.
MOCK = """#!/usr/bin/env bash
[[ $1 == -c ]] && exit 0
echo "step: $* cuda=$HOURLLAVA_EXT_CUDA"
[[ -z "{fails}" || "$*" != *"{fails}"* ]]
"""


def run(python: str, *arguments: str, tools: Path = Path(), seconds: int = 0) -> subprocess.CompletedProcess:
    """The script, `seconds` after its start."""
    given = [f"PYTHON={python}", "CUDA_VISIBLE_DEVICES=", f"SECONDS={seconds}"]
    settings = ["env", *given, "bash", "-c", 'PATH=$0:$PATH exec bash "$@"']
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


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_steps(tmp_path: Path) -> None:
    """Every step runs, whichever fails, and the exit code tells."""
    mock = tmp_path / "python"
    write_program(tmp_path / "compute-sanitizer", "#!/usr/bin/env bash\n")
    for fails, code in (("", 0), ("bench_hour", 1)):
        write_program(mock, MOCK.format(fails=fails))
        done = run(str(mock), str(tmp_path / "results"), tools=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        summary = (tmp_path / "results/summary.txt").read_text()
        assert summary in done.stdout
        results = {line.split()[0]: line for line in summary.splitlines()[2:]}
        assert {"carried", "build", "tests", "decoder", "sanitizer", "races", "hour", "operators"} <= set(results)
        assert results["operators"].endswith("  ok" if not fails else "failed (1)")
        assert results["tests"].endswith("  ok")
        assert results["sanitizer"].endswith("  ok")
        assert "tests/gpu" in (tmp_path / "results/tests.log").read_text()
        # Kernels that came along are not lost to a build without them.
        kept = "there is no nvcc here" in results["build"]
        assert kept or "cuda=1" in (tmp_path / "results/build.log").read_text()


def test_it_ends_within_ten_minutes(tmp_path: Path) -> None:
    """A step gets what is left of them at most; behind that it is left out, and the summary is written."""
    write_program(tmp_path / "python", MOCK.format(fails=""))
    write_program(tmp_path / "compute-sanitizer", "#!/usr/bin/env bash\n")
    whole = run(str(tmp_path / "python"), str(tmp_path / "results"), tools=tmp_path)
    limits = {name: int(limit) for name, limit in re.findall(r"== (\w+): at most (\d+) s", whole.stdout)}
    kill_after = 10
    assert sum(limits[name] + kill_after for name in limits if name not in ("hour", "operators")) < 560
    assert limits["operators"] + kill_after < 600
    late = run(str(tmp_path / "python"), str(tmp_path / "late"), tools=tmp_path, seconds=500)
    assert {int(limit) for limit in re.findall(r"== tests: at most (\d+) s", late.stdout)} <= set(range(60, 76))
    over = run(str(tmp_path / "python"), str(tmp_path / "over"), tools=tmp_path, seconds=590)
    assert over.returncode == 1
    assert "step:" not in over.stdout
    assert "no time is left" in (tmp_path / "over/summary.txt").read_text()


def test_what_cannot_work_here_is_left_out(tmp_path: Path) -> None:
    """A checker that cannot look into the device, and a model whose packages are missing or too old."""
    refused = '#!/usr/bin/env bash\n[[ "$*" == *libcuda* ]] || exit 0\necho "=== Error: Device not supported"\nexit 1\n'
    write_program(tmp_path / "compute-sanitizer", refused)
    missing = '#!/usr/bin/env bash\n[[ "$*" == *hourllava.model* ]] && { echo "ImportError: too old" >&2; exit 1; }\n'
    write_program(tmp_path / "python", MOCK.format(fails="").replace("#!/usr/bin/env bash\n", missing))
    done = run(str(tmp_path / "python"), str(tmp_path / "results"), tools=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {line.split()[0]: line for line in (tmp_path / "results/summary.txt").read_text().splitlines()[2:]}
    assert results["sanitizer"].endswith("left out: it cannot look into this device: === Error: Device not supported")
    assert results["block"].endswith("left out: ImportError: too old")
    assert "left out" in results["decoder"]
    assert "test_block" not in (tmp_path / "results/tests.log").read_text()


def pytest(*arguments: str, settings: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Pytest in the repository, without a GPU, as the script runs it."""
    settings = "env", *settings, "CUDA_VISIBLE_DEVICES="
    command = [*settings, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=SCRIPT.parents[1])


def test_memory_is_checked_in_a_case_of_every_operator() -> None:
    """The sanitizer's step selects tests by name: as many as one of each operator, and not none."""
    text = SCRIPT.read_text()
    (chosen,) = re.findall(r'small="(library .*)"', text)
    files = ["tests/gpu/test_kernels.py", "tests/gpu/test_attention.py"]
    assert " ".join([*files, '-k "$small"']) in text
    listed = pytest("--collect-only", *files, "-k", chosen.replace("library", "triton")).stdout
    names = re.findall(r"::test_(\w+)\[", listed)
    operators = {name.rstrip("_") for name in hourllava_ext.__all__} - {"paged_attention"}
    assert operators <= set(names)
    assert "shared_pages" in names  # of paged attention
    assert len(names) <= 2 * len(operators)


def test_steps_name_what_is_there() -> None:
    text = SCRIPT.read_text()
    paths = re.findall(r"(?:tests|benchmarks)/\w+/test_\w+\.py|benchmarks/ops/\w+\.py", text)
    assert len(paths) > 5
    assert [path for path in paths if not (SCRIPT.parents[1] / path).is_file()] == []


def test_a_gpu_job_fails_where_it_would_skip() -> None:
    graph = "tests/gpu/test_block.py::test_a_graph_replays_a_question_of_fixed_length"
    job = pytest(graph, settings=("FAIL_WITHOUT_CUDA=1",))
    assert job.returncode == 1
    assert "6 errors" in job.stdout
    assert "Skipped: NO GPU" in job.stdout
    room = pytest("tests/gpu/test_kernels.py", "-k", "rope_copies", "-x", settings=("FAIL_WITHOUT_CUDA=1",))
    assert room.returncode == 1
    assert "FAIL_WITHOUT_CUDA is set, but torch sees no GPU" in room.stdout
    assert pytest(graph, settings=("-u", "FAIL_WITHOUT_CUDA")).returncode == 0
