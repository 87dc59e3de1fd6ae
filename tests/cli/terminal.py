"""A command in a pseudo-terminal: what a person at the keyboard does and sees."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Sequence

CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"
PROMPT = r"you[^>\n]*> $"
COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """`tunesmith WORDS` in a terminal of its own; `pieces` is what came out, as it came."""

    def __init__(self, words: Sequence[object], *, size: str = "200") -> None:
        self.pieces: list[str] = []
        self.status: int | None = None
        self._seen = 0
        self._pid, self._screen = pty.fork()
        if self._pid == 0:
            # Wide, so that nothing is wrapped, and without ways of showing that depend on the machine.
            os.environ.update(TERM="xterm", COLUMNS=size, PYTHONUNBUFFERED="1", INPUTRC=os.devnull)
            os.execv(sys.executable, [sys.executable, "-m", "tunesmith", *map(str, words)])

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def press_ctrl_c(self) -> None:
        """A moment later, as a person does: Python's prompt does not see a press that comes before it waits for keys."""
        time.sleep(0.3)
        self.type(CTRL_C)

    def say(self, line: str, until: str = PROMPT) -> str:
        """Type a line and Enter; what is shown behind it until the next prompt."""
        self.type(line + "\r")
        return self.read(f"\n.*{until}")

    def read(self, pattern: str, *, seconds: float = 60) -> str:
        """What has come since the last read, as soon as all of it matches; raises AssertionError when it does not come."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self._new(), re.DOTALL):
            if not self._more(max(0.0, end - time.monotonic())):
                raise AssertionError(f"waited for {pattern!r}, and saw {self._new()!r}")
        new = self._new()
        self._seen = len("".join(self.pieces))
        return new

    def _new(self) -> str:
        return COLOURS.sub("", "".join(self.pieces)[self._seen :]).replace("\r\n", "\n").replace("\r", "")

    def _more(self, seconds: float) -> bool:
        if not select.select([self._screen], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # what Linux says when the other end is closed
            if came := os.read(self._screen, 65536):
                self.pieces.append(came.decode(errors="replace"))
                return True
        return False

    def end(self) -> int:
        """The exit status, once the command has ended."""
        while self.status is None and self._more(30):
            pass
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self.status

    def close(self) -> None:
        if self.status is None:
            os.kill(self._pid, signal.SIGKILL)
            self.end()
        os.close(self._screen)
