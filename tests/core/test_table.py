"""Tables: the signature is the schema."""

import pytest

from tunesmith.core.errors import RecipeError
from tunesmith.core.table import Entry, Table


def weigh(value: float, *, beta: float = 0.1, gamma: float) -> float:
    return beta * gamma * value


TABLE = Table("preference loss", {"weigh": Entry(weigh, source="paper")})


def test_settings_are_the_keyword_only_arguments():
    assert list(TABLE["weigh"].settings()) == ["beta", "gamma"]


def test_unknown_name_setting_and_missing_value_are_told_apart():
    with pytest.raises(RecipeError, match="unknown preference loss 'weihg'; did you mean 'weigh'"):
        TABLE.get("weihg")
    with pytest.raises(RecipeError, match="no setting 'bta'; did you mean 'beta'"):
        TABLE.check("weigh", {"bta": 1, "gamma": 2})
    with pytest.raises(RecipeError, match="needs a value for: gamma"):
        TABLE.check("weigh", {"beta": 1})
    assert TABLE.check("weigh", {"gamma": 2}).function is weigh
