"""Fields of a record from a JSON file, checked: what other code relies on.

`first_wrong` looks at a whole record by dotted names; `items`, `whole`, `number` and `text` take single values, and
`fields_checked` turns what goes wrong among them into one error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from clusterq.readers import Failure

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


@contextmanager
def fields_checked(problem: str, failure: Failure) -> Iterator[None]:
    """Within it, what Python raises for JSON values that are absent or of another kind becomes `failure`.

    Args:
        problem: what that means, such as "FILE is damaged".
        failure: error class.
    """
    try:
        yield
    except KeyError as error:
        raise failure(f"{problem}: it has no {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise failure(f"{problem}: {error}") from error


def items(value: Any, count: int | None = None) -> list[Any]:
    """A list, of `count` entries where given. Raises ValueError for anything else."""
    if not isinstance(value, list) or count not in (None, len(value)):
        raise ValueError(f"{shown(value)} is not a list{'' if count is None else f' of {count}'}")
    return value


def whole(value: Any, name: str, least: int = -(1 << 63), most: int = (1 << 63) - 1) -> int:
    """A whole number within these bounds. Raises ValueError for anything else."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}; wanted a whole number from {least} to {most}")
    return value


def number(value: Any, name: str) -> float:
    """A finite number. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}; wanted a number")
    return float(value)


def text(value: Any, name: str) -> str:
    """A text. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; wanted text")
    return value


def shown(value: Any) -> str:
    """A value for a message, 60 characters at most."""
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}..."
