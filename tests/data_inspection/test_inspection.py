"""What inspection says of hand-made rows, against figures worked out by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tunesmith.cli.main import main
from tunesmith.core.errors import DataError
from tunesmith.core.recipe import Source
from tunesmith.core.types import Dialog, Labelled, Message, Pair, Steps, Text, ToolCall
from tunesmith.data.inspection import inspect
from tunesmith.data.inspection.dialogs import inspect_dialogs
from tunesmith.data.inspection.labels import inspect_labels, recommended_weights
from tunesmith.data.inspection.lengths import paired_bias, unpaired_bias, wilson
from tunesmith.data.inspection.pairs import inspect_pairs
from tunesmith.data.inspection.steps import inspect_steps
from tunesmith.data.inspection.suspects import similarity, suspect
from tunesmith.data.inspection.words import folded, plain, prompt_digest

LONG = "The library opens at nine, and you may bring as many books as you can carry; ask the clerk at the desk for a card today"


def user(text):
    return (Message("user", text),)


def said(text):
    return (Message("assistant", text),)


def pair(prompt, chosen, rejected, key):
    return Pair(user(prompt), said(chosen), said(rejected), key)


def labelled(prompt, answer, value, key):
    return Labelled(user(prompt), said(answer), value, key)


def test_wilson_interval_is_the_published_one():
    # 8 of 10: the textbook's (0.490, 0.943); 0 of 10 ends at z^2 / (n + z^2).
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(10, 10)[1] == 1.0


def test_paired_lengths_by_hand():
    found = paired_bias([20, 40, 10, 7], [10, 10, 20, 7])
    # log2 of the ratios: 1, 2, -1, 0; mean 0.5, deviation sqrt(5/3); the base of the logarithm cancels.
    assert found.effect == pytest.approx(0.5 / math.sqrt(5 / 3))
    assert found.longer == pytest.approx(2 / 3)
    assert (found.low, found.high) == wilson(2, 3)
    assert found.ties == 1
    assert found.superiority == pytest.approx(2.5 / 4)
    assert (found.good, found.bad) == (15.0, 10.0)
    assert found.verdict.startswith("no sign")


@pytest.mark.parametrize(("turned", "way"), [(False, "longer"), (True, "shorter")])
def test_a_clear_length_bias_is_called_large_either_way(turned, way):
    random = np.random.default_rng(0)
    short = random.integers(10, 20, 60)
    sides = [3 * short + random.integers(0, 30, 60), short]
    found = paired_bias(*(sides[::-1] if turned else sides))
    assert found.verdict.startswith(f"chosen answers are {way}: a large length bias (a judge of length alone is right on 100 %)")
    assert found.effect * (-1 if turned else 1) > 0.8


def test_equal_lengths_and_equal_ratios_have_no_deviation():
    same = paired_bias([5, 6], [5, 6])
    assert (same.effect, same.longer, same.low, same.superiority) == (0.0, None, None, 0.5)
    double = paired_bias([10] * 40, [5] * 40)
    assert double.effect is None
    assert "large length bias" in double.verdict


def test_unpaired_lengths_by_hand():
    found = unpaired_bias([8, 8, 2], [2, 4])
    # Couples: 8>2, 8>4 twice; 2=2, 2<4: (4 + 1/2) of 6.
    assert found.superiority == pytest.approx(4.5 / 6)
    assert found.ties == 1
    # log2: 3, 3, 1 and 1, 2; means 7/3 and 3/2; squares 8/3 and 1/2 over 3 degrees of freedom.
    assert found.effect == pytest.approx((7 / 3 - 3 / 2) / math.sqrt((8 / 3 + 1 / 2) / 3))
    assert found.longer is None
    assert found.verdict.startswith("no sign")
    assert "large" in unpaired_bias(list(range(100, 140)), list(range(20, 50))).verdict


def test_words_of_turns():
    calls = Message("assistant", "Look.", thinking="Hm.", tool_calls=(ToolCall("find", {"b": 1, "a": "x"}),))
    assert plain([*user("Where?"), calls]) == 'Where?\n\nHm.\nLook.\nfind({"a": "x", "b": 1})'
    assert folded("  Two\n\tWORDS ") == "two words"
    assert prompt_digest(user("Say  HI\n")) == prompt_digest(user("say hi"))
    assert prompt_digest(user("say hi")) != prompt_digest((Message("system", "say hi"),))
    assert prompt_digest((*user("a"), *said("b"))) != prompt_digest((*user("a b"),))


def test_pairs_by_hand():
    rows = [
        pair("What is red?", "A rose is.", "A leaf.", "f:1"),
        pair("what  is RED?", "a leaf.", "A rose is.", "f:2"),  # the reverse of f:1, but for white space and case
        pair("What is red?", "A rose is.", "A leaf.", "f:3"),  # a copy of f:1
        pair("What is red?", "A brick.", "A leaf.", "f:4"),  # the same question, other answers
        replace(pair("Say hi.", "Hi there", "hi  there", "f:5"), margin=2.0),
        pair("When does it open?", LONG, LONG.replace("nine", "ten"), "f:6"),
        pair("Help me.", "I'm sorry, but I can't help with that.", "Turn the key to the left.", "f:7"),
    ]
    held = [pair("WHAT is red?", "x", "y", "v:1"), pair("What is blue?", "x", "y", "v:2")]
    found = inspect_pairs(rows, held, lambda texts: [len(text.split()) for text in texts])
    assert (found.n, found.margins, found.alike, found.copies) == (7, 1, 1, 1)
    assert (found.contradicted, found.contradictions) == (2, (("f:1", "f:2"),))
    assert (found.prompts.distinct, found.prompts.repeated, found.prompts.most) == (4, 1, 4)
    assert (found.overlap.rows, found.overlap.shared, found.overlap.keys) == (2, 1, ("v:1",))
    assert found.characters.ties == 0
    # In words, chosen is longer in f:1, f:3 and f:7, shorter in f:2, and as long in f:4, f:5 and f:6.
    assert found.tokens.ties == 3
    assert found.tokens.longer == pytest.approx(3 / 4)
    assert found.tokens.superiority == pytest.approx((3 + 1.5) / 7)
    assert found.suspicious == 5
    assert [odd.key for odd in found.suspects] == ["f:5", "f:1", "f:2", "f:6", "f:7"]
    assert {odd.key: odd.reason for odd in found.suspects} == {
        "f:1": "f:2 prefers the other answer",
        "f:2": "f:1 prefers the other answer",
        "f:5": "the answers differ in white space or case alone",
        "f:6": "the answers are nearly the same (96 %)",
        "f:7": "chosen refuses, rejected answers",
    }


def test_the_worst_suspects_are_listed_and_all_are_counted():
    rows = [pair(f"q {n}", LONG, LONG.replace("nine", f"{n}"), f"f:{n}") for n in range(20)] + [pair("q", "So", "so", "f:20")]
    found = inspect_pairs(rows, shown=3)
    assert found.suspicious == 21
    assert [odd.key for odd in found.suspects] == ["f:20", "f:0", "f:1"]


def test_no_pairs_no_report():
    assert inspect_pairs([]) is None
    assert inspect_labels([]) is None
    assert inspect_steps([]) is None
    assert inspect_dialogs([]) is None


@pytest.mark.parametrize(
    "refusal",
    [
        "I’m sorry, but I can’t do this.",
        "Sorry, I cannot say.",
        "As an AI language model, I do not have a favourite.",
        "I am unable to provide that.",
        "I cannot help you with this request.",
        "I must decline.",
        "I apologize, but I will not answer that.",
    ],
)
def test_refusals_are_seen(refusal):
    assert suspect("k", refusal, "Turn left at the church.").reason == "chosen refuses, rejected answers"
    assert suspect("k", "Turn left at the church.", refusal) is None


@pytest.mark.parametrize("nothing", ["...", "N/A", "I don't know.", " - ", "👍"])
def test_answers_that_say_nothing_are_seen(nothing):
    assert suspect("k", nothing, "Turn left at the church.").reason == "chosen says nothing, rejected does"
    assert suspect("k", "Turn left at the church.", nothing) is None


@pytest.mark.parametrize("sound", ["I am sorry to hear that; turn left.", "You cannot help it: turn left.", "Go to the AI desk, I do not."])
def test_answers_are_no_refusals(sound):
    assert suspect("k", sound, "There is no such street in town.") is None


def test_one_word_against_many_is_a_weak_suspect():
    assert suspect("k", "Yes.", LONG).score == 0.5
    assert suspect("k", LONG, "Yes.") is None
    assert suspect("k", "Yes.", "No, never.") is None


def test_similarity_by_hand_and_its_cost_is_bounded():
    assert similarity("a b c d e f g h i j", "a b c d e f g h i x") == pytest.approx(0.9)
    assert similarity("a b c d", "e f g h") == 0.0
    long = " ".join(f"word{n}" for n in range(200_000))
    assert similarity(long, f"{long} more") > 0.99
    assert similarity(long, long[: len(long) // 2]) == 0.0, "clipped answers are alike only when their lengths are"


def test_labels_by_hand():
    rows = [
        labelled("What is red?", "A rose.", 1.0, "f:1"),
        labelled("What is  red?", "A leaf.", 0.0, "f:2"),
        labelled("What is blue?", "The sky.", 1.0, "f:3"),
        labelled("What is blue?", "The sea.", 1.0, "f:4"),
        labelled("What is grey?", "Ash.", 1.0, "f:5"),
        labelled("What is red?", "a rose.", 0.0, "f:6"),  # f:1 with the other label
        labelled("What is grey?", "Ash.", 1.0, "f:7"),
    ]
    found = inspect_labels(rows, [labelled("what is GREY?", "Soot.", 1.0, "v:1")])
    assert (found.n, found.desirable, found.undesirable, found.scored) == (7, 5, 2, 0)
    assert found.unpaired == pytest.approx(4 / 7)
    assert (found.copies, found.contradicted, found.contradictions) == (1, 2, (("f:1", "f:6"),))
    assert (found.weights.name, found.weights.low, found.weights.high) == ("undesirable_weight", pytest.approx(1.875), pytest.approx(2.5))
    assert found.overlap.shared == 1
    # Good: 7, 8, 8, 4, 4 characters; bad: 7, 7. Couples: 7 ties twice, 8 wins four times.
    assert found.characters.superiority == pytest.approx((4 + 1) / 10)


def test_recommended_weights_bring_the_balance_into_the_stated_range():
    for good, bad in ((10, 40), (40, 10), (7, 7), (1, 1000)):
        found = recommended_weights(good, bad)
        for weight, wanted in zip((found.low, found.high), (1, 4 / 3) if good < bad else (4 / 3, 1), strict=True):
            ours, theirs = (weight, 1.0) if found.name == "desirable_weight" else (1.0, weight)
            assert ours * good / (theirs * bad) == pytest.approx(wanted)
    assert recommended_weights(3, 0) is None


def test_scores_are_no_labels():
    found = inspect_labels([labelled("a", "b", 7.5, "f:1"), labelled("a", "c", 2.0, "f:2")])
    assert (found.scored, found.lowest, found.highest, found.weights, found.characters) == (2, 2.0, 7.5, None, None)


def test_steps_by_hand():
    def solution(*values):
        return Steps(user(f"Solve {len(values)}."), tuple("abcd"[: len(values)]), values, f"f:{values}")

    found = inspect_steps([solution(1.0, 1.0), solution(1.0, 0.0, 0.0), solution(0.0, 1.0), solution(1.0, 0.4, 0.9, 1.0)])
    assert (found.n, found.steps, found.fewest, found.most) == (4, 11, 2, 4)
    assert found.wrong == pytest.approx(3 / 4)
    assert found.first_wrong == {1: 1, 2: 2}
    assert found.recovered == 2
    assert (found.prompts.distinct, found.prompts.repeated) == (3, 1)


def test_dialogs_by_hand():
    rows = [Dialog((*user("Hi"), *said("Hello")), "f:1"), Dialog((*user("hi"), *said("hello")), "f:2"), Text("Once upon a time", "f:3")]
    found = inspect_dialogs(rows, [Text("once upon a time", "v:1")])
    assert (found.n, found.turns, found.shortest, found.median, found.longest) == (3, 5, 9, 9.0, 16)
    assert (found.copies, found.prompts.distinct, found.overlap.shared) == (1, 2, 1)


PAIRS = [
    {"prompt": "What is red?", "chosen": "A rose is red.", "rejected": "A leaf."},
    {"prompt": "What is red?", "chosen": "A leaf.", "rejected": "A rose is red."},
    {"prompt": "What is blue?", "chosen": "The sky.", "rejected": "Grass."},
    {"prompt": "What is grey?", "chosen": "Ash.", "rejected": "Ash."},
    {"prompt": "What is grey?", "chosen": "Ash.", "rejected": ""},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(capsys):
    def run(*words):
        status = main(["data", "inspect", *map(str, words)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_reports_in_json(run, tmp_path):
    file, held = write(tmp_path / "pairs.jsonl", PAIRS), write(tmp_path / "held.jsonl", PAIRS[2:3])
    status, out, _ = run(file, "--validation", held, "--tokenizer", "pocket", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["format"], found["kind"], found["rows"]) == ("preference", "pairs", 5)
    assert found["problems"] == {"empty_rejected": 1, "same_answers": 1}
    assert [problem["where"] for problem in found["unusable"]] == [f"{file}:4", f"{file}:5"]
    report = found["report"]
    assert (report["n"], report["contradicted"], report["overlap"]["shared"]) == (3, 2, 1)
    assert report["contradictions"] == [[f"{file}:1", f"{file}:2"]]
    assert report["characters"]["longer"] == pytest.approx(2 / 3)
    assert report["tokens"]["unit"] == "tokens"


def test_the_command_reports_in_words(run, tmp_path):
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    status, out, _ = run(file)
    words = " ".join(out.split())
    assert status == 0
    assert "1 empty_rejected, 1 same_answers" in words
    assert "chosen longer in 66.7 %" in words
    assert f"1.00 {file}:1: {file}:2 prefers the other answer" in words
    assert "2 distinct, 1 of them in several rows (in 2 at most)" in words


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "2 and 2?", "completion": "4", "label": True}, "1 good, 0 bad"),
        ({"prompt": "2 and 2?", "completions": ["1 + 1 = 2", "2 + 2 = 5"], "labels": [True, False]}, "step 2: 1"),
        ({"prompt": "2 and 2?", "completion": "4"}, "1, 2 turns"),
        ({"text": "Once upon a time."}, "17 to 17, median 17"),
        ({"prompt": "2 and 2?", "answers": ["5", "4"], "scores": [1, 3]}, "1, 1 with a margin"),
    ],
)
def test_every_kind_of_row_has_a_report(run, tmp_path, row, said):
    file = write(tmp_path / "rows.jsonl", [row])
    status, out, _ = run(file)
    assert status == 0
    assert said in " ".join(out.split())
    status, out, _ = run(file, "--json")
    assert status == 0
    assert json.loads(out)["report"]["n"] == 1


def test_rows_that_cannot_be_inspected_are_an_error(run, tmp_path):
    status, _, err = run(write(tmp_path / "bad.jsonl", PAIRS[3:]))
    assert status == 2
    assert "no row can be used" in err
    labels = write(tmp_path / "labels.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DataError) as caught:
        inspect(Source(path=str(write(tmp_path / "pairs.jsonl", PAIRS))), Source(path=str(labels)))
    assert caught.value.code == "wrong_kind"
    assert "of another kind than" in caught.value.message
    assert "objective" not in str(caught.value)
    assert run(tmp_path / "none.jsonl")[0] == 2


def test_columns_have_their_names_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "hi", "better": "yes", "worse": "no"}) + "\n")
    words = ["data", "inspect", str(file), "--json"]
    assert main(words) == 2
    assert "--columns prompt=question" in json.loads(capsys.readouterr().out)["error"]["remedy"]
    assert main([*words, "--columns", "prompt=question, chosen=better, rejected=worse"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "pairs"
    for wrong, code in (("prompt", "usage"), ("prompt=", "usage"), ("prompt=a,prompt=b", "usage"), ("promt=question", "unknown_column")):
        assert main([*words, "--columns", wrong]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["code"] == code
