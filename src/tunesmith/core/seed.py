"""Named random streams: one seed gives every purpose its own generator, so that none disturbs another."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called by `names`, stable across machines and Python versions."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the stream called by `names`, e.g. stream(0, "shuffle", epoch)."""
    return np.random.default_rng(seed_of(seed, *names))
