"""Pairs and ranked lists as tokens: what carries weight on which side, what is refused, cut and counted."""

from __future__ import annotations

import random

import numpy as np
import pytest
from judged_rows import LABELS, PAIR_ENDS, PAIRS, PAIRS_THROUGHOUT, STEPS, codes, pair, recipe, refusal, trained

from tunesmith.core.errors import RecipeError
from tunesmith.data.prepare import check_rows, prepare
from tunesmith.data.template import NAMED
from tunesmith.data.tokenizer import encode


def test_a_pair_is_two_rows_with_one_prompt(write, tokenizer):
    path = write("a.jsonl", [pair("hi", "hello", "no"), pair("bye", "see you", "what?")])
    done = prepare(recipe(path), tokenizer, PAIRS)
    rows = list(done.train)
    assert [row.role for row in rows] == ["chosen", "rejected"] * 2
    assert [row.group for row in rows] == [row.key for row in rows] == [f"{path}:1"] * 2 + [f"{path}:2"] * 2
    assert [trained(tokenizer, row) for row in rows] == ["hello<|im_end|>", "no<|im_end|>", "see you<|im_end|>", "what?<|im_end|>"]
    assert all(not row.streams for row in rows)
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        first = int(np.flatnonzero(one.train)[0])
        assert one.ids[:first].tolist() == other.ids[:first].tolist()
        assert not other.train[:first].any()
    (part,) = done.ledger.parts
    assert (part.read, part.used, part.rows, part.format) == (2, 2, 4, "preference")
    assert part.tokens == sum(map(len, rows))
    assert +part.trained == {"assistant": 6 + 3 + 8 + 6}
    assert done.train.groups().tolist() == [0, 2]
    assert [(prompt.truth, prompt.messages[-1].content) for prompt in done.prompts if prompt.key.endswith(":1")] == [("hello", "hi")]


def test_at_the_ends_the_last_token_of_the_conversation_is_read(write, tokenizer):
    path = write("a.jsonl", [pair("hi", "hello", "no", margin=2.5), pair("bye", "see", "what?")])
    done = prepare(recipe(path), tokenizer, PAIR_ENDS)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert done.train[0].ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    for row, margin in zip(done.train, (2.5, 2.5, 0.0, 0.0), strict=True):
        assert np.flatnonzero(row.train).tolist() == [len(row) - 1]
        assert row.train[-1] == 1
        assert row.streams["margin"].tolist() == [margin] * len(row)
    assert [row.role for row in done.train] == ["chosen", "rejected"] * 2
    (part,) = done.ledger.parts
    assert +part.trained == {"assistant": 4}
    assert [(reason.code, reason.count) for reason in part.reasons] == [("margin", 1)]


def test_throughout_every_token_of_the_answer_is_read_and_the_end_last(write, tokenizer):
    path = write("a.jsonl", [pair("hi", "hello", "no", margin=2.5)])
    answers, read = (prepare(recipe(path), tokenizer, wanted).train for wanted in (PAIRS, PAIRS_THROUGHOUT))
    for answer, row in zip(answers, read, strict=True):
        assert row.ids.tolist() == answer.ids.tolist()
        assert answer.train[-1] == 0, "the template writes something behind the answer, which is no target but where a head reads"
        assert row.train.tolist() == [*answer.train[:-1], 1.0]
        assert row.streams["margin"].tolist() == [2.5] * len(row)


MULTI = pair(
    [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}],
    [{"role": "assistant", "content": "g1"}, {"role": "user", "content": "more"}, {"role": "assistant", "content": "g2"}],
    [{"role": "assistant", "content": "b1"}],
)


def test_turns_says_which_turns_of_the_answer_are_trained_and_none_of_the_prompt(write, tokenizer):
    path = write("a.jsonl", [MULTI])
    both = prepare(recipe(path), tokenizer, PAIRS).train
    assert [trained(tokenizer, row) for row in both] == ["g1<|im_end|>g2<|im_end|>", "b1<|im_end|>"]
    # With the last turn alone the answers no longer begin behind the same prompt.
    assert codes(recipe(path, data={"turns": "last"}), tokenizer, PAIRS)[0] == ["prompt_differs", "no_rows"]


@pytest.mark.parametrize("template", ["auto", *NAMED])
def test_the_prompt_is_shared_under_every_template(write, pocket_tokenizer, template):
    pieces = ["yes", " yes", "\nno", "<b>x</b>", "4", "", "assistant", "é🙂", "a  b ", "'s", ":", "Because:\n1. it\n2. is"]
    draw = random.Random(0)
    rows = []
    for number in range(40):
        one, other = (("".join(draw.sample(pieces, 3)) or "x") for _ in range(2))
        rows.append(pair(f"question {number}" + draw.choice(["", "?", " "]), one, other + str(number)))
    path = write("a.jsonl", rows)
    done = prepare(recipe(path, data={"on_bad": "drop"}, model={"template": template}), pocket_tokenizer, PAIRS)
    (part,) = done.ledger.parts
    assert part.used >= 35
    for start in done.train.groups().tolist():
        one, other = done.train[start], done.train[start + 1]
        first = int(np.flatnonzero(one.train)[0])
        assert (one.role, other.role) == ("chosen", "rejected")
        assert one.ids[:first].tolist() == other.ids[:first].tolist()
        assert int(np.flatnonzero(other.train)[0]) == first


def test_where_a_token_straddles_the_border_the_prompt_is_shared_all_the_same(write, merging):
    words = ["four", "five", "six", "\nnone", " four", "nine"]
    rows = [pair("q", one, other) for one in words for other in words if one.strip() != other.strip()]
    done = prepare(recipe(write("a.jsonl", rows)), merging, PAIRS)
    assert done.ledger.parts[0].used == len(rows)
    assert "boundary_retokenised" in {reason.code for _, reason in done.ledger.reasons("note")}
    prompt = encode(merging, "q\nAnswer:").ids
    for row in done.train:
        first = int(np.flatnonzero(row.train)[0])
        assert row.ids[:first].tolist() == prompt
    # The two words alone: in one of them a token does straddle.
    straddles = [merging(f"q\nAnswer: {word}")["input_ids"][: len(prompt)] != prompt for word in ("four", "nine")]
    assert any(straddles)


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_pairs_refused_once_they_are_tokens(write, tokenizer, tmp_path):
    (tmp_path / "thinks.jinja").write_text(THINKS)
    row = pair("question", "<think>\nhm\n</think>yes", "no")
    path = write("a.jsonl", [row])
    settings = recipe(path, model={"template": str(tmp_path / "thinks.jinja")})
    assert codes(settings, tokenizer, PAIRS)[0] == ["prompt_differs", "no_rows"]
    # A template that shows the earlier turn otherwise than it asked for it gives two views.
    (tmp_path / "drops.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        {"role": "assistant", "content": "<think>x</think>g1"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "g2"},
    ]
    settings = recipe(write("b.jsonl", [pair("hi", turns, "no")]), model={"template": str(tmp_path / "drops.jinja")})
    problems, _ = check_rows(settings, tokenizer, PAIRS)
    assert problems[0].code == "several_views"
    assert "template" in problems[0].remedy


def test_bad_pairs_are_listed_and_counted(write, tokenizer):
    rows = [pair("a", "b", "c"), pair("a", "b", "b"), pair("a", "", "b"), pair("a", "b", ""), {"prompt": "a", "chosen": "b"}]
    path = write("a.jsonl", rows)
    error = refusal(recipe(path), tokenizer, PAIRS)
    assert error.code == "rows_refused"
    assert "4 rows" in error.message
    done = prepare(recipe(path, data={"on_bad": "drop"}), tokenizer, PAIRS)
    assert len(done.train) == 2
    (part,) = done.ledger.parts
    assert (part.read, part.used, part.refused) == (5, 1, 4)
    assert {reason.code for reason in part.reasons} == {"same_answers", "empty_chosen", "empty_rejected", "wrong_key"}


def test_a_pair_over_length_stands_or_falls_together(write, tokenizer):
    rows = [pair("p" * 100, "c" * 10, "r" * 60), pair("hi", "yes", "no"), pair("p" * 10, "c", "r" * 150)]
    path = write("a.jsonl", rows)
    dropped = prepare(recipe(path, tokens={"max_length": 150}), tokenizer, PAIRS)
    assert [row.key for row in dropped.train] == [f"{path}:2"] * 2
    assert dropped.ledger.parts[0].dropped == 2
    assert refusal(recipe(path, tokens={"max_length": 150, "overlong": "error"}), tokenizer, PAIRS).code == "over_length"
    for wanted in (PAIRS, PAIR_ENDS):
        cut = prepare(recipe(path, tokens={"max_length": 150, "overlong": "cut_prompt"}), tokenizer, wanted).train
        one, other = cut[0], cut[1]
        whole = prepare(recipe(path), tokenizer, PAIRS).train
        first = int(np.flatnonzero(whole[0].train)[0])
        gone = len(whole[1]) - 150
        assert (len(other), len(one)) == (150, len(whole[0]) - gone)
        assert one.ids.tolist() == whole[0].ids[gone:].tolist()
        assert other.ids.tolist() == whole[1].ids[gone:].tolist()
        assert one.ids[: first - gone].tolist() == other.ids[: first - gone].tolist()
    ledger = prepare(recipe(path, tokens={"max_length": 150, "overlong": "cut_prompt"}), tokenizer, PAIRS).ledger
    assert (ledger.parts[0].cut, ledger.parts[0].cut_tokens, ledger.parts[0].dropped) == (1, 2 * gone, 1)
    assert "answer_over_length" in {reason.code for _, reason in ledger.reasons("dropped")}
    for wanted in (PAIRS, LABELS, STEPS):
        error = refusal(recipe(path, tokens={"overlong": "split"}), tokenizer, wanted)
        assert isinstance(error, RecipeError)
        assert (error.code, error.where) == ("split_not_possible", "tokens.overlong")


def test_ranked_lists_become_pairs_by_a_stated_rule(write, tokenizer):
    row = {"prompt": "q", "answers": ["two", "three", "one", "also two"], "scores": [2, 3, 1, 2]}
    path = write("a.jsonl", [row])

    def found(rule, name=path):
        done = prepare(recipe(name, data={"ranked": rule}), tokenizer, PAIRS)
        rows = list(done.train)
        words = [trained(tokenizer, row).removesuffix("<|im_end|>") for row in rows]
        return list(zip(words[::2], words[1::2], strict=True)), rows, done.ledger

    assert found("best_worst")[0] == [("three", "one")]
    pairs, rows, ledger = found("adjacent")
    assert pairs == [("three", "two"), ("also two", "one")]
    assert [row.group for row in rows] == [f"{path}:1"] * 2 + [f"{path}:1#2"] * 2
    assert [(reason.code, reason.count) for _, reason in ledger.reasons("note")] == [("ranked_alike", 1)]
    pairs, rows, ledger = found("all")
    assert set(pairs) == {("three", "two"), ("three", "also two"), ("three", "one"), ("two", "one"), ("also two", "one")}
    assert (ledger.parts[0].used, ledger.parts[0].rows) == (1, 10)
    ends = prepare(recipe(path), tokenizer, PAIR_ENDS).train
    assert ends[0].streams["margin"][0] == 2.0
    ranks = write("b.jsonl", [{"prompt": "q", "answers": ["b", "a"], "ranks": [2, 1]}])
    assert prepare(recipe(ranks), tokenizer, PAIR_ENDS).train[0].streams["margin"][0] == 0.0
    assert found("best_worst", ranks)[0] == [("a", "b")]


def test_ties_alone_give_no_pair_and_the_same_answer_twice_is_noted(write, tokenizer):
    rows = [
        {"prompt": "q", "answers": ["a", "b"], "scores": [1, 1]},
        {"prompt": "q", "answers": ["a", "a ", "b"], "scores": [3, 2, 1]},
        {"prompt": "q", "answers": ["a" * 300, "b", "c"], "scores": [3, 2, 1]},
    ]
    done = prepare(recipe(write("a.jsonl", rows), data={"ranked": "adjacent"}), tokenizer, PAIRS)
    (part,) = done.ledger.parts
    assert (part.read, part.used, part.dropped, part.rows) == (3, 2, 1, 4)
    assert {(reason.fate, reason.code, reason.count) for reason in part.reasons} == {
        ("dropped", "ranked_alike", 1),
        ("note", "same_answers", 1),
        ("note", "over_length", 1),
    }
