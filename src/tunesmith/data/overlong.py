"""What becomes of rows over the length limit: left out, cut on the left, or split; never cut in an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tunesmith.core.types import Dialog, Message, Text, Tokens


def cut_prompt(tokens: Tokens, limit: int, bos: int | None) -> Tokens | None:
    """The row with context cut away on the left until it has `limit` tokens; None when the answers alone are too long.

    Everything from the first trained token on stays; so does a leading BOS. At least one token of context stays, since the
    first trained token has to be predicted from something.
    """
    cut = cut_front([tokens], int(np.flatnonzero(tokens.train)[0]), limit, bos)
    return None if cut is None else cut[0]


def cut_front(rows: Sequence[Tokens], first: int, limit: int, bos: int | None) -> list[Tokens] | None:
    """The rows, alike before token `first`, with the same context cut away in all until the longest has `limit` tokens.

    None when that would take more than the context (see `cut_prompt`).
    """
    excess = max(len(tokens) for tokens in rows) - limit
    if excess <= 0:
        return list(rows)
    head = 1 if bos is not None and rows[0].ids[0] == bos else 0
    if excess > first - max(head, 1):
        return None
    return [_part(tokens, np.r_[0:head, head + excess : len(tokens)], tokens.key) for tokens in rows]


def split_text(tokens: Tokens, limit: int, bos: int | None) -> list[Tokens]:
    """Running text in pieces of at most `limit` tokens, keyed `key#1`, `key#2`, ...

    Each piece begins with the last token of the one before it (after BOS, when the text begins with one) as context, so every
    trained token is trained exactly once; what is lost is the context before the cut.
    """
    total = len(tokens)
    if total <= limit:
        return [tokens]
    head = 1 if bos is not None and tokens.ids[0] == bos else 0
    pieces: list[Tokens] = []
    start = 0
    while start < total:
        lead = np.arange(0) if start == 0 else np.r_[0:head, start - 1 : start]
        stop = min(total, start + limit - len(lead))
        piece = _part(tokens, np.r_[lead, start:stop].astype(np.int64), f"{tokens.key}#{len(pieces) + 1}")
        piece.train[: max(len(lead), 1)] = 0
        if piece.train.any():
            pieces.append(piece)
        start = stop
    return pieces


def split_dialog(dialog: Dialog, fits: Callable[[Dialog], bool]) -> Iterator[Dialog]:
    """Shorter dialogs of consecutive exchanges, each with the system turns in front, each as long as `fits` allows.

    An exchange runs from a user turn (or a later system turn before it) to the end of the answer, tool calls included. One
    that does not fit even alone is yielded as it is; the caller drops it. Keys are `key#1`, `key#2`, ...
    """
    system, exchanges = _parted(dialog)
    start, number = 0, 0
    while start < len(exchanges):
        stop = start + 1
        while stop < len(exchanges) and fits(_dialog(dialog, system, exchanges[start : stop + 1], number + 1)):
            stop += 1
        number += 1
        yield _dialog(dialog, system, exchanges[start:stop], number)
        start = stop


def last_part(dialog: Dialog, fits: Callable[[Dialog], bool]) -> Dialog:
    """The end of a dialog with as many earlier exchanges as `fits` allows, for when only the last answer is trained.

    Key `key#1`. The last exchange is given even when it does not fit alone.
    """
    system, exchanges = _parted(dialog)
    for start in range(1, len(exchanges)):
        shorter = _dialog(dialog, system, exchanges[start:], 1)
        if fits(shorter):
            return shorter
    return _dialog(dialog, system, exchanges[-1:], 1)


def _parted(dialog: Dialog) -> tuple[tuple[Message, ...], list[list[Message]]]:
    turns = dialog.messages
    spoken = next((place for place, message in enumerate(turns) if message.role not in ("system", "developer")), len(turns))
    return turns[:spoken], _exchanges(turns[spoken:])


def _exchanges(turns: tuple[Message, ...]) -> list[list[Message]]:
    out: list[list[Message]] = []
    asked = False
    for message in turns:
        asks = message.role not in ("assistant", "tool")
        if not out or (asks and not asked):
            out.append([])
        out[-1].append(message)
        asked = asks
    return out


def _dialog(whole: Dialog, system: tuple[Message, ...], exchanges: list[list[Message]], number: int) -> Dialog:
    return Dialog((*system, *(message for exchange in exchanges for message in exchange)), f"{whole.key}#{number}", whole.tools)


def surely_over(example: Dialog | Text, limit: int, longest_piece: int) -> bool:
    """Is the text so long that tokens of the longest kind could not hold it in `limit`? Spares tokenising megabytes in vain."""
    if isinstance(example, Text):
        size = len(example.text)
    else:
        size = sum(len(message.content) + len(message.thinking or "") for message in example.messages)
    return size > limit * longest_piece


def _part(tokens: Tokens, keep: np.ndarray[tuple[int], np.dtype[np.int64]], key: str) -> Tokens:
    train = tokens.train[keep].copy()
    train[0] = 0
    streams = {name: values[keep].copy() for name, values in tokens.streams.items()}
    return Tokens(tokens.ids[keep].copy(), train, key, tokens.group, tokens.role, streams)
