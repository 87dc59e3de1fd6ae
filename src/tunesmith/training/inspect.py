"""What `tunesmith check` says: every problem at once, the ledger, the resolved recipe; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.load import Loaded
from tunesmith.core.recipe import Recipe
from tunesmith.data.ledger import Ledger
from tunesmith.data.prepare import Prepared, check_rows, prepare
from tunesmith.model.load import resolve
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import methods, wanted
from tunesmith.training import door, finish
from tunesmith.training import state as states
from tunesmith.training.balance import balance
from tunesmith.training.optim import peak_lr, warmup_steps
from tunesmith.training.receipt import identify, model_hash
from tunesmith.training.source import Offline


def inspect_stages(stages: Sequence[Loaded]) -> list[dict[str, Any]]:
    """One report for each stage; a stage that starts from an earlier one is checked before that one is trained."""
    reports, made = [], dict[str, Recipe]()
    for stage in door.with_what_they_read(stages):
        model = stage.recipe.model
        before = made.get(model.base) if not Path(model.base).is_dir() else None
        stand_in = None
        if before is not None:
            # Its result will have the tokens and the template of what it starts from itself.
            template = before.model.template if model.template == "auto" else model.template
            later = model.model_copy(update={"base": before.model.base, "revision": before.model.revision, "template": template})
            stand_in = stage.recipe.model_copy(update={"model": later})
        reports.append(inspect(stage, stand_in))
        made[str(Path(stage.recipe.run.out) / "final")] = stand_in or stage.recipe
    return reports


def inspect(loaded: Loaded, stand_in: Recipe | None = None) -> dict[str, Any]:
    """{"problems", "ledger", "recipe", "origin", "derived", "summary"} of one stage.

    `stand_in` is the recipe to look at instead, when the stage's base is yet to be trained.
    """
    loaded = door.within_context(loaded, stand_in)
    recipe = loaded.recipe if stand_in is None else stand_in.model_copy(update={"tokens": loaded.recipe.tokens})
    problems: list[dict[str, str]] = []
    derived: dict[str, Any] = {}
    for check in door.CHECKS:
        try:
            check(recipe)
        except TunesmithError as error:
            if (error.code, error.where) not in {(problem["code"], problem["where"]) for problem in problems}:
                problems.append(error.as_dict())
    refused = {(problem["code"], problem["where"]) for problem in problems}
    ledger: Ledger | None = None
    try:
        base = resolve(recipe.model.base)
        tokenizer = load_tokenizer(base, recipe.model.revision)
        asked = wanted(methods(recipe.objective))
        if recipe.data.on_bad == "refuse":
            found, ledger = check_rows(recipe, tokenizer, wanted=asked)
            problems += [{"code": p.code, "where": p.key, "message": p.message, "remedy": p.remedy} for p in found]
        if not problems:
            prepared = prepare(recipe, tokenizer, wanted=asked)
            ledger = prepared.ledger
            derived = _derived(recipe, prepared)
            if stand_in is None:
                door.demand_its_template(recipe, prepared.template)
                _check_folder(recipe, base, prepared)
    except TunesmithError as error:
        if (error.code, error.where) not in refused:
            problems.append(error.as_dict())
    origin = {**loaded.origin, **dict.fromkeys(derived, "derived")}
    lines = [ledger.summary()] if ledger else []
    if ledger and (words := balance(recipe, ledger)) is not None:
        lines.append(words)
    lines += [f"{name}: {value}" for name, value in derived.items()]
    return {
        "problems": problems,
        "ledger": ledger.as_dict() if ledger else {},
        "recipe": loaded.recipe.as_dict(),
        "origin": origin,
        "derived": derived,
        "summary": "\n".join(lines),
    }


def _derived(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    source = Offline(prepared.train, recipe.run)
    return {
        "steps": source.total,
        "lr": peak_lr(recipe.optim, recipe.model.adapter, wanted(methods(recipe.objective))),
        "warmup_steps": warmup_steps(recipe.optim, source.total),
        "template": prepared.template.source,
    }


def _check_folder(recipe: Recipe, base: str, prepared: Prepared) -> None:
    run = Path(recipe.run.out)
    saved = states.steps_saved(run)
    if saved:
        identity = identify(recipe, prepared, model_hash(base, recipe.model.revision))
        if finish.finished(run, identity) is None:
            states.demand_same(states.read_state(states.folder_of(run, saved[-1]))[1], identity, run)
