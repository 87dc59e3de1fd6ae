"""One process in a run folder at a time; the operating system gives the lock back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.core.errors import CheckpointError

NAME = ".lock"


def demand_free(run: Path) -> None:
    """Raises CheckpointError (run_in_use) when another process trains in this folder; leaves no trace."""
    if (run / NAME).is_file():
        os.close(_taken(run))


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep the folder for this process. Raises CheckpointError (run_in_use)."""
    handle = _taken(run)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        (run / NAME).unlink(missing_ok=True)
        os.close(handle)


def _taken(run: Path) -> int:
    handle = os.open(run / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 32, 0).decode().strip()
        os.close(handle)
        raise CheckpointError(
            f"another process{f' ({holder})' if holder else ''} trains in this folder",
            where=str(run),
            remedy="wait for it or stop it, or choose another run.out",
            code="run_in_use",
        ) from error
    return handle
