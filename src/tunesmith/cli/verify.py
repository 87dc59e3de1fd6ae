"""`tunesmith verify` and `tunesmith doctor`: re-check a run's receipt; say what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.main import app, say

VERIFY = """
Check a finished run again: every file of final/ against its hash, and its log-probabilities against the receipt.

[bold]Example[/]

  tunesmith verify runs/mine
"""

DOCTOR = """
Say what this machine can do: versions, processors, memory, accelerator, optional packages.

[bold]Example[/]

  tunesmith doctor
"""


@app.command(help=VERIFY)
def verify(
    run: Annotated[Path, typer.Argument(help="run folder")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Re-read and compare; exit status 1 when anything differs."""
    from tunesmith.core import log
    from tunesmith.training.receipt import verify as check_receipt

    log.set_up()
    found = check_receipt(run, device)
    if as_json:
        say(found)
    else:
        for name in found["changed_files"]:
            typer.secho(f"changed since training: final/{name}", fg="red")
        typer.echo(
            f"{found['probes']} probes, {found['measure']} differ by at most {found['max_abs_logprob_diff']:.1e} "
            f"(tolerance {found['tolerance']:.0e}): {'the receipt holds' if found['passed'] else 'THE RECEIPT DOES NOT HOLD'}"
        )
    raise typer.Exit(0 if found["passed"] else 1)


@app.command(help=DOCTOR)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False) -> None:
    """Look around and print it."""
    from tunesmith.training.receipt import machine

    found = machine()
    if as_json:
        say(found)
    else:
        for name, value in found.items():
            typer.echo(f"{name:14} {value}")
