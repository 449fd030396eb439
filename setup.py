# SPDX-License-Identifier: Apache-2.0
"""Builds hourllava_ext/_C.abi3.so with CMake and ninja; everything else about the package is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


OLDEST_NVCC = (12, 8)  # the first that knows sm_100 and sm_120


def cuda_compiler() -> str | None:
    """The nvcc to build the CUDA kernels with, if they are to be built.

    They are where there is an nvcc; HOURLLAVA_EXT_CUDA=0 leaves them out, and with HOURLLAVA_EXT_CUDA=1 a build without
    them is an error.
    """
    wanted = os.environ.get("HOURLLAVA_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"hourllava_ext: HOURLLAVA_EXT_CUDA is {wanted!r}; set it to 0 or 1, or not at all")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    problem = "" if nvcc else "there is no nvcc on PATH"
    if nvcc and wanted != "0":
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = tuple(int(n) for n in re.findall(r"release (\d+)\.(\d+)", told)[0])
        if release < OLDEST_NVCC:
            problem = f"{nvcc} is of CUDA {release[0]}.{release[1]}, older than {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
    if problem and wanted == "1":
        sys.exit(f"hourllava_ext: HOURLLAVA_EXT_CUDA=1, but {problem}; install the CUDA toolkit, or unset it")
    if problem and wanted == "":
        print(f"hourllava_ext: building without the CUDA kernels: {problem}", flush=True)
    return None if problem or wanted == "0" else nvcc


class CMakeBuild(build_ext):
    """One CMake build in the persistent folder build/cmake, so that a second install compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / "cmake"
        settings = {
            "TORCH_ROOT": Path(torch.__file__).parent,
            # Said anew each time: the ninja of an isolated build lives in a folder that is gone the next time.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        }
        nvcc = cuda_compiler()
        settings |= {"HOURLLAVA_EXT_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc} if nvcc else {"HOURLLAVA_EXT_CUDA": "OFF"}
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / library.name, library)


setup(
    ext_modules=[Extension("hourllava_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
