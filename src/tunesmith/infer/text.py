"""The text of an answer while it grows: pieces that never change again, and texts that end it wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"  # what decoding gives for the first bytes of a character whose last ones have not come yet
_WORDS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def continuation(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text that the answer's ids add to the prompt's: decoded after the prompt's last token, so that no leading blank is lost."""
    if not answer:
        return ""
    before = str(tokenizer.decode(list(prompt[-1:]), **_WORDS))
    both = str(tokenizer.decode([*prompt[-1:], *answer], **_WORDS))
    return both[len(before) :] if both.startswith(before) else str(tokenizer.decode(list(answer), **_WORDS))


class Growing:
    """The text of one answer, token by token; `stops` end it, `lead` in front of it is left out.

    `text` is all of it so far; `ready()` gives the part that is certain and has not been given yet: not half a character, nor what may be
    the beginning of a stop.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], *, stops: Sequence[str] = (), lead: str = "") -> None:
        self._tokenizer, self._stops, self._lead = tokenizer, tuple(stops), lead
        self._last = list(prompt[-1:])
        self._ids: list[int] = []
        self._kept = ""  # text of the ids before _start
        self._start = 0  # the window that is decoded anew begins here
        self._open = ""  # text of the window
        self._given = 0

    @property
    def text(self) -> str:
        """The whole text so far, without the lead."""
        return (self._kept + self._open).removeprefix(self._lead)

    def add(self, token: int) -> bool:
        """Take one more token; True when a stop has come, which is then cut off together with all that follows it."""
        self._ids.append(token)
        window = self._ids[self._start :]
        # Decoded behind the token before the window: some tokenizers drop a blank in front of the first one.
        before = self._last if self._start == 0 else self._ids[self._start - 1 : self._start]
        self._open = continuation(self._tokenizer, before, window)
        if len(window) > 8 and not self._open.endswith(_BROKEN):
            self._kept, self._open, self._start = self._kept + self._open, "", len(self._ids)
        if not self._stops:
            return False
        whole = self._kept + self._open
        since = max(0, self._given)
        found = [place for place in (whole.find(stop, since) for stop in self._stops) if place >= 0]
        if not found:
            return False
        self._kept, self._open, self._start = whole[: min(found)], "", len(self._ids)
        return True

    def ready(self, *, end: bool = False) -> str:
        """The next piece of text; at the end all that is left."""
        whole = self._kept + self._open
        if self._given == 0 and self._lead:
            if not end and self._lead.startswith(whole):
                return ""
            if whole.startswith(self._lead):
                self._given = len(self._lead)
        stop = len(whole)
        if not end:
            while stop > 0 and whole[stop - 1] == _BROKEN:
                stop -= 1
            stop -= max((_overlap(whole[:stop], text) for text in self._stops), default=0)
        piece = whole[self._given : max(stop, self._given)]
        self._given += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
