"""LoRA adapters as PEFT writes them into folders, read for use beside others on one base."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.core.log import logger
from tunesmith.model import quant
from tunesmith.model.policy import Policy
from tunesmith.model.tokenizer import demand_adapter_files

MOVING = ("pissa", "olora", "corda", "loftq")  # PEFT takes these starts out of the base again when it reads the folder
_PREFIX = "base_model.model."
_A = ".lora_A.weight"


def read_lora(folder: str, policy: Policy, shape_of: Callable[[str], tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, in] and B [out, R] (times the scale) by the path of the layer, in the policy's dtype. `shape_of`: (outputs, inputs) of a layer.

    Raises ModelError `bad_adapter` for a folder that is none, is broken, or belongs to another base; RecipeError `adapter_kind` for what
    cannot be mixed by row.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    demand_adapter_files(folder)
    config: Any = PeftConfig.from_pretrained(folder)
    _demand_plain_lora(config, folder)
    own, theirs = str(policy.causal.config._name_or_path), str(config.base_model_name_or_path or "")
    if theirs and own and Path(theirs).name != Path(own).name:
        logger.warning("%s was trained on %s and is put on %s", folder, theirs, own)
    try:
        stored = load_peft_weights(folder, device="cpu", local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapter's weights cannot be read: {said}", where=folder, remedy="save or fetch the adapter again", code="bad_adapter"
        ) from error
    if broken := sorted(key for key, tensor in stored.items() if not bool(torch.isfinite(tensor).all())):
        raise ModelError(
            f"{len(broken)} of the adapter's tensors hold NaN or infinity, e.g. {broken[0]}",
            where=folder,
            remedy="use an earlier checkpoint of its training, or train it again with a smaller optim.lr",
            code="bad_adapter",
        )
    _demand_no_ends(stored, policy, folder)
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    seconds = {key.replace(".lora_A.", ".lora_B.") for key in stored if key.endswith(_A)}
    odd = sorted(key for key in stored if not key.endswith(_A) and key not in seconds)
    for key in sorted(key for key in stored if key.endswith(_A)):
        path, other = key.removesuffix(_A).removeprefix(_PREFIX), key.replace(".lora_A.", ".lora_B.")
        if other not in stored or not _fits(policy, path, stored[key], stored[other], shape_of):
            odd.append(key)
            continue
        scale = _scale(config, path, len(stored[key]))
        a, b = stored[key].float(), stored[other].float() * scale
        layers[path] = (a.to(policy.device, policy.dtype), b.to(policy.device, policy.dtype))
    if odd or not layers:
        raise ModelError(
            f"the adapter does not fit this base: {len(odd)} of its tensors have no layer of their shape"
            + (f", e.g. {odd[0]} {tuple(stored[odd[0]].shape)}" if odd else ""),
            where=folder,
            remedy=f"use the base that it was made for: {theirs or 'its configuration does not say which'}",
            code="bad_adapter",
        )
    return layers


def _demand_no_ends(stored: dict[str, Tensor], policy: Policy, folder: str) -> None:
    """The head is read without its module, and embeddings are no products: neither can be mixed by row."""
    ends = {id(policy.causal.get_output_embeddings()): "the head", id(policy.causal.get_input_embeddings()): "the embedding"}
    for key in stored:
        path = key.partition(".lora_")[0].removeprefix(_PREFIX)
        try:
            end = ends.get(id(policy.causal.get_submodule(path)))
        except AttributeError:
            continue
        if end is not None:
            raise ModelError(
                f"the adapter changes {end} ({path}), which rows cannot be mixed with",
                where=folder,
                remedy="open it alone: as the model, or with --adapter",
                code="bad_adapter",
            )


def _fits(policy: Policy, path: str, a: Tensor, b: Tensor, shape_of: Callable[[str], tuple[int, int]]) -> bool:
    try:
        layer: Any = policy.causal.get_submodule(path)
    except AttributeError:
        return False
    if not (isinstance(layer, torch.nn.Linear) or quant.kind_of(layer) is not None or type(layer).__name__ == "Conv1D"):
        return False
    outputs, inputs = shape_of(path)
    return a.shape[1] == inputs and b.shape == (outputs, a.shape[0])


def _demand_plain_lora(config: Any, folder: str) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    found = [kind] if kind != "lora" else []
    if not found:
        asked = {
            "DoRA": config.use_dora, "trained modules beside it": config.modules_to_save, "trained biases": config.bias != "none",
            "a bias in B": getattr(config, "lora_bias", False), "target_parameters": getattr(config, "target_parameters", None),
            "a start that moved its base": str(config.init_lora_weights).partition("_")[0] in MOVING,
        }  # fmt: skip
        found = [name for name, value in asked.items() if value]
    if found:
        raise RecipeError(
            f"rows cannot be mixed with this adapter: it is, or has, {', '.join(found)}",
            where=folder,
            remedy="open it alone, as the model, or merge it into its base; plain LoRA adapters can be mixed",
            code="adapter_kind",
        )


def _scale(config: Any, path: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), path), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)
