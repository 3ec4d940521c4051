"""Builds clusterq's two libraries; the only place with compiler flags.

`clusterq._C` (CPU) is built whenever PyTorch and a C++ compiler are there, `clusterq._C_cuda` when that PyTorch is a
CUDA build and nvcc of the same major version is found. What was decided, and why, is written to
`clusterq/_build.json`, from where `clusterq doctor` reads it. Environment: see ENVIRONMENT.md.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
# What the package itself knows about builds, read without importing the package, which needs torch.
BUILD = runpy.run_path(str(ROOT / "clusterq" / "ops" / "_build.py"))
RECORD: Path = BUILD["RECORD"]
# Lowest PyTorch whose stable ABI the libraries use: they load in this one and in every later one.
STABLE_TARGET = "0x020b000000000000"
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX"
# Of SANITIZE=1, see tests/sanitize.py. `undefined` alone leaves out casts of floats that do not fit; torch's classes
# cross library borders with hidden type information, which `vptr` takes for another type.
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr"]


class Unavailable(Exception):
    """A library cannot be built here; the message is the reason shown to the user."""


def release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def find_torch() -> str:
    """Make the target environment's own torch importable from an isolated build; returns its version.

    An isolated build of pip runs the target's interpreter with another `sys.path`; its `purelib` still names the
    target. A torch already in the build environment (put there by build_backend.py for targets that lack it, or that
    it cannot see) comes first. Raises Unavailable when there is none new enough.
    """
    for key in ("purelib", "platlib"):
        path = sysconfig.get_path(key)
        if path not in sys.path and (Path(path) / "torch").is_dir():
            sys.path.append(path)
    try:
        import torch
    except ImportError as error:
        raise Unavailable(f"PyTorch could not be imported during the build: {error}") from error
    if release(torch.__version__) < (2, 11):
        raise Unavailable(f"PyTorch {torch.__version__} is older than 2.11, the oldest stable ABI the kernels use")
    return str(torch.__version__)


def find_compiler() -> str:
    """The C++ compiler, made the one that torch's build helper uses too."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            os.environ["CXX"] = name
            return name
    raise Unavailable("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def find_python_headers() -> None:
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise Unavailable("the headers of Python itself are missing (Debian and Ubuntu: apt-get install python3-dev)")


def pybind11_include() -> list[str]:
    """pybind11's headers; empty when torch's own copy, already on the include path, has to do."""
    import torch

    try:
        import pybind11
    except ImportError:
        if release(torch.__version__) < (2, 13):
            # Their copy refuses to be compiled next to the stable ABI.
            raise Unavailable("PyTorch 2.11 and 2.12 need the package pybind11 for the build") from None
        return []
    return [pybind11.get_include()]


def compile_flags(libraries: str, compiler: str) -> list[str]:
    """Flags of every C++ file: no -std (torch's build helper knows it), no -march and no fast-math (equal results)."""
    flags = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3"]
    if sanitized():
        flags = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS, "-fno-sanitize-recover=all"]
    flags += ["-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_TARGET}", f'-DCLUSTERQ_LIBRARY="{libraries}"']
    flags += [f'-DCLUSTERQ_COMPILER="{compiler_version(compiler)}"']
    return flags


def sanitized() -> bool:
    return os.environ.get("SANITIZE") == "1"


def compiler_version(compiler: str) -> str:
    lines = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return re.sub(r"[^\w .()+:~-]", "", lines[0]) if lines else compiler


def cpu_extension() -> Extension:
    if os.environ.get("CLUSTERQ_EXT") == "0":
        raise Unavailable("left out by CLUSTERQ_EXT=0")
    compiler = find_compiler()
    find_python_headers()
    find_torch()
    from torch.utils.cpp_extension import CppExtension

    sources = ["csrc/module.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))]
    if sanitized():
        # Wrong on purpose: what the sanitizers do not report here, they do not report in a kernel either.
        sources.append("tests/sanitizer_canary.cpp")
    return CppExtension(
        "clusterq._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), *pybind11_include()],
        extra_compile_args={"cxx": compile_flags("cpp", compiler)},
        extra_link_args=SANITIZERS if sanitized() else [],
    )


def cuda_toolkit() -> str:
    """Root of the toolkit that the nvcc on PATH belongs to: its own word, since what is on PATH may be a wrapper."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Unavailable("nvcc not found (set CUDA_HOME)")
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if match is None:
        raise Unavailable(f"{nvcc} does not tell where its toolkit is (set CUDA_HOME)")
    return str(Path(match.group(1)).resolve())


def cuda_extension() -> Extension:
    """CUDA library: decided by torch's own CUDA and nvcc, never by a visible GPU, so that it builds in a container."""
    if os.environ.get("CLUSTERQ_EXT") == "0" or os.environ.get("CLUSTERQ_CUDA") == "0":
        raise Unavailable("left out by CLUSTERQ_EXT=0 or CLUSTERQ_CUDA=0")
    compiler = find_compiler()
    find_python_headers()
    find_torch()
    import torch

    if torch.version.cuda is None:
        raise Unavailable("this PyTorch is built without CUDA")
    home = os.environ.get("CUDA_HOME") or cuda_toolkit()
    nvcc = Path(home) / "bin" / "nvcc"
    if not nvcc.exists():
        raise Unavailable("nvcc not found (set CUDA_HOME)")
    os.environ["CUDA_HOME"] = home
    from torch.utils.cpp_extension import CUDAExtension

    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    release = ".".join(match.groups()) if match else "unknown"
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(f"nvcc is of CUDA {release}, PyTorch of CUDA {torch.version.cuda}: other major version")
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHS
    flags = ["-O3", "--expt-relaxed-constexpr", "--fmad=false", "-Xcompiler=-fvisibility=hidden"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_TARGET}", "-DUSE_CUDA"]
    if os.environ.get("LINEINFO") == "1":
        flags.append("-lineinfo")
    sources = sorted(
        str(p.relative_to(ROOT)) for pattern in ("*.cpp", "*.cu") for p in ROOT.glob(f"csrc/cuda/{pattern}")
    )
    return CUDAExtension(
        "clusterq._C_cuda",
        sources,
        include_dirs=[str(ROOT / "csrc"), *pybind11_include()],
        extra_compile_args={"cxx": [*compile_flags("cuda", compiler), "-DUSE_CUDA"], "nvcc": flags},
    )


def declared_schemas() -> list[str]:
    """Every schema literal passed to `register_op` in clusterq/ops."""
    schemas = []
    for path in sorted(ROOT.glob("clusterq/ops/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register_op":
                schemas.append(ast.literal_eval(node.args[0]))
    return schemas


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """BuildExtension that records what was built once the compilers have succeeded."""

        def run(self) -> None:
            refuse_forced()
            super().run()
            write_record()
            if not self.inplace and not self.editable_mode:
                target = Path(self.build_lib) / "clusterq" / RECORD.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(RECORD, target)

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except (RuntimeError, BaseError) as error:
                # The CPU library is worth having without the CUDA one.
                if extension.name != "clusterq._C_cuda" or os.environ.get("CLUSTERQ_CUDA") == "1":
                    raise
                record["cuda"] = f"did not compile ({error}); CLUSTERQ_CUDA=1 shows why, CLUSTERQ_CUDA=0 leaves it out"
                print(f"clusterq: CUDA library {record['cuda']}", file=sys.stderr)
                extension.optional = True

    return Build


class BuildPython(build_py):
    """Records why there is no library where none is built, before the package's files are collected."""

    def run(self) -> None:
        refuse_forced()
        if not extensions:
            write_record()
        super().run()


def write_record() -> None:
    """Write what happened, and remove libraries of earlier builds that did not take part."""
    for key, name in LIBRARIES.items():
        if record[key] != "built":
            for path in ROOT.glob(f"clusterq/{name}.*.so"):
                path.unlink()
    built = [library for library in LIBRARIES if record[library] == "built"]
    facts = {
        **record,
        **({"torch": find_torch()} if built else {}),
        "schema_digest": BUILD["schema_digest"](declared_schemas()),
        "source_digest": {library: digests[library] for library in built},
    }
    RECORD.write_text(json.dumps(facts, indent=2) + "\n")


def refuse_old_setuptools() -> None:
    """Name what is missing where nothing brings it along: a build without isolation in an environment of 2024 or older.

    Python 3.10 and 3.11 put such a setuptools into every virtual environment.
    """
    wanted = {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv)
    if wanted and not any(map(importlib.util.find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        version = importlib.metadata.version("setuptools")
        raise SystemExit(f"clusterq: setuptools {version} makes no wheels: install setuptools 70.1 or newer")


def refuse_forced() -> None:
    """End the build when a library was asked for that cannot be built."""
    for key, variable in (("cpp", "CLUSTERQ_EXT"), ("cuda", "CLUSTERQ_CUDA")):
        if os.environ.get(variable) == "1" and record[key] != "built":
            raise SystemExit(f"clusterq: {variable}=1, but the {key} library cannot be built: {record[key]}")


LIBRARIES = {"cpp": "_C", "cuda": "_C_cuda"}
refuse_old_setuptools()
record: dict[str, str] = {}
# Taken before the compilers run: what is edited meanwhile is not in the libraries.
digests = {library: BUILD["source_digest"](ROOT / "csrc", library) for library in LIBRARIES}
extensions: list[Extension] = []
# CUDA first: torch's build helper reads CUDA_HOME when it is imported, and cuda_extension sets it.
for library, make in (("cuda", cuda_extension), ("cpp", cpu_extension)):
    try:
        extensions.append(make())
        record[library] = "built"
    except Unavailable as reason:
        record[library] = str(reason)
if "MAX_JOBS" not in os.environ:
    os.environ["MAX_JOBS"] = str(min(os.cpu_count() or 1, 8))
print("clusterq: " + "; ".join(f"{key} library: {value}" for key, value in record.items()), file=sys.stderr)

commands = {"build_py": BuildPython, **({"build_ext": build_command()} if extensions else {})}
setup(ext_modules=extensions, cmdclass=commands)
