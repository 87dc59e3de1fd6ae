"""No policy cuts an answer, and none loses or repeats a trained token."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.core.types import Dialog, Message, Text, Tokens
from tunesmith.data.overlong import cut_prompt, split_dialog, split_text, surely_over

BOS = 99


def row(context, answer, bos=True):
    ids = np.r_[[BOS] if bos else [], np.arange(context), 50 + np.arange(answer)].astype(np.int32)
    train = np.r_[[0] * (bos + context), [1] * answer].astype(np.float32)
    return Tokens(ids, train, "k", "g", "r", {"s": ids.astype(np.float32)})


def test_the_prompt_is_cut_on_the_left_behind_bos():
    cut = cut_prompt(row(10, 3), 8, BOS)
    assert cut.ids.tolist() == [BOS, 6, 7, 8, 9, 50, 51, 52]
    assert cut.train.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert cut.streams["s"].tolist() == cut.ids.tolist()
    assert (cut.key, cut.group, cut.role) == ("k", "g", "r")


def test_without_bos_nothing_is_kept_in_front():
    assert cut_prompt(row(10, 3, bos=False), 5, BOS).ids.tolist() == [8, 9, 50, 51, 52]
    assert cut_prompt(row(10, 3, bos=False), 5, None).ids.tolist() == [8, 9, 50, 51, 52]


@pytest.mark.parametrize(("limit", "fits"), [(14, True), (5, True), (4, True), (3, False)])
def test_the_answer_is_never_cut_and_its_first_token_keeps_a_context(limit, fits):
    cut = cut_prompt(row(10, 3), limit, BOS)
    assert (cut is not None) == fits
    if cut is not None:
        assert len(cut) <= limit
        assert cut.ids[cut.train != 0].tolist() == [50, 51, 52]
        assert cut.train[0] == 0


def test_context_between_two_answers_is_not_cut_out():
    tokens = row(10, 3)
    tokens.train[3] = 1
    assert cut_prompt(tokens, 12, BOS).ids.tolist() == [BOS, *range(2, 10), 50, 51, 52]
    assert cut_prompt(tokens, 8, BOS) is None


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 100])
def test_split_text_trains_every_token_exactly_once(bos, length):
    ids = np.r_[[BOS] if bos else [], np.arange(length)].astype(np.int32)
    train = np.ones(len(ids), dtype=np.float32)
    train[0] = 0
    pieces = split_text(Tokens(ids, train, "k"), 8, BOS)
    assert all(len(piece) <= 8 for piece in pieces)
    learned = np.concatenate([piece.ids[piece.train != 0] for piece in pieces])
    assert learned.tolist() == ids[1:].tolist()
    for piece in pieces[1:]:
        assert piece.train[0] == 0
        first = int(np.flatnonzero(piece.train)[0])
        # What stands before the first target is the very token that stood before it in the text.
        assert piece.ids[first - 1] == piece.ids[first] - 1
        assert (piece.ids[0] == BOS) == bos
    assert [piece.key for piece in pieces] == (["k"] if len(ids) <= 8 else [f"k#{n + 1}" for n in range(len(pieces))])


def test_the_row_itself_is_not_changed():
    tokens = row(10, 3)
    before = tokens.train.copy()
    cut_prompt(tokens, 8, BOS)
    split_text(tokens, 8, BOS)
    np.testing.assert_array_equal(tokens.train, before)


def dialog(*roles):
    return Dialog(tuple(Message(role, f"{role}{place}") for place, role in enumerate(roles)), "k")


def test_dialogs_are_split_at_user_turns_with_the_system_in_front():
    whole = dialog("system", "user", "assistant", "user", "user", "assistant", "tool", "assistant", "user", "assistant")
    pieces = list(split_dialog(whole, lambda shorter: len(shorter.messages) <= 5))
    assert [[m.content for m in piece.messages] for piece in pieces] == [
        ["system0", "user1", "assistant2"],
        ["system0", "user3", "user4", "assistant5", "tool6", "assistant7"],
        ["system0", "user8", "assistant9"],
    ]
    assert [piece.key for piece in pieces] == ["k#1", "k#2", "k#3"]
    (together,) = split_dialog(whole, lambda _: True)
    assert together.messages == whole.messages


def test_a_later_system_turn_goes_with_the_exchange_behind_it():
    whole = dialog("user", "assistant", "system", "user", "assistant")
    pieces = list(split_dialog(whole, lambda _: False))
    assert [[m.content for m in piece.messages] for piece in pieces] == [["user0", "assistant1"], ["system2", "user3", "assistant4"]]


def test_surely_over():
    assert surely_over(Text("a" * 101, "k"), 10, 10)
    assert not surely_over(Text("a" * 100, "k"), 10, 10)
    assert surely_over(Dialog((Message("user", "a" * 60), Message("assistant", "b", thinking="c" * 60)), "k"), 10, 10)
