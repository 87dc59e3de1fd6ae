"""Running text: {"text": "..."}; every token is trained."""

from __future__ import annotations

from tunesmith.core.types import Row, Text
from tunesmith.data.formats import turns

COLUMNS = ("text",)


def looks_like(row: Row) -> bool:
    """Has text as a string."""
    return isinstance(row.get("text"), str)


def to_example(row: Row, key: str) -> Text:
    """The text of a row. Raises DataError when it is missing, empty or no text."""
    text = turns.string(turns.required(row, "text", key), key, "text")
    if not text.strip():
        turns.fail(key, "text", "empty_text", "the text is empty")
    return Text(text, key)
