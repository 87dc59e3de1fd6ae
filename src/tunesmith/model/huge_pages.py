"""Memory that is read through again and again, in large pages: a processor keeps few addresses of pages at hand, and small ones are many.

`benchmarks/cpu_pieces.py` reads the weights of a 135M model both ways.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PAGE = 2 << 20
SLAB = 32 << 20
_MADV_HUGEPAGE = 14


class _Slab:
    """A piece of memory whose parts are handed out one after the other; it lives as long as any of them."""

    def __init__(self, size: int) -> None:
        self.whole = torch.empty(size + PAGE, dtype=torch.uint8)
        self.at = -self.whole.data_ptr() % PAGE
        self.end = self.at + size
        advise(self.whole.data_ptr() + self.at, size)

    def take(self, size: int) -> Tensor:
        part = self.whole[self.at : self.at + size]
        self.at += -(-size // 64) * 64
        return part


class Area:
    """Hands out CPU tensors that will be given back at about the same time: small ones stand together, large ones alone."""

    def __init__(self) -> None:
        self._slab: _Slab | None = None
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor as `torch.empty` makes it."""
        size = math.prod(shape) * dtype.itemsize
        if size > SLAB // 4:
            return _Slab(-(-size // PAGE) * PAGE).take(size).view(dtype).view(*shape)
        with self._lock:
            if self._slab is None or self._slab.at + size > self._slab.end:
                self._slab = _Slab(SLAB)
            return self._slab.take(size).view(dtype).view(*shape)


WEIGHTS = Area()
CACHE = Area()


def advise(address: int, size: int) -> None:
    """Ask for large pages here; a system that has none says no, and nothing is lost."""
    if (call := _madvise()) is not None:
        call(address, size, _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
