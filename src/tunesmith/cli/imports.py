"""Importing torch and what stands on it, as fast as that goes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """While open, and for what was imported in it also later, the garbage collector stays away.

    Thousands of modules are no garbage, and it would walk over all of them again and again: a quarter of the time of importing. Only for
    a process of our own, since whatever is garbage when this ends is never collected.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
