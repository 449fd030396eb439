# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels compile for GPUs that are not here; Triton's fit into their shared memory."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from hourllava_ext import library

ROOT = Path(__file__).resolve().parents[2]
# Shared memory that one program may have, in bytes, by target.
SHARED = {
    "cuda:80:32": 166912,
    "cuda:90:32": 232448,
    "cuda:100:32": 232448,
    "cuda:120:32": 101376,
    "hip:gfx942:64": 65536,
}
# In float32 no kernel is for tensor cores: of NVIDIA's GPUs, that with the least shared memory stands for all.
CASES = [(target, "bfloat16") for target in SHARED] + [("cuda:120:32", "float32")]


@pytest.mark.skipif(find_spec("triton") is None, reason="NO TRITON: its kernels are NOT COMPILED; pip install triton")
@pytest.mark.parametrize(("target", "dtype"), CASES)
def test_triton(target: str, dtype: str) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), target, dtype]
    done = subprocess.run(script, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({c["kernel"] for c in compiled}) == 23
    assert [c for c in compiled if c["shared"] > SHARED[target]] == []
    assert all(c["bytes"] > 0 for c in compiled)
    # The interpreter divides and takes roots to the last bit; instructions that do not would miss the error rule.
    assert [c for c in compiled if c["rough"]] == []
    if dtype == "bfloat16" and target in ("cuda:90:32", "hip:gfx942:64"):
        attention = {"_attend", "_mass", "_page_gradients", "_query_gradients"}
        assert {c["kernel"].split(".")[-1] for c in compiled if c["tensor_cores"]} >= attention


NVCC = shutil.which("nvcc")
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a", "sm_120"]


def compile_for_all(source: Path, folder: Path) -> Path:
    """An object file; nvcc alone, without a header of torch, is all that a kernel needs."""
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}", *targets, "--threads=2"]
    built = folder / f"{source.stem}.o"
    ptx = "-gencode=arch=compute_80,code=compute_80"
    command = [str(NVCC), *flags, ptx, "-c", str(source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return built


def cuobjdump(option: str, objects: list[Path]) -> str:
    program = next(f.locate() for f in files("nvidia-cuda-cuobjdump") or [] if f.name == "cuobjdump")
    return "".join(subprocess.check_output([str(program), option, str(o)], text=True) for o in objects)


def test_cuda(tmp_path: Path) -> None:
    """Every CUDA kernel is machine code for every architecture: in the library, or else compiled here."""
    info = library.build_info()
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if not info["cuda"] and NVCC is None:
        pytest.skip("NO NVCC: the CUDA kernels are NOT COMPILED; install the CUDA toolkit")
    objects = [Path(info["library"])] if info["cuda"] else [compile_for_all(s, tmp_path) for s in sources]
    # One line a source and architecture, such as "ELF file    1: rope.1.sm_80.cubin".
    machine_code = Counter(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf", objects)))
    assert machine_code == {a: len(sources) for a in ARCHITECTURES}

    entries = cuobjdump("-ptx", objects).split(".entry ")[1:]
    kernels = dict(re.match(r"(\w+)\((.*)", entry, re.DOTALL).groups() for entry in entries)
    assert [s.stem for s in sources if not any(f"_{s.stem}_cu_" in name for name in kernels)] == []
    # Those for rows of whole vectors have the number of elements in their names: 4 floats, or 8 halves.
    vectors = {name: body for name, body in kernels.items() if re.search(r"Li[48]E", name)}
    assert vectors
    assert [name for name, body in vectors.items() if not re.search(r"(ld|st)\.global(\.nc)?\.v4", body)] == []
