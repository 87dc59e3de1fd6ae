"""Good and bad answers seldom come in equal numbers: what KTO's weights should then be."""

from __future__ import annotations

from tunesmith.core.recipe import Recipe
from tunesmith.data.ledger import Ledger
from tunesmith.objective import balanced_weights


def balance(recipe: Recipe, ledger: Ledger) -> str | None:
    """How many good and bad answers KTO learns from, the ratio of weights that the paper asks for, and the one that is set; or None."""
    terms = [term for term in recipe.objective if term.name == "kto"]
    good, bad = (sum(part.labels[kind] for part in ledger.parts if part.split == "train") for kind in ("desirable", "undesirable"))
    if not terms or not good or not bad:
        return None
    low, high = balanced_weights(good, bad)
    settings = terms[0].settings()
    ratio = settings.get("desirable_weight", 1.0) / settings.get("undesirable_weight", 1.0)
    within = "within" if low * 0.999 <= ratio <= high * 1.001 else "outside"
    return (
        f"kto: {good} good and {bad} bad answers; desirable_weight / undesirable_weight is recommended to be {low:.2f} to {high:.2f}, "
        f"and {ratio:.2f} is {within} that"
    )
