"""The short form of a recipe on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.core.load import Loaded, flatten, load_recipe, load_tree, set_values

# What a method is called -> the objective's row; NAME trains a LoRA adapter, NAME-qlora one on a base in 4 bits, NAME-full all weights.
OBJECTIVES = {
    "sft": "nll",
    **{name: name for name in ("dpo", "ipo", "simpo", "orpo", "cpo", "kto", "reward", "prm")},
}
METHODS: dict[str, dict[str, Any]] = {
    f"{name}{suffix}": {"model": model, "objective": [{"name": objective}]}
    for name, objective in OBJECTIVES.items()
    for suffix, model in (
        ("", {"adapter": {"name": "lora"}}),
        ("-qlora", {"adapter": {"name": "lora"}, "quant": "nf4"}),
        ("-full", {"adapter": None}),
    )
}


def load_words(
    recipe: Path | None,
    words: list[str],
    *,
    method: str | None,
    model: str | None,
    data: str | None,
    out: str | None,
    template: str | None,
) -> list[Loaded]:
    """The stages of a recipe file, or the one recipe that the short form stands for.

    Raises RecipeError when neither or both are given, or a part of the short form is missing.
    """
    short = {"--method": method, "--model": model, "--data": data, "--out": out, "--template": template}
    named = [name for name, value in short.items() if value is not None]
    if recipe is not None:
        if named:
            raise RecipeError(
                f"a recipe file and {', '.join(named)} are given together",
                where="tunesmith train",
                remedy="change values of a recipe with --set, e.g. --set model.base=...",
                code="usage",
            )
        return load_recipe(recipe, words)
    missing = [name for name in ("--method", "--model", "--data", "--out") if short[name] is None]
    if missing:
        raise RecipeError(
            f"a recipe file is needed, or the short form; missing: {', '.join(missing)}",
            where="tunesmith train",
            remedy="e.g. tunesmith train --method sft --model pocket --data rows.jsonl --out runs/mine",
            code="usage",
        )
    assert method is not None
    if method not in METHODS:
        raise RecipeError(
            f"unknown method '{method}'{did_you_mean(method, METHODS)}",
            where="--method",
            remedy=f"use one of: {', '.join(METHODS)}",
            code="unknown_name",
        )
    row = METHODS[method]
    tree: dict[str, Any] = {
        "model": {"base": model, **({"template": template} if template is not None else {}), **row["model"]},
        "data": {"train": [{"path": data}]},
        "objective": row["objective"],
        "run": {"out": out},
    }
    given = [path for path, _ in flatten(tree)]
    tree, paths = set_values(tree, words)
    return load_tree(tree, where="command line", set_paths=[*given, *paths])
