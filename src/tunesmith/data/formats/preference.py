r"""Two answers to one prompt, the preferred one first: {"prompt", "chosen", "rejected"}.

The prompt is text, a list of turns, a list under `conversations` or `messages` (LLaMA-Factory), or instruction and input (Alpaca);
the answers are text, a turn, or lists of turns. Without a prompt chosen and rejected are whole conversations, as lists of turns or
as Anthropic's "\n\nHuman: ... \n\nAssistant: ...", or whole texts; what they begin with alike is the prompt. Whole conversations may have
their prompt beside them as well, and must then begin with it. `margin`, or `score_chosen` and `score_rejected`, say by how much the one is
preferred.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.types import Message, Pair, Row
from tunesmith.data.formats import answers, turns

ASIDE = ("system", "tools", "margin", "score_chosen", "score_rejected")
ASKED_ELSEWHERE = ("input", "question", "query", "problem", "context", "task")  # such a column is a prompt by another name
COLUMNS = ("prompt", "chosen", "rejected", *answers.TURNS, "instruction", "input", "history", *ASIDE)


def looks_like(row: Row) -> bool:
    """Has a chosen and a rejected answer."""
    return turns.is_pair(row)


def to_example(row: Row, key: str) -> Pair:
    """The pair of a row.

    Raises DataError naming the side at fault: "no_prompt", "prompt_no_prefix", "prompt_differs", "one_side_whole", "bad_margin", and those
    of `answers.pair`.
    """
    turns.refuse_media(row, key)
    turns.no_near_miss(row, ("chosen", "rejected", *ASIDE), key, "")
    sides = {word: _side(row, word, key) for word in ("chosen", "rejected")}
    tools, margin = turns.tools_of(row.get("tools"), key), _margin(row, key)
    if _are_whole_texts(row):
        start, ends = _parted_texts(row, key)
        return answers.pair(turns.led_by_system(row, [Message("user", start)], key), ends, key, tools, margin)
    whole = [bool(side) and side[0].role != "assistant" for side in sides.values()]
    if not any(whole):
        prompt = turns.led_by_system(row, answers.read_prompt(row, key), key)
        return answers.pair(prompt, sides, key, tools, margin)
    if not all(whole):
        turns.fail(key, "", "one_side_whole", "one side is a whole conversation, the other an answer alone", "write both the same way")
    prompt, rests = _parted(row, sides, key)
    return answers.pair(turns.led_by_system(row, prompt, key), rests, key, tools, margin)


def _side(row: Row, word: str, key: str) -> list[Message]:
    value = turns.required(row, word, key)
    found = answers.from_transcript(value) if "prompt" not in row or answers.from_transcript(row["prompt"]) else []
    if found and found[-1].role != "assistant":
        turns.fail(key, word, f"empty_{word}", f"the {word} transcript ends without an answer", "remove the row, or give it an answer")
    return found or answers.read_side(value, word, key, word)


def _are_whole_texts(row: Row) -> bool:
    """Whether the sides are texts that no prompt stands beside, under whichever name."""
    if any(row.get(name) is not None for name in ("prompt", *answers.TURNS, "instruction", *ASKED_ELSEWHERE)):
        return False
    return all(
        isinstance(row[word], str) and row[word].strip() and not answers.from_transcript(row[word]) for word in ("chosen", "rejected")
    )


def _parted_texts(row: Row, key: str) -> tuple[str, dict[str, Sequence[Message]]]:
    """What both texts begin with, without the space at its end, and what each has behind it; cut where TRL's `extract_prompt` cuts."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        turns.fail(key, "", "same_answers", "chosen and rejected are the same text", "remove the row")
    shorter = min(len(chosen), len(rejected))
    count = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    if 0 < count < shorter and chosen[count - 1] == " ":
        count -= 1
    if not chosen[:count].strip():
        turns.fail(
            key,
            "",
            "no_prompt",
            "there is no prompt, and chosen and rejected do not begin alike, so that none can be taken from them",
            "give it under prompt; see data columns",
        )
    return chosen[:count], {word: [Message("assistant", row[word][count:])] for word in ("chosen", "rejected")}


def _parted(row: Row, sides: dict[str, list[Message]], key: str) -> tuple[list[Message], dict[str, Sequence[Message]]]:
    """The turns that both conversations begin with, and what each has behind them."""
    chosen, rejected = sides.values()
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    if count == len(chosen) == len(rejected):
        turns.fail(key, "", "same_answers", "chosen and rejected are the same conversation", "remove the row")
    given = _given(row, key)
    if given:
        lead = int(chosen[0].role == "system" != given[0].role)
        if any(answers.said(side[lead : lead + len(given)]) != answers.said(given) for side in sides.values()):
            turns.fail(
                key,
                "prompt",
                "prompt_no_prefix",
                "chosen and rejected are whole conversations, and they do not both begin with the prompt",
                "make the prompt the turns that both begin with, or leave it out",
            )
    rests: dict[str, Sequence[Message]] = {word: side[count:] for word, side in sides.items()}
    for word, rest in rests.items():
        if not rest:
            turns.fail(key, word, f"empty_{word}", f"the {word} conversation ends where the other one goes on", "give it an answer")
        if rest[0].role != "assistant":
            turns.fail(
                key,
                word,
                "prompt_differs",
                f"the conversations part at a {rest[0].role} turn (turn {count + 1}), so they do not answer the same prompt",
                "make them differ in assistant turns alone",
            )
    return chosen[:count], rests


def _given(row: Row, key: str) -> list[Message]:
    """The row's prompt as turns, where it has one beside the whole conversations."""
    name = next((name for name in ("prompt", *answers.TURNS) if row.get(name) is not None), None)
    prompt = answers.read_prompt(row, key) if name else []
    # UltraFeedback, binarised, repeats the chosen conversation as `messages`.
    return prompt if name == "prompt" or (prompt and prompt[-1].role != "assistant") else []


def _margin(row: Row, key: str) -> float | None:
    if row.get("margin") is not None:
        return answers.number(row["margin"], key, "margin", "bad_margin")
    given = [name for name in ("score_chosen", "score_rejected") if row.get(name) is not None]
    scores = [answers.number(row[name], key, name, "bad_margin") for name in given]
    if len(scores) == 1:
        turns.fail(key, "", "bad_margin", "one of score_chosen and score_rejected is missing", "give both, or neither")
    return scores[0] - scores[1] if scores else None
