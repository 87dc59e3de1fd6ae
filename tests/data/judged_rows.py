"""Rows with judged answers and the questions that several test files ask of them."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import DataError, RecipeError
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Wanted
from tunesmith.data.prepare import check_rows, prepare

PAIRS, PAIR_ENDS = Wanted("pairs"), Wanted("pairs", "ends")
LABELS, LABEL_ENDS, KTO = Wanted("labels"), Wanted("labels", "ends"), Wanted("labels", mismatched=True)
STEPS = Wanted("steps", "ends")
PAIRS_THROUGHOUT, LABELS_THROUGHOUT = Wanted("pairs", "throughout"), Wanted("labels", "throughout")


def recipe(train, *, data=None, tokens=None, model=None):
    return Recipe(model={"base": "x", **(model or {})}, data={"train": train, **(data or {})}, tokens={"max_length": 256, **(tokens or {})})


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def label(prompt, completion, verdict):
    return {"prompt": prompt, "completion": completion, "label": verdict}


def refusal(settings, tokenizer, wanted):
    with pytest.raises((DataError, RecipeError)) as caught:
        prepare(settings, tokenizer, wanted)
    return caught.value


def codes(settings, tokenizer, wanted):
    problems, ledger = check_rows(settings, tokenizer, wanted)
    return [problem.code for problem in problems], ledger


def trained(tokenizer, row):
    return tokenizer.decode(row.ids[row.train != 0])
