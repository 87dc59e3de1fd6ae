"""Whole sampling steps in one compiled function, through an engine: what transformers and the trainer say, with windows and adapters."""

from __future__ import annotations

import pytest
import torch
from engines import TOKENIZER, check_scored, greedy_by_transformers, ids, lively, policy_of, prompts_of, save_lora, with_lora

from tunesmith.core.ports import SampleSettings
from tunesmith.infer.engine import Engine
from tunesmith.model import fuse, native
from tunesmith.model.cached import Cache
from tunesmith.model.feed import Prompts
from tunesmith.model.next_token import NextToken

SLIDING = {"use_sliding_window": True, "sliding_window": 12, "layer_types": ["full_attention", "sliding_attention"]}
FAMILIES = {"llama": {}, "qwen2": SLIDING, "qwen3": SLIDING, "mistral": {"sliding_window": 12}}

# Without a compiler, or on processors that PyTorch has no block product for, there are no whole steps: the other tests go that way.
# Where there is a compiler, tests/model/test_native.py fails when it does not take our functions.
pytestmark = pytest.mark.skipif(native.multiplier(torch.float32) is None, reason="no C++ compiler, or no block product, here")


def wide(family: str = "llama", **changes):
    """A random model with heads of 16 numbers, the narrowest that whole steps are made for."""
    return lively(family, **{"head_dim": 16, "initializer_range": 0.15, **FAMILIES[family], **changes})


def engine_on(model) -> Engine:
    return Engine(policy_of(model), TOKENIZER)


def went_whole(engine: Engine) -> bool:
    return bool(fuse.fused_layers(engine.policy.model)[0].tunesmith.whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_transformers_also_beyond_the_window(family: str) -> None:
    model, prompts = wide(family), prompts_of()
    wanted = greedy_by_transformers(model, prompts, 40)
    engine = engine_on(model)
    found = engine.sample(prompts, SampleSettings(40, 0.0))
    assert went_whole(engine)
    assert [row[0] for row in ids(found)] == wanted
    with native.switched(False):
        assert ids(engine_on(wide(family)).sample(prompts, SampleSettings(40, 0.0))) == ids(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_trainers(family: str) -> None:
    engine, prompts = engine_on(wide(family)), prompts_of()
    rows = engine.sample(prompts, SampleSettings(30, 1.0, n=2, seed=5))
    assert went_whole(engine)
    check_scored(engine.policy, prompts, rows)


@pytest.mark.parametrize(("compiled", "head"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_works_out_what_is_asked_for_alone(family: str, compiled: bool, head: bool) -> None:
    """No token, tokens in the middle and two of one row, in any order, of whole prompts and of parts behind others, longer than the window.

    With transformers' own head (`head` off) the last layer leaves nothing out.
    """
    model = wide(family)
    rows = [list(map(int, row)) for row in prompts_of((31, 5, 40))]
    policy = policy_of(model, head=head)
    with torch.no_grad():
        wanted = [model(torch.tensor([row])).logits[0] for row in rows]
    with native.switched(compiled):
        reads, cache = NextToken(policy), Cache()
        with reads.ready():
            for row, tokens in enumerate(rows):
                cache.add(row, len(tokens))
            for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
                cuts = [(int(low * len(row)), int(high * len(row))) for row in rows]
                feed = Prompts(cache, [(i, rows[i][a:b], a) for i, (a, b) in enumerate(cuts)], policy.device)
                starts = dict(zip(feed.rows, feed.layout.starts.tolist(), strict=False))
                asked = [(2, cuts[2][1] - 1), (0, cuts[0][0]), (0, cuts[0][0] + 3), (1, cuts[1][1] - 1)] if low else []
                places = torch.tensor([starts[row] + place - cuts[row][0] for row, place in asked], dtype=torch.long)
                logits = reads.logits(feed, places)
                assert (fuse.READ in feed.kept) == head
                if not asked:
                    assert logits.shape == (0, policy.vocabulary)
                    continue
                torch.testing.assert_close(logits, torch.stack([wanted[row][place] for row, place in asked]), rtol=1e-4, atol=1e-4)


def test_angles_beyond_the_first_table_are_the_trainers() -> None:
    engine = engine_on(wide(max_position_embeddings=700))
    prompts = prompts_of((250, 5, 500))
    rows = engine.sample(prompts, SampleSettings(20, 1.0, seed=5))
    assert went_whole(engine)
    check_scored(engine.policy, prompts, rows)


def test_angles_that_change_with_the_longest_row_are_worked_out_for_each_step() -> None:
    """A table of places beyond the limit would hold the angles of long rows."""
    limit = 64
    engine = engine_on(wide(max_position_embeddings=limit, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}))
    assert engine.policy.alone_from == limit
    prompts = prompts_of((30, 5, 12))
    rows = engine.sample(prompts, SampleSettings(30, 1.0, seed=5))
    assert went_whole(engine)
    check_scored(engine.policy, prompts, rows)


def test_the_policys_own_adapter_is_sampled_through() -> None:
    engine, prompts = engine_on(with_lora(wide(), size=0.1)), prompts_of()
    for parameter in engine.policy.parameters_by_name().values():
        rows = engine.sample(prompts, SampleSettings(20, 1.0, seed=5))
        check_scored(engine.policy, prompts, rows)
        with torch.no_grad():
            parameter.add_(0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_adapters_are_each_adapter_alone(family: str, tmp_path) -> None:
    folders = [save_lora(tmp_path / str(n), seed=n, r=4 + 12 * n, base=wide(family)) for n in range(3)]
    prompts, settings = prompts_of(), [SampleSettings(30, 1.0, seed=7, adapter=[None, "a0", "a1", "a2"][n % 4]) for n in range(7)]
    engine = engine_on(wide(family))
    for number, folder in enumerate(folders):
        engine.adapters.load(f"a{number}", folder)
    together = engine.sample(prompts, settings)
    assert went_whole(engine)
    for number in range(4):
        rows = [n for n in range(7) if n % 4 == number]
        from peft import PeftModel

        model = wide(family) if number == 0 else PeftModel.from_pretrained(wide(family), folders[number - 1]).eval()
        policy = policy_of(model)
        check_scored(policy, [prompts[n] for n in rows], [together[n] for n in rows])
