"""How much memory a forward and backward pass takes, roughly, and how many layers must recompute for it to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.model.bucket_attention import KEEP_BYTES
from tunesmith.model.fused_layer import by_documents
from tunesmith.model.head import GPU_TILE_BYTES, MOST_ROWS, STRIP_BYTES, TILE_BYTES
from tunesmith.model.layout import BLOCK

BUDGET = 0.7  # of the memory that is there beside optimizer state and gradients
FILLER = 1.25  # padded rows of query, key and value for one token
Way = Literal["fused", "lora", "peft", "autocast"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one forward and backward pass over a micro-batch, in its parts.

    `kept` is what a layer keeps for its backward pass, `entry` what a layer keeps that recomputes, `shared` what all layers read,
    `head` and `turn` what lives for a moment: in the head, and in the backward pass of one layer.
    """

    layers: int
    kept: int
    entry: int
    shared: int
    head: int
    turn: int

    def peak(self, count: int) -> int:
        """The largest sum when the first `count` layers recompute.

        The layers that keep are behind them and have gone when the first one of them computes again.
        """
        at_the_head = (self.layers - count) * self.kept + count * self.entry + max(self.head, self.turn)
        again = count * self.entry + self.kept + self.turn if count else 0
        return self.shared + max(at_the_head, again)

    def count(self, room: int) -> int:
        """The smallest number of layers that must recompute for the peak to stay within `room` bytes; all, when none suffices."""
        return next((count for count in range(self.layers) if self.peak(count) <= room), self.layers)


def estimate(
    config: Any, tokens: int, longest: int, dtype: torch.dtype, device: torch.device, *, way: Way, plain_head: bool = False
) -> Estimate:
    """What `tokens` tokens take, in documents of at most `longest`, for Llama-like layers with products in `dtype`.

    `way`: layers as one function; transformers' with our LoRA function; with PEFT's; or all weights trained under autocast.
    A mixture of experts counts the experts that one token visits.
    """
    text = config.get_text_config().to_dict()
    hidden = _first(text, "hidden_size", "n_embd", "d_model") or 1024
    heads = _first(text, "num_attention_heads", "n_head", "n_heads") or 1
    width = _first(text, "head_dim") or hidden // heads
    keys = (_first(text, "num_key_value_heads") or heads) * width
    queries = heads * width
    inner = _first(text, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    inner *= _first(text, "num_experts_per_tok") or 1
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    filler = 1.0 if device.type == "cuda" else FILLER
    weights = 0
    if way == "fused" and by_documents(dtype, width) is not None:
        filler = 1.0  # scores are made once more and rows are not padded
    elif device.type != "cuda":
        seen = (longest + BLOCK) // 2 if longest > BLOCK else longest
        weights = min(tokens * seen * heads * size, KEEP_BYTES)
    attention = (filler * (queries + 2 * keys) + queries) * size  # query, key, value and result
    if way == "fused":
        per_token = attention + (2 * hidden + 2 * inner) * size + 8
    else:
        per_token = attention + 2 * hidden * (wide + size) + 4 * inner * size
        if way == "peft" and size < 4:  # the input of every adapter once more in the adapter's precision
            per_token += (5 * hidden + queries + inner) * 4
        if way == "autocast":  # the trained norms keep their input, and each product its own copy in half precision
            per_token += 2 * hidden * 4 + 5 * hidden * size
    tables = 4 * (queries + keys) * size + 48 * (heads + keys // width) if way == "fused" else 2 * width * wide
    vocabulary = _first(text, "vocab_size") or 32_000
    # Logits of a tile in the dtype of the products, and strips of them in fp32.
    tile = 3 * GPU_TILE_BYTES if device.type == "cuda" else min(TILE_BYTES, MOST_ROWS * vocabulary * size) + 2 * STRIP_BYTES
    return Estimate(
        layers=depth(config),
        kept=int(tokens * per_token + weights),
        entry=tokens * hidden * (wide if way in ("fused", "autocast") else size),
        shared=tokens * (tables + 2 * hidden * wide),
        head=tokens * (vocabulary * (size + 2 * wide) if plain_head else 3 * hidden * wide) + tile,
        turn=int(tokens * ((3 * inner + 2 * hidden) * size + 3 * hidden * wide) + weights),
    )


def depth(config: Any) -> int:
    """How many layers the configuration names."""
    return _first(config.get_text_config().to_dict(), "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 12


def trained_bytes(trained: int, dtype: torch.dtype) -> int:
    """Gradient and AdamW's two moments of `trained` weights, all in fp32, and their copies in the dtype of the products."""
    return trained * (12 + (dtype.itemsize if dtype.itemsize < 4 else 0))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device; on the CPU, of the machine or of the container, whichever is less."""
    if device.type == "cuda":
        # What torch holds in reserve counts as free: it is handed out first.
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + spare
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _container()
    return free if limit is None else min(free, limit - used)


def whole_bytes(device: torch.device) -> int:
    """Memory of the device, of the machine or of the container: the same at every start, whatever else is running."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    whole = int(psutil.virtual_memory().total)
    limit, _ = _container()
    return whole if limit is None else min(whole, limit)


def _container() -> tuple[int | None, int]:
    """The memory limit of this control group and what is used of it; None without a limit."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        return int(most), int(used.read_text())
    return None, 0


def _first(values: dict[str, Any], *names: str) -> int | None:
    return next((int(values[n]) for n in names if isinstance(values.get(n), int)), None)
