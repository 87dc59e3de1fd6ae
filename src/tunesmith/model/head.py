"""Log-probabilities of chosen tokens without a logits tensor.

K chosen rows, E hidden size, V vocabulary. Logits live for one tile of rows at a time. The gradient with respect to the
hidden rows is worked out while a tile is warm: d logp[t] / d hidden[t] touches row t only, so the backward pass merely scales rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_BYTES = 4 << 20  # of fp32 logits: small enough to stay near the cache of one core
GPU_TILE_BYTES = 512 << 20
LEAST_ROWS = 64  # fewer would starve the matrix product


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a model does to hidden @ weight.T + bias: times `scale`, then cap * tanh(. / cap) when `cap` is set."""

    scale: float = 1.0
    cap: float | None = None


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, hint: Tensor, form: HeadForm, dtype: torch.dtype
) -> Tensor:
    """log softmax(logits)[targets] as [K] in fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias.

    `hint` [K]: the objective's likely weights of the rows. When the incoming gradient turns out proportional to it, as with
    the likelihood, the weight's gradient is already there; otherwise the tiles are computed once more. Products run in `dtype`.
    """
    need = torch.is_grad_enabled() and (hidden.requires_grad, weight.requires_grad or (bias is not None and bias.requires_grad))
    with torch.autocast(hidden.device.type, enabled=False):
        return _token_logprobs(hidden, weight, bias, targets, hint, form, dtype, need or (False, False))


def plain_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from a logits tensor [K, V]: the plain twin."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1).gather(1, targets[:, None])[:, 0]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, hint: Tensor,
        form: HeadForm, dtype: torch.dtype, need: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        h, tile = hidden.to(dtype), _Tile(weight, bias, len(targets), form, dtype)
        logp = torch.empty(len(targets), dtype=tile.wide, device=h.device)
        d_hidden = torch.empty_like(h) if need[0] else None
        sums = _Sums(weight, bias) if need[1] else None
        for a, b in tile.spans:
            logp[a:b] = tile.fill(h[a:b], targets[a:b])
            if d_hidden is None and sums is None:
                continue
            slope = tile.slope(targets[a:b])
            if d_hidden is not None:
                torch.mm(slope, tile.weight, out=d_hidden[a:b])
            if sums is not None:
                sums.add(slope, h[a:b], hint[a:b])
        ctx.form, ctx.dtype, ctx.sums, ctx.hidden_dtype = form, dtype, sums, hidden.dtype
        ctx.save_for_backward(hidden if sums is not None else None, weight, bias, targets, hint, d_hidden)
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        hidden, weight, bias, targets, hint, d_hidden = ctx.saved_tensors
        dh = dw = db = None
        if d_hidden is not None:
            dh = (d_hidden * g.to(d_hidden.dtype)[:, None]).to(ctx.hidden_dtype)
        if ctx.sums is not None:
            ratio = _ratio(g, hint)
            dw, db = _again(ctx, hidden, weight, bias, targets, g) if ratio is None else ctx.sums.times(ratio)
        return dh, dw, db, None, None, None, None, None


_token_logprobs: Callable[..., Tensor] = _TokenLogprobs.apply


class _Tile:
    """Room for the logits of a few rows, used again for every tile; fp32 at least, whatever the products run in."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, form: HeadForm, dtype: torch.dtype) -> None:
        self.weight, self.form = weight.to(dtype), form
        self.bias = None if bias is None else bias.to(dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        size = GPU_TILE_BYTES if weight.is_cuda else TILE_BYTES
        step = min(rows, max(LEAST_ROWS, size // (4 * weight.shape[0]) // 16 * 16))
        self.spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
        shape = (step, weight.shape[0])
        self._narrow = torch.empty(shape, dtype=dtype, device=weight.device)
        self._logits = self._narrow if dtype == self.wide else torch.empty(shape, dtype=self.wide, device=weight.device)
        self._chance = torch.empty(shape, dtype=self.wide, device=weight.device)
        self._steep: Tensor | None = None

    def fill(self, h: Tensor, targets: Tensor) -> Tensor:
        """The logits of rows `h`, their softmax, and the log-probabilities of the targets."""
        narrow, z, chance = (t[: len(h)] for t in (self._narrow, self._logits, self._chance))
        if self.bias is None:
            torch.mm(h, self.weight.t(), out=narrow)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=narrow)
        if z.dtype != narrow.dtype:
            z.copy_(narrow)
        if self.form.scale != 1.0:
            z.mul_(self.form.scale)
        if self.form.cap is not None:
            self._steep = z.div_(self.form.cap).tanh_().clone()
            z.mul_(self.form.cap)
        torch.softmax(z, -1, out=chance)
        # log of the sum of exponentials from the largest entry, whose probability is at least 1 / V: exact to rounding, and
        # several times faster than torch.logsumexp.
        total = z.amax(-1) - chance.amax(-1).log()
        return z.gather(1, targets[:, None])[:, 0] - total

    def slope(self, targets: Tensor) -> Tensor:
        """d logp[target] / d (h @ weight.T + bias) of the rows filled last: one-hot minus softmax, through cap and scale."""
        d = self._chance[: len(targets)].neg_()
        d.scatter_add_(1, targets[:, None], d.new_ones(len(targets), 1))
        if self._steep is not None:
            d.mul_(1 - self._steep * self._steep)
        if self.form.scale != 1.0:
            d.mul_(self.form.scale)
        return d if d.dtype == self._narrow.dtype else self._narrow[: len(targets)].copy_(d)


class _Sums:
    """Gradients of weight and bias, summed over the tiles with a weight per row, in the parameters' own precision."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.zeros_like(weight)
        self.bias = None if bias is None else torch.zeros_like(bias)

    def add(self, slope: Tensor, h: Tensor, rows: Tensor) -> None:
        weighted = h * rows.to(h.dtype)[:, None]
        if slope.dtype == self.weight.dtype:
            self.weight.addmm_(slope.t(), weighted)
        else:
            self.weight += slope.t() @ weighted
        if self.bias is not None:
            self.bias += rows.to(self.bias.dtype) @ slope.to(self.bias.dtype)

    def times(self, ratio: float) -> tuple[Tensor, Tensor | None]:
        return self.weight * ratio, None if self.bias is None else self.bias * ratio


def _ratio(grad: Tensor, hint: Tensor) -> float | None:
    """c with grad = c * hint up to rounding, or None."""
    slack = 4 * torch.finfo(grad.dtype).eps
    top = hint.abs().argmax()
    ratio = (grad[top].double() / hint[top].double()).item()
    close = (grad.double() - hint.double() * ratio).abs().max() <= slack * grad.abs().max()
    return ratio if bool(close) else None


def _again(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
    h, tile, sums = hidden.to(ctx.dtype), _Tile(weight, bias, len(targets), ctx.form, ctx.dtype), _Sums(weight, bias)
    for a, b in tile.spans:
        tile.fill(h[a:b], targets[a:b])
        sums.add(tile.slope(targets[a:b]), h[a:b], g[a:b])
    return sums.times(1.0)
