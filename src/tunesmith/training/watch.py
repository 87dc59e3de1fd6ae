"""Is it learning? Checks that catch a run which trains nothing, the wrong thing, or into NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from tunesmith.core.errors import ModelError
from tunesmith.core.log import logger

WINDOW = 50


def steepest(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """For each tensor with a gradient: where that is largest, and the value that stands there; a step that moves anything moves this."""
    out = {}
    for name, tensor in parameters.items():
        if tensor.grad is not None and tensor.numel():
            place = int(tensor.grad.reshape(-1).abs().argmax())
            out[name] = place, float(tensor.detach().reshape(-1)[place])
    return out


def after_first_step(parameters: Mapping[str, Tensor], before: Mapping[str, tuple[int, float]], lr: float) -> None:
    """Demand that the step since `before` (see `steepest`) moved something.

    Raises ModelError (nothing_moved); tensors without a gradient are named in the log.
    """
    if no_gradient := [name for name in parameters if name not in before]:
        logger.warning(
            "%d trainable tensors got no gradient in the first step, e.g. %s (normal only for unused experts)",
            len(no_gradient),
            ", ".join(no_gradient[:3]),
        )
    if lr > 0 and all(float(parameters[name].detach().reshape(-1)[place]) == value for name, (place, value) in before.items()):
        raise ModelError(
            f"the first step changed none of the {len(parameters)} trainable tensors",
            where="optimizer",
            remedy="raise optim.lr; in bf16 tiny updates vanish, so keep trained weights in fp32",
            code="nothing_moved",
        )


def is_spike(recent: Sequence[float], loss: float) -> bool:
    """Whether a loss stands far above the last ones: more than six deviations and 20 % over their mean."""
    if len(recent) < 10:
        return False
    mean = sum(recent) / len(recent)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in recent) / len(recent))
    return loss > mean + 6 * deviation and loss > 1.2 * mean
