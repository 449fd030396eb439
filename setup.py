# SPDX-License-Identifier: Apache-2.0
"""Builds hourllava_ext/_C.abi3.so with CMake and ninja; everything else about the package is in pyproject.toml."""

import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake build in the persistent folder build/cmake, so that a second install compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / "cmake"
        settings = {
            "TORCH_ROOT": Path(torch.__file__).parent,
            # Said anew each time: the ninja of an isolated build lives in a folder that is gone the next time.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        }
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
