"""Pairs, labelled answers and solutions in steps as tokens: which side is which, where it carries weight, and what stands beside it.

At "answers" the answer's tokens are trained, as in a dialog whose earlier turns are context. At "ends" one token is: the last of
the rendered conversation, where a reward head reads, or the one that ends each step. "throughout" is both, for a head that learns from
every token of an answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import DataError
from tunesmith.core.types import Dialog, Labelled, Pair, Ranked, Steps, Tokens, Wanted
from tunesmith.data.formats.answers import behind, said, solution
from tunesmith.data.problem import Problem
from tunesmith.data.render import Rendered

Judged = Pair | Labelled | Steps
Rule = Literal["best_worst", "adjacent", "all"]


def dialogs_of(judged: Judged) -> list[Dialog]:
    """The dialogs to render: both sides of a pair, chosen first; the one of anything else."""
    if isinstance(judged, Pair):
        return [behind(judged.prompt, answer, judged.key, judged.tools) for answer in (judged.chosen, judged.rejected)]
    answer = judged.answer if isinstance(judged, Labelled) else solution(judged)
    return [behind(judged.prompt, answer, judged.key, judged.tools)]


def pairs_of(ranked: Ranked, rule: Rule) -> tuple[list[Pair], list[Problem]]:
    """The pairs of a ranked list, keyed `key`, `key#2`, ...; and a problem for each two answers that give none.

    The problems: "ranked_alike", "same_answers".

    `rule` (data.ranked): the best answer over the worst; each over the next one down; each over every lower one. Among equals the
    first in the row comes first.
    """
    order = sorted(range(len(ranked.scores)), key=lambda place: -ranked.scores[place])
    if rule == "best_worst":
        # Of several worst ones the first in the row, as of several best ones.
        couples = [(order[0], min(order, key=lambda place: ranked.scores[place]))]
    elif rule == "adjacent":
        couples = list(pairwise(order))
    else:
        couples = [(one, other) for place, one in enumerate(order) for other in order[place + 1 :]]
    pairs: list[Pair] = []
    ties: list[Problem] = []
    for good, bad in couples:
        margin = ranked.scores[good] - ranked.scores[bad]
        if margin <= 0:
            ties.append(Problem(ranked.key, "ranked_alike", "answers are ranked alike, so they give no pair", "remove the row"))
            continue
        if said(ranked.answers[good]) == said(ranked.answers[bad]):
            ties.append(
                Problem(ranked.key, "same_answers", "an answer stands in the list twice, so it gives no pair", "remove one of them")
            )
            continue
        key = f"{ranked.key}#{len(pairs) + 1}" if pairs else ranked.key
        answers = ranked.answers[good], ranked.answers[bad]
        pairs.append(Pair(ranked.prompt, *answers, key, ranked.tools, margin if ranked.measured else None))
    return pairs, ties


def only(forms: Sequence[Rendered], judged: Judged) -> Rendered:
    """The one text of a judged answer. Raises DataError "several_views" when the template shows its turns in several ways."""
    if len(forms) > 1:
        raise DataError(
            f"the template shows the answer's turns in {len(forms)} ways, and a judged answer has to be one text",
            where=judged.key,
            # The last turns of two answers stand behind different turns, so a pair is not helped by them.
            remedy="choose another template, or answers of one turn" + ("" if isinstance(judged, Pair) else ", or set data.turns: last"),
            code="several_views",
        )
    return forms[0]


def mark(judged: Judged, sides: Sequence[Rendered], wanted: Wanted) -> list[Rendered]:
    """The rendered sides with their groups, roles, weights and streams.

    Raises DataError: "prompt_differs", "same_answers" (pairs), "score_no_label" (labels at answers), "steps_rewritten",
    "steps_share_token" (steps), "label_no_share" (a value outside 0..1 where shares are wanted).
    """
    if isinstance(judged, Pair):
        return _pair(judged, sides, wanted)
    (side,) = sides
    if wanted.shares:
        _demand_shares(judged)
    if isinstance(judged, Steps):
        places = _step_ends(judged, side)
        return [_read_at(side, places, {"value": _at(side, places, judged.values)})]
    if wanted.at != "answers":
        places = _read_places(side, wanted)
        return [_read_at(side, places, {"value": _at(side, places, judged.value)})]
    if judged.value not in (0.0, 1.0):
        raise DataError(
            f"the label is {judged.value}, and this objective learns from a yes or no",
            where=judged.key,
            remedy="turn scores into true or false, or train a reward model on them",
            code="score_no_label",
        )
    return [_with(side, group=judged.key, role="desirable" if judged.value >= 0.5 else "undesirable")]


def _demand_shares(judged: Labelled | Steps) -> None:
    values = judged.values if isinstance(judged, Steps) else (judged.value,)
    for place, value in enumerate(values):
        if not 0 <= value <= 1:
            labelled = f"label {place + 1}" if isinstance(judged, Steps) else "the label"
            raise DataError(
                f"{labelled} is {value:g}, and this objective learns how likely the answer is right, from 0 to 1",
                where=judged.key,
                remedy="scale labels to 0..1 (true and false are 1 and 0)"
                + ("" if isinstance(judged, Steps) else ", or learn scores with objective: reward_regression"),
                code="label_no_share",
            )


def _pair(pair: Pair, sides: Sequence[Rendered], wanted: Wanted) -> list[Rendered]:
    chosen, rejected = sides
    fronts = [side.tokens.ids[: first_trained(side.tokens)].tolist() for side in sides]
    if fronts[0] != fronts[1]:
        several = len(pair.chosen) > 1 or len(pair.rejected) > 1
        raise DataError(
            f"what is trained stands behind {len(fronts[0])} tokens in the one answer and behind {len(fronts[1])} others in the other one",
            where=pair.key,
            remedy=("set data.turns: all, or " if several else "")
            + "write both answers alike (with or without a thinking part), or choose another template",
            code="prompt_differs",
        )
    if np.array_equal(chosen.tokens.ids[chosen.tokens.train != 0], rejected.tokens.ids[rejected.tokens.train != 0]):
        raise DataError("chosen and rejected become the same tokens", where=pair.key, remedy="remove the row", code="same_answers")
    named = [_with(side, group=pair.key, role=role) for side, role in zip(sides, ("chosen", "rejected"), strict=True)]
    if wanted.at == "answers":
        return named
    margin = pair.margin or 0.0
    if pair.margin is not None:
        named = [replace(side, notes=(*side.notes, "margin")) for side in named]
    return [_read_at(side, _read_places(side, wanted), {"margin": np.full(len(side.tokens), margin, dtype=np.float32)}) for side in named]


def first_trained(tokens: Tokens) -> int:
    """Where the answer begins."""
    return int(np.flatnonzero(tokens.train)[0])


def _read_places(side: Rendered, wanted: Wanted) -> list[int]:
    """Where a reward head reads one answer: its end, and before that every token of the answer where the head learns from all."""
    last = len(side.tokens) - 1
    if wanted.at == "ends":
        return [last]
    return [*(place for place in np.flatnonzero(side.tokens.train).tolist() if place < last), last]


def _step_ends(steps: Steps, side: Rendered) -> list[int]:
    """The token that holds the last character of each step."""
    answer = steps.separator.join(steps.steps)
    core = answer.strip()
    begin = first_trained(side.tokens)
    at = side.text.find(core, side.ends[begin - 1] if begin else 0)
    if at < 0:
        raise DataError(
            "the template rewrites the solution, so the ends of its steps cannot be found",
            where=steps.key,
            remedy="choose a template that keeps its words",
            code="steps_rewritten",
        )
    position = at - (len(answer) - len(answer.lstrip()))
    places: list[int] = []
    for step in steps.steps:
        end = side.ends[bisect_right(side.ends, position + len(step.rstrip()) - 1)]
        places.append(bisect_right(side.ends, end) - 1)  # of the tokens of one character the last
        position += len(step) + len(steps.separator)
    shared = next((place for place, (one, other) in enumerate(pairwise(places)) if one == other), None)
    if shared is not None:
        raise DataError(
            f"steps {shared + 1} and {shared + 2} end in the same token ({steps.steps[shared + 1]!r} adds none of its own)",
            where=steps.key,
            remedy="join such steps",
            code="steps_share_token",
        )
    return places


def _at(side: Rendered, places: Sequence[int], values: float | Sequence[float]) -> npt.NDArray[np.float32]:
    out = np.zeros(len(side.tokens), dtype=np.float32)
    out[list(places)] = values
    return out


def _with(side: Rendered, *, group: str, role: str) -> Rendered:
    return replace(side, tokens=replace(side.tokens, group=group, role=role))


def _read_at(side: Rendered, places: Sequence[int], streams: Mapping[str, npt.NDArray[np.float32]]) -> Rendered:
    """The side with weight on these tokens alone, which belong to its answer."""
    train = np.zeros_like(side.tokens.train)
    train[list(places)] = 1
    by_role = {role: (0, yes + no) for role, (yes, no) in side.by_role.items()}
    tokens = by_role.get("assistant", (0, 0))[1]
    by_role["assistant"] = (len(places), tokens - len(places))
    return replace(side, tokens=replace(side.tokens, train=train, streams=dict(streams)), by_role=by_role)
