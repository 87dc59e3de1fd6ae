"""What the model would be trained on, token by token: as data for programs, in colour for people."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.core.errors import DataError, TemplateError
from tunesmith.core.recipe import Source
from tunesmith.core.types import Dialog, Example, Labelled, Ranked, Text, Wanted
from tunesmith.data.detect import LOOK, check_columns, detect, hold
from tunesmith.data.formats import FORMATS
from tunesmith.data.judged import dialogs_of, mark, only, pairs_of
from tunesmith.data.notes import explain
from tunesmith.data.problem import Problem
from tunesmith.data.render import Rendered, render
from tunesmith.data.sources import read
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Group

_VISIBLE = str.maketrans({"\t": "→\t", "\r": "␍"})


def show_rows(
    source: Source,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    n: int = 3,
    *,
    turns: Literal["all", "last"] = "all",
    max_length: int | None = None,
) -> dict[str, Any]:
    """The tokens of the first n rows of a source, as `tunesmith show --json` prints them.

    {"rows": [{"key", "role", "ids", "trained" (0 or 1 an id), "pieces" (one text an id; joined they are the rendered text), "dropped"
    (null, or why the row would not be trained on), "notes"}], "template": {"source", "hash"}, "format"}. A row that a template shows in
    several ways gives several entries, as do the sides of a pair, told apart by "role" ("chosen" or "rejected"; "" for a dialog). Pairs
    and labelled answers are shown as a preference objective trains them, steps with the tokens at which a process reward is read.
    Raises DataError when the source cannot be read.
    """
    check_columns(source)
    rows = read(source)
    head = list(islice(rows, max(n, LOOK)))
    name = detect(head, source)
    shown: list[dict[str, Any]] = []
    for key, row in islice(chain(head, rows), n):
        if isinstance(row, Problem):
            shown.append(_dropped(row))
            continue
        try:
            if source.format == "auto":
                hold(name, head[0][0], key, row, source)
            forms = _forms(FORMATS[name].function(row, key), template, tokenizer, turns)
        except (DataError, TemplateError) as error:
            shown.append(_dropped(Problem.of(error, key)))
            continue
        shown += [_shown(form, max_length) for form in forms]
    return {"rows": shown, "template": {"source": template.source, "hash": template.hash}, "format": name}


def _forms(example: Example, template: ChatTemplate, tokenizer: Tokenizer, turns: Literal["all", "last"]) -> list[Rendered]:
    if isinstance(example, Dialog | Text):
        return render(example, template, tokenizer, turns=turns)
    if isinstance(example, Ranked):
        pairs, ties = pairs_of(example, "best_worst")
        if not pairs:
            raise DataError(ties[0].message, where=example.key, remedy=ties[0].remedy, code=ties[0].code)
        return [form for pair in pairs for form in _forms(pair, template, tokenizer, turns)]
    sides = [only(render(dialog, template, tokenizer, turns=turns), example) for dialog in dialogs_of(example)]
    scored = isinstance(example, Labelled) and example.value not in (0, 1)
    return mark(example, sides, Wanted(at="ends" if scored else "answers"))


def _shown(form: Rendered, max_length: int | None) -> dict[str, Any]:
    return {
        "key": form.tokens.key,
        "role": form.tokens.role,
        "ids": form.tokens.ids.tolist(),
        "trained": (form.tokens.train != 0).astype(int).tolist(),
        "pieces": list(form.pieces),
        "dropped": _why_dropped(len(form.tokens), bool(form.tokens.train.any()), max_length),
        "notes": list(form.notes),
    }


def _dropped(problem: Problem) -> dict[str, Any]:
    reason = f"{problem.message} ({problem.code})"
    return {"key": problem.key, "role": "", "ids": [], "trained": [], "pieces": [], "dropped": reason, "notes": []}


def _why_dropped(length: int, trained: bool, max_length: int | None) -> str | None:
    if not trained:
        return "no token of the row would be trained (no_trained_tokens)"
    if max_length is not None and length > max_length:
        return f"{length} tokens, over max_length = {max_length} (over_length)"
    return None


def painted(document: dict[str, Any], special: frozenset[int] = frozenset()) -> Group:
    """The rows of `show_rows` for a terminal: trained tokens green, context dim, special tokens underlined, with a legend.

    `special` are the ids of control tokens (`frozenset(tokenizer.all_special_ids)`).
    """
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text as Paint

    parts: list[Any] = []
    for row in document["rows"]:
        count, trained = len(row["ids"]), sum(row["trained"])
        name = f"{row['key']}   {row['role']}".rstrip()
        parts.append(Rule(f"{name}   {count} tokens, {trained} trained", align="left", style="cyan"))
        body = Paint()
        for token, learned, piece in zip(row["ids"], row["trained"], row["pieces"], strict=True):
            style = "bold black on green" if learned else "dim"
            # A trained line break is a token like any other: it has to be seen.
            text = piece.replace("\n", "⏎\n") if learned else piece
            body.append(text.translate(_VISIBLE), style=f"{style} underline" if token in special else style)
        if count:
            parts.append(body)
        if row["dropped"] is not None:
            parts.append(Paint(f"not trained on: {row['dropped']}", style="bold red"))
        parts += [Paint(f"note: {explain(note)}", style="yellow") for note in row["notes"]]
    legend = Paint("\ntrained", style="bold black on green")
    legend.append("  ", style="not bold default on default").append("context", style="dim not bold default on default")
    legend.append("  ", style="not bold default on default").append("control token", style="underline not bold default on default")
    legend.append(f"   template: {document['template']['source']}   format: {document['format']}", style="not bold default on default")
    parts.append(legend)
    return Group(*parts)
