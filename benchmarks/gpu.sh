#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in under ten minutes and without a network:
#
#     benchmarks/gpu.sh [FOLDER]
#
# builds the library for the torch that is there, runs the tests of the GPU's kernels (what would be skipped fails),
# looks for memory errors and races in small cases, and measures every operator beside the peers that are installed.
# FOLDER (default: benchmarks/results) gets the log of each step, the results as JSON, and the table. PYTHON names the
# interpreter (default: python3), which needs torch, triton, pytest and pytest-benchmark; what else is missing leaves out
# a step, and the summary says which. The exit code is 0 if every step that ran went well.
set -uo pipefail

refuse() {
    echo "gpu.sh: $1; $2" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[[ $# -le 1 ]] || refuse "one folder at most, got $#" "usage: benchmarks/gpu.sh [FOLDER]"
out=${1:-$root/benchmarks/results}
"$python" -c 'import torch' 2>/dev/null || refuse "$python has no torch" "name one that has: PYTHON=... benchmarks/gpu.sh"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    refuse "torch sees no GPU" "run it on a machine that has one"
# The programs of a virtual environment lie beside its interpreter, and CUDA's in a folder of theirs, on the PATH or not.
beside=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))')
PATH=${beside:+$beside:}$PATH:/usr/local/cuda/bin
missing=$("$python" -c 'from importlib.util import find_spec as find
print(*(name for name in ("triton", "pytest", "pytest_benchmark") if find(name) is None))')
[[ -z $missing ]] || refuse "$python lacks $missing" "install what is missing"
mkdir -p "$out" 2>/dev/null || refuse "$out cannot be made" "name another folder"
out=$(cd "$out" && pwd)
cd "$root" || exit 1
export PYTHONPATH=$root:$root/python${PYTHONPATH:+:$PYTHONPATH}
library=$root/hourllava_ext/_C.abi3.so

has() { "$python" -c "import $1" 2>/dev/null; }
why_not() { "$python" -c "import $1" 2>&1 | tail -n 1; }
# Whether the checker can look into this device, which in some virtual machines it cannot: a context and an allocation.
checked() {
    timeout 20 compute-sanitizer --error-exitcode 9 "$python" -c 'import ctypes
cuda, context, memory = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
failed = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or cuda.cuCtxSetCurrent(context)
raise SystemExit(bool(failed or cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(256))))'
}

summary=()
status=0
# What is left of the ten minutes, less the time that a step may take to end.
left() { echo $((575 - SECONDS)); }
# step NAME SECONDS COMMAND...: runs it, keeps its output, and goes on whatever comes of it. The interrupt, which a
# script in the background would have its programs ignore, lets pytest write down what it has when its time is up.
step() {
    local name=$1 limit=$2 begin=$SECONDS code=0 said=ok
    shift 2
    ((limit <= $(left))) || limit=$(left)
    if ((limit < 10)); then
        leave_out "$name" "no time is left"
        status=1
        return 1
    fi
    echo "== $name: at most $limit s"
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" 2>&1 | tee "$out/$name.log" || code=$?
    if ((code == 124 || code == 137)); then said="ran out of its $limit s"; elif ((code)); then said="failed ($code)"; fi
    ((code)) && status=1
    summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$said")")
    return "$code"
}
leave_out() { summary+=("$(printf '%-12s    - s  %s' "$1" "left out: $2")"); }

"$python" -c 'import platform, torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.cuda.get_device_name()}")'

# Whether the library loads, and holds CUDA kernels.
has_kernels() {
    "$python" -c 'from hourllava_ext.library import build_info as info; raise SystemExit(not info()["cuda"])' 2>/dev/null
}

# The promise of the stable ABI: a library that was built elsewhere, for another torch and Python, works here.
wanted=
if [[ -e $library ]]; then
    step carried 45 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_rope.py tests/ops/test_forget.py \
        tests/gpu/test_kernels.py::test_rope_copies_what_does_not_turn
    has_kernels && wanted=1
else
    leave_out carried "no library came along"
fi
# A build without CUDA's compiler would take the place of kernels that came along.
if [[ -n $wanted ]] && ! command -v nvcc >/dev/null; then
    leave_out build "there is no nvcc here, and the library that came along has CUDA kernels"
elif command -v cmake >/dev/null && command -v ninja >/dev/null && has setuptools; then
    step build 140 env HOURLLAVA_EXT_CUDA=$wanted "$python" setup.py build_ext --inplace
else
    leave_out build "there is no cmake, ninja or setuptools here"
fi
[[ -e $library ]] || refuse "there is no library" "install cmake, ninja and setuptools, or bring hourllava_ext/_C.abi3.so"
has_kernels ||
    leave_out c++ "the library holds no CUDA kernels, since it was built without nvcc; Triton's serve"

# From here on a test that cannot run has failed.
export FAIL_WITHOUT_CUDA=1
tests=("$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
files=(tests/gpu/test_kernels.py tests/gpu/test_attention.py tests/gpu/test_emulated.py::test_pool_beyond_32_bits)
if has hourllava.model; then
    files+=(tests/gpu/test_block.py)
else
    leave_out block "$(why_not hourllava.model)"
fi
# Most of their time Triton compiles, one kernel to a core. A process for which a kernel has broken the GPU, or that waits
# for one that does not end, is replaced.
parallel=()
if has xdist; then
    parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --max-worker-restart=100)
    has pytest_timeout && parallel+=(--timeout=60 --timeout-method=thread)
fi
step tests 150 env OMP_NUM_THREADS=1 "${tests[@]}" ${parallel[@]+"${parallel[@]}"} "${files[@]}"
if has nvidia.dali && has hourllava.model; then
    step decoder 30 "${tests[@]}" tests/video/test_dali.py -k cuda
else
    leave_out decoder "DALI is not installed, or the model's tests are left out"
fi
if ! command -v compute-sanitizer >/dev/null; then
    leave_out sanitizer "there is no compute-sanitizer here"
elif ! said=$(checked 2>&1); then
    leave_out sanitizer "it cannot look into this device: $(grep -m 1 Error <<<"$said")"
else
    # One small case of each operator, with every tensor in an allocation of its own.
    small="library and float32 and (shape0 or (retrieve and apart and both) or shared_pages)"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer 50 \
        compute-sanitizer --tool memcheck --target-processes all --error-exitcode 9 \
        "${tests[@]}" tests/gpu/test_kernels.py tests/gpu/test_attention.py -k "$small"
    # In CUDA's kernels threads wait for each other where somebody thought of it.
    has_kernels && step races 40 \
        compute-sanitizer --tool racecheck --kernel-name kns=hourllava_ext --target-processes all --error-exitcode 9 \
        "${tests[@]}" tests/gpu/test_kernels.py -k "$small"
fi
measure=("$python" -m pytest -q -p no:cacheprovider --device cuda --results "$out" --benchmark-disable-gc
    "--benchmark-columns=median,rounds" --benchmark-min-rounds=5 -rs)
step hour "$(($(left) / 2))" "${measure[@]}" --benchmark-max-time=0.3 benchmarks/ops/paged_attention.py -k bench_hour
step operators "$(left)" "${measure[@]}" --benchmark-max-time=0.1 benchmarks/ops/*.py -k "not bench_hour"

printf '%s\n' "" "step         time     result" "${summary[@]}" "results and logs: $out" | tee "$out/summary.txt"
exit $status
