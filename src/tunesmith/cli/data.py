"""`tunesmith data`: what can be said of rows before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from tunesmith.cli.columns import read_columns
from tunesmith.cli.main import app, say

EXAMPLE = """
Look into rows without training: tunesmith data inspect DATA.

[bold]Example[/]

  tunesmith data inspect pairs.jsonl --validation held-out.jsonl
"""
INSPECT = """
Report on rows: for preference pairs length bias, ties, contradictions, overlap of prompts and label noise suspects; for labelled
answers and steps their balance; for any other format a summary.

[bold]Examples[/]

  tunesmith data inspect pairs.jsonl --validation held-out.jsonl --tokenizer pocket

  tunesmith data inspect kto.json --json
"""
data_app = typer.Typer(help=EXAMPLE, no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(data_app, name="data")


@data_app.callback()
def data() -> None:
    """Keep `inspect` a word of its own, which a single command would not be."""


@data_app.command(help=INSPECT)
def inspect(
    data: Annotated[str, typer.Argument(help="file, folder or hub id")],
    validation: Annotated[str | None, typer.Option(help="held-out rows, whose prompts training should not have")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "--model", help="hub id, folder, run folder or pocket: lengths in its tokens as well")
    ] = None,
    data_format: Annotated[str, typer.Option("--format", help="auto, or the format's name")] = "auto",
    columns: Annotated[
        str | None, typer.Option(metavar="OURS=THEIRS,...", help="names of columns, e.g. prompt=question,completion=answer")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="read at most this many rows")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Read, count and print; exit status 0 whatever was found in rows that can be read."""
    from tunesmith.core import log
    from tunesmith.core.recipe import Source
    from tunesmith.data.inspection import inspect as look_into

    log.set_up()
    names = read_columns(columns)
    held_out = None if validation is None else Source(path=validation, format=data_format, columns=names)
    source = Source(path=data, format=data_format, columns=names, limit=limit)
    found = look_into(source, held_out, _counter(tokenizer) if tokenizer else None)
    if as_json:
        say(found.as_dict())
        return
    from tunesmith.data.inspection.terminal import print_inspection

    print_inspection(found)


def _counter(model: str) -> Callable[[list[str]], list[int]]:
    from tunesmith.data.tokenizer import encode_many
    from tunesmith.model.tokenizer import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(model))
    return lambda texts: [len(found.ids) for found in encode_many(tokenizer, texts)]
