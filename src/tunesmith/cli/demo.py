"""`tunesmith demo`: the quickstart on the bundled base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Fine-tune the bundled base on support tickets, evaluate before and after, write a report; under a minute on two cores.

[bold]Example[/]

  tunesmith demo --out demo

  tunesmith demo --align                    # preferences and rewards on the same base; six to ten minutes

  tunesmith demo --align --only dpo         # one of its stages
"""


@app.command(help=EXAMPLE)
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, run and report")] = Path("demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="train again even if the folder holds a finished demo")] = False,
    seed: Annotated[int, typer.Option(help="seed of data order and adapter")] = 0,
    with_preferences: Annotated[bool, typer.Option("--align", help="instead: dpo, ipo, simpo, orpo, kto, reward, prm")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="STAGE", help="of --align: this stage; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Run it and print what came out."""
    from tunesmith.core import log
    from tunesmith.core.errors import RecipeError
    from tunesmith.demo import align, print_align, print_demo
    from tunesmith.demo import demo as run_demo

    log.set_up()
    if only and not with_preferences:
        raise RecipeError("--only names stages of --align", where="--only", remedy="add --align", code="usage")
    result = align(out, fresh=fresh, seed=seed, only=only or ()) if with_preferences else run_demo(out, fresh=fresh, seed=seed)
    if as_json:
        say(result)
    else:
        (print_align if with_preferences else print_demo)(result)
