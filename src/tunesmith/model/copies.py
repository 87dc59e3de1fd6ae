"""Weights in the precision of the products, beside weights that are trained in a wider one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.eight import Eight


class Copies:
    """Weights in the dtype of the products.

    A copy of a frozen weight is kept while the weight's version stays. PyTorch's fused optimizers move weights without raising their
    version, so a copy of a trained weight serves one call only, or as long as `holding` promises that nothing moves.
    """

    def __init__(self) -> None:
        self._steady = False
        self.calls: dict[object, Any] | None = None  # while nothing moves: what a call has made of the weights for the next one
        self._made: dict[int, tuple[Tensor, object, Tensor]] = {}
        self._eights: dict[int, tuple[Tensor, object, Eight]] = {}

    def of(self, weight: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """`weight` times `factor` in `dtype`, the weight itself where that is the same."""
        if weight.dtype == dtype and factor == 1.0:
            return weight.detach()
        state = (weight._version, weight.data_ptr(), dtype, factor)
        kept = weight.is_leaf and (self._steady or not weight.requires_grad)
        old = self._made.get(id(weight)) if kept else None
        if old is not None and old[0] is weight and old[1] == state:
            return old[2]
        with torch.no_grad():
            made = (weight * factor).to(dtype) if factor != 1.0 else weight.to(dtype)
        if kept:
            self._made[id(weight)] = (weight, state, made)
        return made

    def in_8_bits(self, weight: Tensor) -> Eight:
        """A frozen `weight` in 8 bits, made once while its version stays."""
        state, old = (weight._version, weight.data_ptr()), self._eights.get(id(weight))
        if old is None or old[0] is not weight or old[1] != state:
            old = self._eights[id(weight)] = (weight, state, Eight.of(weight))
        return old[2]

    def bytes(self) -> int:
        """What the copies take beside the weights."""
        made = [copy for _, _, copy in self._made.values()]
        eights = [part for _, _, eight in self._eights.values() for part in (eight.values, eight.steps, eight.shift, eight.shift_back)]
        return sum(part.nbytes for part in (*made, *eights))

    def drop(self) -> None:
        """Forget all copies: frozen weights have been trained in between, which their version does not tell."""
        self._made.clear()
        self._eights.clear()
        self.calls = {} if self._steady else None

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """While open no weight moves, so that copies of trained weights can be kept from call to call; dropped at the end."""
        self._steady, self.calls = True, {}
        try:
            yield
        finally:
            self._steady, self.calls = False, None
            self._made = {key: entry for key, entry in self._made.items() if not entry[0].requires_grad}
