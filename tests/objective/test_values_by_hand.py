"""Rows that TRL has not, or has in another form, against plain loops written from the papers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from judged_batches import batch_of, label_rows, labels, method, pair_rows, pairs, say, scored, valued

from tunesmith.core.errors import BugError, DataError


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rows_of(said):
    """(role, group, sum of log-probabilities, sum of the reference's, tokens) of every row, by a loop."""
    batch, values = said.batch, dict(zip(said.outputs.index.tolist(), said.leaf.tolist(), strict=True))
    found = []
    for segment in batch.segments:
        trained = [t for t in range(segment.start, segment.stop) if batch.train[t] != 0]
        logp = sum(float(batch.train[t]) * values[t] for t in trained)
        reference = sum(float(batch.train[t]) * float(batch.streams["reference"][t]) for t in trained)
        found.append((segment.role, segment.group, logp, reference, sum(float(batch.train[t]) for t in trained)))
    return found


def by_pair(said):
    rows = {(role, group): numbers for role, group, *numbers in rows_of(said)}
    return [(*rows["chosen", group], *rows["rejected", group]) for role, group in rows if role == "chosen"]


def assert_gives(said, term, truth):
    found = term.function(said.outputs, said.batch)
    assert found.sum.dtype == torch.float64
    assert float(found.sum.detach()) == pytest.approx(truth, abs=1e-9)
    return found


def test_cdpo():
    said, e, total = pairs(5), 0.3, 0.0
    for c, cr, _, r, rr, _ in by_pair(said):
        x = 0.2 * ((c - cr) - (r - rr))
        total += -(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x))
    assert assert_gives(said, method("cdpo", beta=0.2, label_smoothing=e), total).count == "pairs"


def test_orpo_is_one_mean_a_pair():
    said, total = pairs(5), 0.0
    for c, _, nc, r, _, nr in by_pair(said):
        p, q = math.exp(c / nc), math.exp(r / nr)
        total += -c / nc - 0.4 * math.log(sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q))))
    assert_gives(said, method("orpo", beta=0.4), total)


def test_cpo_is_one_mean_a_pair():
    said = pairs(5)
    total = sum(-math.log(sigmoid(0.1 * (c - r))) - 0.5 * c / nc for c, _, nc, r, _, _ in by_pair(said))
    assert_gives(said, method("cpo", nll_weight=0.5), total)


def test_the_reward_shift_of_bco_pairs():
    said = pairs(5)
    rewards = [(0.1 * (c - cr), 0.1 * (r - rr)) for c, cr, _, r, rr, _ in by_pair(said)]
    shift = sum(a + b for a, b in rewards) / 10
    assert_gives(said, method("bco_pair"), sum(-math.log(sigmoid(a - shift)) - math.log(sigmoid(shift - b)) for a, b in rewards))


@pytest.mark.parametrize(
    ("divergence", "slope"),
    [
        ("forward_kl", lambda t: 1 - 1 / t),
        ("js", lambda t: math.log(2 * t / (t + 1))),
        ("alpha", lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1)),
    ],
)
def test_divergences(divergence, slope):
    said, total = pairs(5), 0.0
    for c, cr, _, r, rr, _ in by_pair(said):
        total += -math.log(sigmoid(0.2 * (slope(math.exp(c - cr)) - slope(math.exp(r - rr)))))
    settings = {"alpha_coefficient": 0.3} if divergence == "alpha" else {}
    assert_gives(said, method("dpo", beta=0.2, divergence=divergence, **settings), total)


def test_the_alpha_divergence_has_both_kls_at_its_ends():
    said = pairs(5)
    for alpha, name in ((0, "forward_kl"), (1, "reverse_kl")):
        end = method("dpo", divergence="alpha", alpha_coefficient=alpha).function(said.outputs, said.batch).sum
        assert float(end) == pytest.approx(float(method("dpo", divergence=name).function(said.outputs, said.batch).sum), abs=1e-12)


def test_token_weights_count_in_sums_and_means():
    rows = pair_rows(4)
    weights = [0.5 + 0.25 * (i % 3) for i in range(sum(answer for _, answer, *_ in rows))]
    said = say(batch_of(rows, weights=weights))
    found = by_pair(said)
    total = sum(-math.log(sigmoid(2 * (c / nc - r / nr) - 1)) for c, _, nc, r, _, nr in found)
    assert_gives(said, method("simpo"), total)
    total = sum(((c - cr) / nc - (r - rr) / nr - 5) ** 2 for c, cr, nc, r, rr, nr in found)
    assert_gives(said, method("ipo"), total)


def test_kto():
    said, total = labels(6, 3), 0.0
    rows = rows_of(said)
    others = [logp - reference for role, _, logp, reference, _ in rows if role == "mismatched"]
    z = max(0.0, sum(others) / len(others))
    for role, _, logp, reference, _ in rows:
        if role == "desirable":
            total += 1.2 * (1 - sigmoid(0.3 * (logp - reference - z)))
        elif role == "undesirable":
            total += 0.9 * (1 - sigmoid(0.3 * (z - (logp - reference))))
    found = assert_gives(said, method("kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.9), total)
    assert found.count == "sequences"
    assert found.metrics["kl"] == (pytest.approx(z, abs=1e-9), 1.0)
    (slope,) = torch.autograd.grad(found.sum, said.leaf)
    other = torch.tensor([said.batch.segments[row].role == "mismatched" for row in said.outputs.row])
    assert (slope[other] == 0).all()
    assert (slope[~other] != 0).all()


def test_bco():
    said, total = labels(7, 4), 0.0
    rewards = [(role, 0.3 * (logp - reference)) for role, _, logp, reference, _ in rows_of(said) if role != "mismatched"]
    good, bad = ([value for role, value in rewards if role == name] for name in ("desirable", "undesirable"))
    shift = (sum(good) / len(good) + sum(bad) / len(bad)) / 2
    for role, value in rewards:
        total += -math.log(sigmoid(value - shift if role == "desirable" else shift - value))
    assert_gives(said, method("bco", beta=0.3), total)


def test_bco_of_a_step_with_one_kind_of_answer():
    rows = [(2, 3, "a", "desirable"), (2, 4, "b", "desirable")]
    said = say(batch_of(rows))
    rewards = [0.1 * (logp - reference) for _, _, logp, reference, _ in rows_of(said)]
    mean = sum(rewards) / 2
    assert_gives(said, method("bco"), sum(-math.log(sigmoid(value - mean)) for value in rewards))


def test_kto_without_mismatched_rows_is_a_bug():
    said = labels(4, mismatched=False)
    with pytest.raises(BugError, match="no mismatched answer"):
        method("kto").function(said.outputs, said.batch)


def test_the_accuracy_of_labels_counts_signs_and_half_of_ties():
    said = labels(6)
    level = torch.from_numpy(said.batch.streams["reference"])[said.outputs.index].double()
    tied = say(said.batch, values=level)
    for name in ("kto", "bco"):
        assert method(name).function(tied.outputs, tied.batch).metrics["accuracy"] == (3.0, 6.0)
        good = torch.tensor([said.batch.segments[row].role == "desirable" for row in said.outputs.row])
        told = say(said.batch, values=level + torch.where(good, 0.1, -0.1))
        assert method(name).function(told.outputs, told.batch).metrics["accuracy"] == (6.0, 6.0)


def numbers(said):
    values = said.batch.streams["value"][said.outputs.index.numpy()].tolist()
    return list(zip(said.leaf.tolist(), values, strict=True))


def test_reward_regression():
    said = valued(6, low=-2, high=5)
    found = assert_gives(said, method("reward_regression"), sum((s - y) ** 2 for s, y in numbers(said)))
    assert found.count == "sequences"
    assert found.metrics["absolute_error"] == (pytest.approx(sum(abs(s - y) for s, y in numbers(said))), 6.0)


def entropy(s, y):
    return -y * math.log(sigmoid(s)) - (1 - y) * math.log(sigmoid(-s))


def test_reward_classes():
    said = valued(6)
    found = assert_gives(said, method("reward_classes"), sum(entropy(s, y) for s, y in numbers(said)))
    assert found.count == "sequences"
    assert found.metrics["accuracy"] == (sum((s > 0) == (y > 0.5) for s, y in numbers(said)), 6.0)


def mean(values):
    return sum(values) / len(values)


def test_a_reward_that_learns_from_every_token():
    """Bradley-Terry at the ends of the answers, and so many times the mean of both answers' mean cross-entropies."""
    said = scored(5, throughout=True)
    rows, leaf, row = said.batch.segments, said.leaf.tolist(), said.outputs.row.tolist()
    scores = [[s for s, of in zip(leaf, row, strict=True) if of == place] for place in range(len(rows))]
    assert max(map(len, scores)) > 1
    total, right = 0.0, 0
    for place in range(0, len(rows), 2):
        assert [rows[place].role, rows[place + 1].role] == ["chosen", "rejected"]
        margin = float(said.batch.streams["margin"][rows[place].start])
        chosen, rejected = scores[place], scores[place + 1]
        gap, both = chosen[-1] - rejected[-1], chosen[-1] + rejected[-1]
        total += -math.log(sigmoid(gap - margin)) + 0.01 * both**2
        total += 0.7 * (mean([entropy(s, 1) for s in chosen]) + mean([entropy(s, 0) for s in rejected])) / 2
        right += gap > 0
    found = assert_gives(said, method("reward", token_weight=0.7, centre=0.01), total)
    assert found.count == "pairs"
    assert found.metrics["accuracy"] == (right, 5.0)
    assert found.metrics["score_mean"] == (pytest.approx(sum(s[-1] for s in scores)), 10.0)


def test_a_verifier_that_learns_from_every_token():
    batch = batch_of([(3, 1, "", ""), (2, 4, "", ""), (1, 3, "", "")], reference=False)
    values = np.repeat([1.0, 0.0, 0.25], [4, 6, 4]).astype(np.float32)
    said = say(replace(batch, streams={"value": values}), score=True)
    s = said.leaf.tolist()
    whole = [(s[0:1], 1.0), (s[1:5], 0.0), (s[5:8], 0.25)]
    total = sum(entropy(scores[-1], y) + 0.7 * mean([entropy(s, y) for s in scores]) for scores, y in whole)
    found = assert_gives(said, method("reward_classes", token_weight=0.7), total)
    assert found.metrics["accuracy"] == (sum((scores[-1] > 0) == (y > 0.5) for scores, y in whole), 3.0)


def test_prm():
    said = valued(5, each=3)
    found = assert_gives(said, method("prm"), sum(entropy(s, y) for s, y in numbers(said)))
    assert found.count == "tokens"
    assert found.metrics["accuracy"] == (sum((s > 0) == (y > 0.5) for s, y in numbers(said)), 15.0)


@pytest.mark.parametrize("name", ["prm", "reward_classes"])
def test_a_value_outside_0_to_1_names_its_row(name):
    said = valued(4, low=0, high=3, seed=2)
    with pytest.raises(DataError, match="is no probability"):
        method(name).function(said.outputs, said.batch)


def test_nll_learns_good_answers_alone():
    for said, learned in ((pairs(5), {"chosen"}), (labels(5), {"desirable"})):
        total = -sum(logp for role, _, logp, *_ in rows_of(said) if role in learned)
        found = assert_gives(said, method("nll"), total)
        assert found.count == "tokens"
        (slope,) = torch.autograd.grad(found.sum, said.leaf)
        own = torch.tensor([said.batch.segments[row].role in learned for row in said.outputs.row])
        assert (slope[own] == -1).all()
        assert (slope[~own] == 0).all()
    plain = say(batch_of([(2, 3, "", ""), (0, 4, "", "")], reference=False))
    assert_gives(plain, method("nll"), -float(plain.leaf.sum()))


def test_what_no_pair_and_no_label_is():
    rows = pair_rows(2)
    for wrong, name in ((rows[:3], "dpo"), ([*rows, rows[0]], "dpo"), (label_rows(2), "simpo"), (rows, "bco")):
        said = say(batch_of(wrong))
        with pytest.raises(BugError):
            method(name).function(said.outputs, said.batch)
    said = scored(2)
    with pytest.raises(BugError, match="a pair"):
        torn = replace(said.batch, segments=tuple(replace(s, group=f"{i}") for i, s in enumerate(said.batch.segments)))
        method("reward").function(said.outputs, torn)
    with pytest.raises(BugError, match="without a score head"):
        said = pairs(2)
        method("reward").function(said.outputs, said.batch)
    with pytest.raises(BugError, match="not filled in"):
        said = say(batch_of(rows, reference=False))
        method("dpo").function(said.outputs, said.batch)
