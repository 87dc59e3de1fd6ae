"""Log-probabilities of chosen tokens without a logits tensor.

K chosen rows, E hidden size, V vocabulary. Logits live for one tile of rows at a time. The gradient with respect to the
hidden rows is worked out while a tile is warm: d logp[t] / d hidden[t] touches row t only, so the backward pass merely scales rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.model import gradients, native
from tunesmith.model.layer_ops import compiled, own_products

TILE_BYTES = 32 << 20  # of logits in the dtype of the products
GPU_TILE_BYTES = 256 << 20
LEAST_ROWS, MOST_ROWS = 64, 256  # on a CPU: fewer would starve the matrix product (weights are read once a tile), more gain nothing
ROUND = 32  # on a CPU the number of rows is made a multiple of this: every new one costs a kernel made for it
VOCABULARY_STRIP = 8_192  # entries whose weight gradient is summed at a time
DEEP = 4_096  # entries that our own products sum at a time for the gradient of hidden rows: laid out they fit a core's cache
STRIP_BYTES = 3 << 20  # of fp32 logits: what the softmax works on at a time stays in the cache of a core


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a model does to hidden @ weight.T + bias: times `scale`, then cap * tanh(. / cap) when `cap` is set."""

    scale: float = 1.0
    cap: float | None = None


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: HeadForm, dtype: torch.dtype, narrow: Tensor | None = None
) -> Tensor:
    """log softmax(logits)[targets] as [K] in fp32 (fp64 for fp64 inputs), differentiable in hidden, weight and bias.

    Products run in `dtype`; `narrow` is the weight in it, where the caller has it at hand; not needed where `reads` says so.
    """
    rows, tail = len(targets), -len(targets) % ROUND if hidden.device.type == "cpu" else 0
    if tail:
        hidden, targets = F.pad(hidden, (0, 0, 0, tail)), F.pad(targets, (0, tail))
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    need = (hidden.requires_grad, trains) if torch.is_grad_enabled() else (False, False)
    with torch.autocast(hidden.device.type, enabled=False):
        return _token_logprobs(hidden, weight, bias, targets, form, dtype, narrow, need)[:rows]


def plain_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from a logits tensor [K, V]: the plain twin."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1).gather(1, targets[:, None])[:, 0]


def reads(weight: Tensor, dtype: torch.dtype) -> native.Kernels | None:
    """The compiled functions, where their products take this weight as it is and no copy of it in `dtype` is made; else None."""
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.is_cpu and weight.is_contiguous()
    return own_products(dtype) if known and all(side % 2 == 0 for side in weight.shape) else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        form: HeadForm, dtype: torch.dtype, narrow: Tensor | None, need: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        h, tile = hidden.to(dtype), _Tile(weight if narrow is None else narrow, bias, len(targets), form, dtype)
        logp = torch.empty(len(targets), dtype=tile.wide, device=h.device)
        d_hidden = torch.empty_like(h, dtype=tile.back_dtype) if need[0] else None
        slopes = []
        for a, b in tile.spans:
            slope = tile.work(h[a:b], targets[a:b], logp[a:b], need[0] or need[1])
            if d_hidden is not None:
                tile.back(slope, d_hidden[a:b])
            if need[1]:
                slopes.append(slope)
                tile.renew(len(targets) - b)
        ctx.trains, ctx.used = need[1], False
        ctx.slopes, ctx.spans, ctx.weight, ctx.bias, ctx.hidden_dtype = slopes, tile.spans, weight, bias, hidden.dtype
        ctx.save_for_backward(h if need[1] else None, d_hidden)
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        h, d_hidden = ctx.saved_tensors
        dh = dw = db = None
        if d_hidden is not None:
            dh = (d_hidden * g.to(ctx.hidden_dtype)[:, None]).to(ctx.hidden_dtype)
        if ctx.trains:
            if ctx.used:
                raise RuntimeError("a second backward pass through the same head")
            dw, db = _weight_gradients(ctx, h, g)
        return dh, dw, db, None, None, None, None, None


def _weight_gradients(ctx: Any, h: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """slope^T (g h) and slope^T g, a strip of the vocabulary at a time, so that the sums stay in the cache."""
    weight, bias, slopes = ctx.weight, ctx.bias, ctx.slopes
    ctx.slopes, ctx.used = [], True
    dw = db = None
    if weight.requires_grad:
        weighted = [h[a:b] * g[a:b, None].to(h.dtype) for a, b in ctx.spans]
        added, fast = gradients.is_direct(weight), reads(weight, h.dtype) if weight.dtype == torch.float32 else None
        dw = gradients.room(weight) if added else torch.zeros_like(weight)
        for first in range(0, weight.shape[0], VOCABULARY_STRIP):
            strip = slice(first, first + VOCABULARY_STRIP)
            if fast is not None:
                for slope, rows in zip(slopes, weighted, strict=True):
                    fast.dense([(slope[:, strip], rows, True, False)], dw[strip], native.ADDED)
                continue
            total = (slopes[0][:, strip].t() @ weighted[0]).to(weight.dtype)
            for slope, rows in zip(slopes[1:], weighted[1:], strict=True):
                total += slope[:, strip].t() @ rows
            dw[strip] += total
        dw = None if added else dw
    if bias is not None and bias.requires_grad:
        db = torch.zeros_like(bias)
        for slope, (a, b) in zip(slopes, ctx.spans, strict=True):
            db += g[a:b].to(bias.dtype) @ slope.to(bias.dtype)
    return dw, db


_token_logprobs: Callable[..., Tensor] = _TokenLogprobs.apply


class _Tile:
    """Room for the logits of some rows, used again for every tile; the softmax runs in strips of it, in fp32 at least."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, form: HeadForm, dtype: torch.dtype) -> None:
        self.form, self.fast = form, reads(weight, dtype)
        self.weight = weight.to(dtype) if self.fast is None else weight.detach()
        self.back_dtype = dtype if self.fast is None else torch.float32
        self.bias = None if bias is None else bias.to(dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        width = weight.shape[0]
        if weight.is_cuda:
            step = strip = max(LEAST_ROWS, GPU_TILE_BYTES // (4 * width) // 16 * 16)
        else:
            step = min(max(LEAST_ROWS, TILE_BYTES // (dtype.itemsize * width) // 16 * 16), MOST_ROWS)
            strip = max(2, STRIP_BYTES // (4 * width))
        step = min(rows, step)
        self.spans = [(a, min(a + step, rows)) for a in range(0, rows, step)]
        self._strip = min(strip, step)
        self._logits = torch.empty(step, width, dtype=dtype, device=weight.device)
        self._chance = torch.empty(self._strip, width, dtype=self.wide, device=weight.device)
        self._wide = self._chance if dtype == self.wide else torch.empty_like(self._chance)

    def renew(self, left: int) -> None:
        """Another room for logits, because the last one is kept; for the rows that are left, where they are fewer."""
        self._logits = torch.empty_like(self._logits[:left])

    def work(self, h: Tensor, targets: Tensor, logp: Tensor, slope: bool) -> Tensor:
        """Write the log-probabilities of the targets for rows `h`; returns d logp / d (h @ weight.T + bias) where `slope` is wanted."""
        logits = self._logits[: len(h)]
        if self.fast is not None:
            self.fast.dense([(h, self.weight, False, True)], logits, native.NARROW, 1.0, self.bias)
        elif self.bias is None:
            torch.mm(h, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=logits)
        fast = compiled(logits.dtype, logits, targets, logp) if self.form == HeadForm() else None
        if fast is not None and logp.dtype == torch.float32:
            fast.soften(logits, targets, logp, slope)
            return logits
        for a in range(0, len(h), self._strip):
            b = min(a + self._strip, len(h))
            self._soften(logits[a:b], targets[a:b, None], logp[a:b], slope)
        return logits

    def back(self, slope: Tensor, d_hidden: Tensor) -> None:
        """Write slope @ weight, the gradient of the rows that `slope` was made from, in `back_dtype`."""
        if self.fast is None:
            torch.mm(slope, self.weight, out=d_hidden)
            return
        for first in range(0, len(self.weight), DEEP):
            part = slice(first, first + DEEP)
            self.fast.dense([(slope[:, part], self.weight[part], False, False)], d_hidden, native.ADDED if first else native.WIDE)

    def _soften(self, logits: Tensor, targets: Tensor, logp: Tensor, slope: bool) -> None:
        """One strip: log-probabilities, and in place of the logits one-hot minus softmax, through cap and scale."""
        z = logits if logits.dtype == self.wide else self._wide[: len(logits)].copy_(logits)
        if self.form.scale != 1.0:
            z.mul_(self.form.scale)
        if self.form.cap is not None:
            z.div_(self.form.cap).tanh_()
        steep = 1 - z * z if self.form.cap is not None and slope else None
        if self.form.cap is not None:
            z.mul_(self.form.cap)
        chance = torch.softmax(z, -1, out=self._chance[: len(logits)])
        # log of the sum of exponentials from the largest entry, whose probability is at least 1 / V: exact to rounding, and
        # several times faster than torch.logsumexp.
        total = z.amax(-1) - chance.amax(-1).log()
        logp.copy_(z.gather(1, targets)[:, 0] - total)
        if not slope:
            return
        chance.neg_().scatter_add_(1, targets, chance.new_ones(len(targets), 1))
        if steep is not None:
            chance.mul_(steep)
        if self.form.scale != 1.0:
            chance.mul_(self.form.scale)
        logits.copy_(chance)
