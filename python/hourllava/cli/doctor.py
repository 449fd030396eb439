# SPDX-License-Identifier: Apache-2.0
"""`hourllava doctor`: what is installed, which kernels are live, what is missing and how to get it."""

import importlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

REINSTALL = "pip install --no-build-isolation . in the repository"
DEVICES = ("CPU", "CUDA")
EXTRAS = {"serve": "serving", "train": "training", "evaluate": "benchmarks"}  # and what they are for
OLDEST_GPU = (8, 0)  # NVIDIA's compute capability that the kernels are compiled for


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    detail: str | None  # what was found, None if nothing was
    todo: str = ""  # how to get it
    needed: bool = True  # without it the core does not work


def doctor() -> bool:
    """Print every finding and return whether the core works: everything but the optional is there."""
    sections = {
        "core": [Finding("Python", platform.python_version()), *_packages()],
        "operators": _operators(),
        "video and model": [*_codecs(), *_decoder(), _preset()],
        "optional": _optional(),
    }
    for title, findings in sections.items():
        print(f"{title}")
        for finding in findings:
            mark = "ok" if finding.detail is not None else "MISSING" if finding.needed else "no"
            todo = "" if finding.detail is not None else f"get it: {finding.todo}"
            print(f"  {mark:8}{finding.name:18}{finding.detail or todo}")
    works = all(f.detail is not None or not f.needed for found in sections.values() for f in found)
    print("the core works" if works else "the core does not work: see MISSING above")
    return works


def _packages() -> list[Finding]:
    names = ("torch", "transformers", "safetensors", "av", "numpy", "matplotlib", "rich", "tqdm")
    return [
        Finding("hourllava", _version("hourllava"), REINSTALL),
        *(Finding(n, _version(n), f"pip install {n}") for n in names),
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _operators() -> list[Finding]:
    try:
        import torch

        from hourllava_ext import __all__ as operators
        from hourllava_ext.library import build_info
    except (ImportError, OSError, RuntimeError) as error:  # the last: a library of another version
        return [Finding("hourllava_ext", None, f"{REINSTALL} ({' '.join(str(error).split())})")]
    info = build_info()
    known = set(torch._C._dispatch_get_all_op_names())
    live = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {operator: f"hourllava_ext::{operator}" for operator in operators}
    kernels = {d: [o for o, name in names.items() if name in known and live(name, d)] for d in DEVICES}
    dead = sorted(set(operators) - set(kernels["CPU"]))
    return [
        Finding("library", info["library"]),
        Finding("stable ABI", f"of torch {info['torch_abi']} and later; running on torch {info['torch']}"),
        Finding(
            "CPU kernels", None if dead else f"{', '.join(operators)}; instruction set {info['cpu_tier']}", REINSTALL
        ),
        _cuda_kernels(info["cuda"], kernels["CUDA"]),
    ]


def _cuda_kernels(built: bool, live: list[str]) -> Finding:
    """Which operators run on a GPU, and whose kernels they have; none of a torch that knows no GPU."""
    import torch

    todo = "a torch built for CUDA or ROCm, and its triton; where nvcc is, pip install builds the C++ kernels too"
    if torch.version.cuda is None and torch.version.hip is None:  # what the library was built with has no use then
        return Finding("CUDA kernels", None, todo, needed=False)
    who = "C++ where written, else Triton" if built else "Triton"
    return Finding("CUDA kernels", f"{', '.join(live)} ({who})" if live else None, todo, needed=False)


def _codecs() -> list[Finding]:
    try:
        import av
    except ImportError:
        return []  # said above
    ffmpeg = f"FFmpeg {av.ffmpeg_version_info}"
    found = {codec: ffmpeg if codec in av.codecs_available else None for codec in ("h264", "libx264")}
    todo = "pip install --force-reinstall av"
    return [
        Finding("H.264 decoder", found["h264"], todo),
        Finding("H.264 encoder", found["libx264"], f"{todo}; only rendering films needs it", needed=False),
    ]


def _decoder() -> list[Finding]:
    """The decoder of videos that a model on the best device here would get."""
    try:
        import torch

        from hourllava.video import choose_decoder
    except (ImportError, OSError):
        return []  # said above
    choice = choose_decoder("cuda" if torch.cuda.is_available() else "cpu")
    return [Finding("video decoder", f"{choice.name} ({choice.why})")]


def _preset() -> Finding:
    try:
        from hourllava.model.loading import PRESETS
    except (ImportError, OSError, RuntimeError):
        return Finding("preset tiny", None, REINSTALL)
    weights = PRESETS / "tiny" / "model.safetensors"
    detail = f"{weights.parent}, {weights.stat().st_size / 1e6:.1f} MB" if weights.is_file() else None
    return Finding("preset tiny", detail, f"{REINSTALL}, or train it: hourllava train tiny", needed=False)


def _optional() -> list[Finding]:
    nvcc = shutil.which("nvcc")
    release = None
    if nvcc:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = next((line.strip() for line in said.splitlines() if "release" in line), nvcc)
    wanted = {
        "nvidia-dali": ("nvidia-dali-cuda130", "pip install 'hourllava[dali]' (decodes video on NVIDIA GPUs)"),
        "flash-attn": ("flash-attn", "pip install 'hourllava[flash]' (attention of the decoder on NVIDIA GPUs)"),
        "triton": ("triton", "comes with torch for CUDA; pip install triton (kernels for other GPUs)"),
    }
    packages = [Finding(name, _version(package), todo, needed=False) for name, (package, todo) in wanted.items()]
    return [
        *(_extra(name, use) for name, use in EXTRAS.items()),
        *packages,
        Finding("nvcc", release, "the CUDA toolkit from developer.nvidia.com (compiles CUDA kernels)", needed=False),
        _cuda_device(),
    ]


def _extra(name: str, use: str) -> Finding:
    """Whether every package of an extra of ours is there."""
    try:
        ours = [Requirement(line) for line in requires("hourllava") or []]
    except PackageNotFoundError:
        ours = []
    needs = [need.name for need in ours if need.marker and need.marker.evaluate({"extra": name})]
    versions = [_version(package) for package in needs]
    there = ", ".join(f"{package} {version}" for package, version in zip(needs, versions, strict=True))
    return Finding(use, there if needs and all(versions) else None, f"pip install 'hourllava[{name}]'", needed=False)


def _cuda_device() -> Finding:
    todo = "an NVIDIA GPU with its driver and a torch built for CUDA (pytorch.org)"
    missing = Finding("CUDA device", None, todo, needed=False)
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return missing
    if not torch.cuda.is_available():
        return missing
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < OLDEST_GPU:
        oldest, own = (".".join(map(str, version)) for version in (OLDEST_GPU, capability))
        todo = f"a GPU of compute capability {oldest} or newer; {name} has {own}"
        return Finding("CUDA device", None, todo, needed=False)
    return Finding("CUDA device", f"{name}, CUDA {torch.version.cuda}")
