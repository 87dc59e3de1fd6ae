"""An inspection as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from tunesmith.data.inspection.dialogs import DialogReport
from tunesmith.data.inspection.labels import LabelReport
from tunesmith.data.inspection.lengths import LengthBias
from tunesmith.data.inspection.pairs import PairReport
from tunesmith.data.inspection.prompts import Overlap, Prompts
from tunesmith.data.inspection.report import Inspection
from tunesmith.data.inspection.steps import StepReport

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 3  # keys on one line
Lines = Iterator[tuple[str, str]]


def print_inspection(found: Inspection) -> None:
    """Print what was found on stdout, the suspects last."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(f"{found.data}  ({found.format}, {found.rows:,} rows)\n", soft_wrap=True)
    console.print(_grid(lines(found)))
    if isinstance(found.report, PairReport) and found.report.suspects:
        console.print(f"\n{found.report.suspicious:,} of {found.report.n:,} pairs may be labelled wrong; the most suspicious:")
        for odd in found.report.suspects:
            console.print(f"{odd.score:.2f}  {odd.key}: {odd.reason}", soft_wrap=True)
    for problem in found.problems[:_SHOWN]:
        console.print(f"cannot be used  {problem.key}: {problem.message}", style="red", soft_wrap=True)


def lines(found: Inspection) -> Lines:
    """The findings, each with its name."""
    report = found.report
    if found.problems:
        yield "cannot be used", ", ".join(f"{count:,} {code}" for code, count in found.codes().items())
    if isinstance(report, PairReport):
        yield from _pair_lines(report)
    elif isinstance(report, LabelReport):
        yield from _label_lines(report)
    elif isinstance(report, StepReport):
        yield from _step_lines(report)
    else:
        yield from _dialog_lines(report)
    yield "prompts", _prompts(report.prompts)
    if report.overlap is not None:
        yield "validation overlap", _overlap(report.overlap)


def _pair_lines(report: PairReport) -> Lines:
    yield "pairs", f"{report.n:,}" + (f", {report.margins:,} with a margin" if report.margins else "")
    for bias in filter(None, (report.characters, report.tokens)):
        yield from _bias_lines(bias, "chosen", "rejected")
    yield "answers alike", f"{report.alike:,}"
    yield "copies", f"{report.copies:,}"
    yield "contradictions", f"{report.contradicted:,} pairs{_couples(report.contradictions)}"


def _label_lines(report: LabelReport) -> Lines:
    yield "answers", f"{report.n:,}"
    if report.scored:
        yield (
            "scores",
            f"{report.scored:,}, from {report.lowest:g} to {report.highest:g}; kto and bco learn from true and false (1, 0) alone",
        )
    else:
        yield "labels", f"{report.desirable:,} good, {report.undesirable:,} bad"
        yield "unpaired", f"{100 * report.unpaired:.1f} % of them answer a prompt that has no answer of the other label"
    if report.weights:
        yield "kto balance", f"{report.weights.name} {report.weights.low:.2f} to {report.weights.high:.2f}, the other 1"
    for bias in filter(None, (report.characters, report.tokens)):
        yield from _bias_lines(bias, "good", "bad")
    yield "copies", f"{report.copies:,}"
    yield "contradictions", f"{report.contradicted:,} answers{_couples(report.contradictions)}"


def _step_lines(report: StepReport) -> Lines:
    yield "solutions", f"{report.n:,}, of {report.fewest} to {report.most} steps, {report.steps:,} in all"
    yield "with a wrong step", f"{100 * report.wrong:.1f} %"
    if report.first_wrong:
        yield "first wrong step", ", ".join(f"step {place}: {count:,}" for place, count in report.first_wrong.items())
    yield "right after wrong", f"{report.recovered:,} solutions"


def _dialog_lines(report: DialogReport) -> Lines:
    yield "rows", f"{report.n:,}, {report.turns:,} turns"
    yield "characters", f"{report.shortest:,} to {report.longest:,}, median {report.median:,.0f}"
    yield "copies", f"{report.copies:,}"


def _bias_lines(bias: LengthBias, good: str, bad: str) -> Lines:
    yield bias.unit, f"median {bias.good:,.0f} {good}, {bias.bad:,.0f} {bad}"
    share = ""
    if bias.longer is not None and bias.low is not None and bias.high is not None:
        share = f"{good} longer in {100 * bias.longer:.1f} % [{100 * bias.low:.1f} to {100 * bias.high:.1f}], {bias.ties:,} ties; "
    effect = "not defined" if bias.effect is None else f"{bias.effect:+.2f}"
    yield "", f"{share}Cohen's d {effect}, superiority {bias.superiority:.3f}"
    yield "", bias.verdict


def _prompts(prompts: Prompts) -> str:
    again = f", {prompts.repeated:,} of them in several rows (in {prompts.most:,} at most)" if prompts.repeated else ""
    return f"{prompts.distinct:,} distinct{again}"


def _overlap(found: Overlap) -> str:
    share = f"{found.shared:,} of {found.rows:,} validation rows ask what training asks"
    return share + (f": {_some(found.keys)}" if found.keys else "")


def _couples(couples: Sequence[tuple[str, str]]) -> str:
    return f": {_some(f'{one} and {other}' for one, other in couples)}" if couples else ""


def _some(texts: Iterable[str]) -> str:
    *first, last = islice(texts, _SHOWN + 1)
    return ", ".join([*first, last] if len(first) < _SHOWN else [*first, "..."])


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for name, words in rows:
        table.add_row(Text(name, style="dim"), Text(words))
    return table
