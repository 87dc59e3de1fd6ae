"""What rendering needs to know of a tokenizer: its added tokens, its habits, and token borders in characters.

`tokenizer` is everywhere a fast tokenizer of transformers.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from tunesmith.core.errors import DataError, TemplateError
from tunesmith.core.types import content_hash

Tokenizer: TypeAlias = Any

_REMEMBERED = 4096


@dataclass(frozen=True)
class Encoded:
    """One tokenisation: ids, and the characters starts[k]..ends[k]-1 that ids[k] stands for (shared by the parts of one character)."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def __add__(self, other: Encoded) -> Encoded:
        shift = self.ends[-1] if self.ends else 0
        return Encoded(self.ids + other.ids, self.starts + [s + shift for s in other.starts], self.ends + [e + shift for e in other.ends])


# A piece of work that yields a text, is sent its tokens, and goes on; run by `together`.
Answer = TypeVar("Answer")
Asking: TypeAlias = Generator[str, Encoded, Answer]


@dataclass(frozen=True)
class Vocabulary:
    """The control side of a tokenizer: added tokens by text, which are special, BOS and EOS, and what it puts before plain text."""

    added: dict[str, int]
    special: dict[str, int]
    bos: str | None
    eos: str | None
    leading: tuple[int, ...]
    added_ids: frozenset[int]
    any_added: re.Pattern[str]
    any_special: re.Pattern[str]
    short: OrderedDict[str, list[int]] = field(default_factory=OrderedDict)

    @property
    def eos_id(self) -> int | None:
        """The id of the end-of-text token, if there is one."""
        return None if self.eos is None else self.special.get(self.eos)


_known: WeakKeyDictionary[Any, tuple[tuple[int, str | None, str | None], Vocabulary]] = WeakKeyDictionary()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The control side of a tokenizer, read once. Raises TemplateError when the tokenizer cannot give character offsets."""
    state = (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = (state, _read(tokenizer))
        _known[tokenizer] = known
    return known[1]


def _read(tokenizer: Tokenizer) -> Vocabulary:
    if not tokenizer.is_fast:
        raise TemplateError(
            "this tokenizer gives no character offsets, so trained tokens cannot be located",
            where=type(tokenizer).__name__,
            remedy="load a fast tokenizer (one with a tokenizer.json)",
            code="slow_tokenizer",
        )
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content}
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special and token.content}
    for text in (tokenizer.bos_token, tokenizer.eos_token):
        if text:
            special[text] = tokenizer.convert_tokens_to_ids(text)
    plain = tokenizer("a", return_special_tokens_mask=True, return_attention_mask=False)
    leading = []
    for index, is_special in zip(plain["input_ids"], plain["special_tokens_mask"], strict=True):
        if not is_special:
            break
        leading.append(index)
    return Vocabulary(
        added={**added, **special},
        special=special,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        leading=tuple(leading),
        added_ids=frozenset(added.values()) | frozenset(special.values()),
        any_added=_any({**added, **special}),
        any_special=_any(special),
    )


def _any(words: dict[str, int]) -> re.Pattern[str]:
    # The longest first, so that a token wins over one that it begins with; (?!) matches nothing.
    return re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) or "(?!)")


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    """The tokens of `text` as it stands: no BOS, no EOS, nothing cut."""
    return encode_many(tokenizer, [text])[0]


def encode_many(tokenizer: Tokenizer, texts: list[str]) -> list[Encoded]:
    """`encode` of every text, in one call: the tokenizer uses all cores for it and holds no lock of Python's."""
    backend = tokenizer.backend_tokenizer
    kind: Any = type(tokenizer)
    if _is_standard(kind) and _is_bare(backend):
        return [_encoded(found.ids, found.offsets) for found in backend.encode_batch(texts, add_special_tokens=False)]
    # A class with a way of its own, or a backend that somebody left with truncation or padding switched on: asked through its door.
    out = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [_encoded(list(ids), offsets) for ids, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)]


@cache
def _is_standard(kind: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in ("__call__", "_encode_plus"))


def _is_bare(backend: Any) -> bool:
    return backend.truncation is None and backend.padding is None and not backend.encode_special_tokens


def _encoded(ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    return Encoded(ids, list(map(itemgetter(0), offsets)), list(map(itemgetter(1), offsets)))


def together(tokenizer: Tokenizer, askers: Sequence[Asking[Answer]]) -> list[Answer | DataError | TemplateError]:
    """What each asker returns, or the error it ends in; the texts that all of them wait for are encoded in one call."""
    ends: dict[int, Answer | DataError | TemplateError] = {}
    answers: list[tuple[int, Encoded | None]] = [(place, None) for place in range(len(askers))]
    while answers:
        waiting: list[int] = []
        texts: list[str] = []
        for place, answer in answers:
            try:
                # The first `send` of a generator takes None.
                texts.append(askers[place].send(cast(Encoded, answer)))
                waiting.append(place)
            except StopIteration as stop:
                ends[place] = stop.value
            except (DataError, TemplateError) as error:
                ends[place] = error
        answers = list(zip(waiting, encode_many(tokenizer, texts), strict=True)) if texts else []
    return [ends[place] for place in range(len(askers))]


def prefix_length(tokenizer: Tokenizer, text: str, encoded: Encoded, border: int) -> Asking[int | None]:
    """How many of the tokens of `text` are the tokens of text[:border] alone; None when a token straddles the border.

    Added tokens cut a text before it is tokenised, so it is enough to compare from the last added token before the border on.
    """
    known = vocabulary(tokenizer)
    stop = bisect_right(encoded.ends, border)
    first = next((k for k in range(stop - 1, -1, -1) if encoded.ids[k] in known.added_ids), 0)
    alone = yield from _alone(known, text[encoded.starts[first] if first else 0 : border])
    return first + len(alone) if encoded.ids[first : first + len(alone)] == alone else None


def _alone(known: Vocabulary, text: str) -> Asking[list[int]]:
    # The same few headers stand before every answer; long pieces are the prompts themselves and do not come again.
    ids = known.short.get(text)
    if ids is None:
        ids = (yield text).ids
        if len(text) <= 80:
            known.short[text] = ids
            if len(known.short) > _REMEMBERED:
                known.short.popitem(last=False)
    return ids


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> Encoded:
    """The tokens of `text` as they follow `prompt` (ids), tokenised apart from it.

    Some tokenizers put a space before whatever they are given, so the text is tried alone and behind a few anchors, and
    the first way that decodes to the prompt and then exactly this text is taken. Raises TemplateError when there is none.
    """
    known = vocabulary(tokenizer)
    tail = list(prompt[-8:])
    before = _decode(tokenizer, tail)
    for anchor in ("", known.eos or "", "\n", "a"):
        lead = encode(tokenizer, anchor).ids if anchor else []
        whole = encode(tokenizer, anchor + text)
        if whole.ids[: len(lead)] != lead:
            continue
        ids = whole.ids[len(lead) :]
        if _decode(tokenizer, tail + ids) == before + text:
            cut, shift = len(lead), len(anchor)
            return Encoded(ids, [max(s - shift, 0) for s in whole.starts[cut:]], [max(e - shift, 0) for e in whole.ends[cut:]])
    raise TemplateError(
        f"the tokenizer cannot continue a prompt with {text[:40]!r}: every way decodes to something else",
        remedy="remove odd white space from the start of the answer, or choose another template",
        code="boundary",
    )


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The vocabulary's own writing of each id."""
    return [str(text) for text in tokenizer.convert_ids_to_tokens(list(ids))]


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its whole serialised state and its special tokens, wherever it was loaded from."""
    if tokenizer.is_fast:
        state: Any = tokenizer.backend_tokenizer.to_str()
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return content_hash([state, special])
