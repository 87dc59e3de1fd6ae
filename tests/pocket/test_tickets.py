"""The demo's data: right labels, the same from the same seed, and nothing of the test in training."""

import json
import re

import pytest

from tunesmith.pocket import tickets

ROWS = {"train": tickets.training_rows, "test": tickets.test_rows}


def _ticket(row: dict) -> str:
    return row["messages"][1]["content"]


def _label(row: dict) -> dict:
    return json.loads(row["messages"][2]["content"])


def _sentences(rows: list[dict]) -> set[str]:
    # One word alone is a name under a letter, which both may have.
    parts = {part.strip() for row in rows for part in re.split(r"(?<=[.!?])\s|\n", _ticket(row))}
    return {part for part in parts if len(part.split()) > 1}


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_labelled_tickets_in_equal_shares(split):
    rows = ROWS[split](180, 0)
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    labels = [tuple(_label(row).items()) for row in rows]
    wanted = [(("category", c), ("urgency", u)) for c in tickets.CATEGORIES for u in tickets.URGENCIES]
    assert {label: labels.count(label) for label in wanted} == dict.fromkeys(wanted, 10)
    assert labels != sorted(labels, key=wanted.index), "rows come shuffled, not label by label"


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_depend_on_the_seed_alone(split):
    assert ROWS[split](50, 3) == ROWS[split](50, 3)
    assert ROWS[split](50, 3) != ROWS[split](50, 4)
    assert len({_ticket(row) for row in ROWS[split](1200, 3)}) == 1200


def test_no_sentence_of_the_test_occurs_in_training():
    train, test = _sentences(tickets.training_rows(3000, 0)), _sentences(tickets.test_rows(1000, 0))
    assert len(train) > 1000
    assert len(test) > 500
    assert not train & test


def test_no_frame_of_the_test_occurs_in_training():
    train, test = tickets.frames("train"), tickets.frames("test")
    assert len(train) > 120
    assert len(test) > 60
    assert not train & test


def test_no_filled_in_frame_of_training_matches_a_sentence_of_the_test():
    # A sentence could be the same rule in other words; open every slot and compare shapes, not texts.
    grammar = tickets.rules()
    sentences = [frame for frame in tickets.frames("train") if "{@" not in frame and frame]
    slots = r"\{\^?([a-z_.]+)(?:@[a-z_]+)?\}|\{\d+\.\.\d+\}"

    def opened(line: str) -> str:
        pieces, last = [], 0
        for match in re.finditer(slots, line):
            pieces.append(re.escape(line[last : match.start()]))
            pieces.append("(?:" + "|".join(map(opened, grammar.rules[match[1]])) + ")" if match[1] else r"\d+")
            last = match.end()
        return "".join(pieces) + re.escape(line[last:])

    shapes = re.compile("|".join(f"(?:{opened(line)})" for line in sentences if len(re.sub(slots, "", line).split()) > 1), re.IGNORECASE)
    assert any(shapes.fullmatch(sentence) for sentence in _sentences(tickets.training_rows(100, 0)))
    matched = [sentence for sentence in _sentences(tickets.test_rows(600, 0)) if shapes.fullmatch(sentence)]
    assert not matched


def test_words_of_the_test_are_known_from_training_so_that_the_task_can_be_learned():
    words = {split: {w for row in make(1500, 0) for w in re.findall(r"[a-z]+", _ticket(row).lower())} for split, make in ROWS.items()}
    unknown = words["test"] - words["train"]
    assert len(unknown) < 0.15 * len(words["test"]), sorted(unknown)
