"""What the house says while it works: plain lines on stderr, one per event."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("tunesmith")


def set_up(level: int = logging.INFO) -> None:
    """Send our messages to stderr, once; a program that configured logging itself is left alone. Of several ranks the first speaks."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level if first_rank() else max(level, logging.WARNING))


def first_rank() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
