"""The table of Triton against CUDA C++: every op is in it, its files exist, and it says what the results say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from clusterq.ops import _library

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("tests of the checkout: bench not beside tests/", allow_module_level=True)
sys.path.insert(0, str(BENCH))
import gpu_dispatch  # noqa: E402

C, CL = "contiguous", "channels_last"
# Elements of the large tensor of the results, [256, 64, 56, 56].
LARGE = 256 * 64 * 56 * 56


def test_every_op_is_in_the_table_with_files_that_are_there() -> None:
    found = gpu_dispatch.sources()
    assert found.keys() == _library._ops.keys()
    for name, files in found.items():
        assert f'"{name}"' in (ROOT / files.cuda).read_text()
        launcher = _library._ops[name].triton
        # Defined there, or imported by that file.
        assert launcher is not None
        assert re.search(rf"\b{launcher.split(':')[1]}\b", (ROOT / files.triton).read_text())


def test_the_page_is_made_from_the_results() -> None:
    assert (gpu_dispatch.RESULTS / "dispatch.md").read_text() == gpu_dispatch.page()


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (("fake_quantize", "bfloat16", LARGE, C, "tensor"), "triton"),
        (("fake_quantize", "bfloat16", LARGE, CL, "channel"), "triton"),
        (("fake_quantize", "float32", LARGE, C, "tensor"), "even"),
        (("fake_quantize", "float32", 2 * LARGE, CL, "channel"), "triton"),
        (("fake_quantize_learned_backward", "float32", LARGE, CL, "channel"), "cuda"),
        (("finite_range", "float32", LARGE, C, "tensor"), "cuda"),
        # The nearest measured size below: [4096, 4096], and the large one.
        (("fake_quantize_learned_backward", "bfloat16", 4096 * 4096, C, "channel"), "cuda"),
        (("fake_quantize_learned_backward", "bfloat16", LARGE - 1, C, "channel"), "cuda"),
        (("fake_quantize_learned_backward", "bfloat16", LARGE, C, "channel"), "triton"),
        # Nothing measured at that size or below, in that dtype, of that op.
        (("fake_quantize", "bfloat16", LARGE - 1, C, "tensor"), None),
        (("fake_quantize", "float16", LARGE, C, "tensor"), None),
        (("nearest_centroid", "float32", LARGE, C, "tensor"), None),
    ],
)
def test_what_the_results_say(call: tuple[str, str, int, str, str], wanted: str | None) -> None:
    assert gpu_dispatch.faster(gpu_dispatch.entries(), *call) == wanted


@pytest.mark.parametrize(
    ("cuda", "triton", "wanted"), [(1.0, 1.04, "even"), (1.0, 1.06, "cuda"), (1.06, 1.0, "triton")]
)
def test_near_ones_are_even(cuda: float, triton: float, wanted: str) -> None:
    entry = gpu_dispatch.Entry("op", "float32", C, "tensor", "[1]", 1, cuda, triton, "made.json")
    assert entry.faster == wanted
