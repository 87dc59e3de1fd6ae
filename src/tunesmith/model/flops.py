"""Floating-point operations of a training step, counted from the model's own matrices, and the matrix product to hold them against.

A product of one position with a matrix of n weights is 2n operations forward, 2n for the gradient of its input, and 2n more for its
own gradient when it is trained: 4n frozen, 6n trained. Attention is 12 h s for each layer and position: h the width of all heads,
s the mean number of positions looked at. What is recomputed to save memory is not counted.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tunesmith.core.types import Tokens
from tunesmith.model.forward import Sharing

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")  # the product that leaves an attention layer; its input is as wide as all heads
_LISTED_EXPERT = re.compile(r"(.*\.experts)\.\d+")  # remote code keeps its experts as a list of modules
SIZES = (512, 1024, 2048, 4096, 8192)
LONGEST = 0.03  # seconds that one product of the measurement may take
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Work:
    """What a step over given rows costs.

    `frozen` and `trained` are weights that every position is multiplied with (of the experts, those that one position visits), and
    `head` the same two of the output head, which only meets the states that predict trained tokens. `attention` holds (width of all
    heads, window; 0: none) of each layer. `not_counted` names what takes part and is missing here.
    """

    frozen: int
    trained: int
    head: tuple[int, int]
    attention: tuple[tuple[int, int], ...]
    not_counted: tuple[str, ...] = ()

    @property
    def formula(self) -> str:
        """The count in symbols; N are the weights below the head."""
        body = _symbols(self.frozen, self.trained, "N")
        return f"{body} + 12 L h s per token, {_symbols(*self.head, 'N_head')} per trained one"

    def of(self, rows: Sequence[Tokens], sharing: Sharing | None = None, *, at: int = 0) -> float:
        """Operations of forward and backward pass over `rows`, each up to its last trained token, which is a target and no input.

        `sharing`: what rows of a group share counts once. `at` 1: the last trained token is an input (a reward model reads its state).
        """
        positions = targets = 0
        pairs: Counter[int] = Counter()
        windows = {window for _, window in self.attention}
        groups: dict[str, list[npt.NDArray[np.int32]]] = {}
        for place, row in enumerate(rows):
            trained = np.flatnonzero(row.train)
            if len(trained):
                targets += len(trained)
                groups.setdefault(row.group or f"\0{place}", []).append(row.ids[: int(trained[-1]) + at])
        for group in groups.values():
            front = sharing.front(group) if sharing is not None else 0
            positions += sum(map(len, group)) - front * (len(group) - 1)
            for window in windows:
                pairs[window] += sum(_pairs(len(row), window) for row in group) - _pairs(front, window) * (len(group) - 1)
        looked = sum(12 * width * pairs[window] for width, window in self.attention)
        return float(positions * (4 * self.frozen + 6 * self.trained) + targets * (4 * self.head[0] + 6 * self.head[1]) + looked)


def _symbols(frozen: int, trained: int, name: str) -> str:
    return f"4 {name} + 6 {name}_lora" if frozen and trained else f"6 {name}" if trained else f"4 {name}"


def _pairs(inputs: int, window: int) -> int:
    """How many (query, key) pairs a causal layer of this window looks at in a document."""
    if not window or inputs <= window:
        return inputs * (inputs + 1) // 2
    return window * (window + 1) // 2 + (inputs - window) * window


def count(causal: Any) -> Work:
    """The work of training `causal`, a transformers model with or without PEFT layers in it, by what requires a gradient."""
    output = causal.get_output_embeddings()
    in_head = {module for module in output.modules() if _is_product(module)} if output is not None else set()
    sizes, head = [0.0, 0.0], [0, 0]
    odd: Counter[str] = Counter()
    for module, tensor, weights in _matrices(causal, in_head):
        if weights is None:
            odd[type(module).__name__] += 1
        else:
            sizes[tensor.requires_grad] += weights
    for module in in_head:
        head[module.weight.requires_grad] += _size(module)
    attention = tuple(attention_widths(causal))
    layers = int(getattr(causal.config.get_text_config(), "num_hidden_layers", len(attention)))
    missing = [f"{number} tensors of {kind}" for kind, number in sorted(odd.items())]
    if len(attention) < layers:
        missing.append(f"the mixing of positions in {layers - len(attention)} of {layers} layers")
    return Work(round(sizes[False]), round(sizes[True]), (head[False], head[True]), attention, tuple(missing))


def _matrices(causal: Any, without: set[Any]) -> Iterator[tuple[nn.Module, Tensor, float | None]]:
    """Every matrix below the head, with the weights that one position is multiplied with; None when that is not known."""
    visited = getattr(causal.config.get_text_config(), "num_experts_per_tok", None)
    modules = dict(causal.get_decoder().named_modules())
    listed = Counter(found[1] for name in modules if (found := _LISTED_EXPERT.fullmatch(name)))
    for name, module in modules.items():
        if module in without or isinstance(module, nn.Embedding):
            continue
        found = _LISTED_EXPERT.match(f"{name}.")
        experts = listed[found[1]] if found else getattr(module, "num_experts", None)
        share = visited / experts if visited and experts else None
        for key, tensor in module.named_parameters(recurse=False):
            if tensor.dim() < 2 or key.endswith("bias"):
                continue
            if _is_product(module):
                yield module, tensor, _size(module) * share if found and share else None if found else _size(module)
            elif tensor.shape[0] == experts:  # a router [experts, width], which all positions meet, or stacked experts [experts, ., .]
                yield module, tensor, tensor.numel() if tensor.dim() == 2 else tensor.numel() * share if share else None
            else:
                yield module, tensor, None


def _is_product(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _size(module: Any) -> int:
    """Weights of a linear layer; of a quantised one too, whose tensor is packed."""
    return int(module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel())


def attention_widths(causal: Any) -> Iterator[tuple[int, int]]:
    """(width, window) of every attention layer: the width is that of its output product's input."""
    config = causal.config.get_text_config()
    for module in causal.get_decoder().modules():
        found = next((getattr(module, name) for name in _OUTPUTS if hasattr(module, name)), None)
        if not type(module).__name__.endswith("Attention") or found is None:
            continue
        last = getattr(found, "base_layer", found)
        values = int(last.in_features if isinstance(last, nn.Linear) else last.weight.shape[0])
        keys = int(module.num_heads * module.qk_head_dim) if hasattr(module, "qk_head_dim") else values
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
        yield (keys + values) // 2, int(window) if isinstance(window, int) else 0


@dataclass(frozen=True, slots=True)
class Gemm:
    """The best product of two square matrices seen on a device: `flops` per second, `size` of a side, precision of the entries."""

    flops: float
    size: int
    dtype: str


def measure_gemm(device: torch.device, dtype: torch.dtype) -> Gemm:
    """Time square products in `dtype` for about a tenth of a second, in the largest size of which one stays under LONGEST seconds.

    The matrices come from a generator of their own: the global random state is untouched. Best of REPEATS. A short burst: a GPU
    that throttles under load does not hold it.
    """
    size, operands, last = 0, None, 0.0
    for larger in SIZES:
        if operands is not None and (last * (larger / size) ** 3 > LONGEST or not _fits(larger, device, dtype)):
            break
        size, operands = larger, _operands(larger, device, dtype)
        _seconds(*operands)  # the first one also chooses and compiles its kernel
        last = _seconds(*operands)
    assert operands is not None
    best = min(last, *(_seconds(*operands) for _ in range(REPEATS - 1)))
    return Gemm(2 * size**3 / best, size, str(dtype).removeprefix("torch."))


def _fits(size: int, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type != "cuda" or 3 * size * size * dtype.itemsize < 0.1 * torch.cuda.mem_get_info(device)[0]


def _operands(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    # Real numbers and not one constant: a GPU draws less power, and runs faster, on equal bits. A few rows, repeated, are enough.
    rows = torch.rand(64, size, generator=generator, device=device).sub_(0.5).to(dtype)
    a = rows.repeat(size // 64, 1)
    return a, a.clone(), torch.empty_like(a)


def _seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
