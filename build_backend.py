"""Build backend: setuptools, asking for torch only where the target environment has none.

The extensions compile against the torch they find. Listing torch as an ordinary build requirement would fetch a second,
possibly different, multi-gigabyte torch into every isolated build; `setup.py` looks into the target environment
instead. That works under pip, which runs the target's own interpreter. uv and `python -m build` run one of their own
and do not tell which environment is the target: there a torch is fetched for the build, and what is built loads in any
torch from 2.11 on all the same.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import sys
import sysconfig
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

_OLDEST = (2, 11)


def _target_folders() -> list[str]:
    """Where the interpreter that runs this isolated build keeps the packages of the environment it was started from."""
    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]


def _has_torch() -> bool:
    for distribution in importlib.metadata.distributions(name="torch", path=_target_folders()):
        release = tuple(int(part) for part in re.findall(r"\d+", distribution.version)[:2])
        if release >= _OLDEST:
            return True
    return False


def _torch_requirement() -> list[str]:
    if os.environ.get("CLUSTERQ_EXT") == "0":
        return []
    # Without a compiler nothing is built, so nothing has to be fetched for the build.
    compilers = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    if not any(name and shutil.which(name) for name in compilers):
        return []
    if _has_torch():
        return []
    requirement = "torch>=" + ".".join(map(str, _OLDEST))
    print(
        f"clusterq: no {requirement} in {sys.prefix}, so one is fetched for the build. Where that is not the "
        "environment you install into (uv), `--no-build-isolation` builds against the torch you have.",
        file=sys.stderr,
    )
    return [requirement]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]
