#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one command without network: build, op tests, memory checks, benches, a table.
#
#   bench/gpu_check.sh              as many stages as fit in 9 minutes; the same command again goes on with the next
#   bench/gpu_check.sh --dry-run    without a GPU: the plan with every command, and all of it that a CPU can check
#
# Needs a Python with torch (CUDA) and triton, nvcc of the same CUDA major version, and compute-sanitizer.
#   PYTHON            interpreter (default python3)
#   OUT               folder of logs and figures (default ./gpu_check_out)
#   RESUME_FROM       folder of an earlier command, where OUT starts empty: copied into it first
#   SKIP_<STAGE>=1    leaves out a stage; --dry-run names them
#   FORCE=1           runs finished stages again
#   BUDGET            seconds for the whole command (default 540)
#   JOBS              test processes that share the GPU, where pytest-xdist is installed (default 8)
# A stage is finished once it passed in $OUT on these sources; $OUT/<stage>.done says so. A stage that fails does not
# keep the next ones from running, except the build. Status 1: a stage failed or ran past its own limit; 2: none failed,
# but the budget left some for another command. The logs of the stages are in $OUT.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-./gpu_check_out}
BUDGET=${BUDGET:-540}
# Most seconds of each stage, so that one that hangs leaves time for the others; in the order they run. Guesses but for
# the sum: on an H200 the first run, of one family of kernels, took 276 s without the sanitizer and about 114 s with it.
STAGES=(BUILD:180 TESTS:150 TESTS_TRITON:200 PROPERTIES:150 CONTRACT:150 SANITIZE:200 BENCH_FAKE_QUANT:120
  BENCH_BN_STATS:120 BENCH_CENTROIDS:120 OFFLINE:300)
# Shorter pieces of the budget are left alone: importing torch alone takes seconds.
LEAST=10
KERNEL_CASES=(tests/kernel_cases.py tests/kernel_mask_cases.py tests/statistics_kernel_cases.py
  tests/alignment_kernel_cases.py tests/centroid_kernel_cases.py)
CUDA_CASES=(tests/statistics_cuda_cases.py tests/centroid_cuda_cases.py)
GPU_CASES=(tests/gpu_cases.py tests/gpu_statistics_cases.py tests/gpu_centroid_cases.py)
CONTRACT_CASES=(tests/gpu_contract_cases.py)
SMALL_CASES="(values_and_gradients or mask_and_its_backward or finite_range or weights_together or errors_of_candidates \
or copies_across_tiles or test_sums or codes_and_back) and (dtype0 or dtype1) or many_programs or several_tiles or \
packing or without_a_slope or many_classes or empty_dimensions or every_option or rows_with_strides"
PYTEST=(-m pytest -q -p no:cacheprovider --import-mode=importlib)

# Runs a command, or only shows it: PLAN is the file descriptor of the plan.
run() {
  if [[ -n ${PLAN:-} ]]; then
    printf '    ' >&"$PLAN"
    printf '%q ' "$@" >&"$PLAN"
    printf '\n' >&"$PLAN"
  else
    "$@"
  fi
}

# The kernels that $1 (`auto`: CUDA C++) chooses, on the GPU.
on_gpu() { run env CLUSTERQ_TEST_DEVICE=cuda CLUSTERQ_BACKEND="$1" "$PYTHON" "${PYTEST[@]}" "${@:2}"; }

xdist() {
  # Most of the time of the small cases goes to compiling Triton kernels.
  parallel=()
  if "$PYTHON" -c "import xdist" 2>/dev/null; then parallel=(-n "${JOBS:-8}"); fi
}

stage_build() {
  export TORCH_CUDA_ARCH_LIST
  if [[ -z ${PLAN:-} ]]; then
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
      'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
  fi
  run env CLUSTERQ_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
  run "$PYTHON" bench/gpu_ready.py
}

stage_tests() {
  local parallel
  xdist
  on_gpu auto "${parallel[@]}" "${KERNEL_CASES[@]}" "${CUDA_CASES[@]}"
}

stage_tests_triton() {
  local parallel
  xdist
  on_gpu triton "${parallel[@]}" "${KERNEL_CASES[@]}"
}

on_both_providers() {
  local backend status=0
  for backend in auto triton; do on_gpu "$backend" "$@" || status=1; done
  return $status
}

# Streams, captured graphs, waits, repeats, 2^31 elements: one process, for it needs the memory of the card.
stage_properties() { on_both_providers "${GPU_CASES[@]}"; }

# opcheck of every op, and every public function compiled whole.
stage_contract() {
  local parallel
  xdist
  on_both_providers "${parallel[@]}" "${CONTRACT_CASES[@]}"
}

stage_offline() { run "$PYTHON" "${PYTEST[@]}" tests/test_cuda_build.py tests/test_*kernels_offline.py; }

stage_bench_fake_quant() { bench fake_quant; }
stage_bench_bn_stats() { bench bn_stats; }
stage_bench_centroids() { bench centroids; }
bench() { run "$PYTHON" "bench/gpu_$1.py" --json "${OUT}/$1.json"; }

find_sanitizer() {
  local candidate
  for candidate in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"; do
    if [[ -n $candidate && -x $candidate ]]; then
      echo "$candidate"
      return
    fi
  done
  if [[ -n ${PLAN:-} ]]; then
    echo compute-sanitizer
    return
  fi
  echo "compute-sanitizer was not found; SKIP_SANITIZE=1 leaves this stage out" >&2
  return 1
}

# Check of the sanitizer -> what it has to say of the canary that is wrong in that way.
declare -A CAUGHT=([memcheck]="Invalid __global__ write" [racecheck]="Race reported|hazard" \
  [initcheck]="Uninitialized __global__ memory read")

# A checker that reports nothing may check nothing.
canary() {
  local tool=$1 check=$2 log="${OUT}/canary.$2.log" status=0
  if [[ -n ${PLAN:-} ]]; then
    run "$tool" --tool "$check" --error-exitcode 9 "${OUT}/canary" "$check"
    return
  fi
  "$tool" --tool "$check" --error-exitcode 9 "${OUT}/canary" "$check" >"$log" 2>&1 || status=$?
  if ((status != 9)) || ! grep -qE "${CAUGHT[$check]}" "$log"; then
    cat "$log"
    echo "${check} did not report its canary (status ${status})" >&2
    return 1
  fi
  echo "${check}: canary reported"
}

stage_sanitize() {
  local tool nvcc check backend status=0 job jobs=() logs=${OUT}
  tool=$(find_sanitizer)
  nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
  # For this card: code for another one would be translated while it runs.
  run "$nvcc" -arch=native -lineinfo -o "${OUT}/canary" tests/gpu_canary.cu
  for check in memcheck racecheck initcheck; do canary "$tool" "$check"; done
  # Each tensor in an allocation of its own, so that an access past its end is an access outside any allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 CLUSTERQ_TEST_DEVICE=cuda
  # At once: each spends most of its time on one CPU core.
  for backend in auto triton; do
    for check in memcheck racecheck initcheck; do
      job="sanitize.${backend}.${check}"
      if [[ -n ${PLAN:-} ]]; then
        run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 CLUSTERQ_TEST_DEVICE=cuda CLUSTERQ_BACKEND=$backend \
          "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" "${PYTEST[@]}" "${KERNEL_CASES[@]}" -k "$SMALL_CASES"
        continue
      fi
      CLUSTERQ_BACKEND=$backend "$tool" --tool "$check" --error-exitcode 9 "$PYTHON" "${PYTEST[@]}" \
        "${KERNEL_CASES[@]}" -k "$SMALL_CASES" >"${logs}/${job}.log" 2>&1 &
      jobs+=("$!:${job}")
    done
  done
  for job in "${jobs[@]}"; do
    wait "${job%%:*}" || { status=1; echo "-- ${job#*:} failed"; tail -n 20 "${logs}/${job#*:}.log"; }
    tail -n 1 "${logs}/${job#*:}.log"
  done
  return $status
}

lower() { tr '[:upper:]' '[:lower:]' <<<"$1"; }

# What the stages run: a stage that passed on other sources says nothing of these.
sources() {
  find bench clusterq csrc kernels tests -type f \( -name '*.py' -o -name '*.sh' -o -name '*.c*' -o -name '*.h' \) \
    -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1
}

finished() {
  local name=$1 mark
  mark="${OUT}/$(lower "$name").done"
  [[ ${FORCE:-0} != 1 && -f $mark && $(cat "$mark") == "$SOURCES" ]] || return 1
  # A folder of results may be on another machine than the build was.
  [[ $name != BUILD ]] || "$PYTHON" bench/gpu_ready.py >/dev/null 2>&1
}

stage() {
  local name=$1 limit=$2 skip="SKIP_$1" log left status=0 start=$SECONDS
  if [[ ${!skip:-0} == 1 ]]; then
    echo "== ${name}: left out by ${skip}=1"
    return
  fi
  if finished "$name"; then
    echo "== ${name}: finished before"
    return
  fi
  left=$((BUDGET - SECONDS))
  if ((left < LEAST)); then
    echo "== ${name}: left for the next command"
    unfinished+=("$name")
    return
  fi
  log="${OUT}/$(lower "$name").log"
  echo "== ${name} (log: ${log})"
  # A process group of its own, all of which `timeout` ends.
  timeout --kill-after=5 "$((left < limit ? left : limit))" bash bench/gpu_check.sh --stage "$name" \
    >"$log" 2>&1 || status=$?
  tail -n 3 "$log"
  if ((status == 0)); then
    echo "$SOURCES" >"${OUT}/$(lower "$name").done"
    echo "== ${name}: $((SECONDS - start)) s"
  elif ((status == 124 || status == 137)) && ((left < limit)); then
    echo "== ${name}: cut off by the budget, left for the next command" >&2
    unfinished+=("$name")
  else
    ((status != 124 && status != 137)) || echo "== ${name}: ended after its ${limit} s" >&2
    tail -n 40 "$log"
    echo "== ${name} failed" >&2
    failed+=("$name")
  fi
}

dry_run() {
  local entry name status=0 suite file
  exec 3>&1
  for entry in "${STAGES[@]}"; do
    name=${entry%%:*}
    echo "== ${name}: at most ${entry#*:} s of ${BUDGET}; SKIP_${name}=1 leaves it out"
    PLAN=3 bash bench/gpu_check.sh --stage "$name"
  done
  echo "== TABLE"
  PLAN=3 run "$PYTHON" bench/gpu_table.py "$OUT"
  # What a CPU can tell of it.
  check_here "bash -n" bash -n bench/gpu_check.sh
  export CLUSTERQ_TEST_DEVICE=cpu
  check_here "cases" "$PYTHON" "${PYTEST[@]}" --collect-only "${KERNEL_CASES[@]}" "${CUDA_CASES[@]}" \
    "${GPU_CASES[@]}" "${CONTRACT_CASES[@]}"
  # A name that is gone from the expression would leave its cases out silently.
  for name in $(grep -oE '[a-z_]{6,}' <<<"$SMALL_CASES"); do
    check_here "cases of ${name}" grep -q "$name" "${KERNEL_CASES[@]}"
  done
  check_here "small cases" "$PYTHON" "${PYTEST[@]}" --collect-only "${KERNEL_CASES[@]}" -k "$SMALL_CASES"
  for suite in fake_quant bn_stats centroids; do
    check_here "bench ${suite}" "$PYTHON" "bench/gpu_${suite}.py" --plan
  done
  echo "== kernels: compiled and run on the CPU by 'make test' (test_cuda_build, test_*_cuda_code, test_*kernels_offline,"
  echo "   test_cuda_emulation, test_kernels_interpret); not here. Nothing above ran on a GPU."
  return $status
}

# Shows the last line of a check; all of it where it failed.
check_here() {
  local what=$1 text
  shift
  if text=$("$@" 2>&1); then
    echo "ok ${what}: $(tail -n 1 <<<"$text")"
  else
    echo "$text"
    echo "FAILED ${what}"
    status=1
  fi
}

case ${1:-} in
  --dry-run) dry_run; exit ;;
  --stage) "stage_$(lower "$2")"; exit ;;
  "") ;;
  *) echo "usage: bench/gpu_check.sh [--dry-run]" >&2; exit 64 ;;
esac

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [[ -n ${RESUME_FROM:-} ]]; then
  cp -r "$RESUME_FROM/." "$OUT"
  # Results that come back from another machine may be read-only.
  chmod -R u+w "$OUT"
fi
SOURCES=$(sources)
export OUT PYTHON
failed=() unfinished=()
for entry in "${STAGES[@]}"; do
  stage "${entry%%:*}" "${entry#*:}"
  # Nothing below can run without it.
  if [[ ${entry%%:*} == BUILD ]] && ((${#failed[@]} + ${#unfinished[@]})); then break; fi
done
echo "== TABLE"
"$PYTHON" bench/gpu_table.py "$OUT" | tee "${OUT}/table.txt" || echo "== no figures to show"
echo "== done in ${SECONDS} s, results in ${OUT}${failed[*]:+; failed: ${failed[*]}}${unfinished[*]:+; left: ${unfinished[*]}}"
if ((${#failed[@]})); then exit 1; fi
if ((${#unfinished[@]})); then exit 2; fi
