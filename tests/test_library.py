# SPDX-License-Identifier: Apache-2.0
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hourllava_ext import library

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()


def test_build_info() -> None:
    info = library.build_info()
    assert Path(info["library"]).name == "_C.abi3.so"
    assert Path(info["library"]).exists()
    assert info["torch"] == torch.__version__
    assert info["torch_abi"] == "2.10"
    assert info["cpu_tier"] in ("avx512_bf16", "avx512", "avx2", "portable")
    assert info["cuda"] is (b".nv_fatbin" in Path(info["library"]).read_bytes())


@pytest.mark.skipif(not CPU_FLAGS, reason="no CPU flags to compare with")
def test_cpu_tier_is_the_best_of_the_machine() -> None:
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= CPU_FLAGS:
        expected = "avx512_bf16" if "avx512_bf16" in CPU_FLAGS else "avx512"
    else:
        expected = "avx2" if {"avx2", "fma", "bmi2", "f16c"} <= CPU_FLAGS else "portable"
    assert library.build_info()["cpu_tier"] == expected


def test_missing_binary_says_what_to_do(tmp_path: Path) -> None:
    shutil.copy(library.__file__, tmp_path / "library.py")
    done = subprocess.run([sys.executable, "-c", "import library"], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: hourllava_ext: ")
    assert "run `pip install -e . --no-build-isolation`" in last
