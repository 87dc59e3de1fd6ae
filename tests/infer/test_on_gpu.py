"""Sampling on a GPU: what `test_arena.py` shows with a recorder of its own, with real CUDA graphs. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import FAMILIES, TOKENIZER, check_scored, ids, lively, policy_of, prompts_of, save_lora

from tunesmith.core.ports import SampleSettings
from tunesmith.infer.engine import Engine
from tunesmith.model import graphs
from tunesmith.model.graphs import CudaRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PROMPTS = prompts_of((5, 6, 17, 40, 2, 23, 120))
HEADS = {"hidden_size": 64, "head_dim": 16}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were recorded so far, one entry each."""
    made: list[int] = []

    class Counting(CudaRecorder):
        def __call__(self, step: Any, device: torch.device) -> Any:
            out = super().__call__(step, device)
            made.append(1)
            return out

    monkeypatch.setattr(graphs, "CudaRecorder", Counting)
    return made


def engine_on_gpu(family: str, **options: Any) -> Engine:
    policy = policy_of(lively(family, dtype=torch.bfloat16, **HEADS).to("cuda"))
    return Engine(policy, TOKENIZER, **options)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma2", "phi", "phi3"}))
def test_recorded_steps_are_those_that_go_one_by_one(family: str, recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on_gpu(family)
    assert engine.policy.spans
    for settings in (SampleSettings(60, 0.0), SampleSettings(60, 1.0, n=2, top_p=0.9)):
        before = len(recorded)
        got = engine.sample(PROMPTS, settings)
        assert not engine._next._graphs.off
        assert len(recorded) > before
        with monkeypatch.context() as patched:
            patched.setattr(engine._next._graphs, "off", True)
            want = engine.sample(PROMPTS, settings)
        alike = [a.ids[:20] == b.ids[:20] for one, other in zip(got, want, strict=True) for a, b in zip(one, other, strict=True)]
        assert sum(alike) >= 0.8 * len(alike), "all but near ties"
        check_scored(engine.policy, PROMPTS, got, within=0.5)


def test_rows_have_their_own_adapters_in_recorded_steps(tmp_path: Any, recorded: list[int]) -> None:
    engine = engine_on_gpu("llama")
    for number, name in enumerate(("one", "two")):
        folder = save_lora(tmp_path / name, base=lively("llama", **HEADS), seed=number + 5, r=4 * (number + 1), size=0.3)
        engine.adapters.load(name, folder)
    names = ("one", None, "two", "two", None, "one", "one")
    settings = [SampleSettings(40, 0.0, adapter=name) for name in names]
    mixed = ids(engine.sample(PROMPTS, settings))
    assert recorded
    alone = [ids(engine.sample([prompt], one))[0] for prompt, one in zip(PROMPTS, settings, strict=True)]
    assert sum(a[0][:10] == b[0][:10] for a, b in zip(mixed, alone, strict=True)) >= 5


def test_a_model_that_flash_attention_lacks_goes_by_slots(recorded: list[int]) -> None:
    engine = engine_on_gpu("gemma2")
    assert not engine.policy.spans
    assert len(engine.sample(PROMPTS, SampleSettings(8, 0.0))) == len(PROMPTS)
    assert not recorded
