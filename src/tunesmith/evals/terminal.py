"""Scores as a table in the terminal: base beside model, each with its interval, then the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.evals.result import Result, gap, number, p_text, span
from tunesmith.evals.stats import Interval

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.evals.run import Report

_COLOURS = {"better": "green", "worse": "red", "unclear": ""}


def print_scores(report: Report) -> None:
    """Print who was scored, the table, and what a reader must know to trust it, on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(f"model  {report.model}", soft_wrap=True)
    if report.base is not None:
        console.print(f"base   {report.base}", soft_wrap=True)
    console.print()
    console.print(score_table(report.results))
    seeds = ", ".join(str(seed) for seed in sorted({result.score.seed for result in report.results}))
    console.print(f"\nIn brackets: 95 % intervals. Seed {seeds}; settings {report.settings_hash[:12]}.", style="dim", soft_wrap=True)
    for note in report.notes:
        console.print(note, soft_wrap=True)


def score_table(results: Sequence[Result], *, model: str = "model", base: str = "base") -> Table:
    """The table as a rich renderable; the base's columns only where there is one. It fits 80 columns."""
    from rich.table import Table
    from rich.text import Text

    paired = any(result.score.base_value is not None for result in results)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for name in [base, model] if paired else [model]:
        table.add_column(Text(name), justify="right", no_wrap=True, overflow="ellipsis")
    if paired:
        table.add_column("difference", justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result, paired))
    return table


def _cells(result: Result, paired: bool) -> list[Text]:
    from rich.text import Text

    score, share, decimals = result.score, result.share, result.decimals

    def value(middle: float, ends: Interval | None, style: str) -> Text:
        around = f" [{span(ends.low, ends.high, decimals, share=share)}]" if ends else ""
        return Text.assemble((number(middle, decimals, share=share), style), (around, "dim"))

    cells = [Text(result.name), Text(str(score.n))]
    if paired:
        cells.append(Text("–") if score.base_value is None else value(score.base_value, result.base, ""))
    cells.append(value(score.value, Interval(score.value, score.low, score.high, score.n), "bold"))
    if paired and result.difference:
        found = result.difference
        cells.append(Text.assemble((gap(found, share=share), _COLOURS[result.change]), (f"  {p_text(found.p_value)}", "dim")))
    return cells
