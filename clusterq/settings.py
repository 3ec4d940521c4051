"""Settings from the command line: `--set synthesis.num_images=1024`, checked against the configuration's fields."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clusterq.config import ClusterQConfig

_SECTIONS = ("quantization", "synthesis", "finetune")


def override(config: ClusterQConfig, assignments: Sequence[str]) -> ClusterQConfig:
    """A copy of `config` with `section.field=value` assignments applied in order.

    Values are JSON; text that is not JSON stands for itself, so `synthesis.source=generator` needs no quotes.

    Raises:
        ValueError: no `=`, an unknown section or field, or a value that is not of the field's type.
    """
    changes: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, _, field = name.partition(".")
        if not equals or section not in _SECTIONS or not field:
            raise ValueError(f"--set {assignment!r}: wanted SECTION.FIELD=VALUE with SECTION {', '.join(_SECTIONS)}")
        part = getattr(config, section)
        hints = typing.get_type_hints(type(part))
        if field not in hints:
            raise ValueError(f"--set {assignment!r}: no setting {field!r}; {section} has {', '.join(hints)}")
        changes.setdefault(section, {})[field] = _value(name, text, hints[field])
    parts = {section: dataclasses.replace(getattr(config, section), **values) for section, values in changes.items()}
    return dataclasses.replace(config, **parts)


def describe(config: ClusterQConfig) -> Iterator[str]:
    """One line per setting: its name, its value in `config`, and what else it may be."""
    for section in _SECTIONS:
        part = getattr(config, section)
        for field, hint in typing.get_type_hints(type(part)).items():
            value = getattr(part, field)
            shown = value if isinstance(value, str) else json.dumps(value)
            yield f"{section}.{field}={shown}  ({_kind(hint)})"


def _value(name: str, text: str, hint: Any) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    if isinstance(value, list):
        value = tuple(value)
    if _accepts(hint, float) and isinstance(value, int) and not isinstance(value, bool) and not _accepts(hint, int):
        value = float(value)
    if not _fits(value, hint):
        raise ValueError(f"{name} is {text!r}; wanted {_kind(hint)}")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _accepts(hint: Any, kind: type) -> bool:
    return kind in _options(hint)


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return True
        elif origin is tuple:
            if isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value):
                return len(value) == len(typing.get_args(option))
        elif origin is not None and issubclass(origin, Mapping):
            if isinstance(value, dict):
                return True
        elif isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return True
    return False


def _kind(hint: Any) -> str:
    names = []
    for option in _options(hint):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            names += [str(v) for v in typing.get_args(option)]
        elif origin is tuple:
            names.append(f"{len(typing.get_args(option))} numbers as [a, b]")
        elif origin is not None:
            names.append('{"name": number, ...}')
        else:
            names.append({"NoneType": "null", "int": "whole number", "float": "number", "bool": "true or false"}.get(
                option.__name__, option.__name__
            ))  # fmt: skip
    return " | ".join(names)
