"""Ops from many threads at once, after a fork, in worker processes, and while the interpreter ends."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("threads_harness.py")


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, HARNESS, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert done.stdout == "done\n"


def test_many_threads_give_what_one_gives() -> None:
    run("threads")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gives_what_its_parent_gives() -> None:
    run("fork")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_items_of_a_loader_made_in_worker_processes(method: str) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    run("workers", method)


def test_the_interpreter_ends_during_a_kernel() -> None:
    run("daemon")


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not free-threaded")
def test_importing_brings_no_gil_back() -> None:
    """A module that does not say that it can do without turns the GIL on for the whole process."""
    code = "import sys, torch\nbefore = sys._is_gil_enabled()\nimport clusterq\nprint(before, sys._is_gil_enabled())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    # A warning names the module that did it.
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout == "False False\n", done.stdout + done.stderr
