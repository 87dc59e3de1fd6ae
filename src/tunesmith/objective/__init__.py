"""Floor 1: losses as pure functions of numbers, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunesmith.core.errors import BugError, RecipeError
from tunesmith.core.recipe import Named
from tunesmith.core.table import Entry, Table
from tunesmith.core.types import Batch, Kind, Loss, Outputs, Position, Wanted
from tunesmith.objective import labels, pairs, rewards
from tunesmith.objective.checks import check_values
from tunesmith.objective.rows import Rows
from tunesmith.objective.sequences import LabelObjective, PairObjective
from tunesmith.objective.shape import Lengths
from tunesmith.objective.token import UNLEARNED, nll

__all__ = ["OBJECTIVES", "UNLEARNED", "Method", "Rows", "methods", "wanted"]


def _pairs(function: Callable[..., Any], source: str, *more: str, **shape: Any) -> Entry[Callable[..., Loss]]:
    """A row over pairs that is held against a reference."""
    return Entry(PairObjective(function, **shape), frozenset({"pairs", "reference", *more}), source)


def _free(function: Callable[..., Any], source: str, lengths: Lengths) -> Entry[Callable[..., Loss]]:
    """A row over pairs without a reference, whose paper settles how lengths count."""
    return Entry(PairObjective(function, lengths=(lengths,), referenced=False), frozenset({"pairs"}), source)


OBJECTIVES: Table[Callable[..., Loss]] = Table(
    "objective",
    {
        "nll": Entry(nll, source="Fisher 1922, maximum likelihood"),
        "dpo": _pairs(pairs.dpo, "Rafailov 2023, arXiv:2305.18290", divergences=True),
        "cdpo": _pairs(pairs.cdpo, "Mitchell 2023, ericmitchell.ai/cdpo.pdf", divergences=True),
        "robust": _pairs(pairs.robust, "Chowdhury 2024, arXiv:2403.00409", divergences=True),
        "ipo": _pairs(pairs.ipo, "Azar 2023, arXiv:2310.12036", lengths=("mean", "sum"), divergences=True),
        "hinge": _pairs(pairs.hinge, "Zhao 2023, arXiv:2305.10425", divergences=True),
        "rso": _pairs(pairs.rso, "Liu 2023, arXiv:2309.06657", divergences=True),
        "exo": _pairs(pairs.exo, "Ji 2024, arXiv:2402.00856", divergences=True),
        "nca": _pairs(pairs.nca, "Chen 2024, arXiv:2402.05369"),
        "sppo": _pairs(pairs.sppo, "Wu 2024, arXiv:2405.00675"),
        "apo_zero": _pairs(pairs.apo_zero, "D'Oosterlinck 2024, arXiv:2408.06266"),
        "apo_down": _pairs(pairs.apo_down, "D'Oosterlinck 2024, arXiv:2408.06266"),
        "aot": _pairs(pairs.aot, "Melnyk 2024, arXiv:2406.05882", "whole_step"),
        "aot_pair": _pairs(pairs.aot_pair, "Melnyk 2024, arXiv:2406.05882", "whole_step"),
        "bco_pair": _pairs(pairs.bco_pair, "Jung 2024, arXiv:2404.04656", "whole_step"),
        "discopop": _pairs(pairs.discopop, "Lu 2024, arXiv:2406.08414", divergences=True),
        "simpo": _free(pairs.simpo, "Meng 2024, arXiv:2405.14734", "mean"),
        "orpo": _free(pairs.orpo, "Hong 2024, arXiv:2403.07691", "mean"),
        "cpo": _free(pairs.cpo, "Xu 2024, arXiv:2401.08417", "sum"),
        "kto": Entry(
            LabelObjective(labels.kto),
            frozenset({"labels", "reference", "whole_step", "mismatched"}),
            "Ethayarajh 2024, arXiv:2402.01306",
        ),
        "bco": Entry(LabelObjective(labels.bco), frozenset({"labels", "reference", "whole_step"}), "Jung 2024, arXiv:2404.04656"),
        "reward": Entry(rewards.reward, frozenset({"pairs", "score"}), "Bradley 1952; Stiennon 2020, arXiv:2009.01325"),
        "reward_regression": Entry(rewards.reward_regression, frozenset({"labels", "score"}), "Wang 2024, arXiv:2406.08673"),
        "reward_classes": Entry(rewards.reward_classes, frozenset({"labels", "score", "shares"}), "Cobbe 2021, arXiv:2110.14168"),
        "prm": Entry(rewards.prm, frozenset({"steps", "score", "shares"}), "Lightman 2023, arXiv:2305.20050"),
    },
)
KINDS: tuple[Kind, ...] = ("pairs", "labels", "steps")


@dataclass(frozen=True)
class Method:
    """One term of the training loss: the function with its settings bound, its weight, and what it needs.

    needs: the kind of data ("pairs", "labels", "steps"), "reference" (a stream of log-probabilities), "score" (a reward head),
    "every_token" (the head is read throughout the answers), "mismatched" (rows with another row's answer), "shares" (values from 0 to 1),
    "whole_step": the loss is no
    sum over micro-batches, so that `loss` must see the rows of the whole step, joined from what `collect` gives of each micro-batch. Both
    raise BugError for a term that is not over rows.
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

    Raises RecipeError for an unknown name or setting, a value that the formula does not allow (bad_value), a setting that another one
    makes idle (unread_setting), and terms that ask for different data or heads (objectives_disagree).
    """
    found = []
    for place, named in enumerate(objectives):
        where, settings = f"objective.{place}", named.settings()
        entry = OBJECTIVES.check(named.name, settings, where=where)
        check_values(named.name, entry.settings(), settings, where, getattr(entry.function, "lengths", ()))
        collect, loss = (getattr(entry.function, part, _not_over_rows) for part in ("collect", "loss"))
        bound = (partial(function, **settings) for function in (collect, loss))
        needs = entry.needs | ({"every_token"} if settings.get("token_weight") else frozenset())
        found.append(Method(named.name, partial(entry.function, **settings), named.weight, needs, *bound))
    _demand_agreement(found)
    return found


def _not_over_rows(*_values: Any, **_settings: Any) -> Any:
    raise BugError("this objective is a sum over positions and has no rows", where="objective", code="no_rows")


def _demand_agreement(terms: Sequence[Method]) -> None:
    heads = {"score" in term.needs for term in terms}
    kinds = {_kind(term.needs) for term in terms if term.name != "nll"}
    if len(kinds) > 1 or len(heads) > 1:
        asked = ", ".join(f"{term.name} ({_kind(term.needs)}{' scored' if 'score' in term.needs else ''})" for term in terms)
        raise RecipeError(
            f"these objectives cannot be trained together: {asked}",
            where="objective",
            remedy="train them in stages of their own; nll goes with pairs and labels, but not with a reward model",
            code="objectives_disagree",
        )


def _kind(needs: frozenset[str]) -> Kind:
    return next((kind for kind in KINDS if kind in needs), "dialogs")


def wanted(terms: Sequence[Method]) -> Wanted:
    """What these terms ask of the data."""
    needs = frozenset[str]().union(*(term.needs for term in terms))
    at: Position = "throughout" if "every_token" in needs else "ends" if "score" in needs else "answers"
    return Wanted(_kind(needs), at, "mismatched" in needs, "shares" in needs)
