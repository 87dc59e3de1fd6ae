"""The laws of training on preferences, labels, steps and rewards: every row of the objective table, all weights and LoRA."""

import types

import pytest
import torch
from judged import THROUGHOUT

from tunesmith.core.load import build
from tunesmith.core.recipe import Fast, Named
from tunesmith.data.pack import pack
from tunesmith.data.prepare import prepare
from tunesmith.model.build import build_policy
from tunesmith.model.forward import Sharing, passes
from tunesmith.model.policy import Policy
from tunesmith.model.probe import settle, settle_front
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import OBJECTIVES, methods, wanted
from tunesmith.training.parallel import Ranks
from tunesmith.training.reference import References
from tunesmith.training.step import Budget, Sums, _slopes, counts_of, gradient_step, validate, zero_gradients

KINDS = ["full", "lora"]
ROWS = [name for name in OBJECTIVES if name != "nll"]


@pytest.fixture
def built(wish):
    """built(objective, adapter): terms, rows with their reference, and a policy whose every trained weight has moved off its start."""

    def make(name: str, adapter: str, **more):
        recipe = build(wish(name, adapter, **more)).recipe
        terms = methods(recipe.objective)
        needs = {word for term in terms for word in term.needs}
        tokenizer = load_tokenizer(recipe.model.base)
        prepared = prepare(recipe, tokenizer, wanted=wanted(terms))
        policy = build_policy(recipe.model, "cpu", seed=0, head="score" if "score" in needs else "language")
        rows = prepared.train
        if "reference" in needs:
            rows = References(recipe, policy, "", tokenizer, Budget(1000), Ranks()).fill(rows, rows.lengths > 0)
        policy.train_mode(True)
        with torch.no_grad():
            for number, parameter in enumerate(policy.parameters_by_name().values()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
        return terms, list(rows), policy

    return make


def gradients(policy, rows, terms, size, ranks=None):
    zero_gradients(policy)
    result = gradient_step(policy, rows, terms, Budget(size), ranks or Ranks())
    return result, {name: p.grad.clone() for name, p in policy.parameters_by_name().items() if p.grad is not None}


def assert_same(found, truth, limit):
    assert set(found) == set(truth)
    size = sum(float(g.double().square().sum()) for g in truth.values()) ** 0.5
    gap = sum(float((found[n] - truth[n]).double().square().sum()) for n in truth) ** 0.5
    assert gap <= limit * size


def doubled(built, name, adapter):
    """What `built` gives with the model in fp64, norms of transformers included, which round to fp32 otherwise."""
    terms, rows, policy = built(name, adapter)
    model = policy.model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(exact_norm, module)
    policy = Policy(model, torch.float64)
    settle(policy, Fast())
    policy.train_mode(True)
    return terms, rows, policy


def exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def shared_fronts(policy, rows, size):
    """How many documents of a step hold rows that share a front."""
    at = "at" if policy.scalar else "before"
    batches = pack(rows, size, sharing=True)
    return sum(len(one.layout.trees) for b in batches for one in passes(b, policy.device, "packed", at=at, sharing=policy.sharing))


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("name", [*ROWS, *THROUGHOUT])
def test_a_shared_prompt_is_the_prompt_of_each_row(built, name, adapter):
    """In fp64: loss, metrics and gradients, with the front of every group shared and with none, whether or not that saves work."""
    terms, rows, policy = doubled(built, name, adapter)
    grouped = len({row.group or row.key for row in rows}) < len(rows)
    alone, expected = gradients(policy, rows, terms, 700)
    settle_front(policy)
    policy.sharing = Sharing(0, 1 << 40)
    assert shared_fronts(policy, rows, 700) == (24 if grouped else 0)
    found, slopes = gradients(policy, rows, terms, 700)
    assert {value.dtype for value in slopes.values()} == {torch.float64}
    assert found.loss == pytest.approx(alone.loss, abs=1e-10, rel=1e-10)
    assert found.metrics == pytest.approx(alone.metrics, abs=1e-10, rel=1e-10)
    assert_same(slopes, expected, 1e-10)


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("name", [*ROWS, *THROUGHOUT])
def test_micro_batches_layouts_and_fronts_change_nothing(built, name, adapter):
    """Packed with shared prompts, packed without, padded; in one micro-batch or in many: one loss, one gradient."""
    terms, rows, policy = built(name, adapter)
    groups = len({row.group or row.key for row in rows})
    assert groups == 24
    truth, expected = gradients(policy, rows, terms, 100_000)
    assert truth.loss == truth.loss
    assert any(float(g.abs().max()) > 0 for g in expected.values())
    if len(rows) > groups:
        settle_front(policy)
        assert policy.sharing is not None
    for size in (1, 700, 100_000):
        found, slopes = gradients(policy, rows, terms, size)
        assert found.loss == pytest.approx(truth.loss, abs=2e-6, rel=1e-6)
        assert found.metrics == pytest.approx(truth.metrics, abs=2e-4, rel=1e-6)
        assert_same(slopes, expected, 1e-4)
    assert validate(policy, rows, terms, Budget(700), Ranks()).loss == pytest.approx(truth.loss, abs=2e-6, rel=1e-6)
    terms, rows, policy = built(name, adapter, way="plain")
    assert policy.layout == "padded"
    found, slopes = gradients(policy, rows, terms, 700)
    assert found.loss == pytest.approx(truth.loss, abs=2e-6, rel=1e-6)
    assert_same(slopes, expected, 1e-4)


def test_a_rank_without_rows_takes_part_in_a_whole_step_loss(built):
    """A step with fewer micro-batches than ranks: the idle rank gathers the others' rows and has no slope of its own."""
    terms, rows, policy = built("kto", "lora")
    batches = pack(rows, 100_000)
    filled = [terms[0].collect(policy.score(batch), batch).detach("cpu") for batch in batches]

    class Idle(Ranks):
        def gather(self, value):
            assert value == []
            return [filled, value]

    sums = Sums()
    assert _slopes(policy, [], terms[0], counts_of(batches, Ranks()), Idle(1, 2), sums) == []
    assert sums.loss == 0


def test_the_balance_of_labels_is_held_against_the_weights(wish):
    from tunesmith.training.balance import balance

    recipe = build(wish("kto", "lora")).recipe
    ledger = prepare(recipe, load_tokenizer(recipe.model.base), wanted=wanted(methods(recipe.objective))).ledger
    assert "16 good and 8 bad answers" in balance(recipe, ledger)
    assert "undesirable_weight is recommended to be 1.50 to 2.00 times desirable_weight, and 1.00 is outside" in balance(recipe, ledger)
    weighted = recipe.model_copy(update={"objective": [Named(name="kto", desirable_weight=0.6)]})
    assert "1.67 is within" in balance(weighted, ledger)
    assert balance(recipe.model_copy(update={"objective": [Named(name="bco")]}), ledger) is None
