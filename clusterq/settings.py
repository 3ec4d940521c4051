"""Checks of settings against the annotations of their fields, and settings from the command line.

A field's annotation says all that one value must be: its type, and with `Annotated[int, Range(at_least=1)]` its range.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterq.config import ClusterQConfig

_SECTIONS = ("quantization", "synthesis", "finetune")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number; None where there is no bound. Infinite numbers and NaN are outside of every range."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            abs(value) <= sys.float_info.max
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {name.replace("_", " "): value for name, value in dataclasses.asdict(self).items()}
        return " and ".join(f"{name} {value}" for name, value in bounds.items() if value is not None)


class LayerBits(Mapping[str, int]):
    """Widths by module name that cannot be changed, so that a configuration can be hashed and shared.

    Equal to any mapping with the same items.
    """

    def __init__(self, bits: Mapping[str, int]) -> None:
        self._bits = dict(bits)

    def __getitem__(self, name: str) -> int:
        return self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __hash__(self) -> int:
        return hash(frozenset(self._bits.items()))

    def __repr__(self) -> str:
        return repr(self._bits)


def check_fields(instance: Any, section: str) -> None:
    """Check every field of a dataclass instance against its annotation.

    Args:
        instance: of a dataclass whose annotations are built from int, float, bool, str, None, Literal, classes,
            Mapping, fixed tuples, unions, and Annotated with a `Range`. An int fits float; a bool fits bool only.
        section: put before the name of the field in the error; may be empty.

    Raises:
        ValueError: names the first field that does not fit, what it got and what it wanted.
    """
    for name, hint in typing.get_type_hints(type(instance), include_extras=True).items():
        check_value(f"{section}.{name}" if section else name, getattr(instance, name), hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError where `value` does not fit the annotation `hint`; see `check_fields`."""
    if not _fits(value, hint):
        raise ValueError(f"{name} is {value!r}; wanted {_kind(hint)}")


def override(config: ClusterQConfig, assignments: Sequence[str]) -> ClusterQConfig:
    """A copy of `config` with `section.field=value` assignments applied in order.

    Values are JSON; text that is not JSON stands for itself, so `synthesis.source=generator` needs no quotes.

    Raises:
        ValueError: no `=`, an unknown section or field, a value that does not fit its field, or settings that
            contradict each other once all are applied.
    """
    changes: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, _, field = name.partition(".")
        if not equals or section not in _SECTIONS or not field:
            raise ValueError(f"--set {assignment!r}: wanted SECTION.FIELD=VALUE with SECTION {', '.join(_SECTIONS)}")
        part = getattr(config, section)
        hints = typing.get_type_hints(type(part), include_extras=True)
        if field not in hints:
            raise ValueError(f"--set {assignment!r}: no setting {field!r}; {section} has {', '.join(hints)}")
        changes.setdefault(section, {})[field] = _value(name, text, hints[field])
    parts = {section: dataclasses.replace(getattr(config, section), **values) for section, values in changes.items()}
    return dataclasses.replace(config, **parts)


def describe(config: ClusterQConfig) -> Iterator[str]:
    """One line per setting: its name, its value in `config`, and what else it may be."""
    for section in _SECTIONS:
        part = getattr(config, section)
        for field, hint in typing.get_type_hints(type(part), include_extras=True).items():
            value = getattr(part, field)
            shown = value if isinstance(value, str) else json.dumps(value, default=dict)
            yield f"{section}.{field}={shown}  ({_kind(hint)})"


def _value(name: str, text: str, hint: Any) -> Any:
    try:
        value = json.loads(text)
    # RecursionError, ValueError of huge numbers: no value of a setting looks like that.
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text, text)
    value = from_json(value, hint)
    check_value(name, value, hint)
    return value


def from_json(value: Any, hint: Any) -> Any:
    """A value as a field with the annotation `hint` holds it: JSON has no tuples, and its 1 may be the number 1.0.

    Equal settings are then written alike. A value that does not fit the field stays as it is, but for the tuple.
    """
    if isinstance(value, list):
        value = tuple(value)
    if not _fits(value, hint):
        return value
    kinds = [_plain(option)[0] for option in _options(hint)]
    if isinstance(value, tuple):
        parts = next(typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple)
        return tuple(map(from_json, value, parts))
    return float(value) if type(value) is int and float in kinds and int not in kinds else value


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _plain(option: Any) -> tuple[Any, Range]:
    """The type of an option and its range."""
    if typing.get_origin(option) is typing.Annotated:
        kind, bounds = typing.get_args(option)
        return kind, bounds
    return option, Range()


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_option(value, *_plain(option)) for option in _options(hint))


def _fits_option(value: Any, kind: Any, bounds: Range) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_fits(part, hint) for part, hint in zip(value, arguments, strict=True))
        )
    if origin is not None:
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(part, arguments[1]) for key, part in value.items()
        )
    if kind in (int, float):
        # bool is an int to Python, but 1 and True say different things here.
        number = type(value) is int or (kind is float and type(value) is float)
        return number and value in bounds
    return isinstance(value, kind)


def _kind(hint: Any) -> str:
    return " | ".join(_kind_option(*_plain(option)) for option in _options(hint))


def _kind_option(kind: Any, bounds: Range) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(arguments)
    if origin is tuple:
        return f"{len(arguments)} values as [a, b]: {_kind(arguments[0])}"
    if origin is not None:
        return f'{{"name": {_kind(arguments[1])}, ...}}'
    names = {type(None): "null", int: "whole number", float: "number", bool: "true or false", str: "text"}
    return f"{names.get(kind, kind.__name__)} {bounds}".strip()
