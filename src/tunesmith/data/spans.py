"""Where each assistant turn's words stand in a rendered conversation.

The conversation is rendered a second time with a sentinel in place of every part of the assistants' words. What stands
between the sentinels is the template's own text; it must occur in the real rendering in exactly one way, and the gaps are
the words as the template left them: verbatim, stripped or rewritten. Tried on real templates in docs/templates-table.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tunesmith.core.errors import TemplateError

# A tag that templates split an answer at: its structure stays, the words between the tags get a sentinel each.
_TAGS = re.compile(r"(</?think>|</?thinking>|\[/?THINK\]|<\|(?:START|END)_(?:THINKING|RESPONSE)\|>)")
_THINKING_KEYS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class Words:
    """One assistant turn's words: characters start..end-1 of the rendering.

    `changed`: a part of them is neither verbatim nor merely stripped of outer white space.
    """

    start: int
    end: int
    changed: bool = False


@dataclass(frozen=True)
class Found:
    """The words by message index, and the indices of turns of which the template leaves a thinking part out."""

    words: dict[int, Words]
    dropped: frozenset[int]


@dataclass(frozen=True)
class _Part:
    """One part of a turn's words: the sentinel, what it stands for, and whether it is the answer itself (the last part)."""

    sentinel: str
    core: str
    turn: int
    answer: bool


def is_plain(row: dict[str, Any]) -> bool:
    """Is the turn one run of words and nothing else: no thinking part, no tags, no calls, no outer white space?"""
    content = row["content"]
    return len(row) == 2 and content != "" and content == content.strip() and not _TAGS.search(content)


def find_words(rows: Sequence[dict[str, Any]], rendered: str, again: Callable[[list[dict[str, Any]]], str], where: str) -> Found:
    """Words by message index for every assistant turn that has any; `again` renders other rows the same way.

    Raises TemplateError: "answer_dropped" (the template leaves an answer out), "answer_repeated", "not_in_one_way".
    """
    nonce = 0
    while f"qz{nonce}x" in rendered:
        nonce += 1
    twin, parts = _with_sentinels(rows, f"qz{nonce}x")
    if not parts:
        return Found({}, frozenset())
    plan = again(twin)
    pieces = re.split(rf"(qz{nonce}x\d+zq)", plan)
    literals, seen = pieces[0::2], pieces[1::2]
    _check_seen(seen, parts, where)
    by_name = {part.sentinel: part for part in parts}
    order = [by_name[name] for name in seen]
    gaps = _verbatim(literals, order, rendered)
    if gaps is None:
        gaps = _matched(literals, order, rendered, plan, where)
    found: dict[int, Words] = {}
    for part, (start, end) in zip(order, gaps, strict=True):
        changed = rendered[start:end].strip() != part.core
        old = found.get(part.turn)
        found[part.turn] = Words(start if old is None else old.start, end, changed or (old is not None and old.changed))
    dropped = {part.turn for part in parts} if len(seen) < len(parts) else set()
    return Found(found, frozenset(t for t in dropped if any(p.turn == t and p.sentinel not in seen for p in parts)))


def _with_sentinels(rows: Sequence[dict[str, Any]], head: str) -> tuple[list[dict[str, Any]], list[_Part]]:
    """The rows with sentinels in the assistants' words; outer white space, tags, empty parts and calls stay as they are."""
    parts: list[_Part] = []

    def mark(text: str, turn: int, answer: bool) -> str:
        core = text.strip()
        if not core:
            return text
        sentinel = f"{head}{len(parts)}zq"
        parts.append(_Part(sentinel, core, turn, answer))
        lead = text.index(core[0])
        return text[:lead] + sentinel + text[lead + len(core) :]

    twin = []
    for turn, row in enumerate(rows):
        if row["role"] != "assistant":
            twin.append(row)
            continue
        row = dict(row)
        for key in _THINKING_KEYS:
            if isinstance(row.get(key), str):
                row[key] = mark(row[key], turn, False)
        sections = _TAGS.split(row["content"])
        last = max((k for k in range(0, len(sections), 2) if sections[k].strip()), default=-1)
        # A turn that only thinks and then calls a tool has no answer that could be missed.
        is_answer = last == len(sections) - 1 or not row.get("tool_calls")
        row["content"] = "".join(
            mark(section, turn, is_answer and k == last) if k % 2 == 0 else section for k, section in enumerate(sections)
        )
        twin.append(row)
    return twin, parts


def _check_seen(seen: list[str], parts: list[_Part], where: str) -> None:
    for part in parts:
        count = seen.count(part.sentinel) if len(parts) < 64 else int(part.sentinel in seen)
        if count > 1:
            raise TemplateError(
                f"the template writes the words of turn {part.turn} {count} times: {part.core[:60]!r}",
                where=where,
                remedy="which of them the model should learn cannot be decided; choose another template",
                code="answer_repeated",
            )
        if count == 0 and part.answer:
            raise TemplateError(
                f"the template leaves out the answer of turn {part.turn}: {part.core[:60]!r}",
                where=where,
                remedy="this template cannot show such a turn (plain text content, or with tool calls); choose another template",
                code="answer_dropped",
            )


def _verbatim(literals: list[str], order: list[_Part], rendered: str) -> list[tuple[int, int]] | None:
    """The gaps when putting the words back for the sentinels gives the very rendering."""
    gaps, text = [], [literals[0]]
    position = len(literals[0])
    for part, literal in zip(order, literals[1:], strict=True):
        gaps.append((position, position + len(part.core)))
        position += len(part.core) + len(literal)
        text += (part.core, literal)
    return gaps if position == len(rendered) and "".join(text) == rendered else None


def _matched(literals: list[str], order: list[_Part], rendered: str, plan: str, where: str) -> list[tuple[int, int]]:
    """The gaps when the literal pieces fit into the rendering in exactly one way."""
    literals, groups = _joined(literals, order)
    lazy, greedy = _leftmost(literals, rendered), _rightmost(literals, rendered)
    if lazy is None or greedy is None:
        _refuse("the words change what the template writes around them", rendered, plan, where)
    if lazy != greedy:
        _refuse("the words can be found in more than one way", rendered, plan, where)
    gaps: list[tuple[int, int]] = []
    for (start, end), members in zip(lazy, groups, strict=True):
        # Parts of one turn without template text between them are one gap: all of it belongs to the last of them.
        gaps += [(start, start)] * (members - 1) + [(start, end)]
    return gaps


def _joined(literals: list[str], order: list[_Part]) -> tuple[list[str], list[int]]:
    kept, groups = [literals[0]], [1]
    for k, literal in enumerate(literals[1:-1], start=1):
        if literal == "" and order[k - 1].turn == order[k].turn:
            groups[-1] += 1
        else:
            kept.append(literal)
            groups.append(1)
    return [*kept, literals[-1]], groups


def _leftmost(literals: list[str], text: str) -> list[tuple[int, int]] | None:
    if not text.startswith(literals[0]) or not text.endswith(literals[-1]):
        return None
    gaps, start = [], len(literals[0])
    for literal in literals[1:-1]:
        found = text.find(literal, start)
        if found < 0:
            return None
        gaps.append((start, found))
        start = found + len(literal)
    end = len(text) - len(literals[-1])
    return [*gaps, (start, end)] if start <= end else None


def _rightmost(literals: list[str], text: str) -> list[tuple[int, int]] | None:
    if not text.startswith(literals[0]) or not text.endswith(literals[-1]):
        return None
    gaps, end = [], len(text) - len(literals[-1])
    for literal in reversed(literals[1:-1]):
        found = text.rfind(literal, 0, end)
        if found < 0:
            return None
        gaps.append((found + len(literal), end))
        end = found
    start = len(literals[0])
    return [(start, end), *reversed(gaps)] if start <= end else None


def _refuse(why: str, rendered: str, plan: str, where: str) -> NoReturn:
    common = next((k for k, (a, b) in enumerate(zip(rendered, plan, strict=False)) if a != b), min(len(rendered), len(plan)))
    begin = max(common - 60, 0)
    raise TemplateError(
        f"{why}; real rendering: ...{rendered[begin : begin + 300]!r}; with sentinels: ...{plan[begin : begin + 300]!r}",
        where=where,
        remedy="which tokens to train would be a guess; change the row (often outer white space or markup), or the template",
        code="not_in_one_way",
    )
