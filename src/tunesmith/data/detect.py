"""Which shape the rows of a source have: decided from many rows, checked on all, and never a mixture."""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith.core.errors import DataError, RecipeError, did_you_mean
from tunesmith.core.log import logger
from tunesmith.core.recipe import Source
from tunesmith.core.types import Kind, Row
from tunesmith.data.formats import COLUMNS, FORMATS, KINDS, LOOKS_LIKE
from tunesmith.data.problem import Problem
from tunesmith.data.readers import Found

_UNLABELLED = ("messages", "sharegpt", "alpaca", "prompt_completion")
_NAMES = ("messages", "conversations", "instruction", "output", "prompt", "completion", "text", "chosen", "rejected")
LOOK = 1000  # rows that decide; each later row is still held against the decision


# Rows of each kind in words, and the objectives that learn from them.
WORDS: dict[Kind, str] = {
    "dialogs": "dialogs or text",
    "pairs": "preference pairs",
    "labels": "labelled answers",
    "steps": "labelled steps",
}
OBJECTIVES: dict[Kind, str] = {
    "dialogs": "nll",
    "pairs": "dpo, simpo, orpo and the other preference losses, and reward models,",
    "labels": "kto, bco, reward_regression and reward_classes",
    "steps": "process-reward models",
}


def shapes(row: Row, kind: Kind | None = None) -> tuple[str, ...]:
    """The names of all formats that a row looks like; of several those of the wanted kind, where there are any (None: dialogs).

    Where pairs or steps are wanted and there are none, a dialog with a score is labelled, which says best what it is.
    """
    names = tuple(name for name, looks_like in LOOKS_LIKE.items() if looks_like(row))
    if kind == "steps" and not names and isinstance(row.get("completions"), list):
        return ("steps",)  # without labels, which reading it says
    # A score beside a dialog is a remark to one objective and the label to another.
    asked = tuple(name for name in names if KINDS[name] == (kind or "dialogs"))
    return asked or tuple(name for name in names if KINDS[name] != "dialogs") or names


def check_columns(source: Source) -> None:
    """Raise RecipeError when `columns` maps a name that no format reads, or `format` is unknown."""
    if source.format != "auto":
        FORMATS.get(source.format, where="data.format")
    known = sorted({name for names in COLUMNS.values() for name in names} if source.format == "auto" else COLUMNS[source.format])
    for ours in source.columns:
        if ours not in known:
            raise RecipeError(
                f"columns names '{ours}', which no format reads{did_you_mean(ours, known)}",
                where=f"{source.path}: columns",
                remedy=f"our names are: {', '.join(known)}; write {{ours: theirs}}",
                code="unknown_column",
            )


def detect(found: Iterable[Found], source: Source, kind: Kind | None = None) -> str:
    """The format of these rows (the first of a source), said in the log.

    `kind` is what an objective wants (None: whatever there is). Raises DataError when the format is unclear or mixed
    ("ambiguous_format", "mixed_formats", "unknown_format", "no_row"), or of another kind ("wrong_kind").
    """
    name = _detect(found, source, kind) if source.format == "auto" else source.format
    if kind is not None and KINDS[name] != kind:
        raise DataError(
            f"these rows are {WORDS[KINDS[name]]} (format {name}), and the objective learns from {WORDS[kind]}",
            where=source.path,
            remedy=f"{OBJECTIVES[KINDS[name]]} learn from {WORDS[KINDS[name]]}, {OBJECTIVES[kind]} from {WORDS[kind]}: "
            "change the objective, or the data (or its format:, if it was taken for something that it is not)",
            code="wrong_kind",
        )
    return name


def _detect(found: Iterable[Found], source: Source, kind: Kind | None) -> str:
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    unknown: tuple[str, Row] | None = None
    broken: Problem | None = None
    for key, row in found:
        if isinstance(row, Problem):
            broken = broken or row
            continue
        names = shapes(row, kind)
        if len(names) > 1:
            raise _ambiguous(names, key, row)
        for name in names:
            first.setdefault(name, key)
            counts[name] = counts.get(name, 0) + 1
        if not names and unknown is None:
            unknown = (key, row)
    if kind == "labels" and "labelled" in first:
        # Where labels are wanted, a row without one is a bad row, and not a row of another format.
        first = {name: key for name, key in first.items() if name not in _UNLABELLED}
    if len(first) > 1:
        (one, here), (other, there) = list(first.items())[:2]
        raise _mixture(source, one, here, other, there)
    if not first:
        raise _nothing_fits(source, unknown, broken)
    name = next(iter(first))
    logger.info("%s: format %s, decided from %d rows", source.path, name, counts[name])
    return name


def hold(name: str, first: str, key: str, row: Row, source: Source, kind: Kind | None = None) -> None:
    """Raise DataError when a later row is of another format than the `name` decided from the first rows (since row `first`)."""
    names = shapes(row, kind)
    if kind == "labels" and name == "labelled" and set(names) <= {name, *_UNLABELLED}:
        return
    if len(names) > 1:
        raise _ambiguous(names, key, row)
    if names and names[0] != name:
        raise _mixture(source, name, first, names[0], key)


def _ambiguous(names: tuple[str, ...], key: str, row: Row) -> DataError:
    return DataError(
        f"the row looks like several formats: {', '.join(names)} (its keys: {', '.join(map(str, row))})",
        where=key,
        remedy=f"say which one it is, for example format: {names[0]}",
        code="ambiguous_format",
    )


def _mixture(source: Source, one: str, here: str, other: str, there: str) -> DataError:
    return DataError(
        f"the rows are of several formats: {one} at {here}, {other} at {there}",
        where=source.path,
        remedy="put them into two files, or say which one holds with format: (the others are then refused)",
        code="mixed_formats",
    )


def _nothing_fits(source: Source, unknown: tuple[str, Row] | None, broken: Problem | None) -> DataError:
    if unknown is None and broken is not None:
        return DataError(f"no row could be read; the first: {broken.message}", where=broken.key, remedy=broken.remedy, code="no_row")
    if unknown is None:
        return DataError("no row could be read", where=source.path, remedy="mend the file", code="no_row")
    key, row = unknown
    if "input_ids" in row:
        hint = "; rows that are already token ids are not read: the ledger could not say what is trained"
    else:
        absent = [name for name in _NAMES if name not in row]  # a name that is there is no misspelling of another
        hint = next((near for name in row if name not in _NAMES and (near := did_you_mean(str(name), absent))), "")
    return DataError(
        f"the rows are of no known format; the first has the keys: {', '.join(map(str, row)) or 'none'}{hint}",
        where=key,
        remedy="known: messages, sharegpt (conversations), alpaca (instruction, output), prompt_completion (prompt, completion), text, "
        "preference (prompt, chosen, rejected), openai_preference, ranked (prompt, answers, scores), labelled (prompt, completion, label), "
        "steps (prompt, completions, labels); map other names with columns: {prompt: question, completion: answer} "
        "(--columns prompt=question,completion=answer)",
        code="unknown_format",
    )
