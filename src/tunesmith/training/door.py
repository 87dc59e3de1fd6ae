"""What can be known to be wrong before any row is read, of the recipe, the device, the folders and the models that it names."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.core.load import Loaded
from tunesmith.core.log import logger
from tunesmith.core.recipe import Recipe, Reference
from tunesmith.data.template import ChatTemplate
from tunesmith.model import eight, float8, quant, reward
from tunesmith.model.build import try_on
from tunesmith.model.context import context_of
from tunesmith.model.load import choose_device, choose_dtype
from tunesmith.model.lora_start import not_quantised
from tunesmith.model.tokenizer import ADAPTER, resolve
from tunesmith.objective import methods
from tunesmith.training.optim import demand_device
from tunesmith.training.reference import demand_reference
from tunesmith.training.sinks import PACKAGES, missing_package

WEIGHTS = ("*.safetensors", "*.bin")


def _objective(recipe: Recipe) -> None:
    methods(recipe.objective)


def _device(recipe: Recipe) -> None:
    device = choose_device(recipe.run.device)
    if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            f"'{recipe.run.device}' is one device, and several processes were started",
            where="run.device",
            remedy="use auto, cpu or cuda; each process takes its own",
            code="one_device",
        )


def _trackers(recipe: Recipe) -> None:
    for name in recipe.run.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise missing_package(PACKAGES[name])


def _weights(recipe: Recipe) -> None:
    folder = Path(resolve(recipe.model.base))
    if recipe.model.init == "random" or not folder.is_dir() or (folder / ADAPTER).is_file():
        return
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ModelError(
            "the folder holds no weights",
            where=str(folder),
            remedy=f"save them beside config.json ({', '.join(WEIGHTS)}), or set model.init: random to draw new ones",
            code="no_weights",
        )


def _run_folder(recipe: Recipe) -> None:
    run = Path(recipe.run.out)
    there = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"'{there}' is a file, not a folder", where="run.out", remedy="choose another run.out", code="bad_out")
    try:  # asking os.access is not enough: root may write where nothing can be written
        Path(tempfile.mkdtemp(dir=there)).rmdir()
    except OSError as error:
        raise RecipeError(
            f"nothing can be written in '{there}' ({error.strerror})", where="run.out", remedy="choose another run.out", code="bad_out"
        ) from error


def _8_bits(recipe: Recipe) -> None:
    if recipe.model.fast.float8:
        float8.demand_device(choose_device(recipe.run.device))
    if recipe.model.fast.int8:
        eight.demand_products(choose_device(recipe.run.device))


def _optimizer(recipe: Recipe) -> None:
    demand_device(recipe.optim, choose_device(recipe.run.device))


def _quantised(recipe: Recipe) -> None:
    device = choose_device(recipe.run.device)
    quant.loading(recipe.model, choose_dtype(recipe.model.dtype, device), device)
    init = getattr(recipe.model.adapter, "init", "zero")
    if recipe.model.quant is None and init == "loftq":
        raise not_quantised()


def _adapter(recipe: Recipe) -> None:
    try_on(recipe.model)


def _context(recipe: Recipe) -> None:
    longest = context_of(recipe.model)
    if longest is not None and recipe.tokens.max_length > longest:
        raise RecipeError(
            f"rows of {recipe.tokens.max_length} tokens are asked for, and the base takes {longest} at most",
            where="tokens.max_length",
            remedy=f"set tokens.max_length: {longest} or less, or leave it out; or choose a base with a longer context",
            code="over_context",
        )


CHECKS: tuple[Callable[[Recipe], None], ...] = (
    _objective, _device, _trackers, _weights, _run_folder, _8_bits, _optimizer, _quantised, _adapter, _context, demand_reference,
)  # fmt: skip


def with_what_they_read(stages: Sequence[Loaded]) -> list[Loaded]:
    """Stages without a `reference` that they only inherit and do not read, where another one reads it."""

    def reads(stage: Loaded) -> bool:
        try:
            return any("reference" in method.needs for method in methods(stage.recipe.objective))
        except RecipeError:  # the door says it better
            return False

    if not any(map(reads, stages)):
        return list(stages)
    plain = {"reference": Reference()}
    return [
        stage if reads(stage) or "reference" not in stage.inherited else replace(stage, recipe=stage.recipe.model_copy(update=plain))
        for stage in stages
    ]


def within_context(loaded: Loaded, stand_in: Recipe | None = None) -> Loaded:
    """The recipe with a tokens.max_length that nobody set lowered to what its base takes, or the base of `stand_in`; said in the log."""
    recipe = loaded.recipe
    longest = context_of((stand_in or recipe).model)
    if longest is None or "max_length" in recipe.tokens.model_fields_set or recipe.tokens.max_length <= longest:
        return loaded
    logger.info("tokens.max_length is %d: the base takes no longer rows (default %d)", longest, recipe.tokens.max_length)
    tokens = recipe.tokens.model_copy(update={"max_length": longest})
    return replace(loaded, recipe=recipe.model_copy(update={"tokens": tokens}), origin={**loaded.origin, "tokens.max_length": "derived"})


def demand_its_template(recipe: Recipe, template: ChatTemplate) -> None:
    """A reward model that is trained on reads rows of the template that it learned from. Raises ModelError "template_differs"."""
    if (card := reward.read_card(resolve(recipe.model.base))) is not None:
        named = recipe.model.template != "auto"
        reward.demand_template(card, template.source, template.hash, "model.template", named=named)


def at_the_door(recipe: Recipe) -> None:
    """Raises the first of what `tunesmith check` lists: RecipeError or ModelError."""
    for check in CHECKS:
        check(recipe)
