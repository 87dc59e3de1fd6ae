"""`tunesmith show`: the tokens of some rows with the trained ones marked."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from tunesmith.cli.main import app, say


class Turns(StrEnum):
    """Which assistant turns are trained."""

    all = "all"
    last = "last"


EXAMPLE = """
Show what would be trained: the tokens of N rows, the trained ones marked.

[bold]Examples[/]

  tunesmith show rows.jsonl --model pocket -n 2

  tunesmith show rows.jsonl --model Qwen/Qwen3-0.6B --turns last --json
"""


@app.command(help=EXAMPLE)
def show(
    data: Annotated[str, typer.Argument(help="file, folder or hub id")],
    model: Annotated[str, typer.Option(help="hub id, folder, run folder or pocket (its tokenizer is used)")] = "pocket",
    template: Annotated[str, typer.Option(help="auto, a named template, a Jinja file, or none")] = "auto",
    n: Annotated[int, typer.Option("-n", min=1, help="rows to show")] = 3,
    data_format: Annotated[str, typer.Option("--format", help="auto, or a name: messages, preference, ...")] = "auto",
    turns: Annotated[Turns, typer.Option(help="assistant turns that are trained")] = Turns.all,
    max_length: Annotated[int | None, typer.Option(min=1, help="mark rows over this many tokens as dropped")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Render the first rows and print them."""
    from tunesmith.core import log
    from tunesmith.core.card import read_card
    from tunesmith.core.recipe import Source
    from tunesmith.data.show import painted, show_rows
    from tunesmith.data.template import choose_template
    from tunesmith.model.tokenizer import load_tokenizer, resolve

    log.set_up()
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    card = read_card(folder)
    chosen = choose_template(tokenizer, template, card.template_options if card and template == "auto" else None)
    shown = show_rows(Source(path=data, format=data_format), tokenizer, chosen, n, turns=turns.value, max_length=max_length)
    if as_json:
        say(shown)
        return
    from rich.console import Console

    Console(highlight=False).print(painted(shown, frozenset(tokenizer.all_special_ids)))
