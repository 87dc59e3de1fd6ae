"""Scores as a table in the terminal: base beside model, each with its interval, then the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.evals.result import Result, gap, number, p_text, span

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tunesmith.evals.run import Report

_COLOURS = {"better": "green", "worse": "red", "unclear": ""}


def print_scores(report: Report) -> None:
    """Print the table, then what a reader must know to trust it, on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(score_table(report.results, model=_short(report.model), base=_short(report.base) if report.base else None))
    seeds = ", ".join(str(seed) for seed in sorted({result.score.seed for result in report.results}))
    console.print(f"95 % intervals; seed {seeds}; settings {report.settings_hash[:12]}", style="dim")
    for note in report.notes:
        console.print(note, markup=False)


def score_table(results: Sequence[Result], *, model: str = "model", base: str | None = None) -> Table:
    """The table as a rich renderable."""
    from rich.table import Table
    from rich.text import Text

    paired = any(result.score.base_value is not None for result in results)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("task", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in [base or "base", model] if paired else [model]:
        table.add_column(Text(name), justify="right", overflow="ellipsis", no_wrap=True)
        table.add_column("95 %", style="dim", no_wrap=True)
    if paired:
        table.add_column("difference", justify="right", no_wrap=True)
        table.add_column("", style="dim", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result, paired))
    return table


def _cells(result: Result, paired: bool) -> list[Text]:
    from rich.text import Text

    score, share, decimals = result.score, result.share, result.decimals
    cells = [Text(result.name), Text(str(score.n))]
    if paired:
        cells.append(Text("–" if score.base_value is None else number(score.base_value, decimals, share=share)))
        cells.append(Text(span(result.base.low, result.base.high, decimals, share=share) if result.base else ""))
    cells += [Text(number(score.value, decimals, share=share), style="bold"), Text(span(score.low, score.high, decimals, share=share))]
    if paired and result.difference:
        cells.append(Text(gap(result.difference, share=share), style=_COLOURS[result.change]))
        cells.append(Text(p_text(result.difference.p_value)))
    return cells


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
