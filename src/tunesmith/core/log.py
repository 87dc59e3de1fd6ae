"""What the house says while it works: plain lines on stderr, one per event."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("tunesmith")
_handler = logging.StreamHandler(sys.stderr)


def set_up(level: int = logging.INFO) -> None:
    """Send our messages to stderr, once; a program that configured logging itself is left alone. Of several ranks the first speaks."""
    if not logger.handlers:
        _handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(_handler)
        logger.propagate = False
    _handler.stream = sys.stderr  # what it is now: a notebook or a test may have put another in its place and closed the old one
    # bitsandbytes tells everyone who imports PEFT about a kernel that could be downloaded.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logger.setLevel(level if first_rank() else max(level, logging.WARNING))


def first_rank() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
