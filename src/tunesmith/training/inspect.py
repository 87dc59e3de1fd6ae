"""What `tunesmith check` says: every problem at once, the ledger, the resolved recipe; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.load import Loaded
from tunesmith.core.recipe import Recipe
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.model.load import resolve
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import methods
from tunesmith.training import finish, receipt
from tunesmith.training import state as states
from tunesmith.training.optim import peak_lr, warmup_steps
from tunesmith.training.source import Offline
from tunesmith.training.state import Identity


def inspect(loaded: Loaded) -> dict[str, Any]:
    """{"problems", "ledger", "recipe", "origin", "derived", "summary"} of one stage."""
    recipe = loaded.recipe
    problems: list[dict[str, str]] = []
    prepared: Prepared | None = None
    derived: dict[str, Any] = {}
    try:
        methods(recipe.objective)
    except TunesmithError as error:
        problems.append(error.as_dict())
    try:
        base = resolve(recipe.model.base)
        prepared = prepare(recipe, load_tokenizer(base, recipe.model.revision))
        source = Offline(prepared.train, recipe.run)
        derived = {
            "steps": source.total,
            "lr": peak_lr(recipe.optim, recipe.model.adapter is not None),
            "warmup_steps": warmup_steps(recipe.optim, source.total),
            "template": prepared.template.source,
        }
        _check_folder(recipe, base, prepared)
    except TunesmithError as error:
        problems.append(error.as_dict())
    origin = {**loaded.origin, **dict.fromkeys(derived, "derived")}
    lines = [prepared.ledger.summary()] if prepared else []
    lines += [f"{name}: {value}" for name, value in derived.items()]
    return {
        "problems": problems,
        "ledger": prepared.ledger.as_dict() if prepared else {},
        "recipe": recipe.as_dict(),
        "origin": origin,
        "derived": derived,
        "summary": "\n".join(lines),
    }


def _check_folder(recipe: Recipe, base: str, prepared: Prepared) -> None:
    run = Path(recipe.run.out)
    saved = states.steps_saved(run)
    if saved:
        data = prepared.train.hash + (prepared.validation.hash if prepared.validation else "")
        identity = Identity(recipe.identity(), data, prepared.template.hash, receipt.model_hash(base, recipe.model.revision))
        if finish.finished(run, identity) is None:
            states.demand_same(states.read_state(states.folder_of(run, saved[-1]))[1], identity, run)
