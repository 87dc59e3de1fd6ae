"""From a recipe to a finished run folder: build, go on where a run was left, train, save, prove, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tunesmith.core.errors import CheckpointError, TunesmithError
from tunesmith.core.files import read_json, write_json, write_text
from tunesmith.core.load import Loaded, dump_yaml, load_recipe, load_tree
from tunesmith.core.log import logger
from tunesmith.core.recipe import Recipe
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.model.build import build_policy
from tunesmith.model.freeze import Turns
from tunesmith.model.load import check_vocabulary, choose_device, resolve
from tunesmith.model.memory import whole_bytes
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle_front
from tunesmith.model.quant import parameter_count
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import methods, wanted
from tunesmith.training import finish
from tunesmith.training import state as states
from tunesmith.training.balance import balance
from tunesmith.training.door import at_the_door, demand_its_template, with_what_they_read, within_context
from tunesmith.training.lock import demand_free, hold
from tunesmith.training.loop import Job, run_loop, stop_on_signal
from tunesmith.training.optim import build_optimizer, peak_lr
from tunesmith.training.parallel import Ranks, join, leave
from tunesmith.training.receipt import identify, model_hash, precision
from tunesmith.training.reference import PROOF, References
from tunesmith.training.sinks import Sinks, open_sinks
from tunesmith.training.source import Offline
from tunesmith.training.speed import gauge_of
from tunesmith.training.state import Identity, Progress
from tunesmith.training.step import Budget

Result = dict[str, Any]


class Interrupted(TunesmithError):
    """The run was asked to stop; a checkpoint is written and the same command goes on."""

    code = "interrupted"


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | Sequence[Loaded], *, set_values: Iterable[str] = (), fresh: bool = False
) -> Result:
    """Train what a recipe says, going on by itself where an earlier, interrupted run of it was left.

    `recipe` is a file, a raw tree or a Recipe; `set_values` are words like "optim.lr=1e-4"; `fresh` moves an earlier run aside.
    Returns {"run", "steps", "final", "metrics", "best", "seconds", "tokens_per_s", "receipt"}, or {"stages": [...]} for stages.
    Raises the errors of core/errors.py, and Interrupted after Ctrl-C.
    """
    return train_stages(_loaded(recipe, set_values), fresh=fresh, began=time.perf_counter())


def train_stages(stages: Sequence[Loaded], *, fresh: bool, began: float) -> Result:
    """`train` for recipes that are read already; `began` (time.perf_counter) is where the time to the first step is counted from."""
    if len(stages) == 1 and not stages[0].name:
        return train_one(stages[0], fresh=fresh, began=began)
    results = []
    for stage in with_what_they_read(stages):
        logger.info("stage %s", stage.name)
        results.append({**train_one(stage, fresh=fresh, began=began), "name": stage.name})
        began = time.perf_counter()
    return {"stages": results}


def _loaded(recipe: str | Path | Mapping[str, Any] | Recipe | Sequence[Loaded], words: Iterable[str]) -> list[Loaded]:
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, words)
    if isinstance(recipe, Recipe):
        tree = recipe.as_dict()
        if "max_length" not in recipe.tokens.model_fields_set:
            del tree["tokens"]["max_length"]  # a default, which gives way to the base's context
        return load_tree(tree)
    if isinstance(recipe, Mapping):
        return load_tree(recipe)
    return list(recipe)


@dataclass
class Built:
    """The parts of a run before its first step."""

    prepared: Prepared
    tokenizer: Any
    policy: Policy
    job: Job


def train_one(loaded: Loaded, *, fresh: bool = False, began: float) -> Result:
    """Train one recipe; a finished run with the same identity is not run again."""
    loaded = within_context(loaded)
    recipe = loaded.recipe
    ranks = join(recipe.run.device)
    try:
        run = Path(recipe.run.out)
        at_the_door(recipe)
        if ranks.first:
            demand_free(run)
        if fresh and ranks.first:
            states.set_aside(run)
        ranks.barrier()
        started = time.perf_counter()
        identity, prepared, tokenizer = _prepare(recipe, ranks)
        done = _earlier(run, identity)
        if done is not None:
            logger.info("%s is finished already and nothing changed; use --fresh to train it again", run)
            return done
        with ExitStack() as held:
            built = _build(loaded, run, identity, prepared, tokenizer, ranks, began, held)
            return _train(loaded, built, started)
    finally:
        leave()


def _aside(function: Callable[..., str], *arguments: Any) -> Future[str]:
    """What `function` gives, worked out by a thread that lets others work and that an error elsewhere does not wait for."""
    found: Future[str] = Future()

    def work() -> None:
        try:
            found.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001  whoever asks for the result gets it
            found.set_exception(error)

    Thread(target=work, daemon=True).start()
    return found


def _prepare(recipe: Recipe, ranks: Ranks) -> tuple[Callable[[], Identity], Prepared, Any]:
    """The run's identity, as a function because hashing the base goes on beside the rest, its rows and its tokenizer."""
    base, revision = resolve(recipe.model.base), recipe.model.revision
    hashed = _aside(model_hash, base, revision) if Path(base).is_dir() else None
    tokenizer = load_tokenizer(base, revision)
    if not ranks.first:
        ranks.barrier()  # the first rank fills the cache, the others read it
    prepared = prepare(recipe, tokenizer, wanted=wanted(methods(recipe.objective)))
    demand_its_template(recipe, prepared.template)
    if ranks.first:
        ranks.barrier()
        logger.info("%s", prepared.ledger.summary())
        if (words := balance(recipe, prepared.ledger)) is not None:
            logger.info("%s", words)

    @cache
    def identity() -> Identity:
        # The files of a hub id may all be here only once the model was loaded.
        return identify(recipe, prepared, hashed.result() if hashed is not None else model_hash(base, revision))

    return identity, prepared, tokenizer


def _earlier(run: Path, identity: Callable[[], Identity]) -> Result | None:
    """The result that the folder holds already. Raises CheckpointError (other_run) when what is there belongs to another recipe."""
    saved = states.steps_saved(run)
    if not saved and not (run / "receipt.json").exists():
        return None
    if saved:
        states.demand_same(states.read_state(states.folder_of(run, saved[-1]))[1], identity(), run)
    done = finish.finished(run, identity())
    if done is None and not saved:
        raise CheckpointError(
            "the folder holds a finished run of another recipe",
            where=str(run),
            remedy="choose another run.out, or start anew with --fresh (the old run is kept aside)",
            code="other_run",
        )
    return done


def _build(
    loaded: Loaded,
    run: Path,
    identity: Callable[[], Identity],
    prepared: Prepared,
    tokenizer: Any,
    ranks: Ranks,
    began: float,
    held: ExitStack,
) -> Built:
    recipe = loaded.recipe
    device = str(choose_device(recipe.run.device if ranks.world == 1 else _rank_device(recipe.run.device, ranks)))
    torch.manual_seed(recipe.run.seed)
    terms = methods(recipe.objective)
    needs = frozenset[str]().union(*(method.needs for method in terms))
    policy = build_policy(recipe.model, device, seed=recipe.run.seed, head="score" if "score" in needs else "language")
    check_vocabulary(policy.causal, tokenizer)
    policy.set_neftune(recipe.run.neftune_alpha)
    if recipe.model.fast.front and needs & {"pairs", "mismatched"}:
        settle_front(policy)
    source = Offline(prepared.train, recipe.run)
    budget = _fit(recipe, policy, prepared, ranks)
    if "reference" in needs:
        prepared = _with_reference(recipe, policy, identity().base, tokenizer, budget, ranks, prepared, source.used())
        source = Offline(prepared.train, recipe.run)
    policy.settle()
    parameters = policy.parameters_by_name()
    lr = peak_lr(recipe.optim, recipe.model.adapter, wanted(terms))
    lr_ratio = getattr(recipe.model.adapter, "lr_ratio", 1.0)
    optimizer = build_optimizer(recipe.optim, lr, parameters, policy.model, lr_ratio=lr_ratio, seed=recipe.run.seed)
    progress, known = Progress(), identity()
    if ranks.first:
        run.mkdir(parents=True, exist_ok=True)
        held.enter_context(hold(run))
    ranks.barrier()
    saved = states.steps_saved(run)
    if ranks.first:
        write_text(run / "recipe.yaml", dump_yaml(loaded))
        write_json(run / "ledger.json", prepared.ledger.as_dict())
        finish.remember_before(run, policy, tokenizer, prepared, terms, budget, fresh=not saved)
    ranks.barrier()
    # Every rank must begin from the same random state, whatever was sampled above; dropout then differs by rank.
    torch.manual_seed(recipe.run.seed + ranks.rank)
    if saved:
        folder = states.folder_of(run, saved[-1])
        progress, _ = states.read_state(folder)
        states.restore(folder, policy, optimizer)
        logger.info("going on after step %d of %d", progress.step, source.total)
    _announce(policy, source)
    validation = [prepared.validation[i] for i in range(len(prepared.validation))] if prepared.validation else None
    sinks = Sinks([])
    if ranks.first:
        sinks = open_sinks(run, recipe.run.trackers, recipe.as_dict(), total=source.total, done=progress.step)
    gauge = gauge_of(policy, ranks)
    job = Job(
        recipe, run, policy, optimizer, lr, terms, source, validation, known, progress, budget, ranks, sinks,
        gauge, began, Turns(policy, recipe.model.lisa, recipe.run.seed) if recipe.model.lisa else None,
    )  # fmt: skip
    return Built(prepared, tokenizer, policy, job)


def _with_reference(
    recipe: Recipe, policy: Policy, base: str, tokenizer: Any, budget: Budget, ranks: Ranks, prepared: Prepared, used: npt.NDArray[np.bool_]
) -> Prepared:
    """The rows with the reference's log-probabilities beside them; before any weight moves, also when the run goes on from a checkpoint."""
    references = References(recipe, policy, base, tokenizer, budget, ranks)
    train = references.fill(prepared.train, used)
    validation = prepared.validation
    if validation is not None:
        validation = references.fill(validation, np.ones(len(validation), dtype=np.bool_))
    references.prove([train[row] for row in np.flatnonzero(used)[:PROOF].tolist()])
    return replace(prepared, train=train, validation=validation)


def _announce(policy: Policy, source: Offline) -> None:
    trained = sum(p.numel() for p in policy.parameters_by_name().values())
    logger.info(
        "training %s of %s parameters on %s examples for %d steps (%s, %s, layout %s)",
        f"{trained:,}",
        f"{parameter_count(policy.model):,}",
        f"{source.examples:,}",
        source.total,
        policy.device,
        precision(policy),
        policy.layout,
    )


def _fit(recipe: Recipe, policy: Policy, prepared: Prepared, ranks: Ranks) -> Budget:
    """The size of micro-batches, and as many layers recomputing as it then takes."""
    longest, all_tokens = int(prepared.train.lengths.max()), int(prepared.train.lengths.sum())
    budget = Budget(micro_tokens(recipe.run.micro_tokens, policy, longest, ranks))
    tokens = max(longest, min(budget.tokens, all_tokens))
    setting = recipe.run.checkpointing
    if setting == "auto":
        count: int | bool = policy.layers_to_recompute(tokens, longest, share=_sharing(policy, ranks))
    else:
        count = setting if isinstance(setting, int) else setting == "on"
    policy.set_checkpointing(count)
    if count:
        logger.info("micro-batches of at most %d tokens, %s layers recompute activations", tokens, "all" if count is True else count)
    return budget


def micro_tokens(setting: int | str, policy: Policy, longest: int, ranks: Ranks) -> int:
    """Tokens of one forward pass: what the recipe says, or the most that suits the device and needs no recomputation.

    `longest` is the longest row. The choice is that of all processes, because they cut the same step, and it depends on the memory that is
    built in and not on what is free now, so that a run which goes on cuts its steps as before.
    """
    if isinstance(setting, int):
        return setting
    choices = (32_768, 16_384, 8_192) if policy.device.type == "cuda" else (1_024, 512)
    room = whole_bytes(policy.device) // _sharing(policy, ranks)
    agreed = ranks.sum([float(policy.fits(max(tokens, longest), longest, room)) for tokens in choices])
    return next((tokens for tokens, votes in zip(choices, agreed, strict=True) if votes == ranks.world), choices[-1])


def _sharing(policy: Policy, ranks: Ranks) -> int:
    """How many processes share the memory of the device."""
    return 1 if policy.device.type == "cuda" else ranks.world


def _rank_device(device: str, ranks: Ranks) -> str:
    return f"cuda:{ranks.local}" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


def _train(loaded: Loaded, built: Built, started: float) -> Result:
    job = built.job
    with stop_on_signal() as stop:
        try:
            complete = run_loop(job, stop)
        finally:
            job.sinks.close()
    if not complete:
        raise Interrupted(
            f"stopped after step {job.progress.step} of {job.source.total}; everything is saved",
            where=str(job.run),
            remedy="run the same command again to go on from here",
        )
    result: Result = {}
    if job.ranks.first:
        result = finish.finish(loaded, job, built.prepared, built.tokenizer, time.perf_counter() - started)
    job.ranks.barrier()
    return result or read_json(job.run / "result.json")
