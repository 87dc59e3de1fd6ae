"""`tunesmith check`: every problem of a recipe at once, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Check a recipe and its data without training: problems, token ledger, and where each value came from.

[bold]Example[/]

  tunesmith check recipes/sft-lora.yaml --set tokens.max_length=512
"""


@app.command(help=EXAMPLE)
def check(
    recipe: Annotated[Path | None, typer.Argument(help="recipe file (YAML or JSON)")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="put a value into the recipe; may be repeated")] = None,
    method: Annotated[str | None, typer.Option(help="short form: the methods of 'tunesmith train'")] = None,
    model: Annotated[str | None, typer.Option(help="short form: hub id, folder, run folder or pocket")] = None,
    data: Annotated[str | None, typer.Option(help="short form: file, folder or hub id of rows")] = None,
    out: Annotated[str | None, typer.Option(help="short form: run folder")] = None,
    template: Annotated[str | None, typer.Option(help="short form: named template, Jinja file, auto or none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Load, inspect and report; exit status 1 when there is a problem."""
    from tunesmith.cli.short_form import load_words
    from tunesmith.core import log
    from tunesmith.core.load import Loaded, dump_yaml
    from tunesmith.core.recipe import Recipe

    log.set_up()
    stages = load_words(recipe, sets or [], method=method, model=model, data=data, out=out, template=template)
    from tunesmith.training.inspect import inspect_stages  # torch: after the words, so that a misspelt one is said at once

    reports = inspect_stages(stages)
    bad = any(report["problems"] for report in reports)
    if as_json:
        say(reports[0] if len(reports) == 1 else {**reports[0], "stages": reports, "problems": [p for r in reports for p in r["problems"]]})
    else:
        for stage, report in zip(stages, reports, strict=True):
            typer.echo(dump_yaml(Loaded(Recipe(**report["recipe"]), report["origin"], stage.name)))
            typer.echo(report["summary"])
            for problem in report["problems"]:
                typer.secho(f"problem  {problem['where']}: {problem['message']}\n  -> {problem['remedy']}", fg="red")
            typer.echo("no problem found" if not report["problems"] else f"{len(report['problems'])} problem(s)")
    raise typer.Exit(1 if bad else 0)
