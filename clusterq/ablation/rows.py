"""What page, picture and terminal read from a result of `clusterq ablate`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def all_bits(results: Mapping[str, Any]) -> list[str]:
    """Every width of the table in the order of its rows."""
    return list(dict.fromkeys(bits for row in results["rows"] for bits in row["bits"]))


def cells_at(row: Mapping[str, Any], bits: str) -> list[Mapping[str, Any]]:
    """Cells of a row at one width, one per seed."""
    return [cell for cell in row["cells"] if cell["bits"] == bits]


def mean_and_spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for one value, which has no spread."""
    numbers = list(values)
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def plain_name(row: Mapping[str, Any]) -> str:
    """A row's name as text without markup, marked where its images are real ones."""
    name: str = row["name"]
    return name if row["data_free"] else f"{name} (not data-free)"
