# SPDX-License-Identifier: Apache-2.0
"""Watching, asking and training with a model that is not on the CPU, without a GPU: see `other_device.py`."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "other_device.py"


def test_watching_and_asking_with_a_model_on_another_device(tmp_path):
    """Wherever the memory lies, tensors of two devices never meet, answers are the CPU's, and MemAug never waits."""
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["same"]) > 10
    assert all(told["same"])
    waiting = {file for _, file in told["waits"]}
    assert "asking.py" in waiting  # a question's answer is words, which the host waits for
    assert "memaug.py" not in waiting
