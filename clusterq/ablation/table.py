"""The file of an ablation: a base, rows that differ from it, and which images choose and which report.

    [base]
    model = "builtin:resnet20"
    weights = "${CLUSTERQ_DATA}/networks/cifar10_resnet20.pt"   # variables of the environment
    data = "${CLUSTERQ_DATA}/cifar10/cifar10_test.npz"
    bits = ["W4A4", "W3A3"]
    seeds = [0, 1, 2]
    evaluate = { choose = "first half", report = "second half" }
    settings = ["finetune.steps=1000"]

    [[row]]
    name = "default"

    [[row]]
    name = "class alignment"
    settings = { synthesis = { alignment_weight = 1.0, warmup_steps = 50 } }

    [[row]]
    name = "ceiling"
    images = "data:first half"   # real images without their labels, in place of synthesised ones: not data-free

All of it is checked, every row's settings too, before anything runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusterq.config import ClusterQConfig, preset
from clusterq.errors import ClusterQError, MissingPackageError, require
from clusterq.readers import first_line, read_limited
from clusterq.records import is_text
from clusterq.settings import override
from clusterq.widths import Width

# Parts of the data that every table measures on.
SECTIONS = ("choose", "report", "all")
_INPUT_KEYS = ("input_size", "normalization", "mean", "std")
_BASE_KEYS = ("model", "weights", "data", *_INPUT_KEYS, "preset", "bits", "settings", "seeds", "threads", "evaluate")
_ROW_KEYS = ("name", "preset", "bits", "settings", "images")
# Of a file: a few names in YAML can stand for more values than memory holds.
_BYTES, _VALUES, _DEPTH = 1 << 20, 100_000, 32


class TableError(ClusterQError, ValueError):
    """A table that cannot be run; says where and what was wanted."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: shown in results.
        widths: one student each per seed.
        assignments: its own settings as for `--set`; the base's come before, those of the command after them.
        config: the settings with seed 0 and the first width.
        images: section of the data whose images take the place of synthesised ones, None: data-free.
    """

    name: str
    widths: tuple[Width, ...]
    assignments: tuple[str, ...]
    config: ClusterQConfig
    images: str | None


@dataclass(frozen=True)
class Table:
    """A checked table.

    Attributes:
        name: of its file, without the ending.
        sha256: of its file.
        model, weights, data: as written, variables in place.
        inputs: `input_size`, `normalization`, `mean`, `std` where given, as for `clusterq.models.load_model`.
        seeds: every row runs with each.
        threads: per process.
        sections: `choose`, `report`, `all` -> part of the data, see `section_range`.
        base, last: settings as for `--set` that every row has before and after its own.
        rows: in the file's order.
    """

    name: str
    sha256: str
    model: str
    weights: str | None
    data: str
    inputs: Mapping[str, Any]
    seeds: tuple[int, ...]
    threads: int
    sections: Mapping[str, str]
    base: tuple[str, ...]
    last: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: Path, *, assignments: Sequence[str] = (), seeds: Sequence[int] = ()) -> Table:
    """Read and check a table.

    Args:
        path: `.toml`, or `.yaml`/`.yml` where PyYAML is installed.
        assignments: `section.field=value` settings that come last in every row.
        seeds: in place of the table's.

    Raises:
        TableError: unreadable, an unknown or absent key, or a value that does not fit; names the row.
        MissingPackageError: the parser of the file's format is not installed.
        OSError: the file cannot be read.
    """
    content = read_limited(path, TableError, limit=_BYTES)
    data = _parse(path, content)
    _require_plain(data, path.name)
    if not isinstance(data, dict) or set(data) - {"base", "row"} or not isinstance(data.get("base"), dict):
        raise TableError(f"{path.name}: wanted one [base] and one or more [[row]], nothing else")
    base, rows = data["base"], data.get("row")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise TableError(f"{path.name}: wanted at least one [[row]]")
    where = f"{path.name} [base]"
    _known(base, _BASE_KEYS, where)
    for key in ("model", "data", "evaluate"):
        if key not in base:
            raise TableError(f"{where}: {key} is missing")
    own_seeds = list(seeds) or _list_of(base.get("seeds", [0]), int, f"{where} seeds")
    if not own_seeds or min(own_seeds) < 0 or len(set(own_seeds)) != len(own_seeds):
        raise TableError(f"{where}: seeds are {own_seeds}; wanted different whole numbers of at least 0")
    threads = _typed(base.get("threads", 1), int, f"{where} threads")
    if threads < 1:
        raise TableError(f"{where}: threads is {threads}; wanted at least 1")
    first = _assignments(base.get("settings", []), f"{where} settings")
    checked = tuple(_row(row, base, first, assignments, f"{path.name} row {i + 1}") for i, row in enumerate(rows))
    names = [row.name for row in checked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TableError(f"{path.name}: two rows are called {twice!r}")
    return Table(
        path.stem,
        hashlib.sha256(content).hexdigest(),
        _typed(base["model"], str, f"{where} model"),
        None if "weights" not in base else _typed(base["weights"], str, f"{where} weights"),
        _typed(base["data"], str, f"{where} data"),
        _inputs(base, where),
        tuple(own_seeds),
        threads,
        _sections(base["evaluate"], f"{where} evaluate"),
        tuple(first),
        tuple(assignments),
        checked,
    )


def section_range(section: str, total: int) -> tuple[int, int]:
    """First image and one past the last of a part of `total` images: `"all"`, `"first half"`, `"second half"`, `"a:b"`.

    Raises:
        TableError: none of these, empty, or beyond the images there are.
    """
    named = {"all": (0, total), "first half": (0, total // 2), "second half": (total // 2, total)}
    if section in named:
        start, stop = named[section]
    else:
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", section)
        if match is None:
            raise TableError(f"section {section!r}: wanted 'first half', 'second half', 'all' or FIRST:END")
        start, stop = int(match[1]), int(match[2])
    if not 0 <= start < stop <= total:
        raise TableError(f"section {section!r} is images {start} to {stop} of {total}; wanted a part that is there")
    return start, stop


def expand(text: str) -> str:
    """`${NAME}` replaced by variables of the environment. Raises TableError for one that is not set."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise TableError(f"{text!r}: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _parse(path: Path, content: bytes) -> Any:
    if path.suffix == ".toml":
        parser = _toml_parser()
        try:
            return parser.loads(content.decode())
        # TOMLDecodeError and UnicodeDecodeError are ValueErrors, as is what numbers and dates without end raise.
        except ValueError as error:
            raise TableError(f"{path.name} is not a TOML file: {first_line(error)}") from error
        except RecursionError:
            raise TableError(f"{path.name} is nested too deeply") from None
    if path.suffix in (".yaml", ".yml"):
        if importlib.util.find_spec("yaml") is None:
            raise MissingPackageError(
                f"{path.name}: reading YAML needs the package PyYAML, which is not installed: pip install pyyaml, or "
                "write the table as .toml"
            )
        yaml = importlib.import_module("yaml")
        try:
            return yaml.safe_load(content)
        except RecursionError:
            raise TableError(f"{path.name} is nested too deeply") from None
        # All but the first for numbers, dates and the like that are none.
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise TableError(f"{path.name} is not a YAML file: {' '.join(str(error).split())}") from error
    raise TableError(f"{path.name}: wanted a table that ends in .toml or .yaml")


def _require_plain(data: Any, name: str) -> None:
    """Raises TableError for what results cannot hold (dates, keys that are no text, huge numbers), depth and bulk."""
    level, values = [data], 0
    for _ in range(_DEPTH):
        for value in level:
            if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                raise TableError(f"{name}: a key of a table is {next(k for k in value if not isinstance(k, str))!r}")
            if not isinstance(value, (dict, list, str, int, float, type(None))):
                raise TableError(f"{name}: {value!r} is a {type(value).__name__}; wanted text, a number, true or false")
            if isinstance(value, float) and not math.isfinite(value):
                raise TableError(f"{name}: a number is {value}; wanted a finite one")
            if isinstance(value, int) and abs(value) >= 1 << 63:
                raise TableError(f"{name}: a whole number has more than 64 bits")
            if isinstance(value, str) and not is_text(value):
                raise TableError(f"{name}: {value!r} holds half a pair of surrogates")
        inside = [value.values() if isinstance(value, dict) else value for value in level if _is_nested(value)]
        values += sum(map(len, inside))
        if values > _VALUES:
            raise TableError(f"{name} has more than {_VALUES} values")
        level = [part for parts in inside for part in parts]
    if level:
        raise TableError(f"{name} is nested too deeply")


def _is_nested(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _toml_parser() -> Any:
    """In the standard library from Python 3.11 on; before that the same parser is the package tomli."""
    if sys.version_info >= (3, 11):
        return importlib.import_module("tomllib")
    return require("tomli", purpose="reading a .toml table with Python 3.10")


def _row(row: Mapping[str, Any], base: Mapping[str, Any], first: Sequence[str], last: Sequence[str], where: str) -> Row:
    if "name" not in row:
        raise TableError(f"{where}: name is missing")
    name = _typed(row["name"], str, f"{where} name").strip()
    where = f"{where} ({name})"
    if not name or "\n" in name or "|" in name:
        raise TableError(f"{where}: wanted a name of one line without '|'")
    _known(row, _ROW_KEYS, where)
    texts = _list_of(row.get("bits", base.get("bits", ["W4A4"])), str, f"{where} bits")
    own = _assignments(row.get("settings", []), f"{where} settings")
    images = None
    if "images" in row:
        text = _typed(row["images"], str, f"{where} images")
        images = text.removeprefix("data:")
        if images == text:
            raise TableError(f"{where}: images is {text!r}; wanted 'data:SECTION', real images without labels")
        section_range(images, sys.maxsize)
    try:
        widths = tuple(Width.parse(text) for text in texts)
        start = preset(_typed(row.get("preset", base.get("preset", "default")), str, "preset"))
        config = override(start, [*first, *own, *last])
        if images is not None:
            config = replace(config, finetune=replace(config.finetune, images="bank"))
    except ValueError as error:
        raise TableError(f"{where}: {error}") from error
    if not widths or len(set(widths)) != len(widths):
        raise TableError(f"{where}: bits are {texts}; wanted one or more different widths")
    return Row(name, widths, tuple(own), config, images)


def _assignments(settings: Any, where: str) -> list[str]:
    """Settings as for `--set` from a list of those, or from a mapping of sections or of `section.field` keys."""
    if isinstance(settings, list):
        return _list_of(settings, str, where)
    if not isinstance(settings, Mapping):
        raise TableError(f"{where}: wanted a list of 'section.field=value' or a table of sections")
    texts = []
    for key, value in settings.items():
        fields = {key: value} if "." in key else {f"{key}.{field}": v for field, v in _mapping(value, key, where)}
        texts += [f"{field}={_text(v)}" for field, v in fields.items()]
    return texts


def _mapping(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise TableError(f"{where}: {key} is {value!r}; wanted a table of the fields of section {key}")
    return value.items()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sections(evaluate: Any, where: str) -> dict[str, str]:
    if not isinstance(evaluate, Mapping):
        raise TableError(f"{where}: wanted a table of sections, such as {{ choose = 'first half', report = '2:4' }}")
    _known(evaluate, SECTIONS, where)
    for name in ("choose", "report"):
        if name not in evaluate:
            raise TableError(f"{where}: {name} is missing; choosing and reporting are done on different images")
    sections = {name: _typed(evaluate.get(name, "all"), str, f"{where} {name}") for name in SECTIONS}
    for section in sections.values():
        # Only whether it can be read: how many images there are is not known yet.
        section_range(section, sys.maxsize)
    return sections


def _inputs(base: Mapping[str, Any], where: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if "input_size" in base:
        inputs["input_size"] = _typed(base["input_size"], int, f"{where} input_size")
    if "normalization" in base:
        inputs["normalization"] = _typed(base["normalization"], str, f"{where} normalization")
    if ("mean" in base) != ("std" in base):
        raise TableError(f"{where}: mean and std belong together")
    for key in ("mean", "std"):
        if key in base:
            inputs[key] = tuple(float(v) for v in _list_of(base[key], (int, float), f"{where} {key}"))
    return inputs


def _known(data: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    unknown = next((key for key in data if key not in keys), None)
    if unknown is not None:
        raise TableError(f"{where}: no key {unknown!r}; wanted {', '.join(keys)}")


def _typed(value: Any, kind: Any, where: str) -> Any:
    # bool is an int to Python.
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {int: "a whole number", str: "text", (int, float): "a number"}
        raise TableError(f"{where} is {value!r}; wanted {names[kind]}")
    return value


def _list_of(value: Any, kind: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise TableError(f"{where} is {value!r}; wanted a list")
    return [_typed(part, kind, where) for part in value]
