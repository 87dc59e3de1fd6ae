"""The door: from a recipe to token sets with their ledger, or to one error that lists everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import CapacityError, DataError, TunesmithError
from tunesmith.core.log import logger
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Prompt, Wanted
from tunesmith.data import cache
from tunesmith.data.dataset import TokenSet
from tunesmith.data.gather import Gathered, gather
from tunesmith.data.ledger import Ledger
from tunesmith.data.notes import explain
from tunesmith.data.problem import Problem
from tunesmith.data.template import ChatTemplate, choose_template
from tunesmith.data.tokenise import DIALOGS
from tunesmith.data.tokenizer import Tokenizer

SHOWN = 10  # bad rows that an error lists
_PROMPTS = 64  # kept in the cache, so that another run.samples finds them there


@dataclass(frozen=True)
class Prepared:
    """Everything the training loop needs of the data.

    `prompts` are up to run.samples dialogs of the validation rows (of the training rows when there are none), each without its
    last answer, which is the truth.
    """

    train: TokenSet
    validation: TokenSet | None
    ledger: Ledger
    template: ChatTemplate
    prompts: list[Prompt]


def prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    wanted: Wanted = DIALOGS,
    *,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> Prepared:
    """The token sets of a recipe, from the cache when the same rows were prepared in the same way before.

    `wanted` is what the objective asks of the rows. `progress` is called with the number of rows done since the last call; `workers`
    processes at most help with much data (None: one less than the cores), which changes nothing but the time. Raises DataError:
    "rows_refused" (a bad row, unless data.on_bad is drop; lists the first ten), "over_length" (with tokens.overlong: error), "no_rows"
    (nothing is left), "no_validation", "wrong_kind" (rows of another kind than wanted), "one_label", "too_few_rows" (labelled answers);
    the errors of files that cannot be read; RecipeError "split_not_possible"; TemplateError when there is no template to use.
    """
    template = choose_template(tokenizer, recipe.model.template, dict(recipe.model.template_options))
    prompts = max(_PROMPTS, recipe.run.samples)
    folder = _folder(recipe, tokenizer, template, prompts, wanted)
    stored = cache.fetch(folder) if folder is not None else None
    if stored is None or (recipe.data.on_bad == "refuse" and stored.ledger.refused):
        gathered = gather(recipe, tokenizer, template, prompts, wanted, progress, workers)
        _raise_what_is_wrong(gathered, recipe)
        validation = gathered.validation.build() if recipe.data.validation is not None else None
        stored = cache.Stored(gathered.train.build(), validation, gathered.ledger, gathered.prompts)
        if folder is not None:
            _keep(folder, stored)
    else:
        logger.info("tokens from the cache: %s", folder)
    _warn(stored.ledger, template)
    return Prepared(stored.train, stored.validation, stored.ledger, template, stored.prompts[: recipe.run.samples])


def _folder(recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate, prompts: int, wanted: Wanted) -> Path | None:
    if not recipe.tokens.cache:
        return None
    try:
        return cache.root() / cache.cache_key(recipe, tokenizer, template.hash, prompts, wanted)
    except DataError:
        return None  # a source cannot be read: reading them all finds every such source, not only the first


def _keep(folder: Path, stored: cache.Stored) -> None:
    try:
        cache.store(folder, stored)
    except (OSError, CapacityError) as error:
        # The cache saves time and nothing else: a run must not fail for it.
        logger.warning("the tokens are not kept in the cache: %s", error.message if isinstance(error, CapacityError) else error)


def check_rows(
    recipe: Recipe, tokenizer: Tokenizer, wanted: Wanted = DIALOGS, *, progress: Callable[[int], None] | None = None
) -> tuple[list[Problem], Ledger]:
    """Every problem that would keep `prepare` from going on or that it would drop, and the ledger; raises for no row.

    Raises TemplateError when there is no template to use.
    """
    template = choose_template(tokenizer, recipe.model.template, dict(recipe.model.template_options))
    gathered = gather(recipe, tokenizer, template, recipe.run.samples, wanted, progress)
    problems = [Problem.of(fault, fault.where) for fault in gathered.faults] + gathered.problems
    if not gathered.faults and (nothing := _nothing_left(gathered, recipe)) is not None:
        problems.append(Problem.of(nothing, nothing.where))
    return problems, gathered.ledger


def _raise_what_is_wrong(gathered: Gathered, recipe: Recipe) -> None:
    refused, refuse = gathered.ledger.refused, recipe.data.on_bad == "refuse"
    if refused and refuse and gathered.faults and all(fault.code == "one_label" for fault in gathered.faults):
        raise _refused(gathered.problems, refused, "rows_refused")  # which may be why one label is left
    if gathered.faults:
        first, *others = gathered.faults
        if refused and first.code == "one_label" and gathered.problems:
            said = f"{first.message}; left out: {refused}, the first: {gathered.problems[0].message}"
            first = DataError(said, where=first.where, remedy=first.remedy, code=first.code)
        if not others:
            raise first
        message = "\n".join([first.message, *(f"{fault.where}: {fault.message}" for fault in others)])
        raise DataError(message, where=first.where, remedy=first.remedy, code=first.code)
    over = [problem for problem in gathered.problems if problem.code == "over_length"]
    if over and recipe.tokens.overlong == "error":
        raise _refused(
            over, sum(reason.count for _, reason in gathered.ledger.reasons("refused") if reason.code == "over_length"), "over_length"
        )
    if refused and refuse:
        raise _refused(gathered.problems, refused, "rows_refused")
    if (nothing := _nothing_left(gathered, recipe)) is not None:
        raise nothing


def _refused(problems: list[Problem], count: int, code: str) -> DataError:
    lines = [f"{problem.key}: {problem.message}" for problem in problems[:SHOWN]]
    more = f"\n  ... and {count - SHOWN} more" if count > SHOWN else ""
    kinds: dict[str, int] = {}
    for problem in problems:
        kinds[problem.code] = kinds.get(problem.code, 0) + 1
    counted = ", ".join(f"{name} {number}" for name, number in sorted(kinds.items(), key=lambda item: -item[1]))
    head = f"{count} {'row' if count == 1 else 'rows'} cannot be used ({counted}):"
    remedy = problems[0].remedy if code == "over_length" else f"{problems[0].remedy}; or set data.on_bad: drop to leave such rows out"
    return DataError("\n  ".join([head, *lines]) + more, where=problems[0].key, remedy=remedy, code=code)


def _nothing_left(gathered: Gathered, recipe: Recipe) -> TunesmithError | None:
    where = ", ".join(source.path for source in recipe.data.train)
    if len(gathered.train) == 0:
        reasons = [
            f"{reason.fate} {reason.count} x {reason.code}: {reason.message}" for _, reason in gathered.ledger.reasons("refused", "dropped")
        ]
        remedies = [reason.remedy for _, reason in gathered.ledger.reasons("refused", "dropped") if reason.remedy]
        return DataError(
            "\n  ".join(["no row is left to train on", *reasons]),
            where=where,
            remedy=remedies[0] if remedies else "use a smaller validation fraction",
            code="no_rows",
        )
    if recipe.data.validation is not None and len(gathered.validation) == 0:
        return DataError(
            f"no row is left for validation ({len(gathered.train)} are for training)",
            where=where,
            remedy="give a larger fraction, or a validation file",
            code="no_validation",
        )
    return None


def _warn(ledger: Ledger, template: ChatTemplate) -> None:
    for note in template.notes:
        logger.warning("template %s: %s", template.source, explain(note))
    for part, reason in ledger.reasons("refused", "dropped", "cut", "split", "note"):
        logger.warning("%s: %d rows %s: %s (%s)", part.source, reason.count, _FATES[reason.fate], reason.message, reason.code)
    for part in ledger.parts:
        if part.unused_columns:
            logger.info("%s: columns not used: %s", part.source, ", ".join(sorted(part.unused_columns)))
        if part.duplicates:
            logger.info("%s: %d rows are copies of another row", part.source, part.duplicates)


_FATES = {"refused": "refused", "dropped": "dropped", "cut": "cut on the left", "split": "split", "note": "noted"}
