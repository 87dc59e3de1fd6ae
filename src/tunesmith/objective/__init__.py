"""Floor 1: losses as pure functions of numbers, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tunesmith.core.recipe import Named
from tunesmith.core.table import Entry, Table
from tunesmith.core.types import Batch, Loss, Outputs
from tunesmith.objective.token import nll

Objective = Callable[[Outputs, Batch], Loss]

OBJECTIVES: Table[Callable[..., Loss]] = Table(
    "objective",
    {
        "nll": Entry(nll, source="maximum likelihood"),
    },
)


@dataclass(frozen=True)
class Method:
    """One term of the training loss: the function with its settings bound, its weight, and what it needs filled."""

    name: str
    function: Objective
    weight: float
    needs: frozenset[str]


def methods(objectives: Sequence[Named]) -> list[Method]:
    """The terms that a recipe names. Raises RecipeError for an unknown name or setting."""
    found = []
    for place, named in enumerate(objectives):
        entry = OBJECTIVES.check(named.name, named.settings(), where=f"objective.{place}")
        found.append(Method(named.name, partial(entry.function, **named.settings()), named.weight, entry.needs))
    return found
