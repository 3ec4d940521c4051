"""Fields of a record from a JSON file, checked by dotted names: what other code relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUMBER = (int, float)
TEXT_OR_NONE = (str, type(None))


def first_wrong(data: Any, fields: Mapping[str, Any]) -> str | None:
    """The first dotted name under which nested dictionaries hold no value of its kind; None where all do.

    Args:
        data: as JSON gives it.
        fields: dotted name -> type or types, as for `isinstance`, but for bool, which is no int here, and for text that
            no file can hold; `[type]` or `[types]`: a list of such values.
    """
    return next((name for name, kind in fields.items() if not _holds(data, name, kind)), None)


def _holds(data: Any, name: str, kind: Any) -> bool:
    for key in name.split("."):
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    if isinstance(kind, list):
        return isinstance(data, list) and all(_is(part, kind[0]) for part in data)
    return _is(data, kind)


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, str) and not is_text(value):
        return False
    # bool is an int to Python.
    return isinstance(value, kind) and not isinstance(value, bool)


def is_text(value: str) -> bool:
    """Whether a file can hold it: JSON and YAML can say half of a pair of surrogates, which UTF-8 has no bytes for."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
