"""Which token ends an assistant turn under a chat template.

Found by rendering a small chat, never from a table of models: what stands after the last answer (`last`), and what stands
between an answer and the next user turn (`middle`). The control tokens that both begin with belong to the turn; what only
one of them has is the end of the text or the next turn's header.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from tunesmith.core.errors import TemplateError
from tunesmith.data.template import ChatTemplate, apply_rows
from tunesmith.data.tokenizer import Tokenizer, Vocabulary, vocabulary

_ANSWERS = ("qz1answerzq", "qz2answerzq")
_QUESTIONS = ("qz1questionzq", "qz2questionzq")


@dataclass(frozen=True)
class Stops:
    """How turns end: `token` is written by the template itself; `append` must be added after a last turn that has no end
    mark (it ends in `token`); `mark` is a literal end mark that is no token. All empty: the EOS token is added."""

    token: str = ""
    append: str = ""
    mark: str = ""


_known: WeakKeyDictionary[Any, dict[tuple[str, int], Stops]] = WeakKeyDictionary()


def find_stops(template: ChatTemplate, tokenizer: Tokenizer) -> Stops:
    """How this template ends a plain turn, found once per template and tokenizer."""
    per_template = _known.setdefault(tokenizer, {})
    key = (template.hash, len(tokenizer))
    if key not in per_template:
        per_template[key] = _find(template, tokenizer)
    return per_template[key]


def _find(template: ChatTemplate, tokenizer: Tokenizer) -> Stops:
    chat = [
        {"role": "user", "content": _QUESTIONS[0]},
        {"role": "assistant", "content": _ANSWERS[0]},
        {"role": "user", "content": _QUESTIONS[1]},
        {"role": "assistant", "content": _ANSWERS[1]},
    ]
    for rows in (chat, chat[:2]):
        try:
            text = apply_rows(template, tokenizer, rows)
        except TemplateError:
            continue
        if rows[-1]["content"] in text:
            last = text.rpartition(rows[-1]["content"])[2]
            middle = text.partition(_ANSWERS[0])[2].partition(_QUESTIONS[1])[0] if len(rows) == 4 else last
            asked = text.partition(_QUESTIONS[0])[2].partition(_ANSWERS[0])[0]
            return _decide(last, middle, asked, vocabulary(tokenizer))
    return Stops()


def _decide(last: str, middle: str, asked: str, known: Vocabulary) -> Stops:
    for pattern in (known.any_special, known.any_added):
        after_last, after_middle = _controls(pattern, last, known), _controls(pattern, middle, known)
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(after_last, after_middle, strict=False))]
        if shared:
            # Some templates write more marks than one (Cohere: end of the response, end of the turn), and some open the next turn
            # even after the last answer; the mark that also ends a user turn is the one that ends turns.
            user_end = _controls(pattern, asked, known)[:1]
            likely = [word for word in shared if word == known.eos] or [word for word in shared if word in user_end]
            return Stops(token=likely[0] if likely else shared[-1] if shared == after_last else shared[0])
        if after_last:
            return Stops(token=after_last[0])
        if after_middle and middle.startswith(last):
            end = middle.index(after_middle[0]) + len(after_middle[0])
            return Stops(token=after_middle[0], append=middle[len(last) : end])
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, middle, strict=False)))
    return Stops(mark=(common.strip() and common.rstrip()) or (last.strip() and last.rstrip()))


def _controls(pattern: re.Pattern[str], text: str, known: Vocabulary) -> list[str]:
    # A BOS before the next turn (llama2) opens that turn; it does not end this one.
    return [word for word in pattern.findall(text) if word != known.bos or word == known.eos]


def end_in(tail: str, stops: Stops, known: Vocabulary, *, call: bool) -> tuple[int, str] | None:
    """Where in `tail` (the template's text after a turn's words) the turn ends, and by which token; None: there is no end mark.

    A turn with a tool call may end otherwise than a plain one (Llama 3.1 <|eom_id|>, gpt-oss <|call|>): by its last special token.
    """
    if stops.token and not stops.append:
        at = tail.find(stops.token)
        if at >= 0:
            return at + len(stops.token), stops.token
    words = [m for m in known.any_special.finditer(tail) if m.group() != known.bos or m.group() == known.eos]
    if words:
        chosen = words[-1] if call else words[0]
        return chosen.end(), chosen.group()
    return None


def stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a turn in generation: the template's end marks for answers and for tool calls, and EOS."""
    known = vocabulary(tokenizer)
    found = []
    if template.text is not None:
        stops = find_stops(template, tokenizer)
        found = [stops.token, *_call_stops(template, tokenizer, stops, known)]
    ids = [known.added[token] for token in found if token in known.added]
    if known.eos_id is not None:
        ids.append(known.eos_id)
    return tuple(dict.fromkeys(ids))


def _call_stops(template: ChatTemplate, tokenizer: Tokenizer, stops: Stops, known: Vocabulary) -> list[str]:
    call = {"type": "function", "id": "qz1call00", "function": {"name": "qz1name", "arguments": {"qz1key": "qz1value"}}}
    tool = {"type": "function", "function": {"name": "qz1name", "description": "", "parameters": {"type": "object", "properties": {}}}}
    rows: list[dict[str, Any]] = [
        {"role": "user", "content": _QUESTIONS[0]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = apply_rows(template, tokenizer, rows, [tool])
    except TemplateError:
        return []
    tail = text.rpartition("qz1value")[2]
    if tail == text or not tail:
        return []
    end = end_in(tail, stops, known, call=True)
    if end is not None:
        return [end[1]]
    follow = call_follow(template, tokenizer, rows, [tool], text, known)
    return [follow[1]] if follow else []


def call_follow(
    template: ChatTemplate, tokenizer: Tokenizer, rows: list[dict[str, Any]], tools: Any, text: str, known: Vocabulary
) -> tuple[str, str] | None:
    """What a tool's answer puts after `text` (a rendering that ends in a call) up to its first special token, and that token."""
    call = rows[-1]["tool_calls"][-1]
    answer = {"role": "tool", "content": "qz9resultzq", "name": call["function"]["name"], "tool_call_id": call.get("id", "qz1call00")}
    try:
        longer = apply_rows(template, tokenizer, [*rows, answer], tools)
    except TemplateError:
        return None
    if not longer.startswith(text):
        return None
    rest = longer[len(text) :].partition("qz9resultzq")[0]
    word = known.any_special.search(rest) or known.any_added.search(rest)
    return (rest[: word.end()], word.group()) if word else None
