"""Rows that share their front give what each gives alone, values and gradients, and are laid out as one document only where it pays."""

import numpy as np
import pytest
import torch
from tiny_models import gradients, largest_gap, make_model, make_policy, one_by_one

from tunesmith.core.groups import common_front
from tunesmith.core.types import Batch, Segment
from tunesmith.model import attention
from tunesmith.model.forward import Sharing, passes
from tunesmith.model.probe import settle_front

# Per group: the front, and the tails of its rows; tails may begin alike too, and untrained rows take no part.
GROUPS = [(20, (9, 14)), (40, (30, 4, 17)), (0, (6,)), (1, (5, 5)), (33, (1, 2))]
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 128,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 8,
    },
    "mistral": {"sliding_window": 128},
    "phi3": {},
}


def grouped(groups=GROUPS, seed=1, trained_front=True) -> Batch:
    rng = np.random.default_rng(seed)
    ids, train, segments, start = [], [], [], 0
    for number, (front, tails) in enumerate(groups):
        shared = rng.integers(3, 256, front)
        # The last id of the front is a target as well in half of the groups: both rows read the same state for it.
        for tail in tails:
            own = rng.integers(3, 256, tail)
            ids += [shared, own]
            marks = np.zeros(front + tail, np.float32)
            marks[front:] = rng.choice(np.array([0, 1, 0.5], np.float32), tail)
            marks[-1] = 1
            if trained_front and front > 1 and number % 2:
                marks[front - 1] = 1
            marks[0] = 0
            train.append(marks)
            segments.append(Segment(start, start + front + tail, f"row:{len(segments)}", f"group:{number}"))
            start += front + tail
    return Batch(np.concatenate(ids).astype(np.int32), np.concatenate(train), tuple(segments))


def weighted(values):
    return (values * torch.linspace(-1, 1, len(values), dtype=values.dtype)).sum()


@pytest.mark.parametrize("layer", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_front_is_each_row_alone(family, layer):
    batch = grouped()
    model = make_model(family, dtype=torch.float64, **FAMILIES[family])
    policy = make_policy(model, layer=layer)
    settle_front(policy)
    assert policy.sharing is not None
    assert policy.layout == "packed"
    policy.sharing = Sharing(policy.sharing.window, 1 << 40)
    shared = policy.score(batch)
    mine = gradients(model, weighted(shared.logp))
    policy.sharing = None
    alone = policy.score(batch)
    assert shared.index.tolist() == alone.index.tolist() == np.flatnonzero(batch.train).tolist()
    limit = 1e-10 if family in ("llama", "qwen3", "mistral") else 3e-5  # the other families' own norms round to fp32
    torch.testing.assert_close(shared.logp, alone.logp, rtol=0, atol=limit)
    with policy.sampling():
        torch.testing.assert_close(shared.logp, one_by_one(model, batch), rtol=0, atol=limit)
    assert largest_gap(mine, gradients(model, weighted(alone.logp))) < limit


def test_states_read_at_the_token_itself():
    batch = grouped()
    model = make_model(dtype=torch.float64)
    policy = make_policy(model)
    rows = {}
    for sharing in (Sharing(0, 1 << 40), None):
        found = []
        for one in passes(batch, policy.device, "packed", at="at", sharing=sharing):
            states = policy.run(one)[0].index_select(0, one.rows)
            found += sorted(zip(one.index.tolist(), states.detach(), strict=True), key=lambda pair: pair[0])
        rows[sharing is None] = found
    truth = []
    for segment in batch.segments:
        states = model.model(torch.tensor(batch.ids[segment.start : segment.stop].astype(np.int64))[None]).last_hidden_state[0]
        truth += [states[t] for t in np.flatnonzero(batch.train[segment.start : segment.stop])]
    for found in rows.values():
        assert [place for place, _ in found] == np.flatnonzero(batch.train).tolist()
        torch.testing.assert_close(torch.stack([s for _, s in found]), torch.stack(truth), rtol=0, atol=1e-10)


def test_a_pair_with_a_long_prompt_is_one_document_and_one_with_a_short_prompt_is_two():
    sharing = Sharing(0, 32)
    long, short = (passes(grouped([(front, (60, 50))]), torch.device("cpu"), "packed", sharing=sharing)[0].layout for front in (120, 20))
    assert (len(long.lengths), len(long.trees), long.real) == (1, 1, 120 + 59 + 49)
    assert (len(short.lengths), len(short.trees)) == (2, 0)


def test_rows_beyond_the_window_stay_apart():
    model = make_model("mistral", dtype=torch.float64, sliding_window=24)
    policy = make_policy(model)
    settle_front(policy)
    batch = grouped([(10, (6, 9)), (22, (5, 6))])
    policy.sharing = Sharing(policy.sharing.window, 1 << 40)
    assert policy.sharing.window == 24
    layouts = [one.layout for one in passes(batch, policy.device, "packed", sharing=policy.sharing)]
    assert [len(layout.trees) for layout in layouts] == [1, 0]
    torch.testing.assert_close(policy.score(batch).logp, one_by_one(model, batch), rtol=0, atol=1e-10)


def test_sharing_is_refused_where_it_changes_the_results(monkeypatch):
    policy = make_policy(make_model(), layer=False)
    monkeypatch.setattr(attention.Layout, "_rectangles", lambda self, number: [])
    settle_front(policy)
    assert policy.sharing is None
    assert "shared prompt changes the results" in policy.notes[-1]


def test_padded_models_do_not_share():
    policy = make_policy(make_model(), packed=False)
    settle_front(policy)
    assert policy.sharing is None
    assert policy.ways()["front"] == "own"


@pytest.mark.parametrize(
    ("rows", "front"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 4]], 2), ([[5], [6]], 0), ([[], [1]], 0), ([[7, 8], [7, 8], [7]], 1)]
)
def test_common_front(rows, front):
    assert common_front([np.array(row, np.int32) for row in rows]) == front
