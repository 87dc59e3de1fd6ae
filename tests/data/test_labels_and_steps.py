"""Labelled answers, their partners and solutions in steps as tokens; and what the sets, the cache and `show` make of judged rows."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from judged_rows import KTO, LABEL_ENDS, LABELS, LABELS_THROUGHOUT, PAIR_ENDS, PAIRS, STEPS, codes, label, pair, recipe, refusal, trained
from rich.console import Console

from tunesmith.core.recipe import Source, TokenLimits
from tunesmith.core.types import Tokens
from tunesmith.data import cache
from tunesmith.data.dataset import Builder
from tunesmith.data.prepare import check_rows, prepare
from tunesmith.data.show import painted, show_rows
from tunesmith.data.template import choose_template
from tunesmith.data.tokenise import Tokeniser

VERDICTS = [
    label("a", "good", True),
    label("a", "bad", False),
    label("b", "fine", True),
    label("c", "poor", False),
    label("b", "so so", True),
]


def test_labelled_answers_have_their_roles_and_are_counted(write, tokenizer):
    path = write("a.jsonl", VERDICTS)
    done = prepare(recipe(path), tokenizer, LABELS)
    assert [row.role for row in done.train] == ["desirable", "undesirable", "desirable", "undesirable", "desirable"]
    assert [row.group for row in done.train] == [f"{path}:{place}" for place in (1, 2, 3, 4, 5)]
    assert [trained(tokenizer, row) for row in done.train] == [f"{row['completion']}<|im_end|>" for row in VERDICTS]
    (part,) = done.ledger.parts
    assert (part.labels, part.unpaired) == ({"desirable": 3, "undesirable": 2}, 3)
    assert "3 desirable, 2 undesirable; 3 of 5 (60%)" in done.ledger.summary()
    assert {prompt.truth for prompt in done.prompts} == {"good", "fine", "so so"}
    ends = prepare(recipe(path), tokenizer, LABEL_ENDS)
    for row, verdict in zip(ends.train, (1.0, 0.0, 1.0, 0.0, 1.0), strict=True):
        assert (row.group, row.role) == ("", "")
        assert np.flatnonzero(row.train).tolist() == [len(row) - 1]
        assert row.streams["value"].tolist() == [0.0] * (len(row) - 1) + [verdict]


def test_throughout_every_token_has_the_row_s_value(write, tokenizer):
    path = write("a.jsonl", VERDICTS)
    answers, read = (prepare(recipe(path), tokenizer, wanted).train for wanted in (LABELS, LABELS_THROUGHOUT))
    for answer, row, verdict in zip(answers, read, (1.0, 0.0, 1.0, 0.0, 1.0), strict=True):
        assert row.train.tolist() == [*answer.train[:-1], 1.0]
        assert row.streams["value"].tolist() == (row.train * verdict).tolist()


def test_a_value_that_is_no_share_makes_a_bad_row_where_shares_are_learned(write, tokenizer):
    path = write("a.jsonl", [*VERDICTS, {"prompt": "a", "completion": "b", "label": 3}, label("a", "c", -0.5)])
    prepare(recipe(path), tokenizer, LABEL_ENDS)
    for wanted in (replace(LABEL_ENDS, shares=True), replace(LABELS_THROUGHOUT, shares=True)):
        error = refusal(recipe(path), tokenizer, wanted)
        assert (error.code, error.where) == ("rows_refused", f"{path}:6")
        assert "(label_no_share 2)" in error.message
        assert f"{path}:7: the label is -0.5" in error.message
    done = prepare(recipe(path, data={"on_bad": "drop"}), tokenizer, replace(LABEL_ENDS, shares=True))
    assert len(done.train) == len(VERDICTS)
    steps = write("s.jsonl", [{"prompt": "a", "completions": ["b", "c"], "labels": [0.5, 2]}])
    prepare(recipe(steps), tokenizer, STEPS)
    problems, _ = check_rows(recipe(steps), tokenizer, replace(STEPS, shares=True))
    assert (problems[0].code, problems[0].key) == ("label_no_share", f"{steps}:1")
    assert "label 2 is 2" in problems[0].message


def test_scores_are_for_the_ends_alone(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "a", "completion": "b", "score": 3.5}, {"prompt": "a", "completion": "c", "score": -1}])
    assert codes(recipe(path), tokenizer, LABELS)[0] == ["score_no_label"] * 2 + ["no_rows"]
    done = prepare(recipe(path), tokenizer, LABEL_ENDS)
    assert [row.streams["value"][-1] for row in done.train] == [3.5, -1.0]
    assert done.ledger.parts[0].labels == {"scored": 2}


@pytest.mark.parametrize("wanted", [LABELS, LABEL_ENDS, LABELS_THROUGHOUT, KTO])
@pytest.mark.parametrize("verdict", [True, False])
def test_one_label_alone_teaches_nothing(write, tokenizer, wanted, verdict):
    path = write("a.jsonl", [label("a", "x", verdict), label("b", "y", verdict)])
    error = refusal(recipe(path), tokenizer, wanted)
    assert (error.code, error.where) == ("one_label", path)
    assert "one_label" in codes(recipe(path), tokenizer, wanted)[0]


def test_rows_that_are_refused_are_told_before_the_one_label_that_they_leave(write, tokenizer):
    path = write("a.jsonl", [label("a", "x", True), label("b", "y", True), label("c", "z", "bad")])
    error = refusal(recipe(path), tokenizer, LABELS)
    assert error.code == "rows_refused"
    assert "expected true, false or a number, got 'bad'" in error.message
    error = refusal(recipe(path, data={"on_bad": "drop"}), tokenizer, LABELS)
    assert error.code == "one_label"
    assert "left out: 1, the first: label: expected" in error.message


def test_labels_of_a_file_that_knows_text_alone(write, tokenizer):
    path = write("a.jsonl", [label("a", "x", "True"), label("b", "y", "false"), label("c", "z", "1"), label("d", "w", "0")])
    assert prepare(recipe(path), tokenizer, LABELS).ledger.parts[0].labels == {"desirable": 2, "undesirable": 2}


@pytest.mark.parametrize(("values", "word"), [([True, True], "true"), ([0, 0], "false"), ([0.3, 0.3], "0.3")])
def test_steps_of_one_label_alone_teach_nothing(write, tokenizer, values, word):
    path = write("a.jsonl", [{"prompt": f"p{n}", "completions": ["b", "c"], "labels": values} for n in range(3)])
    error = refusal(recipe(path), tokenizer, STEPS)
    assert (error.code, error.where) == ("one_label", path)
    assert f"all 6 steps have the label {word}" in error.message
    assert "one_label" in codes(recipe(path), tokenizer, STEPS)[0]


def test_a_file_of_steps_without_labels_or_marks_is_refused_for_that(write, tokenizer):
    """Every row of it: none is left by which the format is known."""
    steps = write("a.jsonl", [{"prompt": "a", "completions": ["b", "c"]}] * 2)
    assert codes(recipe(steps), tokenizer, STEPS)[0] == ["label_missing", "label_missing", "no_rows"]
    text = "How many? Step 1: 2 + 2 = 4\nStep 2: 4 + 1 = 6"
    marked = write("b.jsonl", [{"input": text, "label": text}])
    assert codes(recipe(marked), tokenizer, STEPS)[0] == ["step_marker_absent", "no_rows"]


def test_a_missing_label_is_a_bad_row(write, tokenizer):
    path = write("a.jsonl", [*VERDICTS, {"prompt": "a", "completion": "b"}])
    assert codes(recipe(path), tokenizer, LABELS)[0] == ["label_missing"]
    assert len(prepare(recipe(path, data={"on_bad": "drop"}), tokenizer, LABELS).train) == 5


def test_every_row_is_accompanied_by_the_answer_of_another(write, tokenizer):
    rows = [label(f"prompt {n % 7}", f"answer {n % 5}" * (1 + n % 3), n % 2 == 0) for n in range(30)]
    path = write("a.jsonl", rows)
    done = prepare(recipe(path), tokenizer, KTO)
    plain = prepare(recipe(path), tokenizer, LABELS).train
    assert len(done.train) == 60
    assert done.train.groups().tolist() == list(range(0, 60, 2))
    answers = {row.ids[int(np.flatnonzero(row.train)[0]) :].tobytes() for row in plain}
    for place, row in enumerate(plain):
        own, other = done.train[2 * place], done.train[2 * place + 1]
        assert own.ids.tolist() == row.ids.tolist()
        assert own.train.tolist() == row.train.tolist()
        assert (other.role, other.group, other.key) == ("mismatched", own.group, own.key)
        first = int(np.flatnonzero(own.train)[0])
        assert other.ids[:first].tolist() == own.ids[:first].tolist()
        assert int(np.flatnonzero(other.train)[0]) == first
        assert other.ids[first:].tobytes() in answers
        assert other.ids[first:].tobytes() != own.ids[first:].tobytes()
    (part,) = done.ledger.parts
    assert (part.used, part.rows, part.tokens) == (30, 60, int(done.train.lengths.sum()))
    assert part.trained["mismatched"] == int(done.train.trained[1::2].sum())
    # The partners are those of the rows, not of their order.
    again = prepare(recipe(write("b.jsonl", rows[::-1])), tokenizer, KTO).train
    assert sorted(row.ids.tobytes() for row in again) == sorted(row.ids.tobytes() for row in done.train)


def test_partners_are_cut_at_the_answers_end(write, tokenizer):
    rows = [label("p" * 60, "a", True), label("q", "b" * 100, False)]
    done = prepare(recipe(write("a.jsonl", rows), tokens={"max_length": 130}), tokenizer, KTO)
    cut = done.train[1]
    first = int(np.flatnonzero(done.train[0].train)[0])
    assert (len(cut), cut.role) == (130, "mismatched")
    assert tokenizer.decode(cut.ids[first:]) == "b" * (130 - first)


def test_partners_need_two_different_answers(write, tokenizer):
    path = write("a.jsonl", [label("a", "x", True), label("b", "x", False)])
    assert refusal(recipe(path), tokenizer, KTO).code == "too_few_rows"
    assert "too_few_rows" in codes(recipe(path), tokenizer, KTO)[0]
    assert len(prepare(recipe(path), tokenizer, LABELS).train) == 2


CHAIN = {"prompt": "2 + 2 + 3?", "completions": ["2 + 2 = 4", "  so é🙂", "4 + 3 = 8.\n"], "labels": [True, True, False]}


@pytest.mark.parametrize("template", ["auto", "none", "llama3", "alpaca", "gemma"])
def test_steps_are_read_where_each_ends(write, pocket_tokenizer, template):
    path = write("a.jsonl", [CHAIN])
    done = prepare(recipe(path, model={"template": template}), pocket_tokenizer, STEPS)
    (row,) = done.train
    places = np.flatnonzero(row.train).tolist()
    assert len(places) == 3
    assert row.streams["value"][places].tolist() == [1.0, 1.0, 0.0]
    assert not row.streams["value"][row.train == 0].any()
    assert (row.group, row.role) == ("", "")
    steps = [step.strip() for step in CHAIN["completions"]]
    for place, step in zip(places, steps, strict=True):
        assert pocket_tokenizer.decode(row.ids[: place + 1]).rstrip().endswith(step)
        assert not pocket_tokenizer.decode(row.ids[:place]).rstrip().endswith(step)
    assert +done.ledger.parts[0].trained == {"assistant": 3}


def test_a_step_over_length_loses_context_and_no_step(write, tokenizer):
    row = {"prompt": "p" * 200, "completions": ["one", "two"], "labels": [1, 0]}
    settings = recipe(write("a.jsonl", [row]), tokens={"max_length": 100, "overlong": "cut_prompt"})
    (cut,) = prepare(settings, tokenizer, STEPS).train
    assert len(cut) == 100
    assert tokenizer.decode(cut.ids).endswith("one\ntwo<|im_end|>\n")
    assert [tokenizer.decode(cut.ids[place]) for place in np.flatnonzero(cut.train)] == ["e", "o"]
    assert cut.streams["value"].sum() == 1


def test_steps_refused_once_they_are_tokens(write, tokenizer, merging, tmp_path):
    (tmp_path / "tidies.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('  ', ' ') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write("a.jsonl", [{"prompt": "q", "completions": ["one  1", "two"], "labels": [1, 0]}])
    assert codes(recipe(path, model={"template": str(tmp_path / "tidies.jinja")}), tokenizer, STEPS)[0][0] == "steps_rewritten"
    # A piece that is one token with the line break and what follows it.
    joined = next(piece for piece in merging.get_vocab() if "Ċ" in piece[1:-1])
    one, two = merging.convert_tokens_to_string([joined]).split("\n")[:2]
    path = write("b.jsonl", [{"prompt": "q", "completions": [f"Answer{one}", two], "labels": [1, 0]}])
    assert codes(recipe(path), merging, STEPS)[0][0] == "steps_share_token"


def test_groups_are_contiguous_rows_of_one_name():
    names = ["", "", "a", "a", "b", "a", "a", "ab", "ba", "ba", "", "ba"]
    builder = Builder()
    for place, name in enumerate(names):
        builder.add(Tokens(np.arange(2 + place % 3, dtype=np.int32), np.zeros(2 + place % 3, dtype=np.float32), f"f:{place}", name), 1.0)
    begins = [k for k, name in enumerate(names) if not name or k == 0 or names[k - 1] != name]
    found = builder.build()
    assert found.groups().tolist() == begins
    assert found.groups().dtype == np.int64
    assert Builder().build().groups().tolist() == []


def test_all_answers_to_one_prompt_stay_on_one_side(write, tokenizer):
    rows = [pair(f"prompt {n % 20}", f"good {n}", f"bad {n}") for n in range(100)]
    done = prepare(recipe(write("a.jsonl", rows), data={"validation": {"fraction": 0.3}}), tokenizer, PAIRS)

    def prompts(split):
        return {row.ids[: int(np.flatnonzero(row.train)[0])].tobytes() for row in split}

    assert len(prompts(done.train)) + len(prompts(done.validation)) == 20
    assert not prompts(done.train) & prompts(done.validation)


def test_the_cache_knows_what_was_wanted(write, tokenizer, monkeypatch):
    path = write("a.jsonl", VERDICTS)
    settings = recipe(path)
    first = {wanted: prepare(settings, tokenizer, wanted) for wanted in (LABELS, LABEL_ENDS, KTO)}
    monkeypatch.setattr("tunesmith.data.prepare.gather", None)
    for wanted, done in first.items():
        again = prepare(settings, tokenizer, wanted)
        assert again.train.hash == done.train.hash
        assert again.train.groups().tolist() == done.train.groups().tolist()
        assert again.ledger.as_dict() == done.ledger.as_dict()
        assert again.prompts == done.prompts
    assert len({done.train.hash for done in first.values()}) == 3
    ranked = recipe(path, data={"ranked": "all"})
    assert cache.cache_key(settings, tokenizer, "t", 4) != cache.cache_key(ranked, tokenizer, "t", 4)


def test_show_has_both_sides_with_their_roles(write, tokenizer):
    template = choose_template(tokenizer, "auto", {})
    rows = [pair("q", "yes", "no"), pair("q", "x", "x")]
    document = show_rows(Source(path=write("a.jsonl", rows)), tokenizer, template)
    assert json.loads(json.dumps(document)) == document
    chosen, rejected, bad = document["rows"]
    assert (chosen["role"], rejected["role"], bad["role"], document["format"]) == ("chosen", "rejected", "", "preference")
    assert "".join(piece for piece, yes in zip(rejected["pieces"], rejected["trained"], strict=True) if yes) == "no<|im_end|>"
    assert "same_answers" in bad["dropped"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(painted(document))
    assert "chosen" in console.export_text()
    for name, row, roles, marked in (
        ("b.jsonl", label("q", "yes", False), ["undesirable"], 4),
        ("c.jsonl", CHAIN, [""], 3),
        ("d.jsonl", {"prompt": "q", "answers": ["a", "b"], "scores": [1, 2]}, ["chosen", "rejected"], 2),
    ):
        shown = show_rows(Source(path=write(name, [row])), tokenizer, template)["rows"]
        assert [one["role"] for one in shown] == roles
        assert sum(shown[0]["trained"]) == marked
    scored = Source(path=write("e.jsonl", [{"prompt": "q", "completion": "a", "score": 4}]), format="labelled")
    assert sum(show_rows(scored, tokenizer, template)["rows"][0]["trained"]) == 1


def test_workers_are_sent_what_is_wanted(write, tokenizer):
    def made(wanted, ranked="best_worst"):
        return Tokeniser("all", TokenLimits(max_length=256), choose_template(tokenizer, "auto"), tokenizer, ranked, wanted)

    here = made(PAIR_ENDS)
    there = pickle.loads(pickle.dumps(here))
    assert there.hash == here.hash
    assert len({made(PAIRS).hash, here.hash, made(PAIRS, "all").hash}) == 3
    found = [("f:1", pair("a", "b", "c", margin=1)), ("f:2", pair("a", "b", "b"))]
    one, two = (tokeniser.rows("preference", found) for tokeniser in (here, pickle.loads(pickle.dumps(there))))
    assert [row.streams["margin"].tolist() for row in one[0].tokens] == [row.streams["margin"].tolist() for row in two[0].tokens]
    assert one[1] == two[1]
