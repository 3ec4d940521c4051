#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one command without network: build, op tests, memory checks, benches.
#
#   bench/gpu_check.sh
#
# Needs a Python with torch (CUDA) and triton, nvcc of the same CUDA major version, and compute-sanitizer.
#   PYTHON            interpreter (default python3)
#   OUT               folder of logs and figures (default ./gpu_check_out)
#   SKIP_<STAGE>=1    leaves out a stage: BUILD, TESTS, BENCH, SANITIZE, OFFLINE
#   SUITES            benches to run (default "fake_quant bn_stats centroids")
#   JOBS              test processes that share the GPU, where pytest-xdist is installed (default 8)
# A stage that fails does not keep the next ones from running, except the build; the status is then 1. The logs of the
# stages are in $OUT.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-./gpu_check_out}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
failed=()

stage() {
  local name=$1
  shift
  local skip="SKIP_${name}"
  if [[ ${!skip:-0} == 1 ]]; then
    echo "== ${name}: left out by ${skip}=1"
    return
  fi
  local log
  log="${OUT}/$(echo "$name" | tr '[:upper:]' '[:lower:]').log"
  echo "== ${name} (log: ${log})"
  # Not `if ! "$@"`: there set -e would not hold inside the stage.
  ("$@") >"$log" 2>&1 &
  if ! wait $!; then
    tail -n 40 "$log"
    echo "== ${name} failed" >&2
    failed+=("$name")
    return
  fi
  tail -n 3 "$log"
}

check_machine() {
  "$PYTHON" - <<'PY'
import torch

assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY
}

build() {
  check_machine
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  export TORCH_CUDA_ARCH_LIST
  CLUSTERQ_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
  "$PYTHON" - <<'PY'
import clusterq.ops

for row in clusterq.ops.backends():
    if row.device == "cuda":
        print(row.op, row.kernel, row.missing)
assert any(row.kernel == "cuda" for row in clusterq.ops.backends()), "the CUDA library is not in use"
PY
}

pytest() {
  "$PYTHON" -m pytest -q -p no:cacheprovider --import-mode=importlib "$@"
}

tests() {
  export CLUSTERQ_TEST_DEVICE=cuda
  local parallel=() backend status=0
  # Most of the time goes to compiling Triton kernels.
  if "$PYTHON" -c "import xdist" 2>/dev/null; then parallel=(-n "${JOBS:-8}"); fi
  for backend in auto triton; do
    echo "-- ${backend}"
    CLUSTERQ_BACKEND=$backend pytest "${parallel[@]}" tests/kernel_cases.py tests/kernel_mask_cases.py \
      tests/statistics_kernel_cases.py tests/alignment_kernel_cases.py tests/centroid_kernel_cases.py || status=1
    CLUSTERQ_BACKEND=$backend pytest tests/gpu_cases.py tests/gpu_statistics_cases.py tests/gpu_centroid_cases.py \
      || status=1
  done
  # Ways that only the CUDA C++ kernels take.
  pytest "${parallel[@]}" tests/statistics_cuda_cases.py tests/centroid_cuda_cases.py || status=1
  return $status
}

offline() {
  CLUSTERQ_TEST_DEVICE=cpu pytest tests/test_cuda_build.py tests/test_*kernels_offline.py
}

find_sanitizer() {
  local candidate
  for candidate in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"; do
    if [[ -n $candidate && -x $candidate ]]; then
      echo "$candidate"
      return
    fi
  done
  echo "compute-sanitizer was not found; SKIP_SANITIZE=1 leaves this stage out" >&2
  return 1
}

sanitize() {
  local tool
  tool=$(find_sanitizer)
  # Each tensor in an allocation of its own, so that an access past its end is an access outside any allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 CLUSTERQ_TEST_DEVICE=cuda
  # A checker that reports nothing may check nothing: this kernel writes past the end and must be caught.
  cat >"${OUT}/canary.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def write_past_the_end(x_ptr):
    tl.store(x_ptr + (1 << 22), 1.0)


x = torch.zeros(16, device="cuda")
write_past_the_end[(1,)](x)
torch.cuda.synchronize()
PY
  if "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" "${OUT}/canary.py" >"${OUT}/canary.log" 2>&1; then
    echo "compute-sanitizer did not report the canary" >&2
    return 1
  fi
  grep -q "Invalid __global__ write" "${OUT}/canary.log"
  echo "canary reported"
  local backend check run status=0 runs=() logs
  logs=$(mktemp -d)
  # At once: each spends most of its time on one CPU core.
  for backend in auto triton; do
    for check in memcheck racecheck; do
      CLUSTERQ_BACKEND=$backend "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider \
        --import-mode=importlib tests/kernel_cases.py tests/kernel_mask_cases.py tests/statistics_kernel_cases.py \
        tests/alignment_kernel_cases.py tests/centroid_kernel_cases.py \
        -k "(values_and_gradients or mask_and_its_backward or finite_range or weights_together or errors_of_candidates or copies_across_tiles or test_sums \
            or codes_and_back) and (dtype0 or dtype1) or many_programs or several_tiles or packing \
            or without_a_slope or many_classes or empty_dimensions or every_option or rows_with_strides" \
        >"${logs}/${backend}.${check}" 2>&1 &
      runs+=("$!:${backend}.${check}")
    done
  done
  for run in "${runs[@]}"; do
    wait "${run%%:*}" || status=1
    echo "-- ${run#*:}"
    cat "${logs}/${run#*:}"
  done
  rm -r "$logs"
  return $status
}

bench() {
  local suite status=0
  for suite in ${SUITES:-fake_quant bn_stats centroids}; do
    "$PYTHON" "bench/gpu_${suite}.py" --json "${OUT}/${suite}.json" || status=1
  done
  return $status
}

stage BUILD build
if ((${#failed[@]})); then exit 1; fi
stage TESTS tests
stage BENCH bench
stage SANITIZE sanitize
stage OFFLINE offline
echo "== done, results in ${OUT}${failed[*]:+; failed: ${failed[*]}}"
((${#failed[@]} == 0))
