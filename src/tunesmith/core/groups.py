"""Rows that belong together, and what they begin with alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]


def common_front(rows: Sequence[Ids]) -> int:
    """How many ids all rows begin with alike."""
    first, *others = rows
    front = len(first)
    for other in others:
        front = min(front, len(other))
        differs = first[:front] != other[:front]
        at = int(differs.argmax()) if front else 0
        front = at if front and differs[at] else front
    return front
