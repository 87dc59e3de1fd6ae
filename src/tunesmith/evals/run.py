"""Evaluate a model on a user's own held-out rows, with its base beside it on the same rows."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tunesmith.core.errors import ModelError
from tunesmith.core.log import logger
from tunesmith.core.types import Score, Tokens, content_hash
from tunesmith.data import render
from tunesmith.evals import stats
from tunesmith.evals.likelihood import row_sums
from tunesmith.evals.measure import Measured, check_truths, left_out_notes, measure
from tunesmith.evals.opening import Opened, open_model
from tunesmith.evals.result import Result, sample_row
from tunesmith.evals.rows import Case, Data, as_text, cases_hash, read_cases
from tunesmith.evals.task import Spec, Task, parse_tasks
from tunesmith.model.build import load_policy
from tunesmith.model.policy import Policy
from tunesmith.model.tokenizer import adapter_base, load_tokenizer, resolve

Pairs = Mapping[int, tuple[float, float]]
DISABLED: Literal["disabled adapter"] = "disabled adapter"
ANOTHER_TOKENIZER = "The base has another tokenizer, so perplexities per token do not compare; none is given for it."


@dataclass(frozen=True)
class Report:
    """The results of one evaluation, with samples and everything that they depend on."""

    model: str
    base: str | None
    results: list[Result]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def scores(self) -> list[Score]:
        """The scores alone."""
        return [result.score for result in self.results]

    @property
    def settings_hash(self) -> str:
        """SHA-256 of the settings: scores compare only where it is the same."""
        return content_hash(self.settings)

    def get(self, task: str, metric: str | None = None) -> Result:
        """The result of a task (its first metric, or the one named). Raises KeyError when there is none."""
        for result in self.results:
            if result.score.task == task and metric in (None, result.score.metric):
                return result
        raise KeyError(f"{task}/{metric}")

    def as_dict(self) -> dict[str, Any]:
        """What `eval --json` prints."""
        return {
            "model": self.model,
            "base": self.base,
            "scores": [result.as_dict() for result in self.results],
            "samples": self.samples,
            "settings": self.settings,
            "settings_hash": self.settings_hash,
            "notes": self.notes,
            "seconds": self.seconds,
        }


def evaluate(
    model: str,
    tasks: Sequence[Spec],
    data: Data,
    *,
    base: str | None = None,
    template: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    samples: int = 8,
    device: str = "auto",
) -> Report:
    """Score a hub id, folder, run folder or 'pocket' on held-out rows; see `evals.task.TASKS` for the tasks.

    base: a second model on the same rows; by default the base that a run records (with the adapter switched off where there is
    one), 'none' for no base. It is asked through the model's own template when their tokenizers agree, else through its own. Both are
    held in memory one after the other. limit takes a seeded random part of the rows.
    Raises what loading, reading, rendering and grading raise, before anything is generated where that can be known.
    """
    started = time.perf_counter()
    parsed = parse_tasks(tasks)
    cases = read_cases(data, limit=limit, seed=seed)
    check_truths(parsed, cases)
    opened = open_model(model, template=template, device=device)
    name, way = _base_of(opened, base)
    theirs, comparable = None, True
    if name is not None and way is None:
        with _telling_which(name, recorded=base is None):  # a base that is not there is said now, not after the model was measured
            comparable = _same_tokens(load_tokenizer(name), opened.tokenizer)
    logger.info("evaluating %s on %d rows: %s", model, len(cases), ", ".join(task.label for task in parsed))
    ours = measure(opened, parsed, cases, max_new_tokens=max_new_tokens)
    settings = _settings(opened, parsed, cases, seed, max_new_tokens)
    if way == DISABLED:
        logger.info("evaluating its base: the same model with the adapter switched off")
        with opened.policy.adapter_disabled():
            theirs = measure(opened, parsed, cases, max_new_tokens=max_new_tokens)
    elif name is not None:
        with _telling_which(name, recorded=base is None):
            beside = _open_beside(opened, name, template, device, same_tokens=comparable)
        logger.info("evaluating its base %s", name)
        theirs = measure(beside, parsed, cases, max_new_tokens=max_new_tokens)
    return _report(model, name, parsed, cases, ours, theirs, settings, samples, comparable, started)


def evaluate_policy(
    opened: Opened,
    tasks: Sequence[Spec],
    data: Data,
    *,
    base: Opened | Literal["disabled adapter"] | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    samples: int = 8,
    name: str = "",
) -> Report:
    """`evaluate` for a model that is already loaded: the base is another one, or this one with its adapter switched off."""
    started = time.perf_counter()
    parsed = parse_tasks(tasks)
    cases = read_cases(data, limit=limit, seed=seed)
    ours = measure(opened, parsed, cases, max_new_tokens=max_new_tokens)
    settings = _settings(opened, parsed, cases, seed, max_new_tokens)
    theirs, comparable = None, True
    if isinstance(base, Opened):
        comparable = _same_tokens(base.tokenizer, opened.tokenizer)
        theirs = measure(base, parsed, cases, max_new_tokens=max_new_tokens)
    elif base is not None:
        with opened.policy.adapter_disabled():
            theirs = measure(opened, parsed, cases, max_new_tokens=max_new_tokens)
    said = None if base is None else base.folder if isinstance(base, Opened) else base
    return _report(name or opened.folder, said, parsed, cases, ours, theirs, settings, samples, comparable, started)


def perplexity_score(
    policy: Policy, rows: Iterable[Tokens], *, task: str = "validation", seed: int = 0, base_value: float | None = None
) -> Score:
    """exp of the token-weighted mean negative log-likelihood over rows, with its bootstrap interval over rows.

    Raises GradeError when no row has a trained token.
    """
    sums, weights = row_sums(policy, list(rows))
    return replace(perplexity_result(sums, weights, task=task, seed=seed).score, base_value=base_value)


def perplexity_result(
    sums: stats.Floats, weights: stats.Floats, base_sums: stats.Floats | None = None, *, task: str = "validation", seed: int = 0
) -> Result:
    """Perplexity from what `row_sums` gave; with the base's sums over the same rows, the base's interval and the difference too."""
    known = weights > 0
    pairs = {place: (float(sums[place]), float(weights[place])) for place in np.flatnonzero(known).tolist()}
    others = None
    if base_sums is not None:
        others = {place: (float(base_sums[place]), float(weights[place])) for place in pairs}
    return _result(task, "perplexity", pairs, others, seed)


def share_result(values: Sequence[float], base: Sequence[float], *, task: str, metric: str, seed: int = 0) -> Result:
    """The mean of grades in 0..1, beside the base's on the same rows."""
    ours, theirs = ({place: (value, 1.0) for place, value in enumerate(found)} for found in (values, base))
    return _result(task, metric, ours, theirs, seed)


def _base_of(opened: Opened, asked: str | None) -> tuple[str | None, str | None]:
    """The base's name, and 'disabled adapter' when switching the adapter off gives it."""
    if asked == "none":
        return None, None
    if asked is not None:
        return asked, None
    below = adapter_base(opened.folder)
    recorded = opened.card.base if opened.card is not None else below
    if recorded is None or below is None:
        return recorded, None
    try:
        # An adapter trained on from another one: switching it off gives the base below both, not the one it started from.
        trained_on = adapter_base(resolve(recorded)) is not None
    except ModelError:
        return below, DISABLED  # the folder was moved; what the adapter sits on was loaded and is named
    return (recorded, None) if trained_on else (recorded, DISABLED)


def _open_beside(opened: Opened, name: str, template: str, device: str, *, same_tokens: bool) -> Opened:
    """The base, with the model's tokenizer and template when the tokens are the same ones; the model itself makes room for it."""
    opened.policy.model.to("cpu")
    gc.collect()
    if not same_tokens:
        return open_model(name, template=template, device=device)
    dtype: Literal["bf16", "fp32"] = "bf16" if str(opened.policy.dtype) == "torch.bfloat16" else "fp32"
    return Opened(load_policy(name, dtype=dtype, device=device), opened.tokenizer, opened.template, resolve(name), None)


@contextlib.contextmanager
def _telling_which(name: str, *, recorded: bool) -> Iterator[None]:
    """An error of a base that nobody has named says where the name comes from."""
    try:
        yield
    except ModelError as error:
        if not recorded:
            raise
        raise ModelError(
            f"the base that this run records, '{name}', cannot be loaded: {error.message}",
            where=error.where,
            remedy="name it with --base, or score the model alone with --base none",
            code=error.code,
        ) from error


def _same_tokens(left: Any, right: Any) -> bool:
    return bool(left.get_vocab() == right.get_vocab())


def _settings(opened: Opened, tasks: Sequence[Task], cases: Sequence[Case], seed: int, max_new_tokens: int) -> dict[str, Any]:
    return {
        "tasks": [{"name": task.name, "label": task.label, **task.settings} for task in tasks],
        "rows": len(cases),
        "data": cases_hash(cases),
        "template": {"source": opened.template.source, "hash": opened.template.hash},
        "stop_ids": list(render.stop_ids(opened.template, opened.tokenizer)),
        "decoding": {"greedy": True, "max_new_tokens": max_new_tokens},
        "dtype": str(opened.policy.dtype).removeprefix("torch."),
        "seed": seed,
    }


def _report(
    model: str,
    base: str | None,
    tasks: Sequence[Task],
    cases: Sequence[Case],
    ours: Measured,
    theirs: Measured | None,
    settings: dict[str, Any],
    samples: int,
    comparable: bool,
    started: float,
) -> Report:
    results, notes = [], left_out_notes(ours.left_out)
    for task in tasks:
        for metric, values in ours.values[task.label].items():
            others = theirs.values[task.label].get(metric) if theirs is not None else None
            if task.kind == "likelihood" and others is not None and not comparable:
                others = None
                notes.append(ANOTHER_TOKENIZER)
            results.append(_result(task.label, metric, values, others, settings["seed"]))
    if theirs is not None:
        notes += [f"Base: {note}" for note in left_out_notes(theirs.left_out) if note not in notes]
    return Report(model, base, results, _samples(cases, ours, theirs, samples), settings, notes, time.perf_counter() - started)


def _result(task: str, metric: str, ours: Pairs, theirs: Pairs | None, seed: int) -> Result:
    # Both models are averaged over the rows that both could take, so that the two numbers compare.
    rows = sorted(ours if theirs is None else ours.keys() & theirs.keys())
    sums = [ours[place][0] for place in rows]
    counts = [ours[place][1] for place in rows]
    base = difference = None
    if metric == "perplexity":
        mine = _exp(stats.ratio(sums, counts, seed=seed))
        if theirs is not None:
            others = [theirs[place][0] for place in rows]
            base, difference = _exp(stats.ratio(others, counts, seed=seed)), stats.paired_perplexity(sums, others, counts, seed=seed)
    else:
        mine = stats.share(sums)
        if theirs is not None:
            others = [theirs[place][0] for place in rows]
            base, difference = stats.share(others), stats.paired(sums, others, seed=seed)
    score = Score(task, metric, mine.value, mine.n, mine.low, mine.high, seed, base.value if base else None)
    return Result(score, base, difference)


def _exp(interval: stats.Interval) -> stats.Interval:
    return stats.Interval(math.exp(interval.value), math.exp(interval.low), math.exp(interval.high), interval.n)


def _samples(cases: Sequence[Case], ours: Measured, theirs: Measured | None, count: int) -> list[dict[str, Any]]:
    out = []
    for place in sorted(ours.answers)[:count]:
        prompt = cases[place].prompt()
        other = theirs.answers.get(place) if theirs is not None else None
        out.append(
            sample_row(
                prompt.key,
                as_text(prompt.messages),
                prompt.truth,
                ours.answers[place],
                ours.grades.get(place, {}),
                base=other,
                base_grades=theirs.grades.get(place) if theirs is not None else None,
            )
        )
    return out
