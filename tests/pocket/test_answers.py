"""The demo's preferences: the same from the same seed, nothing of the held-out rows in training, and no easy way to tell the better one."""

import re
from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from tunesmith.data.formats import FORMATS
from tunesmith.pocket import answers, folder

ROWS = {"train": answers.preference_rows, "test": answers.held_out_rows}
SIDES = ("chosen", "rejected")


def sentences(rows):
    parts = {part.strip() for row in rows for name in ("prompt", *SIDES) for part in re.split(r"(?<=[.!?])\s|\n", row[name])}
    # One word alone is a name under a letter, which both may have.
    return {part for part in parts if len(part.split()) > 1}


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.mark.parametrize("make", [*ROWS.values(), answers.labelled_rows])
def test_rows_depend_on_the_seed_alone_and_no_question_comes_twice(make):
    rows = make(600, 3)
    assert rows == make(600, 3)
    assert rows != make(600, 4)
    assert len({row["prompt"] for row in rows}) == 600


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_pairs_that_the_reader_takes(split):
    rows = ROWS[split](120, 0)
    pair = FORMATS.get("preference").function(rows[0], "rows:1")
    assert [pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content] == list(rows[0].values())
    assert list(rows[0]) == ["prompt", "chosen", "rejected"]


def test_no_sentence_of_the_held_out_rows_occurs_in_training():
    train, test = sentences(answers.preference_rows(3000, 0)), sentences(answers.held_out_rows(1000, 0))
    assert len(train) > 3000
    assert len(test) > 1500
    assert not train & test


def test_no_frame_of_the_held_out_rows_occurs_in_training():
    train, test = answers.frames("train"), answers.frames("test")
    assert len(train) > 150
    assert len(test) > 90
    assert not train & test


def test_frames_are_all_that_the_rows_are_written_from():
    # A rule of ours that is neither training's, nor held out, nor a word would escape the two tests above.
    rules = answers.rules().rules
    ours = {line for name, lines in rules.items() for line in lines if ".train." in name or ".test." in name or name in tickets_rules()}
    assert ours <= answers.frames("train") | answers.frames("test")


def tickets_rules():
    return {f"{split}.{part}" for split in ("train", "test") for part in ("hello", "bye", "context")}


def test_held_out_sentences_use_none_of_the_phrases_of_training():
    assert not [line for line in answers.frames("test") if "{said." in line or "{^said." in line]
    assert sum("said." in line for line in answers.frames("train")) > 80


def test_no_filled_in_frame_of_training_matches_a_held_out_sentence():
    rules = answers.rules().rules
    remembered = {
        part: [line for name, lines in rules.items() if name.startswith(f"{part}.") for line in lines] for part in ("act", "thing")
    }
    slots = r"\{\^?(@?)([a-z_.]+)(?:@[a-z_]+)?\}|\{\d+\.\.\d+\}"

    def opened(line):
        pieces, last = [], 0
        for match in re.finditer(slots, line):
            pieces.append(re.escape(line[last : match.start()]))
            lines = remembered[match[2]] if match[1] else rules[match[2]] if match[2] else None
            pieces.append("(?:" + "|".join(map(opened, lines)) + ")" if lines else r"\d+")
            last = match.end()
        return "".join(pieces) + re.escape(line[last:])

    answered = {line for name, lines in rules.items() if re.match(r"(good|bad)\.train\.(?!layout)", name) for line in lines}
    # One word alone may stand in both, but a sentence of an answer counts even where all of its words come from phrases.
    others = [line for line in answers.frames("train") - answered if len(re.sub(slots, "", line).split()) > 1]
    frames = [*answered, *others]
    shapes = re.compile("|".join(f"(?:{opened(line)})" for line in frames), re.IGNORECASE)
    assert any(shapes.fullmatch(sentence) for sentence in sentences(answers.preference_rows(50, 0)))
    assert not [sentence for sentence in sentences(answers.held_out_rows(500, 0)) if shapes.fullmatch(sentence)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_length_decides_nothing(split):
    rows = ROWS[split](600, 0)
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert 0.45 <= longer / 600 <= 0.55
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder())
    gaps = [len(tokenizer(row["chosen"]).input_ids) - len(tokenizer(row["rejected"]).input_ids) for row in rows]
    assert 0.45 <= (sum(gap > 0 for gap in gaps) + sum(gap == 0 for gap in gaps) / 2) / 600 <= 0.55
    assert max(abs(len(row["chosen"]) - len(row["rejected"])) for row in rows) <= answers.APART


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_word_alone_decides(split):
    rows = ROWS[split](600, 0)
    told = Counter()
    for row in rows:
        good, bad = words(row["chosen"]), words(row["rejected"])
        told.update(dict.fromkeys(good - bad, 1))
        told.subtract(dict.fromkeys(bad - good, 1))
    # A judge of one word is right where it tells, and half the time elsewhere.
    assert max(abs(count) for count in told.values()) / 2 / 600 < 0.2


def test_both_answers_speak_of_what_is_asked():
    rows = answers.preference_rows(600, 0)
    things = {line for name in ("bill", "secret", "parcel", "screen", "moneyback", "detail") for line in answers.rules().rules[name]}
    for side in SIDES:
        named = sum(any(thing in row[side] and thing in row["prompt"] for thing in things) for row in rows)
        assert named > 0.5 * len(rows)


def test_words_of_the_held_out_answers_are_known_from_training():
    train = {word for row in answers.preference_rows(1500, 0) for side in SIDES for word in words(row[side])}
    test = {word for row in answers.held_out_rows(1500, 0) for side in SIDES for word in words(row[side])}
    assert len(test - train) < 0.1 * len(test), sorted(test - train)


def test_half_of_the_labelled_rows_are_good_and_have_answers_of_their_side():
    rows = answers.labelled_rows(300, 0)
    assert sum(row["label"] for row in rows) == 150
    labels = [row["label"] for row in rows]
    assert labels != sorted(labels, reverse=True), "rows come shuffled, not label by label"
    assert FORMATS.get("labelled").function(rows[0], "rows:1").value == float(rows[0]["label"])
    good = sentences([{"prompt": "", "chosen": row["completion"], "rejected": ""} for row in rows if row["label"]])
    bad = sentences([{"prompt": "", "chosen": row["completion"], "rejected": ""} for row in rows if not row["label"]])
    assert not good & bad
