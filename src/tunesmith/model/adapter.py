"""Adapters through PEFT: which modules, drawn from which seed, and a folder that PEFT reads back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.core import recipe
from tunesmith.core.errors import ModelError, RecipeError, did_you_mean
from tunesmith.model import reward
from tunesmith.model.load import old_names, seeded

_HEAD = frozenset({"base_model.model.score.weight"})


def attach(model: Any, settings: recipe.Adapter, *, seed: int, base: str) -> Any:
    """The model with a fresh LoRA adapter in fp32 whose output starts at zero; the base is frozen.

    The head of a reward model is trained whole and is kept in the adapter. `base` is recorded as the adapter's base.
    Raises RecipeError `no_target` for a target that names no linear layer.
    """
    from peft import LoraConfig

    check_targets(model, settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        bias="none",
        fan_in_fan_out=_transposed(model, settings),
        **_task(model),
    )
    try:
        with seeded(seed, "adapter"):
            wrapped = _put_on(model, config)
    except ValueError as error:
        raise RecipeError(
            f"PEFT cannot put an adapter here: {' '.join(str(error).split())[:300]}",
            where="model.adapter.targets",
            remedy="name other modules, or train all weights",
            code="no_target",
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def _task(model: Any) -> dict[str, Any]:
    """What PEFT has to know of the head: a score head is trained whole."""
    return {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if reward.is_scalar(model) else {"task_type": "CAUSAL_LM"}


def _put_on(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    with old_names():
        wrapped = get_peft_model(model, config)
    if reward.is_scalar(model):
        # PEFT lists every name that a head may have; what is saved should name the one there is.
        wrapped.peft_config["default"].modules_to_save = ["score"]
    return wrapped


def read(model: Any, folder: str, *, training: bool) -> Any:
    """The model with the adapter of `folder` on it, which a language model's adapter carries over to a reward model.

    Raises ModelError `bad_adapter` when keys are missing, unknown or not finite.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    carried = reward.is_scalar(model) and reward.head_of(folder) == "language"
    try:
        with old_names():
            wrapped = _carried_over(model, folder) if carried else PeftModel.from_pretrained(model, folder, is_trainable=training)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter cannot be read: {' '.join(str(error).split())[:300]}",
            where=folder,
            remedy="use the base it was made for",
            code="bad_adapter",
        ) from error
    _check_keys(wrapped, folder, missing=_HEAD if carried else frozenset())
    if reward.is_scalar(model):
        wrapped.peft_config["default"].modules_to_save = ["score"]
    return wrapped


def _carried_over(model: Any, folder: str) -> Any:
    """A language model's adapter on the base of a reward model, to be trained on beside the head."""
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    config.inference_mode = False
    head = dict.fromkeys(_HEAD, model.score.weight.detach().clone())
    wrapped = _put_on(model, config)
    set_peft_model_state_dict(wrapped, load_peft_weights(folder, device="cpu") | head)
    return wrapped


def _check_keys(wrapped: Any, folder: str, missing: frozenset[str]) -> None:
    """PEFT fills absent tensors with fresh ones: that must not pass unseen, but for those that are known to be `missing`."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = load_peft_weights(folder, device="cpu")
    ours = get_peft_model_state_dict(wrapped)
    odd = sorted((set(stored) ^ set(ours)) - missing) or [name for name, t in stored.items() if not bool(torch.isfinite(t).all())]
    if odd:
        raise ModelError(
            f"the adapter does not fit its base: {len(odd)} tensors are missing, unknown or not finite, e.g. {', '.join(odd[:3])}",
            where=folder,
            remedy="use the base it was made for",
            code="bad_adapter",
        )


def linear_names(model: nn.Module) -> dict[str, nn.Module]:
    """The full names of all linear layers but the output or score head."""
    from transformers.pytorch_utils import Conv1D

    head = model.score if reward.is_scalar(model) else model.get_output_embeddings()  # type: ignore[operator]
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def check_targets(model: nn.Module, settings: recipe.Adapter) -> None:
    """Raises RecipeError `no_target` when a named target matches nothing, or when there is nothing to adapt."""
    linear = linear_names(model)
    if isinstance(settings.targets, str):
        if not linear:
            raise RecipeError(
                "the model has no linear layer to adapt", where="model.adapter.targets", remedy="train all weights", code="no_target"
            )
        return
    known = {name.rsplit(".", 1)[-1] for name in linear}
    for target in settings.targets:
        if not any(name == target or name.endswith("." + target) for name, _ in model.named_modules()):
            raise RecipeError(
                f"no module is called '{target}'{did_you_mean(target, known)}",
                where="model.adapter.targets",
                remedy=f"this model has: {', '.join(sorted(known))}",
                code="no_target",
            )


def _transposed(model: nn.Module, settings: recipe.Adapter) -> bool:
    from transformers.pytorch_utils import Conv1D

    linear = linear_names(model)
    chosen = [m for n, m in linear.items() if isinstance(settings.targets, str) or n.rsplit(".", 1)[-1] in settings.targets]
    return bool(chosen) and all(isinstance(m, Conv1D) for m in chosen)


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers of the model, in order."""
    from peft.tuners.lora.layer import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def check_same(model: Any, settings: recipe.Adapter, folder: str) -> None:
    """Raises RecipeError `adapter_differs` when the recipe asks for another shape than the adapter it starts from has."""
    config = model.peft_config["default"]
    alpha = settings.alpha if settings.alpha is not None else 2 * settings.rank
    if (config.r, config.lora_alpha) != (settings.rank, alpha):
        raise RecipeError(
            f"the adapter to start from has rank {config.r} and alpha {config.lora_alpha}, the recipe asks for {settings.rank} and {alpha}",
            where="model.adapter",
            remedy=f"use the same rank and alpha as {folder}, or merge it into its base first",
            code="adapter_differs",
        )
