"""The pictures of a run folder: synthesised images, loss curves, class separability, accuracy bars.

matplotlib is imported here only when a picture is drawn, and always with its Agg canvas: no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterq.errors import MissingPackageError, require

INK, MUTED, GRID = "#1c2733", "#66727f", "#e3e8ee"
_OTHERS = "#d3dae2"
BARS = {
    "rounded_minmax": ("rounded, min/max ranges", "#c9d1da"),
    "rounded_mse": ("rounded, MSE ranges", "#8fa3b8"),
    "calibrated": ("calibrated, not trained", "#7cc0d4"),
    "clusterq": ("ClusterQ", "#0b6e99"),
}
_LINES = ("#0b6e99", "#d1495b", "#3a8f5c", "#8a5fb0", "#b07d2b", "#4a5563")
_CLASSES = (
    "#0b6e99", "#d1495b", "#3a8f5c", "#e0a030", "#8a5fb0",
    "#5bb5c9", "#7a4a2b", "#e98ab0", "#6b7785", "#a5b83d",
)  # fmt: skip
_GRID_CLASSES, _GRID_COLUMNS, _SINGLE_IMAGES = 10, 12, 60


def draw(
    folder: Path,
    result: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]],
    images: Tensor,
    labels: Tensor,
    separability: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, str]:
    """Write the PNG files of a run.

    Args:
        folder: where to.
        result: content of `result.json`.
        metrics: lines of `metrics.jsonl`.
        images, labels: [N, C, H, W] in the network's input space, [N].
        separability: panel title -> points [n, 2] and labels [n].

    Returns:
        File name -> caption, in reading order; without matplotlib one entry, `""` -> what is missing.
    """
    try:
        require("matplotlib", purpose="drawing the figures", extra="viz")
    except MissingPackageError as error:
        return {"": f"No figures: {error}."}
    written = {}
    contact_sheet(folder / "images.png", images, labels)
    written["images.png"] = "Synthesised images with their classes, made from the network alone."
    if result["float"] is not None:
        _accuracy(folder / "accuracy.png", result)
        written["accuracy.png"] = "Top-1 on real images the method never saw."
    if any(len(step) > 2 for step in metrics):
        _curves(folder / "curves.png", metrics)
        written["curves.png"] = "Loss terms during image synthesis and fine-tuning."
    _separability(folder / "separability.png", separability)
    written["separability.png"] = (
        "Each dot is one image: the two main directions of its statistics in the network's deep BatchNorm layers, "
        "coloured by class. Each panel has its own axes."
    )
    return written


def new_figure(
    columns: int, rows: int, width: float, height: float, *, share_rows: bool = False
) -> tuple[Any, list[Any]]:
    """A figure of `columns` x `rows` plots, width and height in inches; `share_rows`: one vertical axis per row."""
    figure_module = require("matplotlib.figure", purpose="drawing the figures", extra="viz")
    agg = require("matplotlib.backends.backend_agg", purpose="drawing the figures", extra="viz")
    figure = figure_module.Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    agg.FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_rows else False).flatten().tolist()
    for plot in axes:
        plot.spines[["top", "right"]].set_visible(False)
        plot.spines[["left", "bottom"]].set_color(MUTED)
        plot.tick_params(colors=MUTED, labelsize=8)
        plot.title.set_color(INK)
    return figure, axes


def contact_sheet(path: Path, images: Tensor, labels: Tensor) -> None:
    """One class per row where classes have several images, else single images with their class below.

    Args:
        path: PNG file to write.
        images, labels: [N, C, H, W] in any range of values, [N].

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    classes, counts = torch.unique(labels, return_counts=True)
    by_row = int(counts.max()) >= 4
    if by_row:
        if len(classes) > _GRID_CLASSES:
            classes = classes[torch.linspace(0, len(classes) - 1, _GRID_CLASSES).round().long()]
        rows = [images[labels == c][:_GRID_COLUMNS] for c in classes]
    else:
        order = labels.argsort(stable=True)
        chosen = order[torch.linspace(0, len(order) - 1, min(len(order), _SINGLE_IMAGES)).round().long()]
        rows = list(torch.split(images[chosen], _GRID_COLUMNS))
        names = list(torch.split(labels[chosen], _GRID_COLUMNS))
    height, width = images.shape[-2:]
    gap_x = max(1, width // 16)
    gap_y = gap_x if by_row else round(0.28 * height)
    columns = max(len(row) for row in rows)
    canvas = torch.ones(len(rows) * (height + gap_y) - gap_x, columns * (width + gap_x) - gap_x, 3)
    cell = 0.52 if width <= 64 else 0.8
    scale = cell / (width + gap_x)
    figure, axes = new_figure(1, 1, max(scale * canvas.shape[1] + 0.6, 2.5), scale * canvas.shape[0] + 0.1)
    plot = axes[0]
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gap_y), j * (width + gap_x)
            canvas[top : top + height, left : left + width] = _displayable(image)
            if not by_row:
                below = (left + width / 2, top + height + 0.03 * height)
                plot.annotate(str(int(names[i][j])), below, ha="center", va="top", fontsize=7, color=MUTED)
    plot.imshow(canvas.numpy(), interpolation="nearest" if width <= 64 else "antialiased", aspect="equal")
    plot.set_xticks([])
    plot.set_yticks([])
    if by_row:
        middles = [i * (height + gap_y) + height / 2 for i in range(len(rows))]
        plot.set_yticks(middles, [str(int(c)) for c in classes])
        plot.set_ylabel("class", color=MUTED, fontsize=9)
    plot.tick_params(length=0, labelsize=9)
    plot.spines[["left", "bottom"]].set_visible(False)
    figure.savefig(path)


def _displayable(image: Tensor) -> Tensor:
    """[C, H, W] -> [H, W, 3] in 0..1: the middle 98 % of the values stretched over the range."""
    values = image.float().flatten()
    low, high = torch.quantile(values, 0.01), torch.quantile(values, 0.99)
    stretched = ((image.float() - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return stretched[[0, 0, 0] if len(image) != 3 else [0, 1, 2]].permute(1, 2, 0)


def _accuracy(path: Path, result: Mapping[str, Any]) -> None:
    rows = result["widths"]
    figure, axes = new_figure(1, 1, max(2.2 * len(rows) + 1.6, 4.6), 3.2)
    plot = axes[0]
    full = result["float"]["top1"]
    for index, (key, (name, colour)) in enumerate(BARS.items()):
        heights = [row[key]["top1"] for row in rows]
        places = [i + 0.21 * (index - (len(BARS) - 1) / 2) for i in range(len(rows))]
        bars = plot.bar(places, heights, width=0.195, color=colour, label=name, zorder=2)
        for bar, height in zip(bars, heights, strict=True):
            # Inside the bar where there is room: above it, the number would meet the line of FP32.
            inside = height > 12
            plot.annotate(
                f"{height:.1f}",
                (bar.get_x() + bar.get_width() / 2, height),
                xytext=(0, -4 if inside else 3),
                textcoords="offset points",
                ha="center",
                va="top" if inside else "bottom",
                fontsize=8,
                fontweight="bold" if key == "clusterq" else "normal",
                color="white" if inside and key == "clusterq" else INK,
                zorder=4,
            )
    plot.axhline(full, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    plot.annotate(
        f"FP32 {full:.1f}",
        (1, full),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )
    plot.set_xticks(range(len(rows)), [row["bits"] for row in rows], fontsize=10, color=INK)
    plot.tick_params(axis="x", length=0)
    highest = max(full, *(row[key]["top1"] for row in rows for key in BARS))
    plot.set_ylim(0, 104 if highest > 60 else max(1.1 * highest, 1.0))
    plot.set_xlim(-0.55, len(rows) - 0.45)
    plot.set_ylabel("top-1 accuracy, %", color=MUTED, fontsize=9)
    plot.grid(axis="y", color=GRID, zorder=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


def _curves(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Synthesis terms and label accuracy by step, then the fine-tuning loss of every width."""
    synthesis = [step for step in metrics if step["phase"] == "synthesis"]
    finetune = [step for step in metrics if step["phase"] == "finetune"]
    panels = (2 if synthesis else 0) + (1 if finetune else 0)
    figure, axes = new_figure(panels, 1, 3.6 * panels + 0.4, 3.1)
    if synthesis:
        terms = [k for k in synthesis[0] if k not in ("phase", "step", "label_accuracy", "total")]
        terms += [k for step in synthesis[-1:] for k in step if k in ("alignment", "diversity") and k not in terms]
        for name, colour in zip(terms, _LINES, strict=False):
            _line(axes[0], [s for s in synthesis if name in s], name, _TERMS.get(name, name), colour)
        _label(axes[0], "Image synthesis", "loss term", log=True)
        _line(axes[1], synthesis, "label_accuracy", "", _LINES[0], factor=100)
        axes[1].set_ylim(-2, 104)
        _label(axes[1], "Label accuracy of the images", "% the network agrees with")
    if finetune:
        plot = axes[-1]
        for bits, colour in zip(dict.fromkeys(step["bits"] for step in finetune), _LINES, strict=False):
            steps = [step for step in finetune if step["bits"] == bits]
            key = "loss" if "loss" in steps[0] else "total" if "total" in steps[0] else "kd"
            _line(plot, steps, key, str(bits), colour)
        _label(plot, "Fine-tuning", "loss", log=True)
    figure.savefig(path)


_TERMS = {"ce": "cross-entropy", "bns": "BN alignment", "alignment": "class alignment", "diversity": "diversity"}


def _line(
    plot: Any, steps: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, factor: float = 1.0
) -> None:
    """The values, faint, with their moving average over the steps on both sides."""
    steps = [step for step in steps if key in step]
    if not steps:
        return
    x = [step["step"] + 1 for step in steps]
    y = torch.tensor([factor * float(step[key]) for step in steps], dtype=torch.float64)
    reach = len(y) // 80
    smooth = torch.nn.functional.avg_pool1d(y[None, None], 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
    plot.plot(x, y.tolist(), color=colour, alpha=0.3, linewidth=0.8)
    plot.plot(x, smooth.tolist(), color=colour, linewidth=1.6, label=label or None)


def _label(plot: Any, title: str, ylabel: str, *, log: bool = False) -> None:
    values = [v for line in plot.get_lines() for v in line.get_ydata()]
    if log and values and min(values) > 0 and max(values) / min(values) > 8:
        plot.set_yscale("log")
    plot.set_title(title, fontsize=10, loc="left", color=INK)
    plot.set_xlabel("step", fontsize=9, color=MUTED)
    plot.set_ylabel(ylabel, fontsize=9, color=MUTED)
    plot.grid(color=GRID, linewidth=0.6)
    if plot.get_legend_handles_labels()[1]:
        plot.legend(frameon=False, fontsize=8, labelcolor=INK)


def _separability(path: Path, panels: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """The same class has the same colour in every panel; beyond ten classes the less frequent ones are grey."""
    figure, axes = new_figure(len(panels), 1, 3.7 * len(panels) + 0.3, 3.7)
    classes, counts = torch.unique(torch.cat([labels for _, labels in panels.values()]), return_counts=True)
    shown = classes[counts.argsort(descending=True, stable=True)[: len(_CLASSES)]].sort().values
    for plot, (title, (points, labels)) in zip(axes, panels.items(), strict=True):
        rest = ~torch.isin(labels, shown)
        plot.scatter(points[rest, 0], points[rest, 1], s=8, color=_OTHERS, linewidths=0)
        for colour, c in zip(_CLASSES, shown.tolist(), strict=False):
            own = labels == c
            plot.scatter(points[own, 0], points[own, 1], s=13, color=colour, alpha=0.8, linewidths=0, label=str(c))
        plot.set_title(f"{title} ({len(points)} images)", fontsize=10, loc="left", color=INK)
        plot.set_xticks([])
        plot.set_yticks([])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handletextpad=0.1,
        columnspacing=0.9,
    )
    figure.savefig(path)
