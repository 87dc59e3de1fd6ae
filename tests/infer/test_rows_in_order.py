"""Answers are given as soon as they and those before them are done, and errors name the place of a prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engines import TOKENIZER, engine_of, ids, prompts_of

from tunesmith.core.errors import DataError
from tunesmith.core.ports import SampleSettings
from tunesmith.infer.sampler import TransformersSampler

PROMPTS = prompts_of()
DRAWN = SampleSettings(40, 1.0, seed=5, n=2)
PLACES = [f"rows.jsonl:{number}" for number in range(len(PROMPTS))]


def test_the_engine_gives_answers_in_order_while_it_works_on_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(max_rows=4)
    each = [replace(DRAWN, max_new_tokens=count) for count in (1, 9, 3, 40, 2, 40, 5)]
    steps = []
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda: (steps.append(1), step()))
    given, seen = [], []
    for row in engine.answers(PROMPTS, each):
        given.append(row)
        seen.append(len(steps))
    assert seen[0] == 1, "the first answer has one token"
    assert seen == sorted(seen)
    assert seen[2] == seen[1] < seen[3] < seen[5], "the third was done before the second and waited for it"
    assert ids(given) == ids(engine.sample(PROMPTS, each))
    early = engine.answers(PROMPTS, each)
    next(early)
    early.close()
    assert engine.load["active"] == engine.load["waiting"] == 0
    with pytest.raises(DataError) as caught:
        next(engine.answers([*PROMPTS[:3], []], DRAWN, PLACES))
    assert caught.value.where == "rows.jsonl:3"


def test_the_plain_twin_gives_answers_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = engine_of().policy
    twin = TransformersSampler(policy.model, TOKENIZER, stop_ids=[], attention=policy.own_attention, batch_tokens=100)
    prompts = sorted(PROMPTS, key=len, reverse=True)
    runs = []
    run = twin._run
    monkeypatch.setattr(twin, "_run", lambda *given: (runs.append(1), run(*given))[1])
    given, seen = [], []
    for row in twin.answers(prompts, DRAWN):
        given.append(row)
        seen.append(len(runs))
    assert seen[0] < seen[-1]
    assert ids(given) == ids(twin.sample(prompts, DRAWN))
    with pytest.raises(DataError) as caught:
        next(twin.answers([*PROMPTS[:3], []], DRAWN, PLACES))
    assert caught.value.where == "rows.jsonl:3"
