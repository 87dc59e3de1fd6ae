"""`tunesmith score`: what a reward model gives for the rows of a file."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from tunesmith.cli.columns import read_columns
from tunesmith.cli.main import app, say


class Bad(StrEnum):
    """What happens when rows cannot be scored."""

    refuse = "refuse"
    drop = "drop"


EXAMPLE = """
Score rows with a reward model: one JSON line per row.

A conversation gives its key and score, a pair those of both answers, a solution in steps one score a step. A summary with
intervals goes to stderr. Rows that cannot be scored are listed, and nothing is scored (exit status 1), unless --on-bad drop.

[bold]Examples[/]

  tunesmith score runs/reward pairs.jsonl

  tunesmith score runs/reward chats.jsonl --format messages > scores.jsonl
"""


@app.command(help=EXAMPLE)
def score(
    model: Annotated[str, typer.Argument(help="reward model: hub id, folder or run folder")],
    data: Annotated[str, typer.Argument(help="file, folder or hub id of rows")],
    template: Annotated[str, typer.Option(help="auto: the model's own; or a named template, a Jinja file, or none")] = "auto",
    data_format: Annotated[str, typer.Option("--format", help="auto, or the name of a row format")] = "auto",
    columns: Annotated[
        str | None, typer.Option(metavar="OURS=THEIRS,...", help="names of columns, e.g. prompt=question,completion=answer")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    max_length: Annotated[int | None, typer.Option(min=8, help="longest row in tokens; default: what the model knows")] = None,
    on_bad: Annotated[Bad, typer.Option(help="rows that cannot be scored: refuse, or drop them")] = Bad.refuse,
    as_json: Annotated[bool, typer.Option("--json", help="the output is JSON lines in any case")] = False,
) -> None:
    """Score, print each row as it is done, and sum up."""
    from tunesmith.core import log
    from tunesmith.core.errors import DataError
    from tunesmith.core.recipe import Source
    from tunesmith.evals.score import score as score_rows
    from tunesmith.evals.score import summarise

    log.set_up()
    source = Source(path=data, format=data_format, columns=read_columns(columns))
    done = []
    try:
        for row in score_rows(model, source, template=template, device=device, max_length=max_length, on_bad=on_bad.value):
            say(row)
            done.append(row)
    except DataError as error:
        if error.code != "rows_refused":
            raise
        if as_json:
            say({"error": error.as_dict()})
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(1) from error
    sys.stderr.write("".join(f"{line}\n" for line in summarise(done).lines()))
