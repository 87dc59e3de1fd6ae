"""The kinds of adapters that PEFT has: from our settings to its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from tunesmith.core import adapters as kinds
from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.model import reward

WHERE = "model.adapter"


def peft_config(model: Any, settings: kinds.Adapter, base: str) -> Any:
    """PEFT's configuration of an adapter for this model, whose base is kept at `base`.

    Raises RecipeError: no_target (nothing is called so, or nothing that an adapter can go on; what there is stands in the remedy),
    rank_too_large, no_module, no_default.
    """
    return _CONFIGS[settings.name](model, settings, base) if settings.name in _CONFIGS else None


def task(model: Any, more: list[str] | None = None) -> dict[str, Any]:
    """What PEFT has to know of the head: a score head is trained whole, as are the modules named in `more`."""
    if reward.is_scalar(model):
        return {"task_type": "SEQ_CLS", "modules_to_save": ["score", *(more or [])]}
    return {"task_type": "CAUSAL_LM", "modules_to_save": list(more or []) or None}


def linear_names(model: nn.Module) -> dict[str, nn.Module]:
    """The full names of all linear layers but the output or score head."""
    from transformers.pytorch_utils import Conv1D

    head = model.score if reward.is_scalar(model) else model.get_output_embeddings()  # type: ignore[operator]
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def chosen(model: nn.Module, targets: str | list[str], *, embeddings: bool = False) -> dict[str, nn.Module]:
    """The linear layers that `targets` names, by full name; with `embeddings` it may name embeddings too.

    Raises RecipeError `no_target` for a name that matches nothing, or something that is no such layer.
    """
    linear = linear_names(model)
    if isinstance(targets, str):
        if not linear:
            raise RecipeError(
                "the model has no linear layer to adapt", where=f"{WHERE}.targets", remedy="train all weights", code="no_target"
            )
        return linear
    _demand_modules(model, targets, _last_names(linear), "targets")
    _demand_layers(model, targets, linear, embeddings=embeddings)
    return {name: module for name, module in linear.items() if any(is_called(name, target) for target in targets)}


def _demand_modules(model: nn.Module, names: list[str], known: set[str], setting: str) -> None:
    every = [name for name, _ in model.named_modules()]
    for wanted in names:
        if not any(is_called(name, wanted) for name in every):
            raise RecipeError(
                f"no module is called '{wanted}'{did_you_mean(wanted, known)}",
                where=f"{WHERE}.{setting}",
                remedy=f"this model has: {', '.join(sorted(known))}",
                code="no_target",
            )


def _demand_layers(model: nn.Module, names: list[str], linear: dict[str, nn.Module], *, embeddings: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    # A quantised layer of bitsandbytes is an nn.Linear too; the output head, which `linear` leaves out, may be named.
    fitting = (nn.Linear, Conv1D, nn.Embedding) if embeddings else (nn.Linear, Conv1D)
    goes_on = "linear layers and embeddings" if embeddings else "linear layers"
    for wanted in names:
        for name, module in model.named_modules():
            if is_called(name, wanted) and not isinstance(module, fitting):
                known = _last_names(inside for inside in linear if inside.startswith(name + ".")) or _last_names(linear)
                raise RecipeError(
                    f"'{wanted}' is of class {type(module).__name__}, and this adapter goes on {goes_on}",
                    where=f"{WHERE}.targets",
                    remedy=f"name layers, e.g. {', '.join(sorted(known))}",
                    code="no_target",
                )


def _last_names(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def is_called(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def more_modules(model: nn.Module, settings: kinds.Adapter) -> list[str]:
    """Further modules to train whole; embeddings and heads, which may be tied and are read by name elsewhere, are not among them."""
    names = list(getattr(settings, "modules_to_save", []))
    known = _last_names(name for name, module in model.named_modules() if name and any(True for _ in module.parameters()))
    _demand_modules(model, names, known, "modules_to_save")
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]  # type: ignore[operator]
    for name, module in model.named_modules():
        if module in ends and any(is_called(name, wanted) for wanted in names):
            raise RecipeError(
                f"'{name}' is the embedding or the output head, which an adapter does not carry",
                where=f"{WHERE}.modules_to_save",
                remedy="train all weights (adapter: null), or leave it out",
                code="no_module",
            )
    return names


def _low_rank(model: Any, settings: kinds.Lora | kinds.Dora, base: str) -> Any:
    from peft import LoraConfig

    del base
    linear = chosen(model, settings.targets, embeddings=True)
    ranks = _own_ranks(linear, settings)
    for name, module in linear.items():
        rank, smaller = next((r for pattern, r in ranks.items() if is_called(name, pattern)), settings.rank), min(_sides(module))
        if rank > smaller:
            raise RecipeError(
                f"rank {rank} is larger than the layer '{name}' ({' x '.join(map(str, _sides(module)))})",
                where=f"{WHERE}.rank",
                remedy=f"use at most {smaller}, or give this layer a rank of its own with ranks: {{{name.rsplit('.', 1)[-1]}: ...}}",
                code="rank_too_large",
            )
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_of(),
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        bias="none",
        fan_in_fan_out=_transposed(linear),
        rank_pattern=dict(ranks),
        alpha_pattern={} if settings.alpha is not None else {pattern: 2 * rank for pattern, rank in ranks.items()},
        use_rslora=settings.rank_stabilised,
        use_dora=settings.name == "dora",
        **task(model, more_modules(model, settings)),
    )


def _own_ranks(linear: dict[str, nn.Module], settings: kinds.Lora | kinds.Dora) -> dict[str, int]:
    for pattern, rank in settings.ranks.items():
        if rank < 1 or not any(is_called(name, pattern) for name in linear):
            known = _last_names(linear)
            raise RecipeError(
                f"no adapted layer is called '{pattern}'{did_you_mean(pattern, known)}" if rank >= 1 else f"rank {rank} for '{pattern}'",
                where=f"{WHERE}.ranks",
                remedy=f"adapted are: {', '.join(sorted(known))}; ranks are at least 1",
                code="no_target",
            )
    return settings.ranks


def _sides(module: Any) -> tuple[int, int]:
    """Inputs and outputs; a quantised weight does not tell them by its shape."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def _transposed(linear: dict[str, nn.Module]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return bool(linear) and all(isinstance(m, Conv1D) for m in linear.values())


def _vera(model: Any, settings: kinds.Vera, base: str) -> Any:
    from peft import VeraConfig

    del base
    chosen(model, settings.targets)
    return VeraConfig(
        r=settings.rank,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        vera_dropout=settings.dropout,
        d_initial=settings.d_initial,
        save_projection=True,
        bias="none",
        **task(model, more_modules(model, settings)),
    )


# Keys, values, and the feed-forward layer's way back, as the models of this field call them.
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "qkv_proj", "query_key_value", "c_attn")
_WAY_BACK = ("down_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "mlp.c_proj")


def _ia3(model: Any, settings: kinds.Ia3, base: str) -> Any:
    from peft import IA3Config

    del base
    linear = linear_names(model)

    def named(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if any(is_called(full, name) for full in linear)]

    inside = named(_WAY_BACK)[:1] if settings.feedforward == "auto" else list(settings.feedforward)
    targets = [*named(_KEYS_AND_VALUES), *inside] if settings.targets == "auto" else list(settings.targets)
    if not targets:
        raise RecipeError(
            "this model's keys, values and feed-forward layers have no name that is known",
            where=f"{WHERE}.targets",
            remedy=f"name them; this model has: {', '.join(sorted(_last_names(linear)))}",
            code="no_default",
        )
    known = chosen(model, targets)
    if odd := [name for name in inside if name not in targets]:
        if settings.feedforward != "auto":
            raise RecipeError(
                f"'{odd[0]}' is not one of the targets",
                where=f"{WHERE}.feedforward",
                remedy=f"name it in targets too, or one of: {', '.join(targets)}",
                code="no_target",
            )
        inside = []
    return IA3Config(
        target_modules=targets,
        feedforward_modules=inside,
        fan_in_fan_out=_transposed(known),
        **task(model, more_modules(model, settings)),
    )


def _prefix(model: Any, settings: kinds.Prefix, base: str) -> Any:
    from peft import PrefixTuningConfig

    del base
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PrefixTuningConfig(
        num_virtual_tokens=settings.tokens,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * width,
        prefix_projection=settings.projection,
        encoder_hidden_size=settings.width or config.hidden_size,
        task_type=task(model)["task_type"],
    )


def _prompt(model: Any, settings: kinds.Prompt, base: str) -> Any:
    from peft import PromptTuningConfig

    words = (
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": settings.text, "tokenizer_name_or_path": base} if settings.text else {}
    )
    return PromptTuningConfig(
        num_virtual_tokens=settings.tokens, task_type=task(model)["task_type"], **{"prompt_tuning_init": "SAMPLE_VOCAB", **words}
    )


def _p_tuning(model: Any, settings: kinds.PTuning, base: str) -> Any:
    from peft import PromptEncoderConfig

    del base
    return PromptEncoderConfig(
        num_virtual_tokens=settings.tokens,
        encoder_hidden_size=settings.width or model.config.get_text_config().hidden_size,
        encoder_reparameterization_type=settings.encoder.upper(),
        task_type=task(model)["task_type"],
    )


_CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": _low_rank, "dora": _low_rank, "vera": _vera, "ia3": _ia3, "prefix": _prefix, "prompt": _prompt, "p_tuning": _p_tuning,
}  # fmt: skip
