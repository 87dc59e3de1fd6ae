"""Our C++ functions, compiled once for a machine by its own compiler: for CPU tensors in bf16 and fp32 on Linux.

What PyTorch does in five or ten operations, each over a whole tensor, `cpp/layer.cpp` does in one; `cpp/dense.cpp` has the products of
training and `cpp/documents.cpp` its attention, `cpp/step.cpp` runs all layers of a sampling step in one, and `cpp/draw.cpp` draws its
tokens. Every caller has PyTorch's way beside it, for machines without a compiler and to compare with. TUNESMITH_NATIVE=0 in the
environment chooses that way everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.model import native_library

# P pointers, N counts, F floats in the order of the functions in cpp; the number of threads follows.
_SIGNATURES = {
    "norm": "PPFPPPNN",
    "norm_backward": "PPPPPPPNN",
    "gate": "PPPNNN",
    "gate_backward": "PPPPPN",
    "turn": "PPPPPNN",
    "soften": "PPPNNN",
    "look_back": "PNNNN",
    "product": "PPPNNPPPP",
    "turn_rows": "PPPPPFNNNN",
    "keep_rows": "PNPNNNN",
    "attend_rows": "PNPPNNNNNFPNPP",
}
_KINDS: dict[str, Any] = {"P": ctypes.c_void_p, "N": ctypes.c_int64, "F": ctypes.c_float}
# at::native::cpublas::brgemm by the kind of its inputs, and what gives the processor's matrix unit back. PyTorch exports them, and does not
# promise to: where they are missing, products go through its operators.
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllb"
_MULTIPLY = {"float32": _BRGEMM + "PKfS3_Pfb", "bfloat16": _BRGEMM + "PKN3c108BFloat16ES5_Pfb", "int8": _BRGEMM + "PKhPKaPib"}
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"


class Documents(ctypes.Structure):
    """What cpp/documents.cpp reads, in its order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "kv_stride", "keys", "group", "width", "window", "count")),
        *((name, ctypes.c_void_p) for name in ("spans", "sight", "out", "logs", "d_out", "dq", "dk", "dv")),
    )


class Kernels:
    """The compiled functions for products in one dtype T. Tensors are contiguous where nothing else is said; N rows, E columns."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        self._calls: dict[str, Any] = {}
        for function, signature in _SIGNATURES.items():
            call = self._calls[function] = library[f"{function}_{name}"]
            call.argtypes = [_KINDS[kind] for kind in signature] + [ctypes.c_int]
            call.restype = None
        self._draw = library["draw"]
        self._draw.argtypes, self._draw.restype = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 2, ctypes.c_int], None
        self._step = library[f"step_{name}"]
        self._step.argtypes, self._step.restype = [ctypes.c_void_p], None
        self._dense = None
        if dtype == torch.bfloat16 and library["can_dense"]():
            self._dense = library["dense"]
            self._dense.argtypes, self._dense.restype = [ctypes.c_char_p, *[_KINDS[kind] for kind in "NPNNNNFPPP"], ctypes.c_int], None
            self._round = library["round_rows"]
            self._round.argtypes, self._round.restype = [ctypes.c_char_p, *[_KINDS[kind] for kind in "NPPNN"], ctypes.c_int], None
            self._attend = library["attend_documents"]
            self._attend.argtypes, self._attend.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """RMS norm [.., E] in T of x in fp32; also x / rms(x) in T and 1 / rms(x) [.., 1] in fp32, which its gradient needs."""
        out, unit = (torch.empty(x.shape, dtype=weight.dtype) for _ in range(2))
        inverse = torch.empty(*x.shape[:-1], 1)
        self._calls["norm"](
            x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), unit.data_ptr(), inverse.data_ptr(), *_rows(x),
            torch.get_num_threads(),
        )  # fmt: skip
        return out, unit, inverse

    def norm_backward(
        self, dy: Tensor, unit: Tensor, inverse: Tensor, weight: Tensor, need_weight: bool, add: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the norm with respect to x [.., E], `add` in fp32 added to it, and the weight [E], in fp32."""
        dx = torch.empty(dy.shape)
        dw = torch.empty(weight.shape) if need_weight else None
        self._calls["norm_backward"](
            dy.data_ptr(), unit.data_ptr(), inverse.data_ptr(), weight.data_ptr(), at(add), dx.data_ptr(), at(dw), *_rows(dy),
            torch.get_num_threads(),
        )  # fmt: skip
        return dx, dw

    def gate(self, inner: Tensor, up: Tensor) -> Tensor:
        """silu(inner) * up [N, I]; both may be columns of wider rows, of one width."""
        out = torch.empty(inner.shape, dtype=inner.dtype)
        self._calls["gate"](inner.data_ptr(), up.data_ptr(), out.data_ptr(), *_rows(inner), inner.stride(-2), torch.get_num_threads())
        return out

    def gate_backward(self, d: Tensor, inner: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate's output once more, and the gradients of `inner` (in the place of `d`) and of `up`."""
        out, d_up = torch.empty_like(inner), torch.empty_like(inner)
        self._calls["gate_backward"](
            d.data_ptr(), inner.data_ptr(), up.data_ptr(), out.data_ptr(), d_up.data_ptr(), d.numel(), torch.get_num_threads()
        )
        return out, d, d_up

    def turn(self, rows: Tensor, index: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """rows[index] * cos + (their halves exchanged) * signed sin: [R, D] from rows [.., D], index [R] and tables [R, D]."""
        out = torch.empty(len(index), rows.shape[1], dtype=rows.dtype)
        self._calls["turn"](
            rows.data_ptr(), index.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr(), out.data_ptr(), *_rows(out),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def soften(self, logits: Tensor, targets: Tensor, logp: Tensor, slope: bool) -> None:
        """Log-probabilities [N] (fp32) of targets [N] from logits [N, V] in T; with `slope`, one-hot minus softmax in their place."""
        self._calls["soften"](logits.data_ptr(), targets.data_ptr(), logp.data_ptr(), slope, *_rows(logits), torch.get_num_threads())

    def look_back(self, scores: Tensor, offset: int) -> None:
        """Softmax of scores [.., R, E] in T over what each row sees, in place: row i the first i + offset + 1, and the rest is 0."""
        rows, width = scores.shape[-2:]
        self._calls["look_back"](scores.data_ptr(), scores.numel() // width, rows, offset, width, torch.get_num_threads())

    def turn_rows(
        self, joined: Tensor, rotary: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None, eps: float, heads: int, keys: int
    ) -> None:
        """Norm (where there are norms) and turn by `rotary` [N, 1, D] the H query and K key heads of joined [N, (H + 2 K) D], in place."""
        width = joined.shape[1] // (heads + 2 * keys)
        query, key = norms or (None, None)
        self._calls["turn_rows"](
            joined.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr(), at(query), at(key), eps, len(joined), heads, keys, width,
            torch.get_num_threads(),
        )  # fmt: skip

    def product(
        self,
        product: ctypes.Structure,
        x: Tensor,
        out: Tensor,
        multiply: Multiply,
        kind: int,
        lora: ctypes.Structure | None,
        places: Tensor | None,
    ) -> None:
        """x W^T + bias for a Product of cpp/blocks.h from x [N, inputs] in T: NARROW [N, outputs] in T, WIDE the same in fp32.

        ACTIVE: silu(first half) * second half [N, outputs / 2] in T, of a gated one. ONTO: added to `out` in fp32, for outputs in sixteens.
        `lora` and `places` [N]: the rows' adapters.
        """
        added = None if lora is None else ctypes.addressof(lora)
        self._calls["product"](
            ctypes.addressof(product), x.data_ptr(), out.data_ptr(), kind, len(x), added, at(places), *multiply, torch.get_num_threads()
        )

    def keep_rows(self, rows: Tensor, slots: np.ndarray[Any, Any], int8: bool) -> None:
        """Keys or values [N, K, D] of prompts, each token's heads side by side, into the slots of a cache as `Prompts` lists them."""
        self._calls["keep_rows"](
            rows.data_ptr(), rows.stride(0), slots.ctypes.data, len(slots), *rows.shape[1:], int8, torch.get_num_threads()
        )

    def attend_rows(
        self, query: Tensor, slots: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], keys: int, window: int, scale: float, int8: bool,
        multiply: Multiply,
    ) -> Tensor:  # fmt: skip
        """Causal attention [N, H, D] of prompts' new tokens, each one's heads side by side, over K heads of keys and values in slots.

        `slots` of both as for `keep_rows`, which has put the tokens' own there; `window` 0 looks back without limit.
        """
        out = torch.empty(query.shape, dtype=query.dtype)
        out[int(slots[0][:, 4].sum()) :].zero_()  # filler tokens are in no slot
        heads, width = query.shape[1:]
        self._calls["attend_rows"](
            query.data_ptr(), query.stride(0), *(side.ctypes.data for side in slots), len(slots[0]), keys, heads // keys, width, window,
            scale, out.data_ptr(), int8, *multiply, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def draw(self, logits: Tensor, warmth: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A token of each row [B] of logits [B, V] in fp32, and the log of the sum of e^logit [B] in fp64.

        The likeliest one where warmth [B] (fp32) is 0, else by inversion of softmax(logits / warmth) at the number [B] (fp64) in 0..1.
        """
        logits = logits.contiguous()
        tokens, totals = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.float64)
        self._draw(
            logits.data_ptr(), warmth.data_ptr(), uniform.data_ptr(), tokens.data_ptr(), totals.data_ptr(), *_rows(logits),
            torch.get_num_threads(),
        )  # fmt: skip
        return tokens, totals

    @property
    def pairs(self) -> bool:
        """Whether `dense` is there: the processor multiplies pairs of bf16, and has no matrix unit, which PyTorch uses well."""
        return self._dense is not None

    def dense(
        self, terms: Sequence[Term], out: Tensor, kind: int, scale: float = 1.0, bias: Tensor | None = None,
        before: Tensor | None = None, steps: tuple[Tensor, Tensor | None, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """out = scale * (bias + sum of a b over the terms), summed in fp32: NARROW in bf16, WIDE in fp32, or ADDED to `before` in fp32.

        `before` has the shape and strides of `out`; None: what is in `out` itself.
        A term is (a, b, turned, of_weight): a [rows, depth], or where it is turned [depth, rows]; b [depth, columns], or as a weight
        [columns, depth], in bf16, or in fp32 and rounded to bf16 here. Numbers of a row lie side by side; an a that is not turned has an
        even depth, and so has a b as a weight. First may stand terms with b in int8 and a from `round_rows`, both of a depth that is a
        multiple of 4; `steps` has what their numbers count for every row [rows] and column [columns] (None: 1), and what the 128 of the
        rows adds to the sums [columns].
        """
        assert self._dense is not None
        assert before is None or before.stride() == out.stride()
        words: list[int] = []
        for a, b, turned, of_weight in terms:
            words += (
                a.data_ptr(),
                b.data_ptr(),
                a.stride(0),
                b.stride(0),
                a.shape[not turned],
                turned,
                of_weight,
                _NUMBERS[b.dtype],
            )
        small = None if steps is None else struct.pack("3P", *(at(t) or 0 for t in steps))
        self._dense(
            struct.pack(f"{len(words)}q", *words), len(terms), out.data_ptr(), out.stride(0), *out.shape, kind, scale, at(bias),
            (out if before is None else before).data_ptr(), small, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def round_rows(self, parts: Sequence[Tensor], factors: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Rows of `parts` [N, ..] in bf16, side by side, in 8 bits with 128 added [N, E], and what a row's numbers count [N] (fp32).

        `factors`: numbers in fp32 that the columns of each part are multiplied with first. Where `pairs` holds; widths are multiples of 16.
        """
        out, steps = torch.empty(len(parts[0]), sum(part.shape[1] for part in parts), dtype=torch.uint8), torch.empty(len(parts[0]))
        words: list[int] = []
        for number, part in enumerate(parts):
            words += (part.data_ptr(), factors[number].data_ptr() if factors else 0, part.stride(0), part.shape[1])
        self._round(
            struct.pack(f"{len(words)}q", *words), len(parts), out.data_ptr(), steps.data_ptr(), *out.shape, torch.get_num_threads()
        )
        return out, steps

    def attend_documents(
        self, q: Tensor, k: Tensor, v: Tensor, documents: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], keys: int, window: int,
        back: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Causal attention [R, H W] in every document, q scaled; and for the way back the logarithms of the sums [R, H] in fp32.

        q [R, H W], k and v [T, K W], `documents` as `Layout.documents` has them; rows of no document get zeros. With `back`, the gradient
        of the output, the output and the logarithms, the gradients of q, k and v. Where `pairs` holds, and for W a multiple of 32.
        """
        spans, sight = documents
        width = k.shape[1] // keys
        made = [torch.empty_like(t) for t in ((q,) if back is None else (q, k, v))]
        made[0][len(sight) :].zero_()
        for t in made[1:]:
            t[int(spans[:, 1].sum()) :].zero_()
        d_out, out, logs = back or (None, made[0], torch.empty(len(q), q.shape[1] // width))
        work = Documents(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), keys, q.shape[1] // k.shape[1], width, window, len(spans),
            spans.ctypes.data, sight.ctypes.data, out.data_ptr(), logs.data_ptr(), at(d_out), *map(at, made if back else ()),
        )  # fmt: skip
        self._attend(ctypes.addressof(work), back is not None, torch.get_num_threads())
        return (out, logs) if back is None else tuple(made)

    def step(self, step: ctypes.Structure) -> None:
        """All layers over one new token of every row, as a Step of cpp/step.cpp says."""
        self._step(ctypes.addressof(step))


NARROW, WIDE, ACTIVE, ONTO = range(4)  # kinds of products
ADDED = 2  # of `dense`, in the place of ACTIVE
HEAD_WIDTHS = (16, 32, 64, 96, 128, 256)  # that cpp/attention.h is made for
Term = tuple[Tensor, Tensor, bool, bool]
_NUMBERS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}  # what cpp/pairs.h calls Numbers
Multiply = tuple[int, int]  # addresses of what multiplies a block and of what gives the matrix unit back


def kernels(dtype: torch.dtype) -> Kernels | None:
    """The compiled functions for products in this dtype on a CPU; None where PyTorch's operations have to do."""
    return _kernels(dtype) if _on else None


def multiplier(dtype: torch.dtype) -> Multiply | None:
    """What multiplies rows by blocks of weights in bf16, fp32 or int8; None where PyTorch or the processor has no such function."""
    return _multiplier(str(dtype).removeprefix("torch.")) if _on else None


def in_strips(dtype: torch.dtype) -> bool:
    """Whether our products read weights of this kind in strips of 32 outputs, each in one piece, instead of blocks of 64."""
    library = native_library.loaded() if dtype in (torch.bfloat16, torch.int8) else None
    return library is not None and bool(library["strips_for"](int(dtype == torch.int8)))


_on = os.environ.get("TUNESMITH_NATIVE", "1") != "0"


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Compiled functions, or PyTorch's operations, while this is open; with a compiler missing always the latter."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


@functools.cache
def _kernels(dtype: torch.dtype) -> Kernels | None:
    library = native_library.loaded() if dtype in (torch.bfloat16, torch.float32) else None
    return None if library is None else Kernels(library, dtype)


@functools.cache
def _multiplier(kind: str) -> Multiply | None:
    library = native_library.loaded()
    if library is None or kind not in _MULTIPLY:
        return None
    try:
        here = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = [ctypes.cast(here[name], ctypes.c_void_p).value or 0 for name in (_MULTIPLY[kind], _RELEASE)]
    except (OSError, AttributeError):
        return None
    can = library["can_multiply"]
    can.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return (found[0], found[1]) if can(*found, kind != "float32") else None


def at(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first number."""
    return None if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor) -> tuple[int, int]:
    return tensor.numel() // tensor.shape[-1], tensor.shape[-1]
