"""Log-probabilities of the reference model: worked out once for all rows that a run will see, kept on disk, and proven at the start.

They are those of the model as training begins (or of its base, or of another model), in evaluation mode, so that an epoch costs no
second forward pass and full fine-tuning needs no second copy of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import CapacityError, ModelError, RecipeError
from tunesmith.core.files import atomic_folder, cache_folder, file_hash, write_text
from tunesmith.core.log import logger
from tunesmith.core.recipe import Recipe, Reference
from tunesmith.core.types import Tokens, content_hash
from tunesmith.data.dataset import TokenSet
from tunesmith.data.pack import pack
from tunesmith.evals.likelihood import quiet
from tunesmith.model.build import load_policy
from tunesmith.model.compile import settle_int8
from tunesmith.model.context import VIRTUAL
from tunesmith.model.load import check_vocabulary
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle_front
from tunesmith.model.tokenizer import adapter_base, demand_reachable, demand_same_tokens, resolve
from tunesmith.objective import OBJECTIVES, methods
from tunesmith.training.parallel import Ranks
from tunesmith.training.receipt import largest_difference, model_hash, precision, tolerance_of
from tunesmith.training.step import Budget

STREAM = "reference"
FILE, SEAL = "values.npy", "seal.txt"
CHUNK = 512  # rows scored between two words on progress
PROOF = 8  # rows that are scored once more before the first step

Floats = npt.NDArray[np.float32]


def demand_reference(recipe: Recipe) -> None:
    """What can be wrong with a recipe's reference before any row is read.

    Raises RecipeError "unread_setting" where no objective reads one, and ModelError where a model of its own is named that is not there or
    that reads other ids ("tokenizer_differs").
    """
    if not any("reference" in method.needs for method in methods(recipe.objective)):
        # A recipe that was written out has every section, so what the defaults say is not taken for a wish.
        if recipe.reference != Reference():
            names = ", ".join(named.name for named in recipe.objective)
            raise RecipeError(
                f"objective {names} reads no reference model, so what is set here would not be read",
                where="reference",
                remedy="leave the section out, or choose an objective that reads a reference: "
                + ", ".join(name for name, entry in OBJECTIVES.items() if "reference" in entry.needs),
                code="unread_setting",
            )
        return
    name = recipe.reference.model
    if name in ("start", "base"):
        return
    try:
        demand_reachable(resolve(name))
    except ModelError as error:
        raise ModelError(error.message, where="reference.model", remedy=error.remedy, code=error.code) from error
    demand_same_tokens(recipe.model.base, recipe.model.revision, name, where="reference.model")


def _begins_as(recipe: Recipe) -> bool:
    """Whether the model has to be its reference before the first step: `start` always, `base` under an adapter that begins as nothing."""
    adapter = recipe.model.adapter
    if recipe.reference.model != "base":
        return recipe.reference.model == "start"
    fresh = adapter_base(resolve(recipe.model.base)) is None
    return fresh and not isinstance(adapter, VIRTUAL) and getattr(adapter, "init", "") != "loftq"


def _beside_the_weights(recipe: Recipe) -> dict[str, str]:
    """What numbers depend on before the first step, beside the weights: how these are held, and an adapter that starts at random.

    Most adapters begin as nothing, whatever their settings; virtual tokens do not, and LoftQ starts from what quantising lost.
    """
    model, adapter = recipe.model, recipe.model.adapter
    out = {"quant": f"{model.quant} {model.double_quant}"} if model.quant is not None else {}
    if model.fast.coarse:
        out[model.fast.coarse] = "true"
    if recipe.reference.model == "start" and (isinstance(adapter, VIRTUAL) or getattr(adapter, "init", "") == "loftq"):
        out["adapter"] = content_hash({"settings": repr(adapter), "seed": recipe.run.seed})
    return out


class References:
    """Scores rows under the reference that a recipe names; made before any weight has moved."""

    def __init__(self, recipe: Recipe, policy: Policy, base_hash: str, tokenizer: Any, budget: Budget, ranks: Ranks) -> None:
        self._recipe, self._policy, self._budget, self._ranks = recipe, policy, budget, ranks
        self._tokenizer = tokenizer
        self._name = recipe.reference.model
        self._key = {"base": base_hash, "reference": self._name, "dtype": precision(policy)}
        below = adapter_base(resolve(recipe.model.base))
        if below is not None:
            self._key["below"] = model_hash(resolve(below), None)
        if recipe.model.init == "random":
            self._key["seed"] = str(recipe.run.seed)
        if self._name == "base" and not policy.adapted:
            raise RecipeError(
                "base switches an adapter off, and all weights are trained here",
                where="reference.model",
                remedy="use start, or name a model",
                code="no_adapter",
            )
        if self._name not in ("start", "base"):
            self._key["reference"] = model_hash(resolve(self._name), None)
        else:
            self._key |= _beside_the_weights(recipe)

    def fill(self, rows: TokenSet, wanted: npt.NDArray[np.bool_]) -> TokenSet:
        """The same rows with the stream "reference" [T] for the `wanted` ones [R], NaN for the others."""
        path = self._path(rows)
        values = _read(path, int(rows.lengths.sum())) if path is not None and self._ranks.first else None
        values = self._ranks.gather(values)[0]
        if values is None:
            values = np.full(int(rows.lengths.sum()), np.nan, dtype=np.float32)
        starts = np.concatenate([[0], np.cumsum(rows.lengths)])
        missing = [row for row in np.flatnonzero(wanted).tolist() if np.isnan(values[starts[row]])]
        if not missing:
            if path is not None:
                logger.info("reference log-probabilities from the cache: %s", path)
            return rows.with_stream(STREAM, values)
        with self._model() as model:
            self._score(model, rows, missing, starts, values)
        if path is not None and self._ranks.first:
            _keep(path, values)
        return rows.with_stream(STREAM, values)

    def _path(self, rows: TokenSet) -> Path | None:
        if not self._recipe.reference.cache:
            return None
        return cache_folder() / "reference" / f"{content_hash({**self._key, 'rows': rows.hash})}"

    @contextlib.contextmanager
    def _model(self) -> Iterator[Policy]:
        if self._name == "start":
            yield self._policy
        elif self._name == "base":
            with self._policy.adapter_disabled():
                yield self._policy
        else:
            settings = self._recipe.model
            policy = load_policy(self._name, dtype=settings.dtype, device=str(self._policy.device), fast=settings.fast)
            check_vocabulary(policy.causal, self._tokenizer, "reference.model")
            if settings.fast.int8:  # rounded as the policy is, or the difference of both would be rounding
                settle_int8(policy)
            if policy.layout == "packed" and settings.fast.front:
                settle_front(policy)
            yield policy

    def _score(self, model: Policy, rows: TokenSet, missing: Sequence[int], starts: npt.NDArray[np.int64], values: Floats) -> None:
        """Fill in the missing rows; every rank takes its share."""
        logger.info("log-probabilities of the reference (%s) for %s rows", self._name, f"{len(missing):,}")
        own = np.zeros_like(values)
        for first in range(0, len(missing), CHUNK):
            part = missing[first : first + CHUNK]
            for row, found in zip(part, logprobs(model, [rows[row] for row in part], self._budget, self._ranks), strict=True):
                if found is not None:
                    own[starts[row] : starts[row + 1]] = found
            if len(missing) > CHUNK:
                logger.info("reference: %s of %s rows", f"{min(first + CHUNK, len(missing)):,}", f"{len(missing):,}")
        summed = self._ranks.sum_array(own)
        for row in missing:
            values[starts[row] : starts[row + 1]] = summed[starts[row] : starts[row + 1]]

    def prove(self, rows: Sequence[Tokens]) -> float:
        """How far the policy, before its first step, is from the filled-in reference on the first rows.

        Raises ModelError (reference_differs) where both must be the same: a reference that was taken from somewhere else.
        """
        some = list(rows[:PROOF])
        ours = [
            [] if found is None else found[row.train != 0].tolist()
            for row, found in zip(some, logprobs(self._policy, some, self._budget, Ranks()), strict=True)
        ]
        kept = [row.streams[STREAM][row.train != 0].tolist() for row in some]
        gap, tolerance = largest_difference(ours, kept), tolerance_of(precision(self._policy), kept)
        if not _begins_as(self._recipe):
            own = "an adapter that has a start of its own" if self._name == "base" else "a model of its own"
            logger.info("log-probabilities of model and reference (%s) differ by up to %.3g, as %s may", self._name, gap, own)
            return gap
        if not gap <= tolerance:
            raise ModelError(
                f"before the first step the model and its reference differ: log-probabilities by up to {gap:.3g} of {tolerance:.3g}",
                where="reference",
                remedy="set reference.cache: false to score the rows anew; if they differ still, the model gives changing results",
                code="reference_differs",
            )
        logger.info("model and reference (%s) agree to %.1e before the first step", self._name, gap)
        return gap


def logprobs(policy: Policy, rows: Sequence[Tokens], budget: Budget, ranks: Ranks) -> list[Floats | None]:
    """For every row [T] the log-probabilities of its trained tokens, 0 elsewhere; None for what falls to other ranks."""
    named = [replace(row, key=str(place)) for place, row in enumerate(rows)]
    out: list[Floats | None] = [None] * len(rows)
    # Nothing is kept for a backward pass: twice as many tokens need less memory than a step does, and larger products are faster.
    batches = pack(named, 2 * budget.tokens, sharing=policy.sharing is not None)[ranks.rank :: ranks.world]
    with quiet(policy), policy.steady():
        for batch in batches:
            outputs = policy.score(batch)
            flat = np.zeros(len(batch), dtype=np.float32)
            flat[outputs.index.cpu().numpy()] = outputs.logp.float().cpu().numpy()
            for segment in batch.segments:
                out[int(segment.key)] = flat[segment.start : segment.stop]
    return out


def _read(folder: Path, size: int) -> Floats | None:
    """What `_keep` wrote, or None when it is not there, not whole, or another size."""
    try:
        if file_hash(folder / FILE) != (folder / SEAL).read_text(encoding="ascii").strip():
            logger.warning("the reference cache %s is damaged; scoring again", folder)
            return None
        values = np.load(folder / FILE, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (size,) and values.dtype == np.float32 else None


def _keep(folder: Path, values: Floats) -> None:
    try:
        with atomic_folder(folder) as aside:
            np.save(aside / FILE, values, allow_pickle=False)
            write_text(aside / SEAL, file_hash(aside / FILE) + "\n")
    except (OSError, CapacityError) as error:
        # The cache saves time and nothing else: a run must not fail for it.
        logger.warning("the reference log-probabilities are not kept in the cache: %s", error)
