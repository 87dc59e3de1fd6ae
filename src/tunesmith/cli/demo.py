"""`tunesmith demo`: the quickstart on the bundled base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.main import app, say

EXAMPLE = """
Fine-tune the bundled base on support tickets, evaluate before and after, write a report; about two minutes on two cores.

[bold]Example[/]

  tunesmith demo --out demo

  tunesmith demo --align      # preferences and rewards on the same base; two to three minutes
"""


@app.command(help=EXAMPLE)
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, run and report")] = Path("demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="train again even if the folder holds a finished demo")] = False,
    seed: Annotated[int, typer.Option(help="seed of data order and adapter")] = 0,
    with_preferences: Annotated[bool, typer.Option("--align", help="instead: dpo, ipo, simpo, orpo, kto and a reward model")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Run it and print what came out."""
    from tunesmith.core import log
    from tunesmith.demo import align, print_align, print_demo
    from tunesmith.demo import demo as run_demo

    log.set_up()
    work, tell = (align, print_align) if with_preferences else (run_demo, print_demo)
    result = work(out, fresh=fresh, seed=seed)
    if as_json:
        say(result)
    else:
        tell(result)
