"""What sampling makes of a fused layer once: its weights laid out for products of a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model import cached_layer, lora, quant
from tunesmith.model.cached_layer import Part, Ready
from tunesmith.model.products import product

Linears = dict[str, tuple[nn.Linear, lora.Factors | None]]


def ready_of(layer: Any, linears: Linears, head_norms: Sequence[Any]) -> Ready:
    """The weights of a fused layer laid out for sampling; `linears` by name, each with its adapter or None."""
    attention, fused = layer.self_attn, layer.tunesmith
    norms = [n.weight for n in (layer.input_layernorm, layer.post_attention_layernorm, *head_norms)]
    first, second, *heads = (fused.copies.of(weight, fused.dtype) for weight in norms)
    parts = [_part(layer, group, linears) for group in cached_layer.GROUPS]
    width = attention.head_dim
    return Ready(
        number=int(attention.layer_idx),
        dtype=fused.dtype,
        eps=layer.input_layernorm.variance_epsilon,
        first_norm=first,
        second_norm=second,
        head_norms=(heads[0], heads[1]) if heads else None,
        attention=parts[0],
        output=parts[1],
        inner=parts[2],
        down=parts[3],
        heads=linears["q_proj"][0].out_features // width,
        keys=linears["k_proj"][0].out_features // width,
        scale=float(attention.scaling),
    )


def _part(layer: Any, names: tuple[str, ...], linears: Linears) -> Part:
    fused, chosen = layer.tunesmith, [linears[name] for name in names]
    paths = [f"{fused.path}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in names]
    spans = cached_layer.spans_of(paths, [base.out_features for base, _ in chosen])
    biases = [None if base.bias is None else base.bias.detach() for base, _ in chosen]
    if fused.int8 or all(quant.kind_of(base) is None for base, _ in chosen):
        held = [quant.weight_of(base, fused.dtype).detach() for base, _ in chosen]
        way = product(held, biases, fused.dtype, int8=fused.int8, gated=names == ("gate_proj", "up_proj"))
    else:  # unpacked in every call: slower than a dense copy, which would take the memory that the base was quantised to save
        way = partial(_unpacking, [base for base, _ in chosen], biases, fused.dtype)
    adapted = [(span, factors) for span, (_, factors) in zip(spans.values(), chosen, strict=True) if factors is not None]
    if not adapted:
        return Part(spans, way)
    of = fused.copies.of
    ranks = cached_layer.spans_of([str(i) for i in range(len(adapted))], [len(factors.a) for _, factors in adapted])
    turned = [of(factors.b, fused.dtype, factors.scale).t().contiguous() for _, factors in adapted]
    seconds = tuple((span, rank, b) for (span, _), rank, b in zip(adapted, ranks.values(), turned, strict=True))
    return Part(spans, way, torch.cat([of(factors.a, fused.dtype) for _, factors in adapted]), seconds)


def _unpacking(bases: list[Any], biases: Sequence[Tensor | None], dtype: torch.dtype, x: Tensor) -> Tensor:
    return product([quant.weight_of(base, dtype) for base in bases], biases, dtype, packed=False)(x)
