"""Objectives over whole answers: a pure function of rows or pairs, with what is summed, what is counted and what is reported of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.core.types import Batch, Loss, Outputs
from tunesmith.objective.rows import Pairs, Rows, collect

Settings = dict[str, Any]
# What a pair's rewards are for the report: ratios to the reference, the same a token, or plain log-probabilities, summed or a token.
Reward = Literal["ratio", "mean_ratio", "mean", "sum"]
KEYWORD = inspect.Parameter.KEYWORD_ONLY
LENGTHS = {"lengths": "sum", "ld_alpha": 0.5}
DIVERGENCES = {"divergence": "reverse_kl", "divergence_alpha": 0.5}


class PairObjective:
    """A loss over pairs as a row of the table: settings for length and divergence stand beside the function's own."""

    def __init__(
        self, function: Callable[..., Tensor], *, reward: Reward = "ratio", lengths: bool = True, divergences: bool = False
    ) -> None:
        self._function, self._reward = function, reward
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is KEYWORD]
        extra = {**(LENGTHS if lengths else {}), **(DIVERGENCES if divergences else {})}
        self._own = {p.name for p in own}
        self.__signature__ = inspect.Signature([*own, *(inspect.Parameter(name, KEYWORD, default=value) for name, value in extra.items())])
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    def __call__(self, outputs: Outputs, batch: Batch, **settings: Any) -> Loss:
        """The loss of the pairs of one batch."""
        return self.loss(self.collect(outputs, batch, **settings), **settings)

    def collect(self, outputs: Outputs, batch: Batch, **settings: Any) -> Rows:
        """The sums over each row."""
        return collect(outputs, batch, **{name: settings.get(name, default) for name, default in LENGTHS.items()})

    def loss(self, rows: Rows, **settings: Any) -> Loss:
        """The sum over pairs, and accuracy, margin and means of the implicit rewards."""
        pairs = rows.pairs(settings.get("divergence", "reverse_kl"), settings.get("divergence_alpha", 0.5))
        own = {name: value for name, value in settings.items() if name in self._own}
        return Loss(self._function(pairs, **own).sum(), "pairs", self._metrics(pairs, own))

    @torch.no_grad()
    def _metrics(self, pairs: Pairs, own: Settings) -> dict[str, tuple[float, float]]:
        chosen, rejected = rewards(pairs, self._reward)
        scale = float(own.get("beta", self.__signature__.parameters["beta"].default)) if "beta" in self._own else 1.0
        chosen, rejected = scale * chosen, scale * rejected
        n = float(len(chosen))
        sums = {
            "accuracy": (chosen > rejected).double().sum() + 0.5 * (chosen == rejected).double().sum(),
            "reward_margin": (chosen - rejected).sum(),
            "reward_chosen": chosen.sum(),
            "reward_rejected": rejected.sum(),
            "logp_chosen": pairs.chosen.sum(),
            "logp_rejected": pairs.rejected.sum(),
        }
        return {name: (float(value), n) for name, value in sums.items()}


def rewards(pairs: Pairs, kind: Reward) -> tuple[Tensor, Tensor]:
    """What the objective prefers by: one number [n] for each side."""
    chosen, rejected = pairs.scores if "ratio" in kind else (pairs.chosen, pairs.rejected)
    return (chosen / pairs.chosen_weight, rejected / pairs.rejected_weight) if "mean" in kind else (chosen, rejected)


class LabelObjective:
    """A loss over labelled answers as a row of the table."""

    def __init__(self, function: Callable[..., tuple[Tensor, dict[str, tuple[float, float]]]]) -> None:
        self._function = function
        self.__signature__ = inspect.Signature([p for p in inspect.signature(function).parameters.values() if p.kind is KEYWORD])
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    def __call__(self, outputs: Outputs, batch: Batch, **settings: Any) -> Loss:
        """The loss of the labelled rows of one batch."""
        return self.loss(self.collect(outputs, batch), **settings)

    def collect(self, outputs: Outputs, batch: Batch, **_settings: Any) -> Rows:
        """The sums over each row."""
        return collect(outputs, batch)

    def loss(self, rows: Rows, **settings: Any) -> Loss:
        """The sum over labelled rows, and the means of the implicit rewards of both kinds.

        accuracy: good answers with a positive ratio to the reference and bad ones with a negative.
        """
        losses, metrics = self._function(rows, **settings)
        with torch.no_grad():
            beta = float(settings.get("beta", self.__signature__.parameters["beta"].default))
            good, bad = (beta * (part.logp - part.reference) for part in (rows.of("desirable"), rows.of("undesirable")))
            right = (good > 0).double().sum() + (bad < 0).double().sum() + 0.5 * ((good == 0).double().sum() + (bad == 0).double().sum())
            metrics = {**metrics, "accuracy": (float(right), float(len(good) + len(bad)))}
            for name, values in (("reward_desirable", good), ("reward_undesirable", bad)):
                if len(values):
                    metrics[name] = float(values.sum()), float(len(values))
        return Loss(losses.sum(), "sequences", metrics)
