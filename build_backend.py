"""Build backend: setuptools, asking for torch only where the target environment has none.

The extensions compile against the torch they find. Listing torch as an ordinary build requirement would fetch a second,
possibly different, multi-gigabyte torch into every isolated build; `setup.py` looks into the target environment
instead.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)


def _torch_requirement() -> list[str]:
    if os.environ.get("CLUSTERQ_EXT") == "0":
        return []
    # Without a compiler nothing is built, so nothing has to be fetched for the build.
    compilers = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    if not any(name and shutil.which(name) for name in compilers):
        return []
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if any((Path(folder) / "torch").is_dir() for folder in folders):
        return []
    return ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]
