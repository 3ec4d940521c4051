"""The picture of an ablation: one panel per width, one line per row, mean and spread over the seeds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from clusterq.ablation.rows import all_bits, cells_at, mean_and_spread, plain_name
from clusterq.errors import MissingPackageError, require
from clusterq.figures import GRID, INK, MUTED, new_figure

_DATA_FREE, _REAL = "#0b6e99", "#d1495b"
_SECTION = "report"


def draw(results: Mapping[str, Any]) -> bytes | str:
    """A PNG file of the accuracies on the images to report on, or why there is none."""
    try:
        require("matplotlib", purpose="drawing the figure", extra="viz")
    except MissingPackageError as error:
        return str(error)
    rows = [row for row in results["rows"] if row["cells"]]
    widths = [bits for bits in all_bits({"rows": rows}) if any(cells_at(row, bits) for row in rows)]
    if not widths:
        return "no row is finished"
    longest = max(len(plain_name(row)) for row in rows)
    figure, axes = new_figure(
        len(widths), 1, 3.4 * len(widths) + 0.075 * longest + 0.3, 0.3 * len(rows) + 1.35, share_rows=True
    )
    full = results["float"][_SECTION]
    for plot, bits in zip(axes, widths, strict=True):
        _panel(plot, rows, bits, full)
    axes[0].set_yticks(range(len(rows)), [plain_name(row) for row in rows], fontsize=8, color=INK)
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(INK if row["data_free"] else _REAL)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    first, last = results["sections"][_SECTION]
    figure.supxlabel(
        f"top-1 in % on images {first} to {last} of {results['data']['name']}; mean ± std; small dots: seeds",
        fontsize=8,
        color=MUTED,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _panel(plot: Any, rows: Sequence[Mapping[str, Any]], bits: str, full: float) -> None:
    for place, row in enumerate(rows):
        values = [cell["accuracy"][_SECTION] for cell in cells_at(row, bits)]
        if not values:
            continue
        colour = _DATA_FREE if row["data_free"] else _REAL
        mean, spread = mean_and_spread(values)
        if spread is not None:
            # Above the line of the spread, which would hide them.
            above = [place - 0.24] * len(values)
            plot.scatter(values, above, s=10, color=colour, alpha=0.45, linewidths=0, zorder=2)
            plot.errorbar(mean, place, xerr=spread, color=colour, linewidth=1.4, capsize=3, zorder=3)
        plot.plot(
            [mean],
            [place],
            marker="o" if row["data_free"] else "D",
            markersize=5.5,
            color=colour,
            markerfacecolor=colour if row["data_free"] else "white",
            zorder=4,
        )
    plot.axvline(full, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    plot.set_title(bits, fontsize=10, loc="left", color=INK)
    plot.annotate(
        f"FP32 {full:.2f}",
        (full, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=INK,
    )
    plot.grid(axis="x", color=GRID, linewidth=0.6, zorder=0)
    plot.tick_params(axis="y", length=0)
