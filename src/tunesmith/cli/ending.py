"""How a command ends: exit statuses, and errors as three lines of text or one JSON object, never a traceback."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from tunesmith.core.errors import TunesmithError

DONE, NO, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 3
# A check of ours that said no, as opposed to input that is wrong.
SAID_NO = {"reread_differs", "nothing_learned"}
# Typer carries click inside or depends on it, by version; either way this is the class of wrong words.
UsageError: Any = typer.BadParameter.__bases__[0]


def guarded(app: typer.Typer, arguments: list[str]) -> int:
    """Run the app and turn whatever happens into an exit status."""
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        status = command.main(args=arguments, prog_name="tunesmith", standalone_mode=False)
        return status if isinstance(status, int) else DONE
    except TunesmithError as error:
        _tell(error, as_json)
        if error.code == "interrupted":
            return INTERRUPTED
        return NO if error.code in SAID_NO else WRONG_INPUT
    except UsageError as error:
        _tell(_usage(error), as_json)
        return WRONG_INPUT
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("\ninterrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (e.g. `| head`): nothing is wrong with our work.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _usage(error: Any) -> TunesmithError:
    verb = error.ctx.command_path if error.ctx is not None else "tunesmith"
    return TunesmithError(error.format_message(), where=verb, remedy=f"see '{verb} --help'", code="usage")


def _tell(error: TunesmithError, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps({"error": error.as_dict()}, ensure_ascii=False) + "\n")
    name = type(error).__name__ if error.code != "interrupted" else "Stopped"
    sys.stderr.write(f"{name}: {error}\n")
