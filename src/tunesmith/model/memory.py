"""How much memory the activations of a forward pass take, roughly, and whether that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BUDGET = 0.7  # of the memory that is free beside optimizer state and gradients
ATTENTION_KEPT = 64 << 20  # at most this much of attention weights is kept for one layer (bucket_attention.KEEP_BYTES)


def activation_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one forward pass over `tokens` tokens keeps for the backward pass, without recomputation.

    Per layer and token: 10 hidden-size vectors (residuals, norms, query, output, and the fp32 copies that norms make), key and
    value, and 4 vectors of the inner width; besides these the attention weights of short documents. An estimate to choose
    with, within a factor of two for Llama-like models; mixtures of experts count the experts that one token visits.
    """
    text = config.get_text_config().to_dict()
    hidden = _first(text, "hidden_size", "n_embd", "d_model") or 1024
    layers = _first(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 12
    heads = _first(text, "num_attention_heads", "n_head", "n_heads") or 1
    keys = _first(text, "num_key_value_heads") or heads
    inner = _first(text, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    inner *= _first(text, "num_experts_per_tok") or 1
    size = 2 if dtype in (torch.bfloat16, torch.float16) else 4
    per_token = 10 * hidden + 2 * hidden * keys // heads + 4 * inner
    return int(layers * (tokens * per_token * size + ATTENTION_KEPT))


def wants_checkpointing(config: Any, tokens: int, trained: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether activations of `tokens` tokens would take more than BUDGET of what is free once the optimizer has its share.

    `trained` weights cost 12 bytes each in gradient and AdamW's two moments, all in fp32.
    """
    return activation_bytes(config, tokens, dtype) > BUDGET * max(0, free_bytes(device) - 12 * trained)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device; on the CPU, of the machine or of the container, whichever is less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return free


def _first(values: dict[str, Any], *names: str) -> int | None:
    return next((int(values[n]) for n in names if isinstance(values.get(n), int)), None)
