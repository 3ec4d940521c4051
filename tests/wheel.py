"""The wheel where a user has it: `make test-wheel`.

Builds an sdist of the tracked files and a wheel from the sdist, installs the wheel with pip in an environment of its
own, and runs the sdist's tests on it: in a folder from which no checkout is importable, with no compiler on PATH. Tests
that need one, or files of the checkout, are marked so and skip themselves (`markers` in pyproject.toml).

    python tests/wheel.py ENVIRONMENT [--jobs 2] [arguments of pytest in place of the lane's own selection]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Ops, and what is made of them: the method, its checkpoints, commands and exported files.
TESTS = [
    *("fake_quant*", "bn_stats*", "alignment", "centroids*", "kmeans", "codebook*", "op_*", "packing", "library"),
    *("method", "checkpoint", "cli", "packed", "torch_export", "export_onnx", "integer", "models", "threads", "memory"),
]
# What tests start besides the interpreter itself.
TOOLS = ("bash", "sh", "env", "uname", "ls", "cat", "cp", "mv", "rm", "mkdir", "ln", "head", "tail", "grep", "sed")
TOOLS += ("sleep", "kill", "ps", "pgrep", "git", "tee", "date", "timeout")
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "nvcc", "ld")
# Variables that bring in a checkout, a compiler, or a backend other than the one a user gets.
LEFT_OUT = ("PYTHONPATH", "VIRTUAL_ENV", "CXX", "CC", "CUDA_HOME", "CUDA_PATH", "CLUSTERQ_BACKEND", "TRITON_INTERPRET")
# Importing the wheel, before any test does.
FACTS = """
import json, shutil, sys, sysconfig, clusterq
found = clusterq.doctor()
print(json.dumps({
    "file": clusterq.__file__,
    "packages": sysconfig.get_path("platlib"),
    "kernels": sorted({row.kernel for row in found.ops if row.device == "cpu"}),
    "healthy": found.healthy,
    "compilers": [name for name in sys.argv[1:] if shutil.which(name)],
    "torch": found.versions["torch"],
}))
"""


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"wheel: {command[0]} ended with {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}")
    return str(done.stdout)


def build_sdist(place: Path) -> Path:
    """Of the tracked files as they are now: nothing built and nothing that git ignores can get in."""
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / "checkout" / name)
    code = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
    environment = os.environ | {"CLUSTERQ_EXT": "0"}
    run(sys.executable, "-c", code, str(place), cwd=place / "checkout", env=environment)
    (sdist,) = place.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, place: Path) -> Path:
    """In pip's isolated environment, as a user gets it, against the torch of this interpreter; CPU library only."""
    environment = os.environ | {"CLUSTERQ_EXT": "1", "CLUSTERQ_CUDA": "0"}
    environment.pop("PYTHONPATH", None)
    command = ["-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "-w", place / "wheels", sdist]
    run(sys.executable, *command, cwd=place, env=environment)
    (wheel,) = (place / "wheels").glob("*.whl")
    return wheel


def clean_environment(python: Path, place: Path) -> dict[str, str]:
    """Variables of a process that finds everyday tools and the environment's own programs, and no compiler."""
    tools = place / "bin"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return environment | {
        "PATH": f"{python.parent}:{tools}",
        "PYTHONNOUSERSITE": "1",
        # What an earlier run compiled would do for a compiler.
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
    }


def install(wheel: Path, python: Path) -> None:
    """The wheel with what its tests need; torch stays as it is."""
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    version = run(python, "-c", "import torch; print(torch.__version__)").strip()
    # The version is the same for every wheel of the checkout: pip would take the one of the last run for it.
    run(*pip, "uninstall", "--quiet", "--yes", "clusterq")
    run(*pip, "install", "--quiet", f"torch=={version}", f"{wheel}[test]")
    run(*pip, "check")
    # A torch for CPUs alone, as pip finds it on some machines, cannot load the torchvision of the package index.
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode != 0:
        run(*pip, "uninstall", "--quiet", "--yes", "torchvision")
        print(f"wheel: torchvision is for another build than torch {version}: tests that need it skip", flush=True)


def check_import(python: Path, place: Path, environment: dict[str, str]) -> None:
    facts = json.loads(run(python, "-c", FACTS, *COMPILERS, cwd=place, env=environment).splitlines()[-1])
    inside = Path(facts["file"]).is_relative_to(facts["packages"])
    if not inside or facts["kernels"] != ["cpp"] or not facts["healthy"] or facts["compilers"]:
        raise SystemExit(f"wheel: not the wheel's compiled kernels in an environment without compilers: {facts}")
    print(f"wheel: {facts['file']}, torch {facts['torch']}, every op compiled, no compiler", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, help="virtual environment with a torch, without clusterq")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--wheel", type=Path, help="a wheel that was built before, in place of a new one")
    options, arguments = parser.parse_known_args()
    # Not resolved: the link itself is the interpreter of its environment.
    python = options.environment.absolute() / "bin" / "python"
    with tempfile.TemporaryDirectory(prefix="clusterq-wheel-") as folder:
        place, start = Path(folder), time.monotonic()
        sdist = build_sdist(place)
        wheel = options.wheel or build_wheel(sdist, place)
        built = time.monotonic()
        print(f"wheel: {wheel.name} of {sdist.name} in {built - start:.0f} s", flush=True)
        install(wheel, python)
        print(f"wheel: installed in {time.monotonic() - built:.0f} s", flush=True)
        tests, environment = place / "outside", clean_environment(python, place)
        with tarfile.open(sdist) as archive:
            archive.extractall(place / "source", filter="data")
        (source,) = (place / "source").iterdir()
        tests.mkdir()
        for name in ("tests", "pyproject.toml"):
            shutil.move(source / name, tests / name)
        shutil.rmtree(place / "source")
        shutil.rmtree(place / "checkout")
        check_import(python, tests, environment)
        selection = arguments
        if not selection:
            found = {str(path.relative_to(tests)) for name in TESTS for path in tests.glob(f"tests/test_{name}.py")}
            selection = sorted(found)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(options.jobs), "--dist=loadfile"]
        begun = time.monotonic()
        done = subprocess.run([*command, *selection], cwd=tests, env=environment)
        print(f"wheel: tests in {time.monotonic() - begun:.0f} s")
    if done.returncode != 0:
        raise SystemExit("wheel: failed")


if __name__ == "__main__":
    main()
