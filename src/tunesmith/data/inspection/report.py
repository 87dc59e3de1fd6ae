"""From a source to its report: rows are read in whatever format they have, and what cannot be read is counted."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

from tunesmith.core.errors import DataError
from tunesmith.core.recipe import Source
from tunesmith.core.types import Dialog, Example, Kind, Labelled, Pair, Ranked, Steps, Text
from tunesmith.data.detect import LOOK, WORDS, check_columns, detect, hold
from tunesmith.data.formats import FORMATS, KINDS
from tunesmith.data.inspection.dialogs import DialogReport, inspect_dialogs
from tunesmith.data.inspection.labels import LabelReport, inspect_labels
from tunesmith.data.inspection.lengths import Counter
from tunesmith.data.inspection.pairs import PairReport, inspect_pairs
from tunesmith.data.inspection.prompts import SHOWN
from tunesmith.data.inspection.steps import StepReport, inspect_steps
from tunesmith.data.judged import Rule, pairs_of
from tunesmith.data.problem import Problem
from tunesmith.data.sources import read

AnyReport = PairReport | LabelReport | StepReport | DialogReport
Noun = TypeVar("Noun", Pair, Labelled, Steps)


@dataclass
class Examples:
    """The rows of a source: those that could be read, and what was wrong with the others."""

    format: str
    rows: int = 0
    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """What an objective can learn from these rows."""
        return KINDS[self.format]


@dataclass(frozen=True)
class Inspection:
    """The report on a source: its format and kind, how many rows it has, the problems of those that cannot be used, and the rest."""

    data: str
    format: str
    kind: Kind
    rows: int
    problems: list[Problem]
    report: AnyReport

    def codes(self) -> dict[str, int]:
        """How many rows have each problem."""
        return dict(sorted(Tally(problem.code for problem in self.problems).items()))

    def as_dict(self) -> dict[str, Any]:
        """The inspection as JSON; of the problems the first ten in words."""
        return {
            "data": self.data,
            "format": self.format,
            "kind": self.kind,
            "rows": self.rows,
            "problems": self.codes(),
            "unusable": [problem.as_dict() for problem in self.problems[:SHOWN]],
            "report": asdict(self.report),
        }


def inspect(source: Source, validation: Source | None = None, count_tokens: Counter | None = None, rule: Rule = "best_worst") -> Inspection:
    """Read a source, and held-out rows of the same kind, and report on them.

    `count_tokens` gives the number of tokens of each of some texts; ranked lists are turned into pairs by `rule`. Raises DataError as
    reading does, "no_row" when not one row can be used, and "wrong_kind" when the held-out rows are of another kind.
    """
    found = examples_of(source, rule)
    held = None if validation is None else _held_out(validation, rule, source, found.kind)
    report = _report(found, held, count_tokens)
    if report is None:
        first = found.problems[0]
        raise DataError(f"no row can be used; the first: {first.message}", where=first.key, remedy=first.remedy, code="no_row")
    return Inspection(source.path, found.format, found.kind, found.rows, found.problems, report)


def _held_out(validation: Source, rule: Rule, source: Source, kind: Kind) -> Examples:
    """The held-out rows. Raises DataError `wrong_kind` when they are of another kind."""
    try:
        return examples_of(validation, rule, kind)
    except DataError as error:
        if error.code != "wrong_kind":
            raise
        raise DataError(
            f"these rows are of another kind than {source.path}, which has {WORDS[kind]}",
            where=error.where,
            remedy="compare files of one kind",
            code=error.code,
        ) from error


def examples_of(source: Source, rule: Rule = "best_worst", kind: Kind | None = None) -> Examples:
    """All rows of a source. Raises DataError when they are of no known format, of several, or not of the wanted kind."""
    check_columns(source)
    found = iter(read(source))
    head = list(islice(found, LOOK))
    name = detect(head, source, kind)
    to_example, out = FORMATS.get(name).function, Examples(name)
    for key, row in chain(head, found):
        out.rows += 1
        if isinstance(row, Problem):
            out.problems.append(row)
            continue
        if source.format == "auto":
            hold(name, head[0][0], key, row, source, kind)
        try:
            example = to_example(row, key)
        except DataError as error:
            out.problems.append(Problem.of(error, key))
            continue
        if isinstance(example, Ranked):
            pairs, ties = pairs_of(example, rule)
            out.examples += pairs
            out.problems += ties
        else:
            out.examples.append(example)
    return out


def _report(found: Examples, held: Examples | None, count_tokens: Counter | None) -> AnyReport | None:
    if found.kind == "pairs":
        return inspect_pairs(_only(found, Pair), None if held is None else _only(held, Pair), count_tokens)
    if found.kind == "labels":
        return inspect_labels(_only(found, Labelled), None if held is None else _only(held, Labelled), count_tokens)
    if found.kind == "steps":
        return inspect_steps(_only(found, Steps), None if held is None else _only(held, Steps))
    return inspect_dialogs(_dialogs(found), None if held is None else _dialogs(held))


def _only(found: Examples, noun: type[Noun]) -> Iterator[Noun]:
    return (example for example in found.examples if isinstance(example, noun))


def _dialogs(found: Examples) -> Iterator[Dialog | Text]:
    return (example for example in found.examples if isinstance(example, Dialog | Text))
