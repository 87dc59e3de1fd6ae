"""Laws that every row of the objective table keeps, and what recipes are told."""

import math
import pickle
import random
from dataclasses import replace

import pytest
import torch
from judged_batches import batch_of, method, pair_rows, pairs, reorder, said_for, say

from tunesmith.core.errors import BugError, RecipeError
from tunesmith.core.load import build
from tunesmith.core.recipe import Named
from tunesmith.core.types import Outputs, Wanted
from tunesmith.objective import OBJECTIVES, Rows, methods, wanted

ROWS = list(OBJECTIVES)
WHOLE = {"aot", "aot_pair", "bco_pair", "kto", "bco"}
OVER_ROWS = [name for name in ROWS if hasattr(OBJECTIVES[name].function, "collect")]
REFERENCED = [name for name in ROWS if "reference" in OBJECTIVES[name].needs]
THROUGHOUT = [("reward", {"token_weight": 0.7}), ("reward_classes", {"token_weight": 0.7})]  # read at every token
PAIRED = [name for name in OVER_ROWS if "pairs" in OBJECTIVES[name].needs]


def slope_of(loss, said):
    return torch.autograd.grad(loss.sum, said.leaf)[0]


def cut(said, places):
    """The part of a batch that holds these segments, as a micro-batch, and where its positions were."""
    return reorder(said, places)


def halves(said):
    """The segments of the first groups and those of the others."""
    names = list(dict.fromkeys(s.group or i for i, s in enumerate(said.batch.segments)))
    first = set(names[: len(names) // 2])
    inside = [(s.group or i) in first for i, s in enumerate(said.batch.segments)]
    return [i for i, held in enumerate(inside) if held], [i for i, held in enumerate(inside) if not held]


def test_the_table_holds_what_was_asked_for():
    asked = """nll dpo cdpo robust ipo hinge rso exo nca sppo apo_zero apo_down aot aot_pair bco_pair discopop simpo orpo cpo
    kto bco reward reward_regression reward_classes prm"""
    assert set(asked.split()) == set(ROWS)
    assert {name for name in ROWS if "whole_step" in OBJECTIVES[name].needs} == WHOLE


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_a_sentence_a_paper_and_settings_with_defaults(name):
    entry = OBJECTIVES[name]
    first = entry.function.__doc__.splitlines()[0]
    assert first.endswith((".", ","))
    assert any(character.isdigit() for character in entry.source)
    author = entry.source.split()[0].strip(",")
    assert author in entry.function.__doc__
    for arxiv in (word for word in entry.source.replace(";", " ").split() if word.startswith("arXiv:")):
        assert arxiv in entry.function.__doc__
    idle = {"ld_alpha", "alpha_coefficient"}
    methods([Named(name=name, **{key: value for key, value in entry.settings().items() if key not in idle})])


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in ROWS), *THROUGHOUT])
def test_the_order_of_rows_changes_nothing(name, settings):
    term = method(name, **settings)
    said = said_for(term)
    loss = term.function(said.outputs, said.batch)
    order = list(range(len(said.batch.segments)))
    random.Random(3).shuffle(order)
    other, places = reorder(said, order)
    found = term.function(other.outputs, other.batch)
    torch.testing.assert_close(found.sum, loss.sum, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(slope_of(found, other), slope_of(loss, said)[places], atol=1e-10, rtol=1e-12)
    assert found.metrics.keys() == loss.metrics.keys()
    for key, (value, weight) in loss.metrics.items():
        assert found.metrics[key] == (pytest.approx(value, abs=1e-9), weight)


@pytest.mark.parametrize(("name", "settings"), [*(("dpo", {"lengths": way}) for way in ("sum", "mean", "desensitised")), *THROUGHOUT])
def test_positions_in_any_order_are_the_same_positions(name, settings):
    term = method(name, **settings)
    said = said_for(term)
    order = torch.randperm(len(said.leaf), generator=torch.Generator().manual_seed(0))
    o = said.outputs
    held = {"logp": said.leaf[order]} if o.score is None else {"logp": o.logp, "score": said.leaf[order]}
    mixed = Outputs(index=o.index[order], train=o.train[order], row=o.row[order], **held)
    found, loss = term.function(mixed, said.batch), term.function(o, said.batch)
    torch.testing.assert_close(found.sum, loss.sum, atol=1e-12, rtol=0)
    torch.testing.assert_close(slope_of(found, said), slope_of(loss, said), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "settings"), [*((name, {}) for name in ROWS if name not in WHOLE), *THROUGHOUT])
def test_micro_batches_add_up(name, settings):
    term = method(name, **settings)
    said = said_for(term, 6)
    loss = term.function(said.outputs, said.batch)
    whole, slope, total, metrics = float(loss.sum.detach()), slope_of(loss, said), 0.0, {}
    for places in halves(said):
        part, where = cut(said, places)
        found = term.function(part.outputs, part.batch)
        total += float(found.sum.detach())
        torch.testing.assert_close(slope_of(found, part), slope[where], atol=1e-10, rtol=1e-12)
        for key, (value, weight) in found.metrics.items():
            old = metrics.get(key, (0.0, 0.0))
            metrics[key] = old[0] + value, old[1] + weight
    assert total == pytest.approx(whole, abs=1e-9)
    assert metrics == {key: (pytest.approx(value, abs=1e-9), weight) for key, (value, weight) in loss.metrics.items()}


@pytest.mark.parametrize("name", OVER_ROWS)
def test_joined_rows_of_micro_batches_are_one_batch(name):
    """What the training step does: score without gradient, join, take the slopes, score again and carry them back."""
    term = method(name)
    said = said_for(term, 6)
    loss = term.function(said.outputs, said.batch)
    slope = slope_of(loss, said)
    parts = [cut(said, places) for places in halves(said)]
    collected = [term.collect(part.outputs, part.batch).detach("cpu") for part, _ in parts]
    collected = pickle.loads(pickle.dumps(collected))
    joined = Rows.join(collected)
    assert len(joined) == len(joined.logp) == len(said.batch.segments)
    leaf = joined.logp.requires_grad_()
    found = term.loss(joined)
    assert float(found.sum.detach()) == pytest.approx(float(loss.sum.detach()), abs=1e-9)
    assert found.count == loss.count
    assert found.metrics == {key: (pytest.approx(value, abs=1e-9), weight) for key, (value, weight) in loss.metrics.items()}
    coefficients = torch.split(torch.autograd.grad(found.sum, leaf)[0], [len(rows) for rows in collected])
    for (part, where), coefficient in zip(parts, coefficients, strict=True):
        again = (term.collect(part.outputs, part.batch).logp * coefficient).sum()
        torch.testing.assert_close(torch.autograd.grad(again, part.leaf)[0], slope[where], atol=1e-10, rtol=1e-12)


def test_whole_step_rows_are_no_sums_over_micro_batches():
    for name in WHOLE:
        term = method(name)
        said = said_for(term, 6)
        total = sum(
            float(term.function(part.outputs, part.batch).sum.detach()) for part, _ in (cut(said, places) for places in halves(said))
        )
        assert abs(total - float(term.function(said.outputs, said.batch).sum.detach())) > 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_metrics_are_numbers_and_losses_are_fp64(name):
    term = method(name)
    said = said_for(term)
    single = {"logp": said.outputs.logp.float(), "score": None if said.outputs.score is None else said.outputs.score.float()}
    loss = term.function(replace(said.outputs, **single), said.batch)
    assert loss.sum.dtype == torch.float64
    assert loss.sum.shape == ()
    for value, weight in loss.metrics.values():
        assert type(value) is float
        assert type(weight) is float
    if term.name not in ("nll", "reward_regression"):
        assert 0 <= loss.metrics["accuracy"][0] <= loss.metrics["accuracy"][1]


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_finite_far_out(name, size):
    """Log-probabilities and scores of 0 (a certain token) down to -1e4, on either side."""
    variants = [{}]
    known = OBJECTIVES[name].settings()
    if "divergence" in known:
        variants += [{"divergence": kind} for kind in ("forward_kl", "js", "alpha")]
    if "lengths" in known:
        variants += [{"lengths": "sum"}, {"lengths": "mean"}]
    for settings in variants:
        term = method(name, **settings)
        for sign in (1, -1):
            said = said_for(term, 4)
            flips = torch.arange(len(said.leaf)) % 2 == 0
            roles = torch.tensor([said.batch.segments[row].role in ("chosen", "desirable") for row in said.outputs.row])
            values = torch.where(roles if sign > 0 else ~roles, 0.0, -size).double()
            if said.outputs.score is not None:
                values = torch.where(flips, size, -size).double() * sign
            far = say(said.batch, score=said.outputs.score is not None, values=values)
            loss = term.function(far.outputs, far.batch)
            assert torch.isfinite(loss.sum)
            assert torch.isfinite(slope_of(loss, far)).all()
            assert all(math.isfinite(value) for value, _ in loss.metrics.values())


AT_ZERO = {
    "dpo": math.log(2), "cdpo": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0, "rso": 1.0, "nca": 2 * math.log(2),
    "exo": -math.log(2) - 0.5 * (math.log(1 - 1e-3) + math.log(1e-3)), "sppo": 50.0, "apo_zero": 1.0, "apo_down": 1.0,
    "aot": math.log(2), "aot_pair": math.log(2), "bco_pair": 2 * math.log(2), "discopop": 0.5 * math.log(2) + 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ZERO)
def test_a_policy_that_is_its_reference(name):
    """Where training starts: dpo is log 2, whatever the data."""
    batch = batch_of(pair_rows(6))
    index = torch.from_numpy(batch.train.nonzero()[0])
    said = say(batch, values=torch.from_numpy(batch.streams["reference"])[index])
    found = method(name).function(said.outputs, said.batch)
    assert float(found.sum) / 6 == pytest.approx(AT_ZERO[name], abs=1e-12)
    assert found.metrics["accuracy"] == (3.0, 6.0)
    assert found.metrics["reward_margin"] == (0.0, 6.0)


@pytest.mark.parametrize("name", REFERENCED)
def test_what_rounds_apart_from_its_reference_is_a_tie(name):
    """Where training starts the accuracy is a half, whichever way the sums were rounded; what has been learned counts."""
    term = method(name)
    said = said_for(term, 6)
    reference = torch.from_numpy(said.batch.streams["reference"])[said.outputs.index].double()
    signs = torch.randn(len(reference), generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    rounded = say(said.batch, values=reference + 2e-6 * signs)
    value, weight = term.function(rounded.outputs, rounded.batch).metrics["accuracy"]
    assert value == weight / 2
    better = torch.tensor([segment.role in ("chosen", "desirable") for segment in said.batch.segments])[said.outputs.row]
    learned = say(said.batch, values=reference + torch.where(better, 1e-2, -1e-2))
    value, weight = term.function(learned.outputs, learned.batch).metrics["accuracy"]
    assert value == weight


@pytest.mark.parametrize("name", [name for name in PAIRED if name not in ("nca", "sppo", "apo_zero", "apo_down", "bco_pair", "orpo")])
def test_losses_of_margins_know_no_common_change(name):
    """Both answers more likely by one factor: nothing changes where only the difference counts; lengths made equal."""
    said = pairs(6, equal=True)
    row = said.outputs.row
    first = torch.cat([torch.ones(1, dtype=torch.bool), row[1:] != row[:-1]])
    moved = say(said.batch, values=said.leaf.detach() - 0.7 * first)
    settings = {"nll_weight": 0} if name == "cpo" else {}
    term = method(name, **settings)
    before, after = (float(term.function(s.outputs, s.batch).sum) for s in (said, moved))
    assert after == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("name", PAIRED)
def test_a_better_chosen_answer_is_rewarded(name):
    """The gradient descends towards the chosen answer and, but for anchored losses, away from the rejected one."""
    said = pairs(6)
    slope = slope_of(method(name).function(said.outputs, said.batch), said)
    chosen = torch.tensor([said.batch.segments[row].role == "chosen" for row in said.outputs.row])
    up, down = float(slope[chosen].sum()), float(slope[~chosen].sum())
    assert down - up > 0


def test_only_trained_tokens_have_a_slope():
    """Rows read the positions that the model spoke of, and nothing of a row reaches another group."""
    said = pairs(5)
    rows = method("dpo").collect(said.outputs, said.batch)
    for place in range(len(said.batch.segments)):
        (slope,) = torch.autograd.grad(rows.logp[place], said.leaf, retain_graph=True)
        assert torch.equal(slope != 0, said.outputs.row == place)


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_a_reference_beside_a_row_that_needs_none_is_not_read(name):
    rows = pair_rows(5)
    term, without = method(name), say(batch_of(rows, reference=False))
    beside = say(batch_of(rows), values=without.leaf.detach())
    a, b = (term.function(s.outputs, s.batch) for s in (without, beside))
    assert float(a.sum) == float(b.sum)
    assert a.metrics == b.metrics


def refused(code, where, **named):
    with pytest.raises(RecipeError) as caught:
        methods([Named(name="nll"), Named(**named)])
    assert caught.value.code == code
    assert caught.value.where == where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("beta", [0, -1, "0.1", True, math.nan, math.inf, None]),
        ("label_smoothing", [-0.1, 0.5, 1]),
        ("divergence", ["kl", "reverse-kl", 3]),
        ("lengths", ["total", None]),
    ],
)
def test_bad_values_are_refused_at_the_door(setting, values):
    name = "robust"
    for value in values:
        refused("bad_value", f"objective.1.{setting}", name=name, **{setting: value})


def test_bad_values_of_single_rows():
    refused("bad_value", "objective.1.label_smoothing", name="exo", label_smoothing=0)
    refused("bad_value", "objective.1.lengths", name="ipo", lengths="desensitised")
    refused("bad_value", "objective.1.tau", name="discopop", tau=0)
    refused("bad_value", "objective.1.ld_alpha", name="dpo", lengths="desensitised", ld_alpha=1.5)
    refused("bad_value", "objective.1.undesirable_weight", name="kto", undesirable_weight=0)
    refused("bad_value", "objective.1.shift", name="bco_pair", shift="mean")
    refused("bad_value", "objective.1.token_weight", name="reward", token_weight=-1)
    refused("unknown_setting", "objective.1.token_weight", name="reward_regression", token_weight=1)
    refused("unread_setting", "objective.1.ld_alpha", name="dpo", ld_alpha=0.5)
    refused("unread_setting", "objective.1.alpha_coefficient", name="dpo", divergence="js", alpha_coefficient=0.5)
    refused("unknown_setting", "objective.1.divergence", name="nca", divergence="js")
    refused("unknown_setting", "objective.1.lengths", name="simpo", lengths="sum")
    refused("unknown_setting", "objective.1.betta", name="dpo", betta=0.5)
    with pytest.raises(RecipeError, match=r"did you mean 'forward_kl'"):
        method("dpo", divergence="forward-kl")
    method("bco_pair", shift=None)


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf, True, "1"])
def test_a_weight_that_adds_nothing_to_the_loss_is_refused(weight):
    tree = {"model": {"base": "pocket"}, "data": {"train": "rows.jsonl"}, "objective": [{"name": "dpo"}, {"name": "nll", "weight": weight}]}
    with pytest.raises(RecipeError, match="a number above 0; to switch an objective off, leave it out") as caught:
        build(tree)
    assert (caught.value.code, caught.value.where) == ("bad_setting", "objective.1.weight")


def test_terms_of_one_recipe_agree():
    def together(*names):
        return methods([Named(name=name) for name in names])

    for names in (("dpo", "kto"), ("dpo", "reward"), ("nll", "reward"), ("nll", "prm"), ("reward", "reward_classes"), ("prm", "reward")):
        with pytest.raises(RecipeError, match="cannot be trained together") as caught:
            together(*names)
        assert caught.value.code == "objectives_disagree"
    assert wanted(together("nll")) == Wanted()
    assert wanted(together("dpo", "nll", "simpo")) == Wanted("pairs")
    assert wanted(together("nll", "bco")) == Wanted("labels")
    assert wanted(together("bco", "kto")) == Wanted("labels", mismatched=True)
    assert wanted(together("reward")) == Wanted("pairs", "ends")
    assert wanted([method("reward", token_weight=0)]) == Wanted("pairs", "ends")
    assert wanted([method("reward", token_weight=0.5)]) == Wanted("pairs", "throughout")
    assert wanted([method("reward_classes", token_weight=0.5)]) == Wanted("labels", "throughout", shares=True)
    assert wanted(together("reward_regression")) == Wanted("labels", "ends")
    assert wanted(together("prm")) == Wanted("steps", "ends", shares=True)


def test_a_term_without_rows_says_so():
    with pytest.raises(BugError, match="has no rows"):
        method("nll").loss(None)
    assert method("dpo", weight=0.5).weight == 0.5
    assert not method("dpo").whole_step
    assert method("kto").whole_step
