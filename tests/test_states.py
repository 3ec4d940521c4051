"""Sealed folders and trees of values on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from resume_cases import same

from clusterq import states


def test_a_tree_comes_back_equal(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "numbers": [1, -2.5, 1e-300, float("inf"), float("-inf"), float("nan"), True, None, "text", (1, (2,))],
        "map": {0: {"step": torch.tensor(3.0)}, 1: "x", "$tensor": "a name", (1, 2): 3},
        "tensors": [
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(3, 4).T, torch.tensor(1, dtype=torch.int64), torch.zeros(0, 3), torch.randn(3).bfloat16(),
            torch.tensor([True, False]), torch.Generator().get_state(), shared, shared, shared[2:],
        ],
    }  # fmt: skip
    states.write_state(tmp_path, tree)
    states.seal(tmp_path)
    same(states.read_state(tmp_path), tree)
    with pytest.raises(TypeError, match=r"state\.a\.0 is a set"):
        states.write_state(tmp_path, {"a": [set()]})


@pytest.mark.parametrize("files", [{"../x": {}}, {"/etc/passwd": {}}, {".hidden": {}}, {"a/b": {}}])
def test_names_in_a_manifest_stay_in_its_folder(tmp_path: Path, files: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_bytes(states._manifest(files))
    with pytest.raises(states.DamagedError, match="is not the name of a file"):
        states.verify(tmp_path)


def test_a_sealed_folder_holds_what_its_manifest_says_and_nothing_else(tmp_path: Path) -> None:
    states.write_state(tmp_path, {"a": 1})
    digest = states.seal(tmp_path)
    assert states.verify(tmp_path) == digest
    for name in ("checkpoint.json", ".hidden"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(states.DamagedError, match=f"{name} is not in manifest.json"):
            states.verify(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(states.DamagedError, match=r"folder is not in manifest\.json"):
        states.read_state(tmp_path)
    (tmp_path / "folder").rmdir()
    elsewhere = tmp_path.with_name("elsewhere")
    (tmp_path / states.VALUES).rename(elsewhere)
    (tmp_path / states.VALUES).symlink_to(elsewhere)
    with pytest.raises(states.DamagedError, match=r"state\.json is damaged: it is a link"):
        states.verify(tmp_path)
