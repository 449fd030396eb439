# SPDX-License-Identifier: Apache-2.0
"""`hourllava ask` under torchrun: processes share a memory, and one of them says what one process alone would say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hourllava.cli import main
from hourllava.cli.together import take_part
from hourllava.errors import MemoryFileError

QUESTION = "Which colour was the star?"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hourllava"]


def test_two_processes_answer_as_one(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", clip, "--into", str(tmp_path), "--name", "clip", "--model", model]) == 0
    request = ["ask", str(tmp_path / "clip"), QUESTION, "--model", model, "--json", "--plot", str(tmp_path / "a.png")]
    request += ["--budget", "1/2"]
    capfd.readouterr()
    assert main(request) == 0
    alone = json.loads(capfd.readouterr().out)
    (tmp_path / "a.png").unlink()
    done = subprocess.run([sys.executable, *LAUNCH, *request], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    together = json.loads(done.stdout)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert together["answers"][0]["answer"] == alone["answers"][0]["answer"]
    assert together["answers"][0]["mass"] == pytest.approx(alone["answers"][0]["mass"], rel=1e-4, abs=1e-7)
    for key in ("seconds", "damage", "budget"):
        assert together[key] == alone[key]


def test_a_memory_file_is_not_shared(clip: str, model: str, tmp_path: Path) -> None:
    assert main(["watch", clip, "-o", str(tmp_path / "clip.memory"), "--model", model]) == 0
    with pytest.raises(MemoryFileError, match="processes cannot share it; name a video or REPOSITORY/NAME"):
        take_part(None, tmp_path / "clip.memory", False)
