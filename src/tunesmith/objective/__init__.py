"""Floor 1: losses as pure functions of numbers, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunesmith.core.errors import RecipeError
from tunesmith.core.recipe import Named
from tunesmith.core.table import Entry, Table
from tunesmith.core.types import Batch, Kind, Loss, Outputs, Wanted
from tunesmith.objective import labels, pairs, rewards
from tunesmith.objective.checks import check_values
from tunesmith.objective.rows import Rows
from tunesmith.objective.sequences import LabelObjective, PairObjective
from tunesmith.objective.token import UNLEARNED, nll

__all__ = ["OBJECTIVES", "UNLEARNED", "Method", "Rows", "methods", "wanted"]

PAIRS, LABELS, STEPS = frozenset({"pairs"}), frozenset({"labels"}), frozenset({"steps"})
REFERENCE, SCORE, WHOLE = frozenset({"reference"}), frozenset({"score"}), frozenset({"whole_step"})


def _referenced(function: Callable[..., Any], source: str, *, divergences: bool = False, whole: bool = False) -> Entry[Callable[..., Loss]]:
    return Entry(PairObjective(function, divergences=divergences), PAIRS | REFERENCE | (WHOLE if whole else frozenset()), source)


OBJECTIVES: Table[Callable[..., Loss]] = Table(
    "objective",
    {
        "nll": Entry(nll, source="maximum likelihood"),
        "dpo": _referenced(pairs.dpo, "Rafailov 2023, arXiv:2305.18290", divergences=True),
        "cdpo": _referenced(pairs.cdpo, "Mitchell 2023", divergences=True),
        "robust": _referenced(pairs.robust, "Chowdhury 2024, arXiv:2403.00409", divergences=True),
        "ipo": Entry(
            PairObjective(pairs.ipo, reward="mean_ratio", lengths=False, divergences=True), PAIRS | REFERENCE, "Azar 2023, arXiv:2310.12036"
        ),
        "hinge": _referenced(pairs.hinge, "Zhao 2023, arXiv:2305.10425", divergences=True),
        "rso": _referenced(pairs.rso, "Liu 2023, arXiv:2309.06657", divergences=True),
        "exo": _referenced(pairs.exo, "Ji 2024, arXiv:2402.00856", divergences=True),
        "nca": _referenced(pairs.nca, "Chen 2024, arXiv:2402.05369"),
        "sppo": _referenced(pairs.sppo, "Wu 2024, arXiv:2405.00675"),
        "apo_zero": _referenced(pairs.apo_zero, "D'Oosterlinck 2024, arXiv:2408.06266"),
        "apo_down": _referenced(pairs.apo_down, "D'Oosterlinck 2024, arXiv:2408.06266"),
        "aot": _referenced(pairs.aot, "Melnyk 2024, arXiv:2406.05882", whole=True),
        "aot_pair": _referenced(pairs.aot_pair, "Melnyk 2024, arXiv:2406.05882", whole=True),
        "bco_pair": _referenced(pairs.bco_pair, "Jung 2024, arXiv:2404.04656"),
        "discopop": _referenced(pairs.discopop, "Lu 2024, arXiv:2406.08414", divergences=True),
        "simpo": Entry(PairObjective(pairs.simpo, reward="mean", lengths=False), PAIRS, "Meng 2024, arXiv:2405.14734"),
        "orpo": Entry(PairObjective(pairs.orpo, reward="mean", lengths=False), PAIRS, "Hong 2024, arXiv:2403.07691"),
        "cpo": Entry(PairObjective(pairs.cpo, reward="sum", lengths=False), PAIRS, "Xu 2024, arXiv:2401.08417"),
        "kto": Entry(
            LabelObjective(labels.kto), LABELS | REFERENCE | WHOLE | frozenset({"mismatched"}), "Ethayarajh 2024, arXiv:2402.01306"
        ),
        "bco": Entry(LabelObjective(labels.bco), LABELS | REFERENCE | WHOLE, "Jung 2024, arXiv:2404.04656"),
        "reward": Entry(rewards.reward, PAIRS | SCORE, "Bradley 1952; Stiennon 2020, arXiv:2009.01325"),
        "reward_regression": Entry(rewards.reward_regression, LABELS | SCORE, "Wang 2024, arXiv:2406.08673"),
        "reward_classes": Entry(rewards.reward_classes, LABELS | SCORE, "Cobbe 2021, arXiv:2110.14168"),
        "prm": Entry(rewards.prm, STEPS | SCORE, "Lightman 2023, arXiv:2305.20050"),
    },
)
KINDS: tuple[Kind, ...] = ("pairs", "labels", "steps")


@dataclass(frozen=True)
class Method:
    """One term of the training loss: the function with its settings bound, its weight, and what it needs.

    needs: the kind of data ("pairs", "labels", "steps"), "reference" (a stream of log-probabilities), "score" (a reward head),
    "mismatched" (rows with another row's answer), "whole_step": `loss` must see all rows of the step at once, collected by `collect`.
    """

    name: str
    function: Callable[[Outputs, Batch], Loss]
    weight: float
    needs: frozenset[str]
    collect: Callable[[Outputs, Batch], Rows]
    loss: Callable[[Rows], Loss]

    @property
    def whole_step(self) -> bool:
        """Whether the loss is no sum over micro-batches."""
        return "whole_step" in self.needs


def methods(objectives: Sequence[Named]) -> list[Method]:
    """The terms that a recipe names.

    Raises RecipeError for an unknown name or setting, a value that the paper's formula does not allow (bad_value), and terms that ask
    for different data or heads (objectives_disagree).
    """
    found = []
    for place, named in enumerate(objectives):
        where = f"objective.{place}"
        entry, settings = OBJECTIVES.check(named.name, named.settings(), where=where), named.settings()
        check_values(entry.settings(), settings, where)
        function = entry.function
        found.append(
            Method(
                named.name,
                partial(function, **settings),
                named.weight,
                entry.needs,
                partial(getattr(function, "collect", _not_of_rows), **settings),
                partial(getattr(function, "loss", _not_of_rows), **settings),
            )
        )
    _demand_agreement(found)
    return found


def _not_of_rows(*_values: Any, **_settings: Any) -> Any:
    raise TypeError("this objective is no function of rows")


def _demand_agreement(terms: Sequence[Method]) -> None:
    others = [term for term in terms if term.name != "nll"]
    heads = {"score" in term.needs for term in terms}
    kinds = {kind for term in others for kind in KINDS if kind in term.needs}
    if len(kinds) > 1 or len(heads) > 1:
        raise RecipeError(
            f"the objectives {', '.join(term.name for term in terms)} do not go together: they ask for different data or heads",
            where="objective",
            remedy="train them in stages of their own; nll goes with pairs and labels",
            code="objectives_disagree",
        )


def wanted(terms: Sequence[Method]) -> Wanted:
    """What these terms ask of the data."""
    needs = frozenset[str]().union(*(term.needs for term in terms))
    kind: Kind = next((kind for kind in KINDS if kind in needs), "dialogs")
    return Wanted(kind, "ends" if "score" in needs else "answers", "mismatched" in needs)
