"""Graders over JSON: is it valid, and are its fields right."""

# Every grader takes prompt, answer and truth, whichever of them it looks at.
# ruff: noqa: ARG001

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.core.errors import GradeError
from tunesmith.core.types import Grade

_FENCE = re.compile(r"\A```(?:json|JSON)?[ \t]*\n(.*)\n?```\Z", re.DOTALL)
_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class _NotJson(ValueError):
    """The text is not exactly one JSON value."""


def json_valid(
    prompt: str,
    answer: str,
    truth: str,
    *,
    keys: Sequence[str] = (),
    schema: Mapping[str, str | Sequence[Any]] | None = None,
    fenced: bool = False,
) -> Grade:
    """1 when the whole answer is one JSON value (RFC 8259); the truth is not used.

    keys: members that an object must have. schema: for each member its type (string, integer, number, boolean, array, object, null)
    or the list of values it may take; the members named are required. fenced also admits a value inside one Markdown code fence.
    NaN, Infinity and repeated keys, which Python's parser lets pass, are invalid.
    Raises GradeError for an unknown type in schema.
    """
    wanted = dict(schema or {})
    _check_schema(wanted)
    try:
        value = parse(answer, fenced=fenced)
    except _NotJson as error:
        return Grade(0.0, str(error))
    needed = [*keys, *(name for name in wanted if name not in keys)]
    if needed and not isinstance(value, dict):
        return Grade(0.0, f"valid JSON, but {_kind(value)} and not an object")
    missing = [name for name in needed if name not in value]
    if missing:
        return Grade(0.0, f"missing: {', '.join(missing)}")
    for name, rule in wanted.items():
        if not _fits(value[name], rule):
            return Grade(
                0.0, f"{name} is {json.dumps(value[name])[:60]}, not {rule if isinstance(rule, str) else 'one of the allowed values'}"
            )
    return Grade(1.0, "valid")


def json_fields(
    prompt: str,
    answer: str,
    truth: str,
    *,
    fields: Sequence[str] = (),
    every: bool = False,
    ignore_case: bool = False,
    fenced: bool = False,
) -> Grade:
    """The fraction of fields in which the answer's JSON object equals the truth's.

    fields: names to compare (default: all members of the truth); every: 1 only when all of them are equal, otherwise 0.
    Values are equal as JSON: 1 equals 1.0, true does not equal 1, objects regardless of order. Further members of the answer do not count.
    An answer that is no JSON object is worth 0.
    Raises GradeError when the truth is no JSON object, or lacks one of fields.
    """
    want = _truth_object(truth)
    names = list(fields) or list(want)
    absent = [name for name in names if name not in want]
    if absent or not names:
        what = f"lacks the field '{absent[0]}'" if absent else "has no fields"
        raise GradeError(
            f"the truth {truth[:80]!r} {what}", where="truth", remedy="name fields that every truth has", code="truth_lacks_field"
        )
    try:
        got = parse(answer, fenced=fenced)
    except _NotJson as error:
        return Grade(0.0, str(error))
    if not isinstance(got, dict):
        return Grade(0.0, f"valid JSON, but {_kind(got)} and not an object")
    wrong = [name for name in names if name not in got or not same(got[name], want[name], ignore_case=ignore_case)]
    share = 1.0 - len(wrong) / len(names)
    return Grade(float(not wrong) if every else share, f"wrong: {', '.join(wrong)}" if wrong else "all fields right")


def parse(text: str, *, fenced: bool = False) -> Any:
    """The one JSON value that the text is. Raises ValueError saying what is wrong."""
    body = text.strip(" \t\r\n")
    if fenced and (match := _FENCE.match(body)):
        body = match[1]
    if not body:
        raise _NotJson("the answer is empty")
    try:
        return json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise _NotJson("not JSON: nested too deeply") from None
    except _NotJson:
        raise
    except ValueError as error:
        raise _NotJson(f"not JSON: {error}") from None


def same(left: Any, right: Any, *, ignore_case: bool = False) -> bool:
    """Equality of JSON values, in which true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, str) and isinstance(right, str):
        return left.casefold() == right.casefold() if ignore_case else left == right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same(a, b, ignore_case=ignore_case) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name], ignore_case=ignore_case) for name in left)
    return bool(left == right)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise _NotJson(f"not JSON: the key {name!r} stands twice")
        out[name] = value
    return out


def _no_constant(word: str) -> None:
    raise _NotJson(f"not JSON: {word} is no JSON number")


def _truth_object(truth: str) -> dict[str, Any]:
    try:
        value = parse(truth)
    except _NotJson as error:
        raise GradeError(
            f"the truth {truth[:80]!r} is not JSON ({error})",
            where="truth",
            remedy="json_fields needs rows whose truth is a JSON object",
            code="truth_not_json",
        ) from None
    if not isinstance(value, dict):
        raise GradeError(
            f"the truth {truth[:80]!r} is {_kind(value)}",
            where="truth",
            remedy="json_fields needs rows whose truth is a JSON object",
            code="truth_not_json",
        )
    return value


def _check_schema(schema: Mapping[str, str | Sequence[Any]]) -> None:
    for name, rule in schema.items():
        if isinstance(rule, str) and rule not in _KINDS:
            raise GradeError(
                f"'{rule}' is no JSON type",
                where=f"schema.{name}",
                remedy=f"use one of: {', '.join(_KINDS)}, or a list of values",
                code="bad_schema",
            )


def _fits(value: Any, rule: str | Sequence[Any]) -> bool:
    if not isinstance(rule, str):
        return any(same(value, allowed) for allowed in rule)
    # bool is a subclass of int in Python and a type of its own in JSON.
    return isinstance(value, _KINDS[rule]) and (rule == "boolean" or not isinstance(value, bool))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    return {str: "a string", list: "an array", dict: "an object", type(None): "null"}.get(type(value), "a number")
