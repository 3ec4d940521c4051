"""Fields of a record: what is absent, of another type, or text that no file can hold is named."""

from __future__ import annotations

from typing import Any

import pytest

from clusterq.records import NUMBER, TEXT_OR_NONE, first_wrong, is_text

FIELDS = {"a.b": int, "a.c": NUMBER, "d": TEXT_OR_NONE, "e": [NUMBER], "f": dict}
RECORD: dict[str, Any] = {"a": {"b": 3, "c": 0.5}, "d": None, "e": [1, 2.5], "f": {}}


def test_a_record_that_has_all_of_it() -> None:
    assert first_wrong({**RECORD, "more": "is not looked at"}, FIELDS) is None
    assert first_wrong({**RECORD, "d": "text", "e": []}, FIELDS) is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"a": {"c": 0.5}}, "a.b"),
        ({"a": {"b": True, "c": 0.5}}, "a.b"),
        ({"a": {"b": 3.0, "c": 0.5}}, "a.b"),
        ({"a": {"b": 3, "c": "0.5"}}, "a.c"),
        ({"a": [3]}, "a.b"),
        ({"d": 3}, "d"),
        ({"d": "\ud800"}, "d"),
        ({"e": 3}, "e"),
        ({"e": [1, None]}, "e"),
        ({"e": [1, False]}, "e"),
        ({"f": []}, "f"),
    ],
)
def test_the_first_wrong_field_is_named(change: dict[str, Any], name: str) -> None:
    assert first_wrong({**RECORD, **change}, FIELDS) == name


@pytest.mark.parametrize("data", [None, 3, [RECORD], "a.b"])
def test_something_else(data: object) -> None:
    assert first_wrong(data, FIELDS) == "a.b"


def test_text_is_what_a_file_can_hold() -> None:
    assert is_text("ä 木 \U0001f600 \ufffd") and not is_text("a\udfffb")
