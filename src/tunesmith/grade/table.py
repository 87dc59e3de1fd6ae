"""The graders by name: keyword-only arguments of a row's function are its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tunesmith.core.ports import Grader
from tunesmith.core.table import Entry, Table
from tunesmith.core.types import Grade
from tunesmith.grade.number import numeric
from tunesmith.grade.options import choice
from tunesmith.grade.structure import json_fields, json_valid
from tunesmith.grade.text import contains, exact, regex

GRADERS: Table[Callable[..., Grade]] = Table(
    "grader",
    {
        "exact": Entry(exact, source="Rajpurkar 2016, arXiv:1606.05250 (normalisation)"),
        "contains": Entry(contains),
        "regex": Entry(regex),
        "numeric": Entry(numeric, source="Cobbe 2021, arXiv:2110.14168 (the #### mark)"),
        "json_valid": Entry(json_valid, source="RFC 8259"),
        "json_fields": Entry(json_fields),
        "choice": Entry(choice),
    },
)


def grader(name: str, settings: Mapping[str, Any] | None = None, *, where: str = "") -> Grader:
    """The grader called `name` with its settings bound. Raises RecipeError for an unknown name or setting."""
    entry = GRADERS.check(name, settings or {}, where=where)
    return partial(entry.function, **(settings or {}))
