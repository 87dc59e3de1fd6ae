"""Objectives over whole answers: a pure function of pairs or labels, with what is summed, what is counted and what is reported of it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.core.types import Batch, Loss, Outputs
from tunesmith.objective.labels import kl, kto
from tunesmith.objective.rows import Labels, Pairs, Rows, collect
from tunesmith.objective.shape import Lengths, average, diverge

Metrics = dict[str, tuple[float, float]]
KEYWORD = inspect.Parameter.KEYWORD_ONLY
EVERY_LENGTH: tuple[Lengths, ...] = ("sum", "mean", "desensitised")
# The same model scores the same answer in fp32 to about 1e-6 of its log-probability, in whatever company it is computed. A hundred times
# as much is told apart by no one: at 100 nats it is one answer being 1 % likelier than before.
TIE = 1e-4


class _OverRows(ABC):
    """What the table, the batch and the training step see of a function over rows.

    The keyword-only arguments of the function are settings, and so are those that its class adds (`extra`: name -> default). They are
    told by `__signature__`, which is what the table checks a recipe against.
    """

    def __init__(self, function: Callable[..., Tensor], referenced: bool, extra: Mapping[str, Any]) -> None:
        self._function, self._referenced = function, referenced
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is KEYWORD]
        self._own = {p.name: p.default for p in own}
        self._extra = dict(extra)
        self.__signature__ = inspect.Signature([*own, *(inspect.Parameter(n, KEYWORD, default=v) for n, v in extra.items())])
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def __call__(self, outputs: Outputs, batch: Batch, **settings: Any) -> Loss:
        return self.loss(self.collect(outputs, batch, **settings), **settings)

    def collect(self, outputs: Outputs, batch: Batch, **settings: Any) -> Rows:
        """The sums over each row. Raises BugError when the reference is needed and not filled in."""
        if self._referenced and "reference" not in batch.streams:
            raise BugError("the reference log-probabilities are not filled in", where=f"objective.{self.__name__}", code="no_reference")
        return collect(outputs, batch, excess=self._excess(settings), referenced=self._referenced)

    @abstractmethod
    def loss(self, rows: Rows, **settings: Any) -> Loss:
        """The loss of these rows, a differentiable function of rows.logp alone."""

    def _excess(self, settings: Mapping[str, Any]) -> float:
        whole = {**self._extra, **settings}
        return float(whole["ld_alpha"]) if whole.get("lengths") == "desensitised" else 1.0

    def _bound(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: settings.get(name, default) for name, default in self._own.items()}


class PairObjective(_OverRows):
    """A loss over pairs as a row of the table.

    `lengths`: the ways to take an answer's log-probability that make sense for it, the usual first; with more than one the setting
    `lengths` chooses: sum over its tokens; mean, a token; desensitised, in which tokens beyond the shorter answer of the pair count
    ld_alpha times (LD-DPO, Liu 2024, arXiv:2409.06411). `divergences`: whether the loss is one of the difference of rewards, in which
    the constant of an f-divergence cancels; then the settings divergence and alpha_coefficient choose another (see shape.diverge).
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        lengths: Sequence[Lengths] = EVERY_LENGTH,
        divergences: bool = False,
        referenced: bool = True,
    ) -> None:
        self.lengths = tuple(lengths)
        extra: dict[str, Any] = {"lengths": lengths[0]} if len(lengths) > 1 else {}
        extra |= {"ld_alpha": 0.5} if "desensitised" in lengths else {}
        extra |= {"divergence": "reverse_kl", "alpha_coefficient": 0.5} if divergences else {}
        super().__init__(function, referenced, extra)

    def loss(self, rows: Rows, **settings: Any) -> Loss:
        """The sum over pairs. Raises BugError when a group of rows is not one pair."""
        whole, own = {**self._extra, **settings}, self._bound(settings)
        plain = rows.pairs()
        pairs, read_from = diverge(plain, whole.get("divergence", "reverse_kl"), whole.get("alpha_coefficient", 0.5)), plain
        if whole.get("lengths", self.lengths[0]) == "mean":
            pairs, read_from = average(pairs), average(plain)
        ties = _ties(read_from.chosen, read_from.rejected)
        return Loss(self._function(pairs, **own).sum(), "pairs", _pair_metrics(plain, pairs, own["beta"], ties))


class LabelObjective(_OverRows):
    """A loss over labelled answers as a row of the table."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__(function, True, {})

    def loss(self, rows: Rows, **settings: Any) -> Loss:
        """The sum over labelled answers; mismatched rows are no answers. Raises BugError for a row of another role."""
        labels, own = rows.labels(), self._bound(settings)
        return Loss(self._function(labels, **own).sum(), "sequences", _label_metrics(labels, own["beta"], self._function is kto))


@torch.no_grad()
def _pair_metrics(plain: Pairs, pairs: Pairs, beta: float, ties: Tensor) -> Metrics:
    """Means over pairs: how often the implicit reward is right (a tie is half right), the rewards, and the log-probabilities."""
    n, chosen, rejected = float(len(pairs.chosen)), beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return read({
        "accuracy": (right(pairs.difference, ties), n),
        "reward_margin": ((chosen - rejected).sum(), n),
        "reward_chosen": (chosen.sum(), n),
        "reward_rejected": (rejected.sum(), n),
        "logp_chosen": (plain.chosen.sum(), n),
        "logp_rejected": (plain.rejected.sum(), n),
    })  # fmt: skip


@torch.no_grad()
def _label_metrics(labels: Labels, beta: float, divergence: bool) -> Metrics:
    """Means over answers: how often the sign of the implicit reward is that of the label, and the rewards of both kinds.

    The margin, a difference of two means, is that of the rows at hand with weight 1.
    """
    found: dict[str, tuple[Tensor, float]] = {}
    rewards = beta * labels.ratio
    found["accuracy"] = right(torch.where(labels.desirable, labels.ratio, -labels.ratio), _ties(labels.logp)), float(len(rewards))
    kinds = {"chosen": labels.desirable, "rejected": ~labels.desirable}
    numbers = {name: float(kind.sum()) for name, kind in kinds.items()}
    for name, kind in kinds.items():
        if numbers[name]:
            found[f"reward_{name}"] = rewards[kind].sum(), numbers[name]
            found[f"logp_{name}"] = labels.logp[kind].sum(), numbers[name]
    if all(numbers.values()):
        found["reward_margin"] = rewards[kinds["chosen"]].mean() - rewards[kinds["rejected"]].mean(), 1.0
    if divergence:
        found["kl"] = kl(labels), 1.0
    return read(found)


def _ties(*logp: Tensor) -> Tensor:
    """The largest difference from a reference that may be rounding alone, of answers with these log-probabilities."""
    return TIE * torch.stack(logp).detach().abs().amax(0).clamp_min(1.0)


def right(margins: Tensor, ties: Tensor | float = 0.0) -> Tensor:
    """How many margins are positive; one that is no larger than `ties`, either way, is half."""
    margins = margins.detach()
    return (torch.where(margins.abs() <= ties, 0.0, margins.sign()) + 1).sum() / 2


def read(metrics: Mapping[str, tuple[Tensor, float]]) -> Metrics:
    """Metrics as numbers, brought from the device in one go."""
    values = torch.stack([value.detach().double() for value, _ in metrics.values()]).tolist()
    return {name: (value, weight) for value, (name, (_, weight)) in zip(values, metrics.items(), strict=True)}
