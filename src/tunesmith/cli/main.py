"""The command line: one file per verb, and nothing heavy imported before a verb needs it."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(
    name="tunesmith",
    help="A language model from raw rows to a served and proven model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> None:
    """Entry point of the `tunesmith` command."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w" if number else "r"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="tunesmith")  # what its encoding lacks, as JSON writes it
    status = main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; a further Ctrl-C must not change the status
    sys.exit(status)


def main(arguments: list[str]) -> int:
    """Run one command line; returns its exit status (0 done, 1 a check said no, 2 the input is wrong, 3 interrupted)."""
    from tunesmith.cli import verbs  # noqa: F401  registers the verbs
    from tunesmith.cli.ending import guarded

    return guarded(app, arguments)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks, as JSON escapes them."""
    import json

    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("tunesmith", _escaped)


def say(value: Any) -> None:
    """One JSON document on stdout."""
    import json

    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run()
