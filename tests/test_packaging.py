"""What a user gets from the build: with a compiler, without one, and from a wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from clusterq.ops._build import source_digest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.checkout("csrc", "kernels", "setup.py", "ENVIRONMENT.md")
SOURCES = (
    "clusterq",
    "csrc",
    "kernels",
    "setup.py",
    "build_backend.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def copy_checkout(target):
    """The tracked kind of files alone: no compiled library, no build record."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
        else:
            shutil.copy(source, target / name)
    return target


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


def build_wheel(checkout, out, **environment):
    out.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(out), str(checkout)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_sdist_holds_what_builds_and_tests_and_nothing_built_or_measured(tmp_path):
    folder = copy_checkout(tmp_path / "checkout")
    for name in ("tests", "bench", "docs", "CHANGELOG.md"):
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    made = ("clusterq/_C.cpython-311-x86_64-linux-gnu.so", "clusterq/_build.json", "build/lib/clusterq/_C.so")
    for name in (*made, "runs/demo/result.json", "tests/__pycache__/conftest.cpython-311.pyc", ".venv/x.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    code = "import sys, build_backend; print(build_backend.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "CLUSTERQ_EXT": "0"}, cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sdist = tmp_path / done.stdout.strip().splitlines()[-1]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    kinds = {"csrc": (".h", ".cpp", ".cu"), "kernels": (".py",), "tests": (".py", ".h", ".cpp", ".cu", ".json")}
    wanted = {
        str(path.relative_to(ROOT))
        for top, endings in (kinds | {"clusterq": (".py", ".typed", ".safetensors")}).items()
        for path in (ROOT / top).rglob("*")
        if path.suffix in endings
    }
    files = {"pyproject.toml", "setup.py", "build_backend.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"}
    assert len(wanted) > 300
    # What setuptools writes itself comes on top.
    own = {name for name in names if name.startswith("clusterq.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - own == wanted | files
    assert sdist.stat().st_size < 2 << 20


def import_from_wheel(wheel, target, code):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment.pop("CLUSTERQ_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        env=environment,
        cwd=target,
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_compilers(tmp_path):
    """A PATH with the everyday tools but no compiler."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "env", "uname", "ls", "cat", "rm", "mkdir", "git"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    return str(tools)


def test_without_a_compiler_it_installs_and_says_what_it_lacks(checkout, tmp_path):
    environment = {"PATH": without_compilers(tmp_path), "CXX": ""}
    wheel = build_wheel(checkout, tmp_path / "out", **environment)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    done = import_from_wheel(
        wheel,
        tmp_path / "site",
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import clusterq.ops\n"
        "print(clusterq.__file__)\n"
        "print(*[str(w.message) for w in caught])\n"
        "print({r.kernel for r in clusterq.ops.backends() if r.device == 'cpu'})",
    )
    assert done.returncode == 0, done.stderr
    where, warning, kernels = done.stdout.strip().splitlines()
    assert where.startswith(str(tmp_path / "site"))
    assert "without its compiled CPU kernels" in warning and "no C++ compiler found" in warning
    assert kernels == "{'reference'}"


def test_wheel_with_the_cpu_library_works_from_an_unpacked_folder(tmp_path):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("no Python headers")
    # Its own checkout: what is compiled in it must not get into the wheels of the other tests.
    source = copy_checkout(tmp_path)
    # Unoptimised, as that compiles in a third of the time; the checks are those of a wheel, not of a kernel.
    wheel = build_wheel(source, tmp_path / "out", CLUSTERQ_EXT="1", CLUSTERQ_CUDA="0", DEBUG="1")
    assert not wheel.name.endswith("none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("clusterq/_build.json"))
        names = archive.namelist()
    assert record["cpp"] == "built" and record["torch"] == torch.__version__
    assert record["source_digest"] == {"cpp": source_digest(source / "csrc", "cpp")}
    assert len([name for name in names if name.startswith("clusterq/_C.") and name.endswith(".so")]) == 1
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu"))]
    done = import_from_wheel(
        wheel,
        tmp_path / "site",
        "import json, torch, clusterq\n"
        "from clusterq import ops\n"
        "x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)\n"
        "scale, zero = torch.tensor([0.05, 0.1, 0.2]), torch.zeros(3, dtype=torch.int32)\n"
        "wanted = torch.fake_quantize_per_channel_affine(x, scale, zero, 1, -8, 7)\n"
        "found = clusterq.doctor()\n"
        "print(json.dumps({\n"
        "    'file': clusterq.__file__, 'healthy': found.healthy, 'stale': found.stale, 'build': found.build,\n"
        "    'kernels': sorted({s.kernel for s in found.ops if s.device == 'cpu'}),\n"
        "    'equal': torch.equal(ops.fake_quantize(x, scale, 0, -8, 7, axis=1), wanted)}))\n",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["file"].startswith(str(tmp_path / "site"))
    assert found["kernels"] == ["cpp"] and found["healthy"] and found["equal"]
    assert found["stale"] == [] and found["build"] == record


def test_wheel_holds_both_packages_the_record_and_no_stub(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path / "out", CLUSTERQ_EXT="0")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "clusterq").rglob("*.py")}
    modules |= {"clusterq/" + str(p.relative_to(ROOT)) for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= names, sorted(modules - names)
    assert "clusterq/py.typed" in names and "clusterq/_build.json" in names
    assert "clusterq/kernels.pyi" not in names and not [n for n in names if n.startswith("kernels/")]


def backend_requirements(folders):
    """What the build backend asks for when the target environment keeps its packages in `folders`."""
    code = (
        "import sys, build_backend\n"
        "build_backend._target_folders = lambda: sys.argv[1:]\n"
        "print(build_backend._torch_requirement())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # uv keeps the target from the backend: what is fetched, and how to avoid it, must not be a riddle.
    assert ("--no-build-isolation" in done.stderr) == (done.stdout.strip() != "[]")
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("version", "wanted"), [(None, "['torch>=2.11']"), ("2.8.0", "['torch>=2.11']"), ("2.11.0+cu130", "[]")]
)
def test_backend_asks_for_torch_only_where_the_target_has_none_new_enough(tmp_path, version, wanted):
    if version is not None:
        info = tmp_path / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    assert backend_requirements([tmp_path]) == wanted


def test_asking_for_metadata_leaves_the_library_alone(checkout, tmp_path):
    library = checkout / "clusterq" / "_C.cpython-00-none.so"
    library.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=checkout,
        env={**os.environ, "CLUSTERQ_EXT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert library.exists()
    library.unlink()


def test_a_library_that_was_asked_for_and_cannot_be_built_ends_the_build(checkout, tmp_path):
    environment = {**os.environ, "PATH": without_compilers(tmp_path), "CXX": "", "CLUSTERQ_EXT": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "CLUSTERQ_EXT=1, but the cpp library cannot be built" in done.stderr


def test_setuptools_that_makes_no_wheels_is_named(checkout):
    """As in a virtual environment of Python 3.11, in a build without isolation."""
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "absent = ('wheel', 'setuptools.command.bdist_wheel')\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)\n"
        "sys.argv = ['setup.py', 'editable_wheel']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "makes no wheels: install setuptools 70.1 or newer" in done.stderr


def test_top_level_name_kernels_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "clusterq.kernels" in done.stderr


def test_source_reads_no_environment_variable_that_is_not_documented():
    documented = (ROOT / "ENVIRONMENT.md").read_text()
    found = set()
    for folder in ("clusterq", "csrc", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".sh"):
                found |= set(re.findall(r"\bCLUSTERQ_[A-Z_]+\b", path.read_text()))
    found |= set(re.findall(r"\bCLUSTERQ_[A-Z_]+\b", (ROOT / "setup.py").read_text()))
    macros = {
        name
        for name in found
        if re.search(rf"-D{name}|#define {name}|#ifdef {name}|#ifndef {name}|defined\({name}\)", all_source())
    }
    missing = {name for name in found - macros if name not in documented}
    assert not missing, f"not in ENVIRONMENT.md: {sorted(missing)}"


def all_source():
    paths = [p for f in ("csrc",) for p in (ROOT / f).rglob("*") if p.is_file()] + [ROOT / "setup.py"]
    return "\n".join(path.read_text() for path in paths)
