"""What a reward model says of rows: a score for each conversation, for both sides of a pair, for every step of a solution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.core.errors import DataError, ModelError
from tunesmith.core.log import logger
from tunesmith.core.recipe import Data, Model, Recipe, Source, TokenLimits
from tunesmith.core.types import Kind, Tokens, Wanted
from tunesmith.data.dataset import TokenSet
from tunesmith.data.detect import LOOK, check_columns, detect
from tunesmith.data.formats import KINDS
from tunesmith.data.gather import Gathered, gather
from tunesmith.data.pack import pack
from tunesmith.data.prepare import SHOWN
from tunesmith.data.sources import read
from tunesmith.evals.likelihood import CAPACITY, quiet
from tunesmith.evals.opening import Opened, open_model
from tunesmith.evals.stats import Interval, mean, share
from tunesmith.model import reward
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle_front
from tunesmith.model.tokenizer import resolve

WINDOW = 16 * CAPACITY  # tokens that are packed together; scores come out as each window is done
ENDLESS = 1 << 20  # for a model that names no longest row
LONG = "shorten such rows, or raise --max-length (the longest row that the model knows is the default)"
Scored = dict[str, Any]


def score(
    model: str,
    data: str | Path | Source,
    *,
    template: str = "auto",
    data_format: str = "auto",
    device: str = "auto",
    max_length: int | None = None,
    on_bad: Literal["refuse", "drop"] = "refuse",
) -> Iterator[Scored]:
    """The scores of rows in their order, each as soon as it is there.

    A conversation, text or labelled answer gives {"key", "score"}, a pair {"key", "chosen", "rejected"}, a solution in steps
    {"key", "scores"}. Rows over `max_length` tokens (default: the longest the model knows) cannot be scored. Raises at once, before any
    score: ModelError "no_score_head" (a language model), "template_differs" (another template than the model learned from, unless
    `template` names it), "position_differs" (steps for a model of whole answers, or the other way round); DataError "rows_refused" (rows
    that cannot be used, unless on_bad is drop; the first ten are listed) and "no_rows". A score that is no number: ModelError "nan_score".
    """
    folder = resolve(model)
    if reward.head_of(folder) != "score":
        raise reward.no_score_head(model)
    opened = open_model(model, template=template, device=device)
    source = data if isinstance(data, Source) else Source(path=str(data), format=data_format)
    kind = kind_of(source)
    _check_card(opened, kind, source, named=template != "auto")
    gathered = _gathered(opened, source, kind, max_length, on_bad)
    _refuse(gathered, source, on_bad)
    rows = gathered.train.build()
    if kind == "pairs":
        settle_front(opened.policy)
    return _scores(opened.policy, rows, kind)


def kind_of(source: Source) -> Kind:
    """Which kind of rows a source holds, from its first ones. Raises the errors of files that cannot be read as rows."""
    check_columns(source)
    return KINDS[detect(list(islice(read(source), LOOK)), source)]


def _check_card(opened: Opened, kind: Kind, source: Source, *, named: bool) -> None:
    card = reward.read_card(opened.folder)
    if card is None:
        return
    reward.demand_template(card, opened.template.source, opened.template.hash, source.path, named=named)
    if (card.position == "steps") != (kind == "steps"):
        held = "labelled steps" if kind == "steps" else "whole answers"
        raise ModelError(
            f"the rows are {held}, and this reward model reads {reward.RULES[card.position]}",
            where=source.path,
            remedy="score rows of the kind that it was trained on",
            code="position_differs",
        )


def _gathered(opened: Opened, source: Source, kind: Kind, max_length: int | None, on_bad: Literal["refuse", "drop"]) -> Gathered:
    longest = max_length or getattr(opened.policy.causal.config.get_text_config(), "max_position_embeddings", None) or ENDLESS
    recipe = Recipe(
        model=Model(base=opened.folder),
        # Of a dialog one view is enough, the last; answers of several turns are one text already.
        data=Data(train=[source], on_bad=on_bad, turns="last" if kind == "dialogs" else "all"),
        tokens=TokenLimits(max_length=int(longest), overlong="error", cache=False),
    )
    return gather(recipe, opened.tokenizer, opened.template, 0, Wanted(kind, at="ends"))


def _refuse(gathered: Gathered, source: Source, on_bad: Literal["refuse", "drop"]) -> None:
    # Answers that all have one label cannot be learned from, and can be scored.
    for fault in gathered.faults:
        if fault.code != "one_label":
            raise fault
    bad = [reason for _, reason in gathered.ledger.reasons("refused", "dropped")]
    lines = [f"{problem.key}: {problem.message}" for problem in gathered.problems[:SHOWN]]
    lines += [f"{', '.join(reason.keys[:SHOWN])}: {reason.message}" for reason in bad if reason.fate == "dropped"]
    count = sum(reason.count for reason in bad)
    if (count and on_bad == "refuse") or not len(gathered.train):
        first = next((reason for reason in bad if reason.remedy), None)
        remedy = LONG if first is not None and first.code == "over_length" else first.remedy if first is not None else "mend the rows"
        more = [f"... ({count} in all)"] if count > len(lines) else []
        raise DataError(
            "\n  ".join([f"{count} {'row' if count == 1 else 'rows'} cannot be scored:", *lines, *more]),
            where=source.path,
            remedy=f"{remedy}; or leave such rows out with --on-bad drop" if len(gathered.train) else remedy,
            code="rows_refused" if len(gathered.train) else "no_rows",
        )
    for line in lines:
        logger.warning("not scored: %s", line)
    if count:
        logger.warning("not scored: %d of %d rows in all", count, sum(part.read for part in gathered.ledger.parts))


def _scores(policy: Policy, rows: TokenSet, kind: Kind) -> Iterator[Scored]:
    """One score a group of rows, in windows of about WINDOW tokens."""
    starts = [*rows.groups().tolist(), len(rows)]
    held: list[list[Tokens]] = []
    size = 0
    for start, stop in pairwise(starts):
        held.append([rows[place] for place in range(start, stop)])
        size += sum(map(len, held[-1]))
        if size >= WINDOW or stop == len(rows):
            yield from rate_groups(policy, held, kind)
            held, size = [], 0


def rate_groups(policy: Policy, groups: Sequence[Sequence[Tokens]], kind: Kind) -> list[Scored]:
    """The scores of groups of rows (both sides of a pair, or one row), in evaluation mode and without gradients.

    A dialog carries weight on its answers' words and is read at its last token; other rows carry it where they are read.
    Raises ModelError "nan_score".
    """
    flat: list[Tokens] = []
    for number, group in enumerate(groups):
        flat += [
            replace(_at_end(row) if kind == "dialogs" else row, key=str(len(flat) + i), group=str(number)) for i, row in enumerate(group)
        ]
    values: list[list[float]] = [[] for _ in flat]
    with quiet(policy), policy.steady():
        for batch in pack(flat, CAPACITY, sharing=policy.sharing is not None) if flat else []:
            out = policy.rate(batch)
            assert out.score is not None
            for segment, value in zip(out.row.tolist(), out.score.double().tolist(), strict=True):
                values[int(batch.segments[segment].key)].append(value)
    rest = iter(values)
    return [_told(group, [next(rest) for _ in group], kind) for group in groups]


def _at_end(row: Tokens) -> Tokens:
    train = np.zeros_like(row.train)
    train[-1] = 1
    return replace(row, train=train)


def _told(group: Sequence[Tokens], values: Sequence[Sequence[float]], kind: Kind) -> Scored:
    for row, own in zip(group, values, strict=True):
        if not np.isfinite(own).all():
            raise ModelError(
                "the model gives a score that is not a number",
                where=row.key,
                remedy="look for NaN in the weights, or score in fp32",
                code="nan_score",
            )
    if kind == "pairs":
        return {"key": group[0].group, **{row.role: own[0] for row, own in zip(group, values, strict=True)}}
    return {"key": group[0].key, "scores": list(values[0])} if kind == "steps" else {"key": group[0].key, "score": values[0][0]}


@dataclass(frozen=True)
class Summary:
    """How many rows were scored, their mean score, and for pairs how often the chosen answer scores higher (a tie counts half)."""

    n: int
    mean: Interval
    accuracy: Interval | None = None
    margin: Interval | None = None

    def lines(self) -> list[str]:
        """One line a number, for people."""
        found = [f"{self.n} {'row' if self.n == 1 else 'rows'}, mean score {_shown(self.mean)}"]
        if self.accuracy is not None and self.margin is not None:
            found.append(f"chosen over rejected in {_shown(self.accuracy)} of pairs, by {_shown(self.margin)} on the mean")
        return found


def summarise(scores: Sequence[Scored]) -> Summary:
    """The numbers over all rows, each with its 95 % interval."""
    names = ("score", "chosen", "rejected")
    flat = [value for one in scores for value in [*(one[name] for name in names if name in one), *one.get("scores", [])]]
    pairs = np.array([one["chosen"] - one["rejected"] for one in scores if "chosen" in one])
    if not len(pairs):
        return Summary(len(scores), mean(flat))
    return Summary(len(scores), mean(flat), share((pairs > 0) + 0.5 * (pairs == 0)), mean(pairs))


def _shown(value: Interval) -> str:
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"
