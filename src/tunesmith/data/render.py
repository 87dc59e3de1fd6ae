"""From text to tokens with their training weights: the one place where it is decided which tokens are learned.

The trained tokens of a turn are exactly what the model must generate behind its prompt, up to and including the one stop
token. Prompt tokens are the tokens of the prompt text alone, as inference will see them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tunesmith.core.errors import BugError, DataError, TemplateError, TunesmithError
from tunesmith.core.types import Dialog, Message, Text, Tokens
from tunesmith.data.stops import stop_ids
from tunesmith.data.template import NAMED, ChatTemplate, apply
from tunesmith.data.tokenizer import (
    Asking,
    Encoded,
    Tokenizer,
    Vocabulary,
    continuation,
    encode,
    prefix_length,
    together,
    token_texts,
    vocabulary,
)
from tunesmith.data.views import Chat, Span, View, find_span, find_views

Floats: TypeAlias = npt.NDArray[np.float32]

__all__ = ["Rendered", "render", "render_many", "render_prompt", "stop_ids"]


@dataclass(frozen=True)
class Rendered:
    """One text to train on.

    `tokens`; `text`; `by_role`: role -> (trained, untrained) tokens; `notes`: stable codes of what is worth knowing
    ("boundary_retokenised", "prompt_tail_differs", "history_rewritten", "thinking_dropped", "answer_rewritten", "header_trained",
    "stop_appended", "stop_is_text", "control_token_in_prompt", "control_token_in_answer", "ROLE_text_changed", "tools_dropped");
    `ends`: where in `text` each token ends.
    """

    tokens: Tokens
    text: str
    by_role: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()
    ends: Sequence[int] = field(default=(), repr=False)

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """The text cut at the token borders, one piece per id; of the tokens of one character the first has it, the others ''."""
        pieces, position = [], 0
        for end in self.ends:
            pieces.append(self.text[position:end])
            position = max(position, end)
        if pieces and position < len(self.text):
            pieces[-1] += self.text[position:]
        return tuple(pieces)


def render(
    example: Dialog | Text, template: ChatTemplate, tokenizer: Tokenizer, *, turns: Literal["all", "last"] = "all"
) -> list[Rendered]:
    """The tokens of one example with their training weights; several when the template shows earlier turns otherwise than it asks for them.

    Raises TemplateError (codes in `views`, `spans`, `template`) and DataError ("nothing_trained", "control_token_in_answer").
    """
    (found,) = render_many([example], template, tokenizer, turns=turns)
    if isinstance(found, TunesmithError):
        raise found
    return found


def render_many(
    examples: Sequence[Dialog | Text], template: ChatTemplate, tokenizer: Tokenizer, *, turns: Literal["all", "last"] = "all"
) -> list[list[Rendered] | DataError | TemplateError]:
    """`render` of every example, with the error in the place of one that cannot be rendered; the texts of all are encoded together."""
    return together(tokenizer, [_render(example, template, tokenizer, turns) for example in examples])


def _render(example: Dialog | Text, template: ChatTemplate, tokenizer: Tokenizer, turns: Literal["all", "last"]) -> Asking[list[Rendered]]:
    if isinstance(example, Text):
        return [(yield from _text(example, tokenizer))]
    if template.text is None:
        return [(yield from _plain(example, tokenizer))]
    chat = Chat(example, template, tokenizer)
    done: list[Rendered] = []
    for view in find_views(chat, turns):
        done += yield from _tokens_of(chat, view)
    return done


def render_prompt(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: ChatTemplate, tokenizer: Tokenizer
) -> list[int]:
    """The ids at which generation starts: the very ids that training puts before the answer."""
    if template.text is None:
        known = vocabulary(tokenizer)
        return [*known.leading, *encode(tokenizer, _plain_prompt(messages, tools, "prompt")).ids]
    return encode(tokenizer, apply(template, tokenizer, messages, tools, generation_prompt=True)).ids


def _tokens_of(chat: Chat, view: View) -> Asking[list[Rendered]]:
    """The view as tokens; a turn whose border a token straddles goes into a view of its own, tokenised as inference will."""
    whole = yield view.text
    fitting: list[tuple[Span, int]] = []
    straddled: list[Span] = []
    for span in view.spans:
        begin = yield from prefix_length(chat.tokenizer, view.text, whole, span.start)
        # A stop token is never part of another; an end mark in ordinary text may be.
        if begin is None or not (span.stop or span.end in whole.ends):
            straddled.append(span)
        else:
            fitting.append((span, begin))
    done = []
    if fitting:
        done.append(_build(chat, view, whole, fitting, view.notes))
    for span in straddled:
        alone = span if len(view.spans) == 1 or span.turn == view.count - 1 else _own_span(chat, span)
        prompt = yield alone.text[: alone.start]
        parts = prompt + continuation(chat.tokenizer, prompt.ids, alone.text[alone.start :])
        own = View(alone.text, span.turn + 1, (alone,))
        done.append(_build(chat, own, parts, [(alone, len(prompt.ids))], (*view.notes, "boundary_retokenised")))
    return done


def _own_span(chat: Chat, span: Span) -> Span:
    return find_span(chat, span.turn, chat.words(span.turn + 1).words.get(span.turn))


def _build(chat: Chat, view: View, encoded: Encoded, spans: list[tuple[Span, int]], notes: Sequence[str]) -> Rendered:
    known = vocabulary(chat.tokenizer)
    train = np.zeros(len(encoded.ids), dtype=np.float32)
    found = [*notes]
    for span, begin in spans:
        stop = bisect_left(encoded.ends, span.end)
        _check_stop(encoded, begin, stop, span, known, chat.key)
        train[begin : stop + 1] = span.weight
        found += span.notes
    train[:1] = 0  # nothing predicts the first token
    found += _doubts(chat, view, known)
    tokens = Tokens(np.asarray(encoded.ids, dtype=np.int32), train, chat.key)
    by_role = _by_role(chat, view, encoded, train)
    return Rendered(tokens, view.text, by_role, tuple(dict.fromkeys(found)), encoded.ends)


def _check_stop(encoded: Encoded, begin: int, stop: int, span: Span, known: Vocabulary, key: str) -> None:
    """The last trained id is the stop token, and it stands exactly once in what is trained."""
    if stop < begin or stop >= len(encoded.ids):
        raise BugError(f"turn {span.turn} ends before it begins (tokens {begin}..{stop})", where=key, code="empty_span")
    if not span.stop:
        return
    stop_id = known.added[span.stop]
    trained = encoded.ids[begin : stop + 1]
    if trained.count(stop_id) > 1:
        raise DataError(
            f"the words of assistant turn {span.turn} contain the stop token {span.stop}, which would teach the model to stop there",
            where=key,
            remedy=f"remove {span.stop} from the row; the template writes it",
            code="control_token_in_answer",
        )
    if trained[-1] != stop_id:
        raise BugError(f"turn {span.turn} ends with id {trained[-1]}, not with {span.stop}", where=key, code="no_stop_at_end")


def _doubts(chat: Chat, view: View, known: Vocabulary) -> list[str]:
    """What the template does to the words of others, and control tokens that a row brings along."""
    notes = []
    for message in chat.messages[: view.count]:
        if known.any_special.search(message.content):
            notes.append("control_token_in_answer" if message.role == "assistant" else "control_token_in_prompt")
        if message.role != "assistant" and message.content.strip() not in view.text:
            notes.append(f"{message.role}_text_changed")
    for tool in chat.tools:
        function = tool.get("function", tool)
        if str(function.get("name", "")) not in view.text:
            notes.append("tools_dropped")
    return notes


def _by_role(chat: Chat, view: View, encoded: Encoded, train: Floats) -> dict[str, tuple[int, int]]:
    """Tokens by role, trained and not. A turn's header counts for the turn, the template's preamble for the first one."""
    spans, words = {span.turn: span for span in view.spans}, chat.words(view.count).words
    ends = [0] * view.count
    upper = len(view.text)
    # From the back, so that a short content is not found in the preamble.
    for turn in range(view.count - 1, -1, -1):
        if turn in spans:
            ends[turn], upper = spans[turn].end, spans[turn].start
        elif turn in words:
            ends[turn], upper = words[turn].end, words[turn].start
        else:
            core = chat.messages[turn].content.strip()
            at = view.text.rfind(core, 0, upper) if core else -1
            ends[turn], upper = (at + len(core), at) if at >= 0 else (upper, upper)
    ends[-1] = len(view.text)
    counts: dict[str, tuple[int, int]] = {}
    begin = 0
    for end, message in zip(ends, chat.messages, strict=False):
        stop = max(begin, bisect_right(encoded.ends, end)) if end < len(view.text) else len(encoded.ids)
        learned = int(np.count_nonzero(train[begin:stop]))
        old = counts.get(message.role, (0, 0))
        counts[message.role] = (old[0] + learned, old[1] + stop - begin - learned)
        begin = stop
    return counts


def _plain_prompt(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], where: str) -> str:
    roles = [message.role for message in messages]
    if tools or roles not in (["user"], ["system", "user"]):
        before = (" ".join(roles) or "no turn") + (" and tools" if tools else "")
        raise TemplateError(
            f"template 'none' has no way to write roles, and this row has {before} before the answer",
            where=where,
            remedy=f"name a template ({', '.join(NAMED)}); 'none' takes one user turn, after at most one system turn",
            code="needs_template",
        )
    return "\n\n".join(message.content for message in messages if message.role == "user" or message.content)


def _plain(dialog: Dialog, tokenizer: Tokenizer) -> Asking[Rendered]:
    """Prompt and completion as they stand: the tokenizer's own BOS, the prompt, the completion, EOS."""
    known = vocabulary(tokenizer)
    answer = dialog.messages[-1] if dialog.messages else None
    context = _plain_prompt(dialog.messages[:-1], dialog.tools, dialog.key)
    if answer is None or answer.role != "assistant" or answer.tool_calls or answer.thinking:
        raise TemplateError(
            "template 'none' takes one plain answer, with neither tool calls nor a thinking part",
            where=dialog.key,
            remedy=f"name a template ({', '.join(NAMED)})",
            code="needs_template",
        )
    if answer.weight == 0 or not answer.content.strip():
        raise DataError(
            "the row trains nothing: its answer is empty or has weight 0", where=dialog.key, remedy="remove the row", code="nothing_trained"
        )
    words = context + answer.content
    encoded = yield words
    notes = []
    begin = yield from prefix_length(tokenizer, words, encoded, len(context))
    if begin is None:
        prompt = yield context
        encoded, begin = prompt + continuation(tokenizer, prompt.ids, answer.content), len(prompt.ids)
        notes.append("boundary_retokenised")
    for name, text in (("control_token_in_prompt", context), ("control_token_in_answer", answer.content)):
        if known.any_special.search(text):
            notes.append(name)
    if known.eos_id is not None and known.eos_id in encoded.ids[begin:]:
        raise DataError(
            f"the answer contains the stop token {known.eos}, which would teach the model to stop there",
            where=dialog.key,
            remedy=f"remove {known.eos} from the row; it is added at the end",
            code="control_token_in_answer",
        )
    return _framed(dialog.key, words, encoded, begin, answer.weight, notes, tokenizer)


def _text(example: Text, tokenizer: Tokenizer) -> Asking[Rendered]:
    """Running text: every token is learned, and the EOS token that closes it."""
    known = vocabulary(tokenizer)
    if not example.text.strip():
        raise DataError("the text is empty", where=example.key, remedy="remove the row", code="nothing_trained")
    notes = ["control_token_in_answer"] if known.any_special.search(example.text) else []
    rendered = _framed(example.key, example.text, (yield example.text), 0, 1.0, notes, tokenizer)
    return replace(rendered, by_role={"text": (int(np.count_nonzero(rendered.tokens.train)), int(np.sum(rendered.tokens.train == 0)))})


def _framed(key: str, words: str, encoded: Encoded, begin: int, weight: float, notes: list[str], tokenizer: Tokenizer) -> Rendered:
    """Plain text between the tokenizer's own BOS and one EOS; trained from token `begin` on."""
    known = vocabulary(tokenizer)
    if known.eos_id is None or known.eos is None:
        raise TemplateError(
            "the tokenizer has no EOS token, so a text cannot be ended", where=key, remedy="give the tokenizer an eos_token", code="no_stop"
        )
    front = token_texts(tokenizer, known.leading)
    lead = Encoded(list(known.leading), [0] * len(front), [sum(map(len, front[: k + 1])) for k in range(len(front))])
    whole, text = lead + encoded, "".join(front) + words
    if not encoded.ids or encoded.ids[-1] != known.eos_id:
        end = len(text) + len(known.eos)
        whole, text = Encoded([*whole.ids, known.eos_id], [*whole.starts, len(text)], [*whole.ends, end]), text + known.eos
    train = np.zeros(len(whole.ids), dtype=np.float32)
    train[len(front) + begin :] = weight
    train[:1] = 0
    tokens = Tokens(np.asarray(whole.ids, dtype=np.int32), train, key)
    learned = int(np.count_nonzero(tokens.train))
    by_role = {"user": (0, len(front) + begin), "assistant": (learned, len(whole.ids) - len(front) - begin - learned)}
    return Rendered(tokens, text, by_role, tuple(notes), whole.ends)
