"""How many tokens a base can take in one row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.core import adapters, recipe
from tunesmith.core.errors import ModelError
from tunesmith.model.tokenizer import adapter_base, demand_reachable, resolve

VIRTUAL = (adapters.Prefix, adapters.Prompt, adapters.PTuning)


def context_of(settings: recipe.Model) -> int | None:
    """The longest row that a recipe's model can take, virtual tokens taken off; None where its configuration names no limit.

    None also where the configuration is not to be had, which loading the model says better.
    """
    from transformers import AutoConfig

    try:
        place = resolve(settings.base)
        below = adapter_base(place)
        demand_reachable(below or place)
        config = AutoConfig.from_pretrained(below or place, revision=settings.revision if below is None else None)
    except (ModelError, OSError, ValueError, KeyError):
        return None
    longest = longest_of(config.get_text_config())
    taken = settings.adapter.tokens if isinstance(settings.adapter, VIRTUAL) else 0
    return None if longest is None else longest - taken


def longest_of(config: Any) -> int | None:
    """The positions that a configuration promises, those that scaled rotary embeddings add included."""
    named = getattr(config, "max_position_embeddings", None)
    if not isinstance(named, int) or named <= 0:
        return None
    return max([named, *_stretched(config, named)])


def _stretched(config: Any, named: int) -> Iterator[int]:
    """Positions by each scaling rule: some families name the length before it as max_position_embeddings, some the one behind it."""
    rules = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rule in (rules, *rules.values()):  # one rule, or one for each kind of layer
        if isinstance(rule, dict) and isinstance(rule.get("factor"), int | float):
            yield int(rule["factor"] * (rule.get("original_max_position_embeddings") or named))
