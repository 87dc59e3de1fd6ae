"""Pairs, labelled answers, ranked lists and solutions in steps: every layout of a row, and every reason to refuse one."""

from __future__ import annotations

import json

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.recipe import Source
from tunesmith.core.types import Labelled, Message, Pair, Ranked, Steps
from tunesmith.data.detect import detect, hold, shapes
from tunesmith.data.formats import COLUMNS, FORMATS, KINDS, LOOKS_LIKE

HI, YES, NO = Message("user", "hi"), Message("assistant", "yes"), Message("assistant", "no")
PAIR = Pair((HI,), (YES,), (NO,), "f:1")


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def said(who, text):
    return {"from": who, "value": text}


def example(name, row):
    return FORMATS[name].function(row, "f:1")


def refusal(name, row):
    with pytest.raises(DataError) as caught:
        example(name, row)
    assert caught.value.where == "f:1"
    assert caught.value.remedy
    return caught.value


def test_every_format_has_a_kind():
    assert list(FORMATS) == list(COLUMNS) == list(LOOKS_LIKE)
    assert set(KINDS) == set(FORMATS)


ONE_PAIR = {
    "text": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "turns": {"prompt": [user("hi")], "chosen": [says("yes")], "rejected": [says("no")]},
    "one turn": {"prompt": "hi", "chosen": says("yes"), "rejected": says("no")},
    "whole": {"chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no")]},
    "whole and prompt": {"prompt": "hi", "chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no")]},
    "binarised": {
        "prompt": "hi",
        "prompt_id": "7",
        "chosen": [user("hi"), says("yes")],
        "rejected": [user("hi"), says("no")],
        "messages": [user("hi"), says("yes")],
    },
    "messages twice": {
        "chosen": [user("hi"), says("yes")],
        "rejected": [user("hi"), says("no")],
        "messages": [user("hi"), says("yes")],
    },
    "sharegpt": {"conversations": [said("human", "hi")], "chosen": said("gpt", "yes"), "rejected": said("gpt", "no")},
    "sharegpt whole": {"chosen": [said("human", "hi"), said("gpt", "yes")], "rejected": [said("human", "hi"), said("gpt", "no")]},
    "llamafactory": {"messages": [user("hi")], "chosen": says("yes"), "rejected": says("no")},
    "json": {"conversations": json.dumps([said("human", "hi")]), "chosen": said("gpt", "yes"), "rejected": said("gpt", "no")},
    "alpaca": {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"},
    "transcript": {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no\n"},
    "transcript and prompt": {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "yes", "rejected": "no"},
    "transcripts and prompt": {
        "prompt": "\n\nHuman: hi\n\nAssistant:",
        "chosen": "\n\nHuman: hi\n\nAssistant: yes",
        "rejected": "\n\nHuman: hi\n\nAssistant: no",
    },
}


@pytest.mark.parametrize("name", ONE_PAIR)
def test_one_pair_in_every_layout(name):
    row = ONE_PAIR[name]
    assert shapes(row, "pairs") == ("preference",)
    assert example("preference", row) == PAIR


OPENAI = {
    "input": {"messages": [user("hi")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [says("yes")],
    "non_preferred_output": [says("no")],
}


def test_openai_rows_in_both_spellings():
    assert shapes(OPENAI) == ("openai_preference",)
    assert example("openai_preference", OPENAI) == PAIR
    older = {"input": OPENAI["input"], "preferred_completion": [says("yes")], "non_preferred_completion": [says("no")]}
    assert shapes(older) == ("openai_preference",)
    assert example("openai_preference", older) == PAIR
    tool = {"name": "weather", "parameters": {}}
    with_tools = example("openai_preference", {**OPENAI, "input": {"messages": [user("hi")], "tools": [tool]}})
    assert with_tools.tools == ({"type": "function", "function": tool},)


WHOLE_TEXTS = [
    ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
    ("2 + 3 =\n5", "2 + 3 =\n6", ("2 + 3 =\n", "5", "6")),
    ("Tea is hot", "Tea is hotter", ("Tea is hot", "", "ter")),
]


@pytest.mark.parametrize(("chosen", "rejected", "parts"), WHOLE_TEXTS)
def test_what_texts_begin_with_alike_is_the_prompt(chosen, rejected, parts):
    row = {"chosen": chosen, "rejected": rejected, "margin": 2}
    if not parts[1]:
        assert refusal("preference", row).code == "empty_chosen"
        return
    pair = example("preference", row)
    assert ([m.role for m in pair.prompt], pair.margin) == (["user"], 2.0)
    assert (pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content) == parts


def test_texts_are_cut_where_trl_cuts_them():
    extract = pytest.importorskip("trl").extract_prompt
    for chosen, rejected, parts in WHOLE_TEXTS[:2]:
        found = extract({"chosen": chosen, "rejected": rejected})
        assert (found["prompt"], found["chosen"], found["rejected"]) == parts


def test_texts_that_share_no_beginning_or_are_the_same_are_refused():
    assert refusal("preference", {"chosen": "yes", "rejected": "no"}).code == "no_prompt"
    assert refusal("preference", {"chosen": "It is so.", "rejected": "It is so."}).code == "same_answers"
    # A prompt by another name is not passed over.
    error = refusal("preference", {"question": "Is it?", "chosen": "It is so.", "rejected": "It is not."})
    assert (error.code, "it has: question" in error.message) == ("no_prompt", True)


def test_what_conversations_begin_with_alike_is_the_prompt():
    front = [{"role": "system", "content": "s"}, user("a"), says("b"), user("c")]
    pair = example("preference", {"chosen": [*front, says("d"), user("e"), says("f")], "rejected": [*front, says("g")]})
    assert [m.content for m in pair.prompt] == ["s", "a", "b", "c"]
    assert [m.content for m in pair.chosen] == ["d", "e", "f"]
    assert [m.content for m in pair.rejected] == ["g"]
    # A prompt in words need not repeat the system text, and may be the first turns alone.
    again = example("preference", {"prompt": "a", "chosen": [*front, says("d")], "rejected": [*front, says("g")]})
    assert [m.content for m in again.prompt] == ["s", "a", "b", "c"]


def test_a_system_text_a_margin_and_scores():
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no", "system": "be kind"}
    assert example("preference", row).prompt == (Message("system", "be kind"), HI)
    assert example("preference", row).margin is None
    assert example("preference", {**row, "margin": 2}).margin == 2.0
    assert example("preference", {**row, "score_chosen": 4.5, "score_rejected": 1}).margin == 3.5


BAD_PAIRS = [
    ({"prompt": "hi", "chosen": "yes", "rejected": "yes"}, "same_answers"),
    ({"prompt": "hi", "chosen": "yes", "rejected": " yes\n"}, "same_answers"),
    ({"chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("yes")]}, "same_answers"),
    ({"prompt": "hi", "chosen": "", "rejected": "no"}, "empty_chosen"),
    ({"prompt": "hi", "chosen": "yes", "rejected": " "}, "empty_rejected"),
    ({"prompt": "hi", "chosen": "yes", "rejected": None}, "empty_rejected"),
    ({"prompt": "hi", "chosen": "yes", "rejected": []}, "empty_rejected"),
    ({"prompt": "hi", "chosen": [says("yes")], "rejected": [says(None)]}, "empty_rejected"),
    ({"prompt": "hi", "chosen": None, "rejected": "no"}, "empty_chosen"),
    ({"chosen": [user("hi"), says("yes")], "rejected": [user("hi")]}, "empty_rejected"),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant:"}, "empty_rejected"),
    ({"prompt": "ho", "chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no")]}, "prompt_no_prefix"),
    (
        {"prompt": [user("hi"), says("x"), user("y")], "chosen": [user("hi"), says("y")], "rejected": [user("hi"), says("n")]},
        "prompt_no_prefix",
    ),
    ({"chosen": [user("hi"), says("yes")], "rejected": [user("ho"), says("no")]}, "prompt_differs"),
    ({"chosen": [user("a"), says("b"), user("c"), says("d")], "rejected": [user("a"), says("b"), user("x"), says("d")]}, "prompt_differs"),
    ({"prompt": "hi", "chosen": [user("hi"), says("yes")], "rejected": "no"}, "one_side_whole"),
    ({"chosen": "yes", "rejected": "no"}, "no_prompt"),
    ({"prompt": "hi", "chosen": "yes"}, "wrong_key"),
    ({"prompt": "hi", "chosen": "yes", "rejcted": "no"}, "wrong_key"),
    ({"prompt": "hi", "chosen": "yes", "rejected": "no", "margn": 1}, "wrong_key"),
    ({"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": "much"}, "bad_margin"),
    ({"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": True}, "bad_margin"),
    ({"prompt": "hi", "chosen": "yes", "rejected": "no", "score_chosen": 1}, "bad_margin"),
    ({"prompt": "", "chosen": "yes", "rejected": "no"}, "empty_prompt"),
    ({"prompt": "hi", "chosen": 3, "rejected": ["no"]}, "not_an_object"),
    ({"prompt": "hi", "chosen": True, "rejected": "no"}, "not_text"),
    ({"prompt": "hi", "chosen": "yes", "rejected": [says("no", weight=0)]}, "nothing_trained"),
    ({"prompt": "hi", "chosen": "yes", "rejected": [says("no"), user("what?")]}, "last_not_assistant"),
    ({"prompt": "hi", "chosen": "yes", "rejected": "no", "images": ["a.png"]}, "unsupported_part"),
    ({"conversations": [said("human", "hi"), said("gpt", "ho")], "chosen": said("man", "a"), "rejected": said("gpt", "b")}, "unknown_role"),
]


@pytest.mark.parametrize(("row", "code"), BAD_PAIRS)
def test_pairs_refused(row, code):
    assert refusal("preference", row).code == code


def test_the_side_at_fault_is_named():
    assert refusal("preference", {"prompt": "hi", "chosen": "yes", "rejected": [says("no", weight=0)]}).message.startswith("rejected: ")
    assert "did you mean 'rejected'" in refusal("preference", {"prompt": "hi", "chosen": "yes", "rejeced": "no"}).message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"input": [user("hi")]}, "not_an_object"),
        ({"input": {"mesages": [user("hi")]}}, "wrong_key"),
        ({"input": {"messages": [user("hi")], "tols": []}}, "wrong_key"),
        ({"preferred_output": []}, "empty_chosen"),
        ({"non_preferred_output": [says("")]}, "empty_rejected"),
        ({"non_preferred_output": [says("yes")]}, "same_answers"),
        ({"non_preferred_output": None}, "empty_rejected"),
    ],
)
def test_openai_rows_refused(change, code):
    assert refusal("openai_preference", {**OPENAI, **change}).code == code
    assert refusal("openai_preference", {"input": OPENAI["input"], "preferred_output": [says("yes")]}).code == "wrong_key"


ONE_LABEL = [
    {"prompt": "hi", "completion": "yes", "label": True},
    {"prompt": "hi", "completion": "yes", "kto_tag": True},
    {"prompt": [user("hi")], "completion": [says("yes")], "label": 1},
    {"messages": [user("hi"), says("yes")], "label": True},
    {"conversations": [said("human", "hi"), said("gpt", "yes")], "label": True},
    {"conversations": [said("human", "hi"), said("gpt", "yes")], "kto_tag": True},
    {"instruction": "hi", "input": "", "output": "yes", "kto_tag": True},
    {"completion": [user("hi"), says("yes")], "label": True},
]


@pytest.mark.parametrize("row", ONE_LABEL)
def test_a_labelled_answer_in_every_layout(row):
    if "completion" not in row or "prompt" in row:
        assert shapes(row) == shapes(row, "labels") == ("labelled",)
    assert example("labelled", row) == Labelled((HI,), (YES,), 1.0, "f:1")
    assert example("labelled", {**row, **{name: False for name in ("label", "kto_tag") if name in row}}).value == 0.0


def test_a_score_is_a_label_only_where_labels_are_wanted():
    row = {"prompt": "hi", "completion": "yes", "score": 3.5}
    assert (shapes(row), shapes(row, "labels")) == (("prompt_completion",), ("labelled",))
    assert example("labelled", row).value == 3.5
    assert example("labelled", {**row, "label": False}).value == 0.0
    assert example("labelled", {**row, "score": "3.5"}).value == 3.5
    assert shapes({**row, "label": " TRUE"}) == ("labelled",)
    assert example("labelled", {**row, "label": " TRUE"}).value == 1.0
    # A class in words says nothing about an answer.
    assert shapes({"prompt": "hi", "completion": "yes", "label": "greeting"}) == ("prompt_completion",)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "hi", "completion": "yes"}, "label_missing"),
        ({"prompt": "hi", "completion": "yes", "label": None}, "label_missing"),
        ({"messages": [user("hi"), says("yes")]}, "label_missing"),
        ({"prompt": "hi", "completion": "yes", "label": "good"}, "bad_label"),
        ({"prompt": "hi", "completion": "yes", "score": float("nan")}, "bad_label"),
        ({"prompt": "hi", "completion": "yes", "score": "nan"}, "bad_label"),
        ({"prompt": "hi", "completion": "", "label": True}, "empty_answer"),
        ({"prompt": "hi", "completion": None, "label": True}, "empty_answer"),
        ({"completion": "yes", "label": True}, "no_prompt"),
        ({"instruction": "hi", "output": None, "label": True}, "empty_answer"),
        ({"prompt": "hi", "label": True}, "wrong_key"),
        ({"messages": [user("hi")], "label": True}, "no_assistant"),
        ({"messages": [user("hi"), says("yes"), user("no")], "label": True}, "last_not_assistant"),
        ({"prompt": "hi", "completion": "yes", "label": True, "sytem": "s"}, "wrong_key"),
    ],
)
def test_labelled_refused(row, code):
    assert refusal("labelled", row).code == code
    assert "did you mean 'label'" in refusal("labelled", {"prompt": "hi", "completion": "yes", "labl": True}).message


STEPWISE = {"prompt": "hi", "completions": ["one", "two"], "labels": [True, False]}
SHEPHERD = {
    "input": "How many? Step 1: 2 + 2 = 4 ки\nStep 2: 4 + 1 = 6 ки",
    "label": "How many? Step 1: 2 + 2 = 4 +\nStep 2: 4 + 1 = 6 -",
    "task": "GSM8K",
}


def test_steps_in_both_layouts():
    assert shapes(STEPWISE) == shapes(SHEPHERD) == ("steps",)
    assert example("steps", STEPWISE) == Steps((HI,), ("one", "two"), (1.0, 0.0), "f:1")
    assert example("steps", {**STEPWISE, "labels": [0.5, 1]}).values == (0.5, 1.0)
    found = example("steps", SHEPHERD)
    assert found.prompt == (Message("user", "How many?"),)
    assert (found.steps, found.values) == (("Step 1: 2 + 2 = 4", "Step 2: 4 + 1 = 6"), (1.0, 0.0))


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({**STEPWISE, "labels": [True]}, "steps_and_labels"),
        ({**STEPWISE, "completions": [], "labels": []}, "no_steps"),
        ({**STEPWISE, "completions": ["one", " "]}, "empty_step"),
        ({**STEPWISE, "labels": [True, None]}, "label_missing"),
        ({**STEPWISE, "labels": None}, "label_missing"),
        ({"prompt": "hi", "completions": ["one", "two"]}, "label_missing"),
        ({**STEPWISE, "labels": [True, "yes"]}, "bad_label"),
        ({**STEPWISE, "labels": True}, "not_a_list"),
        ({"prompt": "hi", "completions": ["a"], "lables": [True]}, "wrong_key"),
        ({"completions": ["a"], "labels": [True]}, "wrong_key"),
        ({**STEPWISE, "prompt": ""}, "empty_prompt"),
        ({**SHEPHERD, "input": "How many? Step 1: 4"}, "step_marker_absent"),
        ({"input": "How many? Step 1: 4", "label": "How many? Step 1: 4"}, "step_marker_absent"),
        ({**SHEPHERD, "input": SHEPHERD["input"] + " and so on"}, "steps_and_labels"),
        ({**SHEPHERD, "label": SHEPHERD["label"].replace("4 +", "4 *")}, "steps_and_labels"),
        ({**SHEPHERD, "label": SHEPHERD["label"][:-1]}, "steps_and_labels"),
        ({"input": "2 + 2 = 4 ки", "label": "2 + 2 = 4 +"}, "no_prompt"),
        ({"input": "Step 1: 4 ки", "label": "Step 1: 4 +"}, "no_prompt"),
    ],
)
def test_steps_refused(row, code):
    assert refusal("steps", row).code == code


def test_ranked_lists_in_every_layout():
    answers = ((YES,), (NO,))
    scored = Ranked((HI,), answers, (3.0, 1.0), "f:1")
    for name in ("answers", "responses", "completions"):
        row = {"prompt": "hi", name: ["yes", "no"], "scores": [3, 1]}
        assert shapes(row) == ("ranked",)
        assert example("ranked", row) == scored
    for name in ("ranks", "ranking"):
        row = {"prompt": [user("hi")], "answers": [[says("yes")], [says("no")]], name: [2, 1]}
        assert example("ranked", row) == Ranked((HI,), answers, (1.0, 2.0), "f:1", measured=False)
    feedback = {
        "instruction": "hi",
        "completions": [{"response": "yes", "overall_score": 3, "model": "a"}, {"response": "no", "overall_score": 1.0}],
        "models": ["a", "b"],
    }
    assert shapes(feedback) == ("ranked",)
    assert example("ranked", feedback) == scored


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "hi", "answers": ["a", "b"], "scores": [1]}, "answers_and_scores"),
        ({"prompt": "hi", "answers": ["a", "b"], "scores": [1, "x"]}, "bad_score"),
        ({"prompt": "hi", "answers": ["a", "b"], "ranks": [0, 1]}, "bad_rank"),
        ({"prompt": "hi", "answers": ["a", "b"], "ranks": [1, 3]}, "bad_rank"),
        ({"prompt": "hi", "answers": ["a", "b"]}, "wrong_key"),
        ({"prompt": "hi", "answers": ["a", "b"], "score": [1, 2]}, "wrong_key"),
        ({"prompt": "hi", "answers": ["a"], "scores": [1]}, "too_few_answers"),
        ({"prompt": "hi", "answers": ["a", ""], "scores": [1, 2]}, "empty_answer"),
        ({"prompt": "hi", "answers": ["a", None], "scores": [1, 2]}, "empty_answer"),
        ({"prompt": "hi", "answers": "a", "scores": [1]}, "broken_json"),
        ({"answers": ["a", "b"], "scores": [1, 2]}, "no_prompt"),
        ({"instruction": "hi", "completions": [{"response": "a", "overall_score": 1}, {"response": "b"}]}, "wrong_key"),
    ],
)
def test_ranked_refused(row, code):
    assert refusal("ranked", row).code == code


def test_what_the_rows_are_is_decided_by_what_is_wanted_where_both_fit():
    binarised = ONE_PAIR["binarised"]
    assert shapes(binarised) == ("messages",)
    assert detect([("f:1", binarised)], Source(path="f"), "dialogs") == "messages"
    assert detect([("f:1", binarised)], Source(path="f"), "pairs") == "preference"
    assert shapes(ONE_PAIR["sharegpt"]) == shapes(ONE_PAIR["llamafactory"]) == ("preference",)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (ONE_PAIR["text"], "dialogs", "preference pairs .* dialogs"),
        (ONE_PAIR["text"], "labels", "preference pairs .* labelled answers"),
        ({"prompt": "hi", "completion": "yes"}, "pairs", "dialogs or text .* preference pairs"),
        ({"prompt": "hi", "completion": "yes"}, "labels", "dialogs or text .* labelled answers"),
        ({"prompt": "hi", "completion": "yes", "label": True}, "dialogs", "labelled answers .* dialogs"),
        (STEPWISE, "pairs", "labelled steps .* preference pairs"),
        (OPENAI, "steps", "preference pairs .* labelled steps"),
    ],
)
@pytest.mark.parametrize("said_so", [False, True])
def test_rows_of_another_kind_are_refused_with_the_objectives_for_each(row, kind, words, said_so):
    source = Source(path="f", format=shapes(row)[0] if said_so else "auto")
    with pytest.raises(DataError, match=words) as caught:
        detect([("f:1", row)], source, kind)
    assert (caught.value.code, caught.value.where) == ("wrong_kind", "f")
    for name in {"dialogs": ["nll"], "pairs": ["dpo"], "labels": ["kto"], "steps": ["process"]}[kind]:
        assert name in caught.value.remedy


def test_a_row_without_a_label_among_labelled_ones_is_a_bad_row():
    rows = [("f:1", {"prompt": "a", "completion": "b"}), ("f:2", {"prompt": "a", "completion": "b", "label": True})]
    assert detect(rows, Source(path="f"), "labels") == "labelled"
    hold("labelled", "f:1", "f:3", rows[0][1], Source(path="f"), "labels")
    with pytest.raises(DataError) as caught:
        hold("labelled", "f:1", "f:3", {"text": "a"}, Source(path="f"), "labels")
    assert caught.value.code == "mixed_formats"
    with pytest.raises(DataError) as caught:
        detect(rows, Source(path="f"), "dialogs")
    assert caught.value.code == "mixed_formats"


@pytest.mark.parametrize("verdict", [{"label": True}, {"score": 3.5}])
def test_labelled_answers_where_pairs_are_wanted_are_called_what_they_are(verdict):
    row = {"prompt": "hi", "completion": "yes", **verdict}
    with pytest.raises(DataError, match=r"these rows are labelled answers .* learns from preference pairs") as caught:
        detect([("f:1", row)], Source(path="f"), "pairs")
    assert caught.value.code == "wrong_kind"
    assert "reward_regression and reward_classes learn from labelled answers" in caught.value.remedy


def test_a_key_that_is_there_is_no_misspelling():
    with pytest.raises(DataError) as caught:
        detect([("f:1", {"completion": "yes", "other": 1})], Source(path="f"))
    assert caught.value.code == "unknown_format"
    assert "did you mean" not in caught.value.message
    with pytest.raises(DataError, match="did you mean 'prompt'"):
        detect([("f:1", {"promt": "hi", "completion": "yes"})], Source(path="f"))
