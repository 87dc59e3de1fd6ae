"""A table of named functions whose keyword-only arguments are their only settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tunesmith.core.errors import RecipeError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[F]):
    """One row: the function, what it needs filled in beforehand, and where it comes from."""

    function: F
    needs: frozenset[str] = frozenset()
    source: str = ""

    def settings(self) -> dict[str, Any]:
        """Names and defaults of the keyword-only arguments (a required one has `inspect.Parameter.empty`)."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


class Table(Generic[F]):
    """A read-only mapping that knows what it is a table of, and suggests the near miss."""

    def __init__(self, noun: str, rows: Mapping[str, Entry[F]]) -> None:
        self.noun = noun
        self._rows = dict(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Entry[F]:
        return self.get(name)

    def items(self) -> Iterator[tuple[str, Entry[F]]]:
        """Names and rows in the order they are written."""
        return iter(self._rows.items())

    def get(self, name: str, *, where: str = "") -> Entry[F]:
        """The row called `name`, or a RecipeError that names the nearest one."""
        if name not in self._rows:
            raise RecipeError(
                f"unknown {self.noun} '{name}'{did_you_mean(name, self._rows)}",
                where=where,
                remedy=f"use one of: {', '.join(self._rows)}",
                code="unknown_name",
            )
        return self._rows[name]

    def check(self, name: str, settings: Mapping[str, Any], *, where: str = "") -> Entry[F]:
        """The row called `name`, once every setting is one that its function takes and none that it needs is missing."""
        entry = self.get(name, where=where)
        known = entry.settings()
        for key in settings:
            if key not in known:
                raise RecipeError(
                    f"{self.noun} '{name}' has no setting '{key}'{did_you_mean(key, known)}",
                    where=f"{where}.{key}" if where else key,
                    remedy=f"its settings are: {', '.join(known) or 'none'}",
                    code="unknown_setting",
                )
        missing = [k for k, v in known.items() if v is inspect.Parameter.empty and k not in settings]
        if missing:
            raise RecipeError(
                f"{self.noun} '{name}' needs a value for: {', '.join(missing)}",
                where=where,
                remedy=f"set {missing[0]}",
                code="missing_setting",
            )
        return entry
