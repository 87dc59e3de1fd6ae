"""The rules language: slots, memory, numbers, articles, and errors at the door."""

from pathlib import Path
from random import Random

import pytest

from tunesmith.pocket.grammar import Grammar


def test_slots_are_filled_and_remembered():
    grammar = Grammar({"top": ["{^word@x} and {word@x} and {@y}"], "word": ["one", "two", "three"]})
    texts = {grammar.write("top", Random(seed), {"y": "four"}) for seed in range(30)}
    assert texts == {"One and one and four", "Two and two and four", "Three and three and four"}


def test_what_is_remembered_can_be_read_afterwards():
    bound: dict[str, str] = {}
    text = Grammar({"top": ["{1..6@n} plus {1..6}"]}).write("top", Random(0), bound)
    assert text.startswith(bound["n"] + " plus ")
    assert 1 <= int(bound["n"]) <= 6


def test_article_follows_the_next_sound():
    write = Grammar({"top": ["A {w}, not a {v}"], "w": ["apple"], "v": ["user"]}).write
    assert write("top", Random(0)) == "An apple, not a user"


def test_empty_alternatives_leave_no_double_space():
    assert Grammar({"top": ["a {none} b {none}\\n{none} c"], "none": [""]}).write("top", Random(0)) == "a b\nc"


def test_unknown_rule_is_an_error_before_anything_is_written():
    with pytest.raises(KeyError, match="'top' uses 'nuon'"):
        Grammar({"top": ["{nuon}"], "noun": ["x"]})


@pytest.mark.parametrize(("text", "message"), [("[a]\nx\n[a]\ny\n", "defined twice"), ("x\n[a]\ny\n", "before the first rule")])
def test_bad_rules_files_are_errors(tmp_path: Path, text, message):
    path = tmp_path / "rules.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Grammar.read(path)


def test_alternatives_are_used_equally():
    grammar, random = Grammar({"top": ["a", "b", "c", "d"]}), Random(1)
    counts = [0] * 4
    for _ in range(4000):
        counts["abcd".index(grammar.write("top", random))] += 1
    assert min(counts) > 900
