"""How a command ends: exit statuses, and errors as three lines of text or one JSON object, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import typer

from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import FULL, full_disk
from tunesmith.core.log import first_rank

DONE, NO, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 3
# What typer gives for a KeyboardInterrupt.
CTRL_C = 130
# A check of ours that said no, as opposed to input that is wrong.
SAID_NO = {"reread_differs", "nothing_learned", "final_unreadable"}
# Typer carries click inside or depends on it, by version; either way this is the class of wrong words.
UsageError: Any = typer.BadParameter.__bases__[0]


def guarded(app: typer.Typer, arguments: list[str]) -> int:
    """Run the app and turn whatever happens into an exit status."""
    as_json = "--json" in arguments
    command = typer.main.get_command(app)
    try:
        status = command.main(args=arguments, prog_name="tunesmith", standalone_mode=False)
        sys.stdout.flush()  # here and not at exit, so that a reader who went away is noticed below
        if status == CTRL_C:
            raise KeyboardInterrupt
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
        trains = any(word in arguments[:1] for word in ("train", "demo"))
        remedy = "run the same command again" + ("; a training run goes on from its last checkpoint" if trains else "")
        _tell(TunesmithError("stopped at once", remedy=remedy, code="interrupted"), as_json)
        return INTERRUPTED
    except SystemExit:
        # Only typer's own answer to a closed pipe comes as this: the reader went away, see below.
        return DONE
    except BrokenPipeError:
        # The reader of our output went away (e.g. `| head`): nothing is wrong with our work.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.errno in FULL and not error.filename:  # most likely the output, which must not fail once more at the end
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _tell(_refused(error), as_json)
        return WRONG_INPUT


def _usage(error: Any) -> TunesmithError:
    verb = error.ctx.command_path if error.ctx is not None else "tunesmith"
    return TunesmithError(error.format_message(), where=verb, remedy=f"see '{verb} --help'", code="usage")


def _refused(error: OSError) -> TunesmithError:
    """What the operating system refused, where no nearer place knew better."""
    where = str(error.filename or "")
    if error.errno in FULL and not where:
        said, remedy = (
            "the disk is full: no room for what is printed",
            "free some space, or print elsewhere, and run the same command again",
        )
        return TunesmithError(said, where="standard output", remedy=remedy, code="disk_full")
    if error.errno in FULL:
        return full_disk(Path(where))
    return TunesmithError(
        f"the operating system refused: {error.strerror or error}", where=where, remedy="check the path and its permissions", code="system"
    )


def _tell(error: TunesmithError, as_json: bool) -> None:
    if as_json and first_rank():
        import json

        sys.stdout.write(json.dumps({"error": error.as_dict()}, ensure_ascii=False) + "\n")
    name = type(error).__name__ if error.code != "interrupted" else "Stopped"
    sys.stderr.write(f"{name}: {error}\n")
