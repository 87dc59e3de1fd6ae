"""Graders, case by case; the last cases of each are the ones meant to fool it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tunesmith.core.errors import GradeError, RecipeError
from tunesmith.grade import GRADERS, grader

Case = tuple[str, str, dict[str, Any], float]

EXACT: list[Case] = [
    ("Paris", "Paris", {}, 1),
    (" Paris\n", "Paris", {}, 1),
    (" Paris", "Paris", {"strip": False}, 0),
    ("paris", "Paris", {}, 0),
    ("PARIS", "Paris", {"ignore_case": True}, 1),
    ("Paris.", "Paris", {"ignore_punctuation": True}, 1),
    ("Parisian", "Paris", {}, 0),
    ("cafe\u0301", "caf\u00e9", {}, 1),
    ("", "Paris", {}, 0),
    ("\u200bParis", "Paris", {}, 0),
]
CONTAINS: list[Case] = [
    ("It is Paris, of course", "Paris", {}, 1),
    ("It is paris", "Paris", {}, 0),
    ("It is paris", "Paris", {"ignore_case": True}, 1),
    ("It costs 100", "10", {}, 0),
    ("It costs 100", "10", {"whole_words": False}, 1),
    ("use a.b+c", "a.b+c", {}, 1),
    ("use aXbbc", "a.b+c", {}, 0),
    ("", "Paris", {}, 0),
]
REGEX: list[Case] = [
    ("order 66 is here", "66", {}, 1),
    ("order 67 is here", "66", {}, 0),
    ("id: A-12", "A-12", {"pattern": r"id: (\S+)"}, 1),
    ("id: A-13", "A-12", {"pattern": r"id: (\S+)"}, 0),
    ("id: A-12 no, id: A-13", "A-12", {"pattern": r"id: (\S+)"}, 0),
    ("yes", "-", {"pattern": "YES", "ignore_case": True}, 1),
    ("yes and no", "-", {"pattern": "yes", "full": True}, 0),
    ("one\ntwo", "-", {"pattern": "one.two", "full": True}, 1),
]
NUMERIC: list[Case] = [
    ("It is 18.", "18", {}, 1),
    ("16 - 3 - 4 = 9, and 9 * 2 = 18\n#### 18", "9 * 2 = 18 #### 18", {}, 1),
    ("#### 18 (of 20)", "18", {}, 1),
    ("1,234,567", "1234567", {}, 1),
    ("$1,234.50", "1234.5", {}, 1),
    ("3.14159", "3.14", {"tolerance": 0.002}, 1),
    ("3.15", "3.14", {"tolerance": 0.002}, 0),
    ("101", "100", {"relative": 0.01}, 1),
    ("0.75", "3/4", {}, 1),
    ("it fell to -5", "-5", {}, 1),
    ("a cost of -$5", "-5", {}, 1),
    ("1.2e3", "1200", {}, 1),
    ("5-3", "-3", {}, 0),
    ("10 - 3 gives 7", "7", {}, 1),
    ("we need H2O", "2", {}, 0),
    ("18 apples, 2 each", "18", {}, 0),
    ("0.1 + 0.2 = 0.3", "0.3", {}, 1),
    ("1e999999", "1", {}, 0),
    ("12e99999", "12", {}, 0),
    ("18 " + "7" * 50_000, "18", {}, 0),
    ("1e999/7", "18", {}, 0),
    ("no idea", "18", {}, 0),
    ("\u0661\u0668", "18", {}, 0),
    ("**18**", "18", {}, 1),
    ("_18_", "18", {}, 1),
    ("1/0", "1", {}, 0),
    ("the years 1990-2000", "2000", {}, 1),
    ("so x = -4", "-4", {}, 1),
    ("7 - 4", "-4", {}, 0),
]
JSON_VALID: list[Case] = [
    ('{"a": 1}', "", {}, 1),
    (' [1, 2, "x"]\n', "", {}, 1),
    ('"text"', "", {}, 1),
    ('{"a": 1} and more', "", {}, 0),
    ('Sure! {"a": 1}', "", {}, 0),
    ("{'a': 1}", "", {}, 0),
    ('{"a": 1,}', "", {}, 0),
    ('{"a": NaN}', "", {}, 0),
    ('{"a": 1, "a": 2}', "", {}, 0),
    ("[" * 100_000, "", {}, 0),
    ("[" * 100_000 + "]" * 100_000, "", {}, 0),
    ("9" * 5000, "", {}, 0),
    ("", "", {}, 0),
    ("\u00a0{}", "", {}, 0),
    ('```json\n{"a": 1}\n```', "", {}, 0),
    ('```json\n{"a": 1}\n```', "", {"fenced": True}, 1),
    ('{"a": 1}', "", {"keys": ["a"]}, 1),
    ('{"a": 1}', "", {"keys": ["a", "b"]}, 0),
    ('["a"]', "", {"keys": ["a"]}, 0),
    ('{"a": true}', "", {"schema": {"a": "integer"}}, 0),
    ('{"a": true}', "", {"schema": {"a": "boolean"}}, 1),
    ('{"a": "low"}', "", {"schema": {"a": ["low", "high"]}}, 1),
    ('{"a": "mid"}', "", {"schema": {"a": ["low", "high"]}}, 0),
]
TRUTH = '{"category": "billing", "urgency": 1}'
JSON_FIELDS: list[Case] = [
    ('{"urgency": 1.0, "category": "billing"}', TRUTH, {}, 1),
    ('{"category": "billing", "urgency": 2}', TRUTH, {}, 0.5),
    ('{"category": "billing", "urgency": 2}', TRUTH, {"every": True}, 0),
    ('{"category": "billing", "urgency": 2}', TRUTH, {"fields": ["category"]}, 1),
    ('{"category": "Billing", "urgency": 1}', TRUTH, {"ignore_case": True}, 1),
    ('{"category": "billing"}', TRUTH, {}, 0.5),
    ('{"category": "billing", "urgency": true}', TRUTH, {}, 0.5),
    ('{"category": "x", "category": "billing", "urgency": 1}', TRUTH, {}, 0),
    ('{"urgency": {"level": [1, true]}}', '{"urgency": {"level": [1, 1]}}', {}, 0),
    ("category: billing", TRUTH, {}, 0),
    ("[1]", TRUTH, {}, 0),
]
CITIES = {"options": ["Rome", "Paris", "Paris, Texas"]}
CHOICE: list[Case] = [
    ("B", "B", {}, 1),
    ("(B)", "B", {}, 1),
    ("b.", "B", {}, 1),
    ("B. Paris", "Paris", CITIES, 1),
    ("Paris", "B", CITIES, 1),
    ("The answer is (C).", "C", {}, 1),
    ("I first thought the answer is A, but the answer is B.", "B", {}, 1),
    ("It must be Paris, Texas.", "Paris, Texas", CITIES, 1),
    ("It must be Paris, Texas.", "Paris", CITIES, 0),
    ("Rome or Paris", "Paris", CITIES, 0),
    ("A dog barks", "A", {}, 0),
    ("The answer is about dogs", "A", {}, 0),
    ("A B C D", "A", {}, 0),
    ("", "A", {}, 0),
    ("**B**", "B", {}, 1),
    ("Answer: D", "D", {}, 1),
    ("E", "A", {}, 0),
    ("e", "E", {"letters": "abcde"}, 1),
]
ALL = {
    "exact": EXACT,
    "contains": CONTAINS,
    "regex": REGEX,
    "numeric": NUMERIC,
    "json_valid": JSON_VALID,
    "json_fields": JSON_FIELDS,
    "choice": CHOICE,
}


def test_every_grader_has_its_cases() -> None:
    assert set(ALL) == set(GRADERS)
    assert all(len(cases) >= 6 for cases in ALL.values())


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in ALL.items() for case in cases])
def test_grade(name: str, case: Case) -> None:
    answer, truth, settings, value = case
    grade = grader(name, settings)("a question", answer, truth)
    assert grade.value == value, grade.reason
    assert grade.reason
    assert math.isfinite(grade.value)


@pytest.mark.parametrize(
    ("name", "truth", "settings", "code"),
    [
        ("exact", "  ", {}, "empty_truth"),
        ("exact", "?!", {"ignore_punctuation": True}, "empty_truth"),
        ("contains", "", {}, "empty_truth"),
        ("regex", "(", {}, "bad_pattern"),
        ("regex", "a*", {}, "bad_pattern"),
        ("regex", "", {}, "bad_pattern"),
        ("numeric", "many", {}, "truth_not_number"),
        ("numeric", "3 or 4", {}, "truth_not_number"),
        ("numeric", "3", {"tolerance": -1.0}, "bad_setting"),
        ("json_valid", "", {"schema": {"a": "strnig"}}, "bad_schema"),
        ("json_fields", "billing", {}, "truth_not_json"),
        ("json_fields", "[1]", {}, "truth_not_json"),
        ("json_fields", "{}", {}, "truth_lacks_field"),
        ("json_fields", '{"a": 1}', {"fields": ["b"]}, "truth_lacks_field"),
        ("choice", "F", {}, "truth_not_option"),
        ("choice", "Berlin", CITIES, "truth_not_option"),
        ("choice", "A", {"options": ["x", "X "]}, "bad_options"),
        ("choice", "A", {"letters": "A-D"}, "bad_options"),
        ("choice", "A", {"letters": ""}, "bad_options"),
    ],
)
def test_misuse_is_an_error_and_never_a_zero(name: str, truth: str, settings: dict[str, Any], code: str) -> None:
    with pytest.raises(GradeError) as caught:
        grader(name, settings)("a question", "an answer", truth)
    assert caught.value.code == code
    assert caught.value.remedy


def test_unknown_names_and_settings_are_refused_with_the_near_miss() -> None:
    with pytest.raises(RecipeError, match="did you mean 'exact'"):
        grader("exakt")
    with pytest.raises(RecipeError, match="did you mean 'ignore_case'"):
        grader("exact", {"ignore_cas": True})
