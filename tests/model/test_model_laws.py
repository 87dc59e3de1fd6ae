import numpy as np
import pytest
import torch
from tiny_models import gradients, largest_gap, make_batch, make_model, make_policy, one_by_one

from tunesmith.core.errors import BugError, ModelError
from tunesmith.core.types import Batch, Segment
from tunesmith.model.layout import TAIL

BATCH = make_batch(weights=(0.0, 1.0, 0.5))
LAYOUTS = [{"packed": True}, {"packed": False}, {"packed": True, "head": False}, {"packed": False, "head": False}]


def weighted(logp: torch.Tensor) -> torch.Tensor:
    return (logp * torch.linspace(-1, 1, len(logp), dtype=logp.dtype)).sum()


@pytest.mark.parametrize("fast", LAYOUTS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_and_padded_are_one_by_one(fast, dtype, limit, tied):
    model = make_model(dtype=dtype, tie_word_embeddings=tied)
    policy = make_policy(model, **fast)
    assert policy.layout == ("packed" if fast["packed"] else "padded")
    assert policy.head == ("plain" if fast.get("head") is False else "fast")
    outputs = policy.score(BATCH)
    reference = one_by_one(make_model(dtype=dtype, tie_word_embeddings=tied), BATCH)
    assert outputs.index.tolist() == np.flatnonzero(BATCH.train).tolist()
    np.testing.assert_array_equal(outputs.train.numpy(), BATCH.train[BATCH.train != 0])
    assert float((outputs.logp - reference).detach().abs().max()) < limit
    other = make_model(dtype=dtype, tie_word_embeddings=tied)
    theirs = gradients(other, weighted(one_by_one(other, BATCH)))
    assert largest_gap(gradients(model, weighted(outputs.logp)), theirs) < limit


def test_likelihood_gradient_takes_the_short_way_and_is_exact():
    """A loss proportional to the train weights lets the head use the gradient it kept; it must be the true one."""
    model = make_model(dtype=torch.float64)
    outputs = make_policy(model).score(BATCH)
    ours = gradients(model, -(outputs.logp * outputs.train).sum() / 3)
    other = make_model(dtype=torch.float64)
    theirs = gradients(other, -(one_by_one(other, BATCH) * outputs.train).sum() / 3)
    assert largest_gap(ours, theirs) < 1e-10


def test_left_padding_is_right_padding():
    model = make_model(dtype=torch.float64)
    policy = make_policy(model, packed=False)
    right = policy.score(BATCH).logp
    policy.side = "left"
    left = policy.score(BATCH).logp
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
    assert largest_gap(gradients(model, weighted(left)), gradients(model, weighted(right))) < 1e-9


def test_long_documents_beside_short_ones():
    batch = make_batch((800, 33, 1, 900, 7))
    model = make_model(dtype=torch.float64, max_position_embeddings=1024)
    logp = make_policy(model).score(batch).logp
    torch.testing.assert_close(logp, one_by_one(model, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
def test_one_batch_is_the_sum_of_its_parts(packed):
    model = make_model(dtype=torch.float64)
    policy = make_policy(model, packed=packed)
    whole = gradients(model, weighted_by_train(policy, BATCH))
    parts: dict[str, torch.Tensor] = {}
    for segment in BATCH.segments:
        a, b = segment.start, segment.stop
        part = Batch(BATCH.ids[a:b], BATCH.train[a:b], (Segment(0, b - a, segment.key),))
        for name, gradient in gradients(model, weighted_by_train(policy, part)).items():
            parts[name] = parts.get(name, 0) + gradient
    assert largest_gap(whole, parts) < 1e-10


def weighted_by_train(policy, batch):
    outputs = policy.score(batch)
    return (outputs.logp * outputs.train).sum()


@pytest.mark.parametrize("packed", [True, False])
def test_untrained_tokens_have_no_gradient(packed):
    """What stands after the last trained token of a document can be anything."""
    train = BATCH.train.copy()
    for segment in BATCH.segments:
        train[(segment.start + segment.stop) // 2 + 1 : segment.stop] = 0
    other = BATCH.ids.copy()
    for segment in BATCH.segments:
        stop = segment.start + np.flatnonzero(train[segment.start : segment.stop]).max(initial=-1) + 1
        other[stop : segment.stop] = 7
    assert (other != BATCH.ids).any()
    model = make_model(dtype=torch.float64)
    policy = make_policy(model, packed=packed)
    a, b = (Batch(ids, train, BATCH.segments) for ids in (BATCH.ids, other))
    assert torch.equal(policy.score(a).logp, policy.score(b).logp)
    assert largest_gap(gradients(model, policy.score(a).logp.sum()), gradients(model, policy.score(b).logp.sum())) < 1e-12


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_activations_changes_nothing(packed, dtype):
    model = make_model()
    policy = make_policy(model, packed=packed, layer=False)
    policy.dtype, policy.autocast = dtype, dtype == torch.bfloat16
    policy.train_mode(True)
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = policy.score(BATCH).logp
    off = gradients(model, weighted(kept))
    before = len(calls)
    policy.set_checkpointing(True)
    again = policy.score(BATCH).logp
    on = gradients(model, weighted(again))
    assert len(calls) == 3 * before  # forward, forward, and once more in the backward pass
    policy.set_checkpointing(False)
    assert torch.equal(kept, again)
    assert largest_gap(on, off) < 1e-6


def test_a_batch_without_trained_tokens_scores_to_nothing():
    policy = make_policy(make_model())
    outputs = policy.score(Batch(BATCH.ids, np.zeros_like(BATCH.train), BATCH.segments))
    assert outputs.logp.shape == outputs.index.shape == outputs.train.shape == (0,)
    outputs.logp.sum().backward()


def test_no_graph_is_kept_when_none_is_asked_for():
    policy = make_policy(make_model())
    with torch.no_grad():
        assert not policy.score(BATCH).logp.requires_grad


def test_what_cannot_be_scored_is_refused():
    policy = make_policy(make_model())
    train = BATCH.train.copy()
    train[BATCH.segments[1].start] = 1
    with pytest.raises(BugError, match="first token"):
        policy.score(Batch(BATCH.ids, train, BATCH.segments))
    ids = BATCH.ids.copy()
    ids[4] = 256
    with pytest.raises(BugError, match="vocabulary"):
        policy.score(Batch(ids, BATCH.train, BATCH.segments))
    with pytest.raises(ModelError, match="no adapter"), policy.adapter_disabled():
        pass


def test_generate_gives_the_same_with_and_without_our_attention():
    model = make_model()
    prompt = torch.tensor([[0, 0, 5, 9, 17], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **arguments)
    policy = make_policy(model)
    assert policy.layout == "packed"
    assert torch.equal(policy.model.generate(prompt, **arguments), expected)
    with policy.sampling() as inside:
        assert torch.equal(inside.generate(prompt, **arguments), expected)
    assert torch.equal(policy.score(BATCH).logp, policy.score(BATCH).logp)


def test_full_bf16_keeps_fp32_weights_and_stays_near():
    """The plain decoder layers under autocast; the fused ones have tests of their own."""
    exact = make_policy(make_model(), layer=False)
    policy = make_policy(make_model(), layer=False)
    policy.dtype, policy.autocast = torch.bfloat16, True
    policy.train_mode(True)
    outputs = policy.score(BATCH)
    assert outputs.logp.dtype == torch.float32
    gap = (outputs.logp - exact.score(BATCH).logp).detach().abs()
    assert 0 < float(gap.mean()) < 0.05
    ours = gradients(policy.model, -outputs.logp.sum())
    assert {g.dtype for g in ours.values()} == {torch.float32}
    theirs = gradients(exact.model, -exact.score(BATCH).logp.sum())
    assert largest_gap(ours, theirs) < 0.05


def test_attention_dropout_is_drawn_per_document_in_training_only():
    batch = make_batch((30, 12, 800))
    policy = make_policy(make_model(attention_dropout=0.3, max_position_embeddings=1024))
    still = policy.score(batch).logp
    torch.testing.assert_close(still, one_by_one(policy.model, batch), rtol=1e-5, atol=2e-5)
    policy.train_mode(True)
    assert float((policy.score(batch).logp - still).detach().abs().mean()) > 1e-3
    policy.train_mode(False)
    assert torch.equal(policy.score(batch).logp, still)


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_behind_the_last_trained_token_is_computed(packed):
    train = BATCH.train.copy()
    for segment in BATCH.segments:
        train[segment.start + 2 : segment.stop] = 0
        train[segment.start + 1] = 1
    policy = make_policy(make_model(), packed=packed)
    seen = []
    policy.causal.get_input_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape[0] * out.shape[1]))
    policy.score(Batch(BATCH.ids, train, BATCH.segments))
    assert seen[0] == (TAIL if packed else len(BATCH.segments))
