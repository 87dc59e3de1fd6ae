"""A policy by what it is made of: a recipe's model section to train, or the name of a model to ask."""

from __future__ import annotations

from typing import Literal

import torch

from tunesmith.core import adapters as kinds
from tunesmith.core import recipe
from tunesmith.core.errors import ModelError
from tunesmith.core.log import logger
from tunesmith.model import adapter as adapters
from tunesmith.model import bottleneck, eight, quant, reward
from tunesmith.model.allocator import keep_freed_memory
from tunesmith.model.compile import settle_compiled, settle_float8, settle_int8
from tunesmith.model.float8 import demand_device
from tunesmith.model.freeze import freeze
from tunesmith.model.load import choose_device, choose_dtype, load_base
from tunesmith.model.peft_configs import peft_config
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle
from tunesmith.model.stream import begin
from tunesmith.model.tokenizer import adapter_base, demand_reachable, resolve


def build_policy(settings: recipe.Model, device: str, *, seed: int, training: bool = True, head: reward.Head = "language") -> Policy:
    """Load the base, put the adapter on, choose the fast paths and prove them.

    A base that is itself an adapter folder goes on training that adapter when the recipe asks for one of the same shape;
    without an adapter it is merged in and all weights are trained. With `head` "score" it is a reward model, whose head is drawn from
    `seed` unless the base is a reward model already. Raises ModelError and RecipeError as `load_base` and `attach`.
    """
    spot = choose_device(device)
    if settings.fast.float8:
        demand_device(spot)
    if settings.fast.int8:
        eight.demand_products(spot)
    place = resolve(settings.base)
    below = adapter_base(place)
    target = spot
    if settings.stream:  # loaded on the host, in the precision of the device
        kept: Literal["fp32", "bf16"] = "bf16" if choose_dtype(settings.dtype, target) == torch.bfloat16 else "fp32"
        settings, spot = settings.model_copy(update={"dtype": kept}), torch.device("cpu")
    if settings.adapter is None:
        model = load_base(settings, spot, training=training, seed=seed, head=head)
        model.requires_grad_(training)
        if training and settings.freeze:
            freeze(model, settings.freeze)
    elif below is None:
        model = load_base(settings, spot, training=training, seed=seed, head=head)
        model = adapters.attach(model, settings.adapter, seed=seed, base=place, revision=settings.revision)
    else:
        reward.demand_head(place, head)
        model = load_base(settings.model_copy(update={"base": below, "revision": None}), spot, training=training, seed=seed, head=head)
        model = adapters.read(model, place, training=training)
        adapters.check_same(model, settings.adapter, place)
    if training and target.type == "cpu":
        keep_freed_memory()
    model.eval()
    if settings.stream:
        waiting = begin(model, target).host_bytes
        logger.info("the base is streamed: %.2f GB of its layers wait in host memory", waiting / 1e9)
    policy = Policy(model, choose_dtype(settings.dtype, target))
    # Where both are asked for, compiling wins: a fused layer leaves nothing to compile.
    settle(policy, settings.fast.model_copy(update={"layer": settings.fast.layer and not settings.fast.compile}))
    if settings.fast.float8:
        settle_float8(policy)
    if settings.fast.int8:
        settle_int8(policy)
    if settings.fast.compile:
        settle_compiled(policy)
    if settings.adapter is not None and (stacked := [name for name, p in policy.causal.named_parameters() if p.dim() > 2]):
        policy.note(f"{len(stacked)} tensors that are no linear layers (experts, convolutions) get no adapter, e.g. {stacked[0]}")
    return policy


def try_on(settings: recipe.Model) -> None:
    """Whether the adapter of a recipe fits its base, by the shapes alone: no weight is read.

    Raises RecipeError as `peft_configs.peft_config` and `bottleneck.attach`, ModelError `no_model` for a hub id that is out of reach. What
    only the weights can tell is not looked at, nor is a base whose configuration is not to be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = resolve(settings.base)
    if settings.adapter is None or adapter_base(place) is not None:
        return
    demand_reachable(place)
    try:
        config = AutoConfig.from_pretrained(place, revision=settings.revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError):
        return
    if isinstance(settings.adapter, kinds.Bottleneck):
        bottleneck.demand_places(model, settings.adapter)
    else:
        peft_config(model, settings.adapter, place)


def load_policy(
    folder_or_id: str,
    *,
    adapter: str | None = None,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    fast: recipe.Fast | None = None,
) -> Policy:
    """A model to score, sample or rate with, nothing trained: hub id, folder, run folder, adapter folder, or 'pocket'.

    `adapter` puts an adapter folder (or a run folder) on top of the model named first.
    """
    spot = choose_device(device)
    precision = choose_dtype(dtype, spot)
    place = resolve(folder_or_id)
    on_top = resolve(adapter) if adapter is not None else None
    below = adapter_base(place)
    if below is not None:
        if on_top is not None:
            raise ModelError("both the model and --adapter are adapters", where=place, remedy="name a whole model", code="bad_adapter")
        place, on_top = resolve(below), place
    if on_top is not None and adapter_base(on_top) is None:
        raise ModelError("this is a whole model, not an adapter", where=on_top, remedy="give it as the model", code="bad_adapter")
    settings = recipe.Model.model_validate({"base": place, "dtype": dtype, "adapter": {}, **quant.remembered(on_top)})
    model = load_base(settings, spot, training=False, head=reward.head_of(on_top or place))
    if on_top is not None:
        model = adapters.read(model, on_top, training=False)
    model.requires_grad_(False).eval()
    policy = Policy(model, precision)
    settle(policy, fast or recipe.Fast())
    return policy
