"""How weights move: the optimizer of a recipe, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import Parameter

from tunesmith.core.adapters import Adapter
from tunesmith.core.errors import BugError
from tunesmith.core.optimizers import AdamW8bit, Optim, PagedAdamW
from tunesmith.core.types import Wanted
from tunesmith.training.optimizers import bits
from tunesmith.training.optimizers.table import OPTIMIZERS
from tunesmith.training.optimizers.weights import Weights


def build_optimizer(
    optim: Optim, lr: float, parameters: Mapping[str, Parameter], model: nn.Module, *, lr_ratio: float = 1.0, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over every trainable parameter of `model`.

    Every group has a factor `lr_ratio` of the rate: the one given here for LoRA's second factors, 1 for everything else. `seed` is the
    run's, for optimizers that draw projections. Weight decay is for matrices: not for norms and biases (one axis) and not for
    embeddings. Raises BugError when a trainable tensor would not be in the optimizer, RecipeError when it does not fit device or model.
    """
    optimizer = OPTIMIZERS[optim.name](optim, Weights(parameters, model, lr, lr_ratio, seed))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in held]
    if missing or not held:
        raise BugError(f"{len(missing)} trainable tensors are not in the optimizer", where=", ".join(missing[:3]), code="not_covered")
    return optimizer


def demand_device(optim: Optim, device: torch.device) -> None:
    """Raises RecipeError (no_gpu, no_bitsandbytes) when the optimizer cannot run there; known before any weight is read."""
    if isinstance(optim, (AdamW8bit, PagedAdamW)):
        bits.demand(optim, device)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step move at `rate`, each group at its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


# Peak learning rates by what is learned and how: (with an adapter, all weights). Preferences move a model that already answers, by
# little; the figures are those of the papers' recipes and of the libraries in use.
LEARNING_RATES = {"answers": (2e-4, 2e-5), "preferences": (1e-5, 1e-6), "scores": (1e-4, 1e-5)}
# An update of Lion is larger than AdamW's: each entry is 1 (Chen 2023, section 5: rates 3 to 10 times smaller).
RELATIVE = {"lion": 0.2}
# Few trained numbers move far: what the papers and PEFT's examples use, over LoRA's rate.
OF_ADAPTERS = {"vera": 20.0, "ia3": 20.0, "prefix": 50.0, "prompt": 100.0, "p_tuning": 10.0}


def peak_lr(optim: Optim, adapter: Adapter | None, wanted: Wanted) -> float:
    """The peak learning rate: the recipe's, or what is usual for the kind of objective, adapter and optimizer."""
    if optim.lr is not None:
        return optim.lr
    kind = "answers" if wanted.kind == "dialogs" else "preferences" if wanted.at == "answers" else "scores"
    usual = LEARNING_RATES[kind][0 if adapter is not None else 1] * RELATIVE.get(optim.name, 1.0)
    return usual * (OF_ADAPTERS.get(adapter.name, 1.0) if adapter is not None else 1.0)


def warmup_steps(optim: Optim, total: int) -> int:
    """Steps of linear warm-up: a fraction of all steps when below 1, else a number of steps."""
    return min(total, math.ceil(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup))


def lr_factor(optim: Optim, step: int, total: int) -> float:
    """The share of the peak learning rate that step 0..total-1 uses."""
    warm = warmup_steps(optim, total)
    if step < warm:
        return (step + 1) / warm
    if optim.schedule == "constant":
        return 1.0
    # The first step after warm-up is at the peak; the final rate would be that of step `total`, so no step is spent at zero.
    done = (step - warm) / (total - warm)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.final_lr + (1 - optim.final_lr) * shape
