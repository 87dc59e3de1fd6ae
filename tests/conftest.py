"""What tests of every part use."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

from tunesmith.core.log import logger

# Tests break the code on purpose and look whether the proof at load sees it: nothing may be known from before.
os.environ["TUNESMITH_PROOFS"] = "0"

# A shell starts background jobs with Ctrl-C ignored, which children inherit: the tests that press it would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Keep(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the house says during a test, each line once, whether or not an earlier test had it speak to stderr instead of the root."""
    keep, level = _Keep(), logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    yield keep.lines
    logger.removeHandler(keep)
    logger.setLevel(level)
