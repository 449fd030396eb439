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


def test_the_contracts_compile_against_the_installed_torch(tmp_path: Path) -> None:
    """With CUDA, too, whose stream is asked of torch: `pip install` builds for whichever torch is there."""
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    sources = sorted([csrc / "gpu.cpp", *csrc.glob("ops/*.cpp")])
    together = tmp_path / "contracts.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    include = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-fsyntax-only", "-w", "-DHOURLLAVA_EXT_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = ["c++", *options, f"-I{csrc}", f"-I{include}", str(together)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


def test_missing_binary_says_what_to_do(tmp_path: Path) -> None:
    shutil.copy(library.__file__, tmp_path / "library.py")
    done = subprocess.run([sys.executable, "-c", "import library"], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: hourllava_ext: ")
    assert "run `pip install -e . --no-build-isolation`" in last


def test_the_source_folder_uses_the_installed_library(tmp_path: Path) -> None:
    """Python, started there, finds the package's sources before the installed package, which holds the library."""
    source, installed = (tmp_path / name / "hourllava_ext" for name in ("source", "installed"))
    for folder in (source, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        shutil.copy(library.__file__, folder / "library.py")
    shutil.copy(library.LIBRARY, installed)
    told = "from hourllava_ext import library; print(library.__file__, library.build_info()['library'], sep='\\n')"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(1, {str(installed.parent)!r}); {told}"]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [str(source / "library.py"), str(installed / library.LIBRARY.name)], done.stderr


@pytest.mark.parametrize(
    ("switch", "release", "told"),
    [
        ("1", None, "HOURLLAVA_EXT_CUDA=1, but there is no nvcc on PATH; install the CUDA toolkit, or unset it"),
        ("1", "11.8", "is of CUDA 11.8, older than 12.8; install the CUDA toolkit, or unset it"),
        ("yes", None, "HOURLLAVA_EXT_CUDA is 'yes'; set it to 0 or 1, or not at all"),
    ],
)
def test_build_without_the_nvcc_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str, release: str | None, told: str
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho release {release}")
    nvcc.chmod(0o755)
    monkeypatch.setenv("HOURLLAVA_EXT_CUDA", switch)
    found = None if release is None else str(nvcc)
    program = f"""
import runpy, shutil, sys
shutil.which = lambda name: {found!r}
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hourllava_ext: ")
    assert last.endswith(told)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("**/*.so")) == []
