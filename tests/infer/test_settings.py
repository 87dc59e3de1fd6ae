"""Settings of the wrong kind are named, and what can only mean one thing is taken as that."""

from __future__ import annotations

import pytest
from engines import TOKENIZER, engine_of

from tunesmith.core.errors import RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.infer.draw import check_settings
from tunesmith.infer.sampler import TransformersSampler

WRONG = [
    ("max_new_tokens", 1.5), ("max_new_tokens", None), ("max_new_tokens", True), ("temperature", None), ("temperature", "1"),
    ("temperature", True), ("top_p", None), ("top_k", 2.5), ("top_k", "5"), ("n", 2.5), ("seed", "x"), ("seed", 1.0), ("min_p", None),
    ("repetition_penalty", None), ("frequency_penalty", "0"), ("presence_penalty", None), ("stop", (5,)), ("stop", 5), ("stop", None),
    ("stop", ""), ("stop_ids", (99999,)), ("stop_ids", (-1,)), ("stop_ids", 5), ("stop_ids", ("5",)), ("stop_ids", (True,)),
    ("top_logprobs", True), ("top_logprobs", 2.0), ("logit_bias", {"x": 1}), ("logit_bias", {"99999": 1}), ("logit_bias", {5: "1"}),
    ("logit_bias", [5]), ("logit_bias", None), ("adapter", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value}" for name, value in WRONG])
def test_a_setting_of_the_wrong_kind_is_named_with_what_it_should_be(name: str, value: object) -> None:
    engine = engine_of()
    twin = TransformersSampler(engine.policy.model, TOKENIZER, stop_ids=[], attention=engine.policy.own_attention)
    for sampler in (engine, twin):
        with pytest.raises(RecipeError) as caught:
            sampler.sample([[3]], SampleSettings(**{name: value}))
        assert (caught.value.where, caught.value.code) == (name, "bad_setting")
        assert caught.value.remedy.startswith("use ")
    assert repr(getattr(SampleSettings(**{name: value}), name)) in caught.value.message


def test_one_stop_is_a_text_and_ids_of_biases_may_come_from_json() -> None:
    assert SampleSettings(stop="END").stop == ("END",)
    assert SampleSettings(logit_bias={"5": 1, 6: 2.0}).logit_bias == {5: 1, 6: 2.0}
    check_settings(SampleSettings(stop="END", logit_bias={"5": 1}, stop_ids=[5], temperature=1), 256)
    engine = engine_of()
    given, text = SampleSettings(1, 0.0, logit_bias={"5": 100}), SampleSettings(1, 0.0, logit_bias={5: 100.0})
    assert engine.sample([[3]], given)[0][0].ids == engine.sample([[3]], text)[0][0].ids == (5,)
