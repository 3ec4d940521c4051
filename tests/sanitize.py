"""The op suite with every kernel under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Builds the CPU library with `SANITIZE=1` in a copy of this checkout, so that the library in use stays as it is; has ops
that are wrong on purpose caught (`sanitizer_canary.cpp`), since a lane that catches nothing looks like one that finds
nothing; then runs the tests, on memory filled with NaN, so that what a kernel forgets to write shows too.

    python tests/sanitize.py [--jobs 2] [arguments of pytest in place of the lane's own selection]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
FOLDERS = ("clusterq", "csrc", "kernels", "tests")
FILES = ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE")
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")

# Kernels of every family against independent truth, in every dtype and layout. The cases of the GPU kernels for
# centroids are not among them: where those skip a wrong index, the CPU raises.
TESTS = [
    *("kernel_cases.py", "kernel_mask_cases.py", "statistics_kernel_cases.py", "alignment_kernel_cases.py"),
    *("test_fake_quant.py", "test_fake_quant_arguments.py", "test_fake_quant_ranges.py", "test_packing.py"),
    *("test_bn_stats.py", "test_centroids.py", "test_centroids_average.py", "test_centroids_search.py"),
    *("test_op_functions.py", "test_cuda_indexing.py"),
]
# What is compiled by torch, needs gigabytes or starts many processes, and questions to which backend serves an op, are
# for `make test`; `move_centroids` in a file of GPU cases compares bits that only those promise.
LEFT_OUT = "compile or inductor or 31_elements or every_level or processes or serves or move_centroids"

# What is called, and what has to be in the report.
CANARIES = {
    "op.element(torch.ones(5), 5)": ("AddressSanitizer: heap-buffer-overflow", "sanitizer_canary.cpp"),
    "op.integer(torch.full((1,), torch.inf))": ("outside the range of representable values", "sanitizer_canary.cpp"),
}
# The same ops used rightly; on filled memory, what was not written is NaN.
CONTROL = """
assert op.element(torch.ones(5), 4).item() == 1 and op.integer(torch.ones(3)).item() == 1
torch.use_deterministic_algorithms(True)
assert op.unwritten(torch.ones(1000)).isnan().all()
"""


def copy_checkout() -> None:
    """Modification times are kept, so that only what has changed is compiled again."""
    for name in FOLDERS:
        shutil.rmtree(COPY / name, ignore_errors=True)
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, COPY / name, ignore=ignored)
    for name in FILES:
        shutil.copy2(ROOT / name, COPY / name)


def build(jobs: int) -> None:
    environment = {"SANITIZE": "1", "CLUSTERQ_EXT": "1", "CLUSTERQ_CUDA": "0", "CXX": "g++", "MAX_JOBS": str(jobs)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=COPY, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: the library does not build\n{(done.stdout + done.stderr)[-6000:]}")


def sanitized_environment() -> dict[str, str]:
    """Of a process in which the sanitizers come first, as they must where the program itself is built without them."""
    named = [["g++", f"-print-file-name={name}"] for name in LIBRARIES]
    paths = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in named]
    absent = [path for path in paths if not Path(path).is_absolute()]
    if absent:
        raise SystemExit(f"sanitize: g++ has no {' and no '.join(absent)}")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        # The interpreter frees little of its own at exit: that is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python's own allocator hands out parts of large blocks, within which nothing is out of bounds.
        "PYTHONMALLOC": "malloc",
        # A library that does not load is an error, not a run of the reference.
        "CLUSTERQ_BACKEND": "cpp",
        "OMP_NUM_THREADS": "2",
    }


def call_canary(code: str) -> tuple[int, str]:
    """Exit status of a process that runs `code` on the canary ops, and what it wrote to stderr."""
    command = [sys.executable, "-c", f"import torch, clusterq.ops\nop = torch.ops.clusterq_canary\n{code}"]
    done = subprocess.run(command, cwd=COPY, env=sanitized_environment(), capture_output=True, text=True)
    return done.returncode, done.stderr


def check_canaries() -> None:
    status, report = call_canary(CONTROL)
    if status != 0 or report:
        raise SystemExit(f"sanitize: the canary ops used rightly end with status {status}\n{report[:4000]}")
    for code, wanted in CANARIES.items():
        status, report = call_canary(code)
        if status == 0 or not all(part in report for part in wanted):
            raise SystemExit(f"sanitize: nobody noticed {code}: status {status}\n{report[:4000]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    options, arguments = parser.parse_known_args()
    start = time.monotonic()
    copy_checkout()
    build(options.jobs)
    built = time.monotonic()
    check_canaries()
    print(f"sanitize: built in {built - start:.0f} s, canaries caught", flush=True)
    selection = arguments or [*(f"tests/{name}" for name in TESTS), "-k", f"not ({LEFT_OUT})"]
    # What is written to stderr itself is not captured: the report of a process that ends would be lost.
    command = [sys.executable, "-m", "pytest", "-q", "--fill", "--capture=sys", "-p", "no:cacheprovider"]
    command += ["-n", str(options.jobs), *selection]
    done = subprocess.run(command, cwd=COPY, env=sanitized_environment())
    print(f"sanitize: tests in {time.monotonic() - built:.0f} s")
    if done.returncode != 0:
        raise SystemExit("sanitize: failed")


if __name__ == "__main__":
    main()
