"""How weights move: parameter groups, AdamW, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import Parameter

from tunesmith.core import recipe as settings
from tunesmith.core.errors import BugError
from tunesmith.core.types import Wanted


def embeddings(model: nn.Module) -> set[int]:
    """The ids of all embedding weights, by the kind of their module: names differ (embed_tokens, wte, word_embeddings)."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def build_optimizer(optim: settings.Optim, lr: float, parameters: Mapping[str, Parameter], model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov 2019, arXiv:1711.05101) over every trainable parameter of `model`.

    Weight decay is for matrices: not for norms and biases (one axis) and not for embeddings. Raises BugError when a trainable
    tensor would not be in the optimizer.
    """
    spared = embeddings(model)
    decayed = {name for name, p in parameters.items() if p.ndim >= 2 and id(p) not in spared}
    groups = [
        {"params": [p for n, p in parameters.items() if n in decayed], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=optim.betas, eps=optim.eps, fused=True)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in held]
    if missing or not held:
        raise BugError(f"{len(missing)} trainable tensors are not in the optimizer", where=", ".join(missing[:3]), code="not_covered")
    return optimizer


# Peak learning rates by what is learned and how: (with an adapter, all weights). Preferences move a model that already answers, by
# little; the figures are those of the papers' recipes and of the libraries in use.
LEARNING_RATES = {"answers": (2e-4, 2e-5), "preferences": (1e-5, 1e-6), "scores": (1e-4, 1e-5)}


def peak_lr(optim: settings.Optim, adapted: bool, wanted: Wanted) -> float:
    """The peak learning rate: the recipe's, or what is usual for the kind of objective."""
    if optim.lr is not None:
        return optim.lr
    kind = "answers" if wanted.kind == "dialogs" else "scores" if wanted.at == "ends" else "preferences"
    return LEARNING_RATES[kind][0 if adapted else 1]


def warmup_steps(optim: settings.Optim, total: int) -> int:
    """Steps of linear warm-up: a fraction of all steps when below 1, else a number of steps."""
    return min(total, math.ceil(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup))


def lr_factor(optim: settings.Optim, step: int, total: int) -> float:
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
