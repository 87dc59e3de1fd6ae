"""Adapters through PEFT: which modules, drawn from which seed, and a folder that PEFT reads back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.core import adapters as kinds
from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.core.seed import seed_of
from tunesmith.model import bottleneck, lora_start, reward, virtual
from tunesmith.model.load import old_names, seeded
from tunesmith.model.peft_configs import peft_config
from tunesmith.model.tokenizer import demand_adapter_files

_PREFIX_START = 0.02  # standard deviation of a fresh prefix
_HEAD = frozenset({"base_model.model.score.weight"})


def attach(model: Any, settings: kinds.Adapter, *, seed: int, base: str, revision: str | None = None) -> Any:
    """The model with a fresh adapter in fp32; the base is frozen.

    Its output is that of the base but for prefixes and prompts, which are drawn. The head of a reward model is trained whole and is
    kept in the adapter. `base` is recorded as the adapter's base (`revision` of it is read where a start needs its
    weights). Raises RecipeError as `peft_configs.peft_config`.
    """
    with seeded(seed, "adapter"):
        if isinstance(settings, kinds.Bottleneck):
            return bottleneck.attach(model, settings, base=base)
        config = peft_config(model, settings, base)
        if isinstance(settings, kinds.Vera):
            config.projection_prng_key = seed_of(seed, "vera") % 2**31
        try:
            wrapped = _put_on(model, config)
        except ValueError as error:
            raise RecipeError(
                f"PEFT cannot put an adapter here: {' '.join(str(error).split())[:300]}",
                where="model.adapter.targets",
                remedy="name other modules, or train all weights",
                code="no_target",
            ) from error
        wrapped.peft_config["default"].base_model_name_or_path = base
        if isinstance(settings, kinds.Lora):
            lora_start.begin(wrapped, settings, base, revision)
    if isinstance(settings, kinds.Lora) and settings.freeze_a:
        for layer in lora_layers(wrapped):
            layer.lora_A.requires_grad_(False)
    if virtual.front_of(wrapped):
        _settle_prompt(wrapped, settings)
    return wrapped


def _settle_prompt(wrapped: Any, settings: kinds.Adapter) -> None:
    """Virtual tokens in fp32; PEFT draws a prefix of size one, under which the base cannot be heard."""
    wrapped.prompt_encoder.float()
    if isinstance(settings, kinds.Prefix) and not settings.projection:
        with torch.no_grad():
            wrapped.prompt_encoder["default"].embedding.weight.mul_(_PREFIX_START)


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

    if bottleneck.is_bottleneck(folder):
        return bottleneck.read(model, folder, training=training)
    demand_adapter_files(folder)
    carried = reward.is_scalar(model) and reward.head_of(folder) == "language"
    try:
        with old_names():
            # PEFT reads prompts for use only; what it then uses is what is trained on.
            prompts = training and _is_prompt(folder)
            trained = training and not prompts
            wrapped = _carried_over(model, folder) if carried else PeftModel.from_pretrained(model, folder, is_trainable=trained)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the adapter cannot be read: {' '.join(str(error).split())[:300]}",
            where=folder,
            remedy="use the base it was made for",
            code="bad_adapter",
        ) from error
    _check_keys(wrapped, folder, missing=_HEAD if carried else frozenset())
    if prompts:
        wrapped.prompt_encoder.float().requires_grad_(True)
    if reward.is_scalar(model):
        wrapped.peft_config["default"].modules_to_save = ["score"]
    return wrapped


def _is_prompt(folder: str) -> bool:
    """Whether the adapter is virtual tokens. Raises ModelError `only_result` for those whose network PEFT does not keep."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(folder)
    if not config.is_prompt_learning:
        return False
    if kind_of(config) == "p_tuning" or getattr(config, "prefix_projection", False):
        raise ModelError(
            "the folder holds the virtual tokens and not the network that makes them, so they cannot be trained on",
            where=folder,
            remedy="go on from a checkpoint (the same command in the same run folder), or train prompt or prefix without a network",
            code="only_result",
        )
    return True


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


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers of the model, in order."""
    from peft.tuners.lora.layer import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def check_same(model: Any, settings: kinds.Adapter, folder: str) -> None:
    """Raises RecipeError `adapter_differs` when the recipe asks for another kind or shape than the adapter it starts from has."""
    config = model.peft_config["default"]
    asked = {"kind": settings.name, **_shape(settings)}
    found = {"kind": kind_of(config), **{name: getattr(config, _PEFT[name], None) for name in _shape(settings)}}
    if asked != found:
        odd = next(name for name in asked if asked[name] != found[name])
        raise RecipeError(
            f"the adapter to start from has {odd} {found[odd]}, the recipe asks for {asked[odd]}",
            where="model.adapter",
            remedy=f"ask for the same kind and shape as {folder}, or merge it into its base first",
            code="adapter_differs",
        )


_PEFT = {"rank": "r", "alpha": "lora_alpha", "tokens": "num_virtual_tokens", "width": "width", "position": "position"}


def _shape(settings: kinds.Adapter) -> dict[str, Any]:
    if isinstance(settings, kinds.Lora | kinds.Dora):
        return {"rank": settings.rank, "alpha": settings.scale_of()}
    if isinstance(settings, kinds.Bottleneck):
        return {"width": settings.width, "position": settings.position}
    names = {kinds.Vera: ("rank",), kinds.Ia3: ()}.get(type(settings), ("tokens",))
    return {name: getattr(settings, name) for name in names}


def kind_of(config: Any) -> str:
    """What our recipes call the kind of a PEFT configuration."""
    name = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    if name == "lora":
        return "dora" if config.use_dora else "lora"
    return {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}.get(name, name)
