"""The errors of the house: each says what is wrong, where, and what to do.

TunesmithError
  RecipeError      a setting is unknown, misspelt, impossible or in conflict
  DataError        a row or a file cannot be read as what it should be
  TemplateError    a chat template cannot be applied, or not in exactly one way
  ModelError       a model folder is missing, broken or of an unsupported kind
  CheckpointError  a run folder cannot be continued or a save did not complete
  CapacityError    memory or disk does not suffice
  GradeError       a grader is misused
  JobError         a fine-tuning job is in the wrong state
  BugError         ours: please report
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunesmithError(Exception):
    """One failure in three parts: message (what), where (file:line, field path or tensor), remedy (what to do)."""

    code = "error"

    def __init__(self, message: str, *, where: str = "", remedy: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  -> {self.remedy}" if self.remedy else head

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.where, self.remedy, self.code))

    def as_dict(self) -> dict[str, str]:
        """The error object of every `--json` output."""
        return {"code": self.code, "where": self.where, "message": self.message, "remedy": self.remedy}


def _rebuild(kind: type[TunesmithError], message: str, where: str, remedy: str, code: str) -> TunesmithError:
    return kind(message, where=where, remedy=remedy, code=code)


class RecipeError(TunesmithError):
    """A setting is unknown, misspelt, impossible or in conflict with another."""

    code = "recipe"


class DataError(TunesmithError):
    """A row or a file cannot be read as what it should be."""

    code = "data"


class TemplateError(TunesmithError):
    """A chat template cannot be applied, or the trained words cannot be found in exactly one way."""

    code = "template"


class ModelError(TunesmithError):
    """A model folder is missing, broken or of an unsupported kind."""

    code = "model"


class CheckpointError(TunesmithError):
    """A run folder cannot be continued, or a save did not complete."""

    code = "checkpoint"


class CapacityError(TunesmithError):
    """Memory or disk does not suffice."""

    code = "capacity"


class GradeError(TunesmithError):
    """A grader is unknown, misused, or got something it cannot grade."""

    code = "grade"


class JobError(TunesmithError):
    """A fine-tuning job is in the wrong state for what was asked."""

    code = "job"


class BugError(TunesmithError):
    """An invariant of ours does not hold: please report it."""

    code = "bug"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
