"""Figures and the HTML page: complete, self-contained, and honest about what is missing."""

from __future__ import annotations

import base64
import copy
import re
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterq import figures, report

RESULT: dict[str, Any] = {
    "format": "clusterq-result",
    "command": "clusterq quantize --model 'a&b.py:make' <x>",
    "created": "2026-01-02T03:04:05+00:00",
    "preset": "default",
    "seed": 11,
    "model": {
        "model": "a&b.py:make",
        "weights": "w.pt",
        "weights_sha256": "ab" * 32,
        "parameters": 12345,
        "input_shape": [1, 8, 8],
        "num_classes": 3,
        "mean": [0.5],
        "std": [0.25],
    },
    "data": {"name": "set.npz", "images": 100, "of": 400, "sha256": "cd" * 32},
    "float": {"top1": 98.25, "top5": None},
    "images": {"count": 30, "shape": [1, 8, 8], "source": "bank", "label_accuracy": 96.5},
    "baselines": {
        "rounded_minmax": {
            "training": "none",
            "scheme": "paper",
            "ranges": "minmax",
            "weights": "per output channel, asymmetric",
            "activations": "per tensor, asymmetric",
            "calibration_images": 29,
        },
        "rounded_mse": {
            "training": "none",
            "scheme": "paper",
            "ranges": "mse",
            "weights": "per output channel, symmetric",
            "activations": "per tensor, asymmetric",
            "calibration_images": 29,
        },
    },
    "widths": [
        {
            "bits": bits,
            "weight_bits": w,
            "activation_bits": w,
            "first_layer_bits": 8,
            "last_layer_bits": w,
            "layer_bits": {},
            "rounded_minmax": {"top1": 41.5, "top5": None},
            "rounded_mse": {"top1": 55.75, "top5": None},
            "calibrated": {"top1": 83.25, "top5": None},
            "clusterq": {"top1": 97.125, "top5": None},
            "student_seconds": 12.3,
            "samples_seen": {"synthesis": 3000, "finetune": 4000},
            "label_accuracy": 96.5,
            "layers": [],
            "unreached": [{"name": "head", "kind": "gelu", "note": "a note"}],
        }
        for bits, w in (("W4A4", 4), ("W3A3", 3))
    ],
    "seconds": {"load": 0.5, "synthesis": 20.0, "total": 61.0},
    "config": {"seed": 11, "synthesis": {"num_images": 30}},
    "versions": {"clusterq": "0.1.0", "torch": "2.99.0"},
    "machine": {
        "system": "Linux x86_64",
        "processor": "Test CPU",
        "cpu_capability": "AVX2",
        "cores": 2,
        "threads": 2,
        "gpu": None,
        "device": "cpu",
    },
    "backends": {"fake_quantize": "cpp", "nearest_centroid": "reference"},
}
SYNTHESIS: list[dict[str, Any]] = [
    {"phase": "synthesis", "step": i, "ce": 3.0 / (i + 1), "bns": 9.0 / (i + 1), "label_accuracy": i / 50}
    for i in range(50)
]
FINETUNE: list[dict[str, Any]] = [
    {"phase": "finetune", "bits": bits, "step": i, "kd": 1.0 / (i + 1), "loss": 1.0 / (i + 1)}
    for bits in ("W4A4", "W3A3")
    for i in range(30)
]
METRICS = SYNTHESIS + FINETUNE


class Page(HTMLParser):
    """Tags, attributes that refer to something, and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def _draw(folder: Path, result: dict[str, Any], channels: int = 1, classes: int = 3) -> dict[str, str]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % classes
    images = torch.randn(30, channels, 8, 8, generator=random)
    points = torch.randn(30, 2, generator=random)
    return figures.draw(
        folder,
        result,
        metrics=METRICS,
        images=images,
        labels=labels,
        separability={"synthesised": (points, labels), "real": (points[:9], labels[:9])},
    )


def _size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_four_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = _draw(tmp_path, RESULT)
    assert list(written) == ["images.png", "accuracy.png", "curves.png", "separability.png"]
    for name, caption in written.items():
        width, height = _size(tmp_path / name)
        assert width >= 300 and height >= 150, name
        assert caption.endswith(".")


@pytest.mark.parametrize("widths", [1, 2])
def test_nothing_is_cut_off_at_the_border(tmp_path: Path, widths: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    _draw(tmp_path, {**RESULT, "widths": RESULT["widths"][:widths]})
    for name in ("accuracy.png", "curves.png", "separability.png"):
        pixels = image.imread(str(tmp_path / name))[..., :3]
        for border in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (border == 1.0).all(), name


def test_colour_images_and_many_classes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "images.png" in _draw(tmp_path, RESULT, channels=3, classes=25)


def test_no_accuracy_figure_without_measurements(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = copy.deepcopy(RESULT)
    result["float"] = None
    assert "accuracy.png" not in _draw(tmp_path, result)


def test_drawing_needs_no_display_and_no_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    _draw(tmp_path, RESULT)
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = _draw(tmp_path, RESULT)
    assert list(written) == [""]
    report.write_html(tmp_path / "report.html", RESULT, written)
    assert "clusterq[viz]" in Page((tmp_path / "report.html").read_text()).text


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write_html(tmp_path / "report.html", RESULT, _draw(tmp_path, RESULT))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 4 and "script" not in page.tags and "link" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    names = ("images.png", "accuracy.png", "curves.png", "separability.png")
    for link, name in zip(page.links, names, strict=True):
        assert base64.b64decode(link.split(",", 1)[1]) == (tmp_path / name).read_bytes()
    assert "width=device-width" in text
    for expected in (
        "98.25",
        "41.50",
        "55.75",
        "83.25",
        "97.12",
        "W3A3",
        "ab" * 32,
        "cd" * 32,
        "Test CPU",
        "torch 2.99.0",
    ):
        assert expected in page.text, expected
    for expected in ("first layer 8 bit", "default, 11", "100 of 400", "head (a note)", "3,000 in synthesis"):
        assert expected in page.text, expected
    for expected in (
        "Rounded min/max: no training, ranges between the extreme values from 29 of the images; weights per output "
        "channel, asymmetric; activations per tensor, asymmetric",
        "Rounded MSE: no training, ranges of least squared error from 29 of the images; weights per output channel, "
        "symmetric; activations per tensor, asymmetric",
    ):
        assert expected in page.text
    # The command appears as typed, and nothing from it becomes markup.
    assert RESULT["command"] in page.text
    assert not re.search(r"<x>", text)


def test_table_is_aligned_and_rounds() -> None:
    lines = report.table(RESULT).splitlines()
    assert lines[0].split() == ["FP32", "rounded", "min/max", "rounded", "MSE", "calibrated", "ClusterQ", "time"]
    assert lines[2].split() == ["W4A4", "98.25", "41.50", "55.75", "83.25", "97.12", "12", "s"]
    ends = [line.rindex(value) + len(value) for line, value in zip(lines[2:], ("97.12", "97.12"), strict=True)]
    assert set(ends) == {lines[0].rindex("ClusterQ") + len("ClusterQ")}


def test_table_without_measurements() -> None:
    result = copy.deepcopy(RESULT)
    result["float"] = None
    for row in result["widths"]:
        row["rounded_minmax"] = row["rounded_mse"] = row["calibrated"] = row["clusterq"] = None
    assert report.table(result).splitlines()[2].split() == ["W4A4", "-", "-", "-", "-", "-", "12", "s"]
    result["data"] = None
    assert "no evaluation set" in report.summary(result)


def test_summary_tells_the_label_accuracy() -> None:
    text = report.summary(RESULT)
    assert "96.5 %" in text and "seed 11" in text and "100 images of set.npz" in text
