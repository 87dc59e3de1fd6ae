"""Which decoder layers run as one fused function, and what each call hands to it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.core.errors import BugError
from tunesmith.model import cached_layer, eight, lora, quant
from tunesmith.model.attention import window_of
from tunesmith.model.cached_layer import Ready
from tunesmith.model.copies import Copies
from tunesmith.model.feed import Feed, NextTokens, Prompts
from tunesmith.model.fused_layer import PROJECTIONS, Parts, Plan, by_documents, fused_layer, rotary_tables
from tunesmith.model.layer_ops import Linear, wide
from tunesmith.model.layout import Layout
from tunesmith.model.ready import Linears, ready_of
from tunesmith.model.virtual import PREFIX
from tunesmith.model.whole_step import WholeStep

WHOLE = "all layers at once"
READ = "the last layer gave what is read alone"
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer's calls have in common while no weight moves (`Copies.calls`)."""

    parts: Parts
    parameters: list[Tensor | None]


@dataclass(slots=True)
class Fused:
    """What a fused layer carries: the dtype of its products, copies of weights in it, whether it is the last, whether it recomputes.

    `path` names the layer in the model. `rounded`: whether its products with frozen weights run in 8 bits in training. For sampling:
    whether they do (`int8`), what is made ready at its first call, and the window that its masks told; the first of `layers` may hold
    what runs them all at once (False: nothing can).
    """

    dtype: torch.dtype
    copies: Copies
    last: bool
    path: str = ""
    recompute: bool = False
    rounded: bool = False
    int8: bool = False
    ready: Ready | None = None
    reach: int = 0
    layers: list[Any] = field(default_factory=list)
    whole: WholeStep | Literal[False] | None = None


def fuse(model: nn.Module, dtype: torch.dtype, copies: Copies) -> int:
    """Give every decoder layer of a known family the fused forward with products in `dtype`; returns how many."""
    layers = decoder_layers(model)
    inside: Any = model
    inside = inside.get_base_model() if hasattr(model, "get_base_model") else model
    paths = {id(module): name for name, module in inside.named_modules()}
    for layer in layers:
        layer.tunesmith = Fused(dtype, copies, last=layer is layers[-1], path=paths[id(layer)], layers=layers)
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def fused_layers(model: nn.Module) -> list[Any]:
    """The layers that run fused, in order."""
    return [m for m in model.modules() if "tunesmith" in m.__dict__]


def unfuse(model: nn.Module) -> None:
    """Give the decoder layers transformers' own forward back."""
    for layer in fused_layers(model):
        del layer.forward, layer.tunesmith


def make_ready(model: nn.Module, *, int8: bool) -> None:
    """Let the fused layers sample with products in int8 or not, made ready at their first call."""
    for layer in fused_layers(model):
        if layer.tunesmith.int8 != int8:
            layer.tunesmith.int8, layer.tunesmith.ready, layer.tunesmith.whole = int8, None, None


def forget_ready(model: nn.Module) -> None:
    """Drop what was made ready: weights have moved or are seen otherwise, or their memory is wanted."""
    for layer in fused_layers(model):
        layer.tunesmith.ready = layer.tunesmith.whole = None
        if layer.tunesmith.copies.calls is not None:
            layer.tunesmith.copies.calls.clear()


def recompute(model: nn.Module, count: int) -> None:
    """Let the first `count` fused layers work out their activations once more in the backward pass."""
    for i, layer in enumerate(fused_layers(model)):
        layer.tunesmith.recompute = i < count


def can_round(model: nn.Module) -> bool:
    """Whether every decoder layer runs fused at every step and can multiply with its frozen weights in 8 bits."""
    layers = fused_layers(model)
    return bool(layers) and all(_rounds(module) for layer in layers for module in _projections(layer).values())


def _rounds(module: Any) -> bool:
    """A frozen weight of fitting sides, and in an adapter no dropout, which would send the layer PEFT's way, and no odd rank."""
    base = module if _plain(module) else module.base_layer
    if quant.kind_of(base) is not None or base.weight.requires_grad or not eight.fits(base.weight):
        return False
    return base is module or (
        lora.usable(module)
        and all(isinstance(one, nn.Identity) for one in module.lora_dropout.values())
        and all(rank % 2 == 0 for rank in module.r.values())
    )


def round_products(model: nn.Module, on: bool) -> int:
    """Let the fused layers, which `can_round`, multiply rows with frozen weights in 8 bits (see eight.py), or not; returns their number."""
    layers = fused_layers(model)
    for layer in layers:
        layer.tunesmith.rounded = on
    return len(layers)


@contextlib.contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Products of training without 8 bits while open."""
    rounded = [layer for layer in fused_layers(model) if layer.tunesmith.rounded]
    for layer in rounded:
        layer.tunesmith.rounded = False
    try:
        yield
    finally:
        for layer in rounded:
            layer.tunesmith.rounded = True


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers that the fused function can stand for, by their class and parts; empty when any layer is of another kind."""
    found = [m for m in model.modules() if type(m).__name__ in {f"{family}DecoderLayer" for family in FAMILIES}]
    return found if found and all(_fits(layer) for layer in found) else []


def _fits(layer: Any) -> bool:
    """transformers' own class with its usual parts on a CPU; numbers are compared by the probe."""
    attention = layer.self_attn
    if not type(layer).__module__.startswith("transformers.models."):
        return False
    projections = _projections(layer)
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)]
    return (
        all(_plain(p) or lora.fits(p) for p in projections.values())
        and all(hasattr(norm, "variance_epsilon") and not hasattr(norm, "modules_to_save") for norm in norms)
        and PREFIX not in attention.__dict__
        and len({norm.variance_epsilon for norm in norms}) == 1
        and attention.attention_dropout == 0
        and type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(p.device.type == "cpu" for p in layer.parameters())
    )


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear or quant.kind_of(module) is not None


def _projections(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return {name: (attention if name[0] in "qkvo" else mlp).get_submodule(name) for name in PROJECTIONS}


def _head_norms(attention: Any) -> list[Any]:
    return [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    tunesmith_layout: Layout | Feed | None = None,
    **kwargs: Any,
) -> Tensor:
    """The signature of transformers' decoder layers; sampling and layers with dropout in their adapter go its own way."""
    if isinstance(tunesmith_layout, Feed) and self.tunesmith.ready is not None and position_embeddings is not None:
        return _sample(self, self.tunesmith.ready, tunesmith_layout, hidden_states, position_embeddings, attention_mask)
    calls, name = self.tunesmith.copies.calls, (id(self), self.training, torch.is_grad_enabled(), self.tunesmith.rounded)
    if calls and name in calls and isinstance(tunesmith_layout, Layout) and past_key_values is None and position_embeddings is not None:
        return _train(self, hidden_states, calls[name], tunesmith_layout, position_embeddings, attention_mask)
    linears = None if tunesmith_layout is None or past_key_values is not None else _linears(self)
    if linears is None or tunesmith_layout is None or position_embeddings is None:
        if tunesmith_layout is not None:
            kwargs["tunesmith_layout"] = tunesmith_layout
        if hidden_states.dtype != self.input_layernorm.weight.dtype and not torch.is_autocast_enabled("cpu"):
            hidden_states = hidden_states.to(self.input_layernorm.weight.dtype)  # from a fused layer below
        out: Tensor = type(self).forward(
            self, hidden_states, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        return out
    if isinstance(tunesmith_layout, Feed):
        self.tunesmith.ready = ready_of(self, linears, _head_norms(self.self_attn))  # once for all calls until `forget_ready`
        return _sample(self, self.tunesmith.ready, tunesmith_layout, hidden_states, position_embeddings, attention_mask)
    if not torch.is_grad_enabled():  # an adapter that has learned nothing yet, as before the first step, costs nothing
        linears = {
            name: (base, factors if factors is not None and bool(factors.b.any()) else None) for name, (base, factors) in linears.items()
        }
    with torch.autocast("cpu", enabled=False):
        parts, parameters = _parts(self, linears)
    held = Held(parts, parameters)
    # Factors that are made in the call (see lora.factors) have a graph of their own in each.
    if calls is not None and all(p is None or p.is_leaf for p in parameters):
        calls[name] = held
    return _train(self, hidden_states, held, tunesmith_layout, position_embeddings, attention_mask)


def _train(
    layer: Any, hidden_states: Tensor, held: Held, layout: Layout, position_embeddings: tuple[Tensor, Tensor], marker: Tensor | None
) -> Tensor:
    """The layer over whole rows."""
    attention, fused, parts = layer.self_attn, layer.tunesmith, held.parts
    with torch.autocast("cpu", enabled=False):
        whole = attention.head_dim == position_embeddings[0].shape[-1]  # or a part of each head is turned
        fast = by_documents(parts.dtype, attention.head_dim) if whole else None
        read = layout.read if fused.last and fast is not None else None
        plan = Plan(
            of=parts,
            layout=layout,
            rotary=rotary_tables(
                *position_embeddings,
                layout,
                parts.keys,
                parts.group,
                float(attention.scaling),
                parts.dtype,
                fast is not None,
                read,
            ),
            window=window_of(marker, getattr(attention, "sliding_window", None), layout),
            recompute=fused.recompute,
            fast=fast,
            read=read,
        )
        y = fused_layer(hidden_states[0].to(wide(parts.dtype)), plan, *held.parameters)
        # What follows the last layer (a norm, perhaps transformers' own head) finds the dtype that it knows.
        return (y.to(layer.input_layernorm.weight.dtype) if fused.last else y)[None]


def _sample(
    layer: Any,
    ready: Ready,
    feed: Feed,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    marker: Tensor | None,
) -> Tensor:
    """The layer over cached rows, or all layers at once: then the first one does the work and the others hand on what they get."""
    fused, window = layer.tunesmith, window_of(marker, getattr(layer.self_attn, "sliding_window", None), feed)
    assert marker is not None  # or window_of had raised
    fused.reach = int(marker)
    with torch.autocast("cpu", enabled=False):
        x = hidden_states[0].to(wide(ready.dtype))
        if WHOLE in feed.kept:
            if feed.kept[WHOLE][ready.number] != window:
                raise BugError(f"layer {ready.number} has the window {window} and went with {feed.kept[WHOLE][ready.number]}")
        else:
            rotary = cached_layer.rotary_of(*position_embeddings, feed, ready.dtype)
            if not (layer is fused.layers[0] and isinstance(feed, NextTokens) and _at_once(layer, x, feed, rotary, window)):
                # An adapter of a row's own is found by the token's place among all.
                read = fused.last and isinstance(feed, Prompts) and feed.read is not None and feed.mix is None
                x = cached_layer.forward(x, ready, feed, rotary, window, read=read)
                if read:
                    feed.kept[READ] = True
        return (x.to(layer.input_layernorm.weight.dtype) if fused.last else x)[None]


def _at_once(first: Any, x: Tensor, feed: NextTokens, rotary: tuple[Tensor, Tensor], window: int) -> bool:
    """All layers over x [N, E] in one function, in place, where there is one for them."""
    fused = first.tunesmith
    if any(layer.tunesmith.ready is None for layer in fused.layers):  # the others' first call
        return False
    if fused.whole is None:
        layers = [layer.tunesmith.ready for layer in fused.layers]
        fused.whole = WholeStep(layers) if WholeStep.can(layers) else False
    if not fused.whole:
        return False
    windows = _windows(fused, feed)
    if windows[0] != window or not x.is_contiguous() or not fused.whole.run(x, feed, rotary, windows):
        return False
    feed.kept[WHOLE] = windows
    return True


def _windows(fused: Fused, feed: Feed) -> list[int]:
    """Each layer's window as its masks told it, 0 where no row is longer."""
    return [layer.tunesmith.reach if layer.tunesmith.reach < feed.longest else 0 for layer in fused.layers]


def states(decoder: Any, feed: NextTokens) -> Tensor | None:
    """What a decoder of these families says of new tokens, [N, E], without transformers' way around the layers, which makes masks.

    None until its layers have run at once (`_at_once`), which has shown that they can.
    """
    layers: Any = getattr(decoder, "layers", ())
    fused = layers[0].__dict__.get("tunesmith") if len(layers) else None
    if fused is None or not fused.whole or len(layers) != len(fused.layers):
        return None
    x = decoder.embed_tokens(feed.ids[None])
    with torch.autocast("cpu", enabled=False):
        rotary = fused.whole.angles(decoder, x, feed)
        wide_x = x[0].to(wide(fused.dtype))
        if not wide_x.is_contiguous() or not fused.whole.run(wide_x, feed, rotary, _windows(fused, feed)):
            return None
    out: Tensor = decoder.norm(wide_x.to(fused.layers[-1].input_layernorm.weight.dtype))
    return out


def _linears(layer: Any) -> Linears | None:
    """Each projection with its adapter (None: none, or switched off); None when one of them must go PEFT's way in this call."""
    found: Linears = {}
    for name, module in _projections(layer).items():
        if _plain(module):
            found[name] = module, None
        elif lora.usable(module):
            found[name] = module.base_layer, lora.factors(module)
        else:
            return None
    return found


def _parts(layer: Any, linears: Linears) -> tuple[Parts, list[Tensor | None]]:
    """What the function reads, in the dtype of the products, and the parameters whose gradients it returns, in its order."""
    attention, fused = layer.self_attn, layer.tunesmith
    norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *(n.weight for n in _head_norms(attention))]
    first, second, *heads = (fused.copies.of(weight, fused.dtype) for weight in norms)
    merged = {name: bool(getattr(module, "merged", False)) for name, module in _projections(layer).items()}
    parts = Parts(
        dtype=fused.dtype,
        keys=linears["k_proj"][0].out_features // attention.head_dim,
        group=attention.num_key_value_groups,
        eps=layer.input_layernorm.variance_epsilon,
        first_norm=first,
        second_norm=second,
        head_norms=(heads[0], heads[1]) if heads else None,
        linear={name: _linear(base, factors, fused, merged[name]) for name, (base, factors) in linears.items()},
        train_norms=any(norm.requires_grad for norm in norms),
    )
    parameters: list[Tensor | None] = [*norms, *[None] * (4 - len(norms))]
    for base, factors in linears.values():
        parameters += [base.weight, base.bias, factors.a if factors else None, factors.b if factors else None]
    return parts, parameters


def _linear(base: nn.Linear, factors: lora.Factors | None, fused: Fused, merged: bool) -> Linear:
    """`merged`: PEFT has added the adapter to the weight and left its version and place as they were, so that no copy would know."""
    of, dtype = fused.copies.of, fused.dtype
    held: Tensor | Callable[[], Tensor] = partial(quant.weight_of, base, dtype)
    if merged and quant.kind_of(base) is None:
        held = base.weight.detach().to(dtype)
    elif quant.kind_of(base) is None:
        # Where our own products read weights in fp32 nobody may ever ask for the copy.
        held = base.weight.detach() if base.weight.dtype == dtype else partial(of, base.weight, dtype)
    return Linear(
        held=held,
        bias=None if base.bias is None else of(base.bias, dtype),
        a=None if factors is None else of(factors.a, dtype),
        b=None if factors is None else of(factors.b, dtype, factors.scale),
        scale=1.0 if factors is None else factors.scale,
        need_weight=base.weight.requires_grad,
        need_bias=base.bias is not None and base.bias.requires_grad,
        own=base.weight if quant.kind_of(base) is None else None,
        eight=fused.copies.in_8_bits(base.weight) if fused.rounded and not merged else None,
    )
