"""Text that grows: certain pieces, stops across token borders, and the text that ids add to a prompt's."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from engines import TOKENIZER, ids_of
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tunesmith.infer.text import Growing, continuation
from tunesmith.model.tokenizer import load_tokenizer


def spelled(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer as those of SentencePiece: a blank in front of words is part of the token, and is dropped at the very beginning."""
    inner = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token=pieces[0], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


PIECES = ["<unk>", "▁Hello", "▁world", "!", "<0xE6>", "<0x97>", "<0xA5>", "▁", "s", "<0x41>"]
LLAMA = spelled(PIECES)


def grow(tokenizer, prompt: Sequence[int], ids: Sequence[int], **options) -> tuple[list[str], str, bool]:
    """Pieces, text, and whether a stop came."""
    growing = Growing(tokenizer, prompt, **options)
    pieces = []
    for token in ids:
        if growing.add(token):
            return [*pieces, growing.ready(end=True)], growing.text, True
        pieces.append(growing.ready())
    return [*pieces, growing.ready(end=True)], growing.text, False


def test_a_leading_blank_is_part_of_what_follows_a_prompt() -> None:
    assert continuation(LLAMA, [1], [2, 3]) == " world!"
    assert continuation(LLAMA, [], [2, 3]) == "world!"
    assert continuation(LLAMA, [1], []) == ""
    assert continuation(LLAMA, [1, 2], [8]) == "s"
    pieces, text, _ = grow(LLAMA, [1], [2, 3, 2])
    assert (pieces, text) == ([" world", "!", " world", ""], " world! world")


def test_windows_do_not_lose_blanks() -> None:
    ids = [2, 1, 3, 2, 2, 8, 7, 7, 2, 1] * 5
    pieces, text, _ = grow(LLAMA, [1], ids)
    assert text == "".join(pieces) == continuation(LLAMA, [1], ids) == (" world Hello! world worlds   world Hello" * 5)


def test_bytes_of_a_character_that_are_tokens_of_their_own() -> None:
    pieces, text, _ = grow(LLAMA, [1], [4, 5, 6, 3])
    assert (pieces, text) == (["", "", "日", "!", ""], "日!")
    pieces, text, _ = grow(LLAMA, [1], [4, 5, 3])
    assert pieces[:2] == ["", ""]
    assert "".join(pieces) == text
    assert text.endswith("!")


def test_half_a_character_at_the_windows_end_waits() -> None:
    words = "aaaaaaaa日aaaaaaa🎉aaaaaaa語aaaaaaaaaé" * 3
    pieces, text, _ = grow(TOKENIZER, [70], ids_of(words))
    assert "".join(pieces) == text == words
    assert "\ufffd" not in "".join(pieces)
    assert max(map(len, pieces)) == 1


def test_a_prompt_that_ends_within_a_character() -> None:
    first, *rest = ids_of("日")
    for ids in (rest, [*rest, *ids_of("abcdefghijkl")], ids_of("abc")):
        pieces, text, _ = grow(TOKENIZER, [first], ids)
        assert "".join(pieces) == text == continuation(TOKENIZER, [first], ids)


@pytest.mark.parametrize("stop", ["END", "E", "a-END", "ENDED"])
def test_a_stop_ends_the_text_wherever_it_comes(stop: str) -> None:
    for before in range(0, 30):
        words = "x" * before + "a-ENDED of it"
        pieces, text, stopped = grow(TOKENIZER, [70], ids_of(words), stops=(stop,))
        assert stopped
        assert "".join(pieces) == text == words.partition(stop)[0]


def test_what_may_begin_a_stop_waits_and_is_given_when_it_does_not() -> None:
    pieces, text, stopped = grow(TOKENIZER, [70], ids_of("aaabaaac"), stops=("aaac", "zz"))
    assert (pieces, text, stopped) == (["", "", "", "aaab", "", "", "", ""], "aaab", True)
    pieces, text, stopped = grow(TOKENIZER, [70], ids_of("aab"), stops=("aaac",))
    assert (pieces, text, stopped) == (["", "", "aab", ""], "aab", False)
    pieces, text, stopped = grow(TOKENIZER, [70], ids_of("xaa"), stops=("aaac",))
    assert (pieces, text, stopped) == (["x", "", "", "aa"], "xaa", False)


def test_a_token_that_holds_more_than_the_stop() -> None:
    pieces, text, stopped = grow(LLAMA, [1], [2, 1, 2], stops=("o H",))
    assert not stopped
    assert "".join(pieces) == text == " world Hello world"
    pieces, text, stopped = grow(LLAMA, [1], [2, 1, 2], stops=("d He", "ello"))
    assert (pieces, text, stopped) == ([" worl", ""], " worl", True)


def test_the_first_of_several_stops_wins() -> None:
    pieces, text, stopped = grow(LLAMA, [1], [2, 1], stops=("llo", "He"))
    assert (text, stopped) == (" world ", True)
    assert "".join(pieces) == text


@pytest.mark.parametrize("lead", [" ", "\n", "\n\n", "  \n"])
def test_a_lead_is_left_out_once(lead: str) -> None:
    for words in ("word", lead + "word", lead + lead + "word", lead[:1] + "word", lead, lead[:1], ""):
        pieces, text, _ = grow(TOKENIZER, [70], ids_of(words), lead=lead)
        assert "".join(pieces) == text == words.removeprefix(lead), words


@pytest.mark.parametrize("which", ["pocket", "bytes"])
def test_random_tokens_add_up_with_random_stops(which: str) -> None:
    tokenizer = load_tokenizer("pocket") if which == "pocket" else TOKENIZER
    size = len(tokenizer)
    rng = random.Random(3)
    for _ in range(60):
        prompt, ids = [rng.randrange(size)], [rng.randrange(size) for _ in range(rng.randrange(40))]
        whole = continuation(tokenizer, prompt, ids)
        at = rng.randrange(len(whole) + 1)
        stops = tuple(stop for stop in (whole[at : at + 2], whole[at + 3 : at + 6]) if stop and "\ufffd" not in stop)
        pieces, text, stopped = grow(tokenizer, prompt, ids, stops=stops)
        given = "".join(pieces)
        assert given == text
        assert stopped == any(stop in whole for stop in stops)
        if stopped:
            assert text == whole[: min(whole.find(stop) for stop in stops if stop in whole)]
        else:
            assert text == whole
