"""Every row that TRL has, against TRL's own code: value and gradient in fp64, on random pairs, labels and scores."""

import pytest
import torch
from judged_batches import labels, method, pairs, scored

trl_oracle = pytest.importorskip("trl_oracle", reason="TRL is not installed")

SEEDS = (0, 1, 2)
DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def assert_parity(said, term, expected, n):
    """The term over `said`, divided by n, is TRL's mean; so is its slope in every token's log-probability."""
    found = term.function(said.outputs, said.batch)
    (slope,) = torch.autograd.grad(found.sum / n, said.leaf)
    (truth,) = torch.autograd.grad(expected, said.leaf)
    ours, theirs = float(found.sum.detach()) / n, float(expected.detach())
    assert abs(ours - theirs) <= 1e-9 * max(1.0, abs(theirs))
    assert float((slope - truth).abs().max()) <= 1e-9
    assert float(truth.abs().max()) > 1e-6


PAIRS = [
    ("dpo", {}, "sigmoid", {}),
    ("dpo", {"beta": 0.5}, "sigmoid", {"beta": 0.5}),
    ("dpo", {"lengths": "mean", "beta": 2}, "sigmoid_norm", {"beta": 2}),
    ("robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("robust", {"label_smoothing": 0}, "robust", {}),
    ("ipo", {}, "ipo", {}),
    ("ipo", {"beta": 0.7}, "ipo", {"beta": 0.7}),
    ("hinge", {}, "hinge", {}),
    ("rso", {}, "hinge", {"beta": 0.05}),
    ("exo", {}, "exo_pair", {"label_smoothing": 1e-3}),
    ("exo", {"label_smoothing": 0.2, "beta": 1.0}, "exo_pair", {"label_smoothing": 0.2, "beta": 1.0}),
    ("nca", {}, "nca_pair", {}),
    ("sppo", {}, "sppo_hard", {}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("aot", {}, "aot", {}),
    ("aot", {"label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
    ("aot_pair", {}, "aot_unpaired", {}),
    ("aot_pair", {"label_smoothing": 0.1}, "aot_unpaired", {"label_smoothing": 0.1}),
    ("bco_pair", {"shift": 0}, "bco_pair", {}),
    ("discopop", {"beta": 0.1}, "discopop", {}),
    ("discopop", {"tau": 0.5}, "discopop", {"beta": 0.05, "tau": 0.5}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "settings", "loss_type", "theirs"), PAIRS)
def test_pairs(name, settings, loss_type, theirs, seed):
    said = pairs(7, seed)
    expected, _ = trl_oracle.dpo(said, loss_type, **theirs)
    assert_parity(said, method(name, **settings), expected, 7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("name", "loss_type", "more"),
    [
        ("dpo", "sigmoid", {}),
        ("robust", "robust", {"label_smoothing": 0.1}),
        ("ipo", "ipo", {}),
        ("hinge", "hinge", {}),
        ("exo", "exo_pair", {"label_smoothing": 1e-3}),
        ("discopop", "discopop", {"beta": 0.1}),
    ],
)
def test_divergences(name, loss_type, more, divergence, monkeypatch):
    said = pairs(7, 3)
    settings = {"divergence": divergence, **more, **({"alpha_coefficient": 0.3} if divergence == "alpha" else {})}
    with trl_oracle.in_double(monkeypatch):
        expected, _ = trl_oracle.dpo(said, loss_type, divergence=DIVERGENCES[divergence], alpha=0.3, **more)
    assert_parity(said, method(name, **settings), expected, 7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("name", "loss_type"), [("dpo", "sigmoid"), ("nca", "nca_pair"), ("sppo", "sppo_hard"), ("aot", "aot")])
def test_desensitised_lengths(name, loss_type, alpha):
    said = pairs(7, 4)
    expected, _ = trl_oracle.dpo(said, loss_type, ld_alpha=alpha)
    assert_parity(said, method(name, lengths="desensitised", ld_alpha=alpha), expected, 7)


def test_desensitised_lengths_with_a_divergence():
    said = pairs(7, 5)
    expected, _ = trl_oracle.dpo(said, "sigmoid", ld_alpha=0.5, divergence="js_divergence")
    assert_parity(said, method("dpo", lengths="desensitised", divergence="js"), expected, 7)


def test_cdpo_is_aot_of_a_single_pair():
    """TRL 1.16 has no smoothed DPO; with one pair there is nothing to sort."""
    said = pairs(1, 6)
    expected, _ = trl_oracle.dpo(said, "aot", label_smoothing=0.3)
    assert_parity(said, method("cdpo", label_smoothing=0.3), expected, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_shifted_bco_of_pairs(seed):
    """The mean shift moves every reward by one number, which is the reference of every answer moved by shift / beta."""
    said, beta = pairs(7, seed), 0.1
    rows = method("bco_pair").collect(said.outputs, said.batch).detach("cpu")
    shift = float((beta * (rows.logp - rows.reference)).mean())
    moved = pairs(7, seed)
    last = [segment.stop - 1 for segment in moved.batch.segments]
    moved.batch.streams["reference"] = moved.batch.streams["reference"].astype("float64")
    moved.batch.streams["reference"][last] += shift / beta
    expected, _ = trl_oracle.dpo(moved, "bco_pair", beta=beta)
    (truth,) = torch.autograd.grad(expected, moved.leaf)
    found = method("bco_pair").function(said.outputs, said.batch).sum / 7
    (slope,) = torch.autograd.grad(found, said.leaf)
    assert float(found) == pytest.approx(float(expected), abs=1e-9)
    torch.testing.assert_close(slope, truth, atol=1e-9, rtol=0)
    assert abs(shift) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_kto(seed, settings):
    said = labels(6, seed)
    expected, metrics = trl_oracle.kto(said, **settings)
    term = method("kto", **settings)
    assert_parity(said, term, expected, 6)
    ours = term.function(said.outputs, said.batch).metrics
    assert ours["kl"][0] == pytest.approx(metrics["kl"], abs=1e-9)
    names = {"rewards/margins": "reward_margin", "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected"}
    for theirs, own in {**names, "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected"}.items():
        assert ours[own][0] / ours[own][1] == pytest.approx(metrics[theirs], abs=1e-9)


def test_both_signs_of_the_kl_estimate_are_met():
    found = [trl_oracle.kto(labels(6, seed))[1]["kl"] for seed in range(6)]
    assert min(found) == 0
    assert max(found) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_simpo(seed):
    said = pairs(7, seed)
    expected, _ = trl_oracle.cpo(said, "simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0)
    assert_parity(said, method("simpo"), expected, 7)
    expected, _ = trl_oracle.cpo(said, "simpo", beta=2.5, simpo_gamma=1.4, cpo_alpha=0.0)
    assert_parity(said, method("simpo", beta=2.5, gamma=1.4), expected, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_cpo(seed):
    said = pairs(7, seed)
    for smoothing in (0.0, 0.2):
        expected, _ = trl_oracle.cpo(said, beta=0.3, label_smoothing=smoothing, cpo_alpha=0.0)
        assert_parity(said, method("cpo", beta=0.3, label_smoothing=smoothing, nll_weight=0), expected, 7)
    said = pairs(7, seed, equal=True)  # where a mean over all tokens is a mean of means
    expected, _ = trl_oracle.cpo(said, cpo_alpha=0.8)
    assert_parity(said, method("cpo", nll_weight=0.8), expected, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_cpo_with_the_likelihood_over_all_tokens(seed):
    """TRL's mixture for answers of any length: the contrast a pair, and nll over the chosen tokens of the step."""
    said = pairs(7, seed)
    expected, _ = trl_oracle.cpo(said, cpo_alpha=0.8)
    contrast = method("cpo", nll_weight=0).function(said.outputs, said.batch).sum / 7
    tokens = sum(segment.role == "chosen" for segment in (said.batch.segments[row] for row in said.outputs.row.tolist()))
    whole = contrast + 0.8 * method("nll").function(said.outputs, said.batch).sum / tokens
    (slope,), (truth,) = torch.autograd.grad(whole, said.leaf), torch.autograd.grad(expected, said.leaf)
    assert float(whole) == pytest.approx(float(expected), abs=1e-9)
    torch.testing.assert_close(slope, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_orpo(seed, monkeypatch):
    """TRL's likelihood covers the prompt and is one mean over the batch: the same for prompts of one token and equal lengths."""
    said = pairs(7, seed, equal=True, prompt=1)
    with trl_oracle.in_double(monkeypatch):
        expected, _ = trl_oracle.orpo(said, beta=0.7)
    assert_parity(said, method("orpo", beta=0.7), expected, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_odds_ratio_of_orpo_for_any_length(seed, monkeypatch):
    said = pairs(7, seed)
    with trl_oracle.in_double(monkeypatch):
        small, large = (trl_oracle.orpo(said, beta=beta)[0] for beta in (0.1, 0.9))
    ours = [method("orpo", beta=beta).function(said.outputs, said.batch).sum / 7 for beta in (0.1, 0.9)]
    (slope,) = torch.autograd.grad(ours[1] - ours[0], said.leaf)
    (truth,) = torch.autograd.grad(large - small, said.leaf)
    assert float(ours[1] - ours[0]) == pytest.approx(float(large - small), abs=1e-9)
    torch.testing.assert_close(slope, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("margin", [True, False])
@pytest.mark.parametrize("centre", [0.0, 0.01, 0.5])
def test_rewards(seed, margin, centre):
    said = scored(7, seed, margin)
    expected, metrics = trl_oracle.reward(said, centre=centre or None)
    term = method("reward", centre=centre)
    assert_parity(said, term, expected, 7)
    ours = term.function(said.outputs, said.batch).metrics
    for name, theirs in (("accuracy", "accuracy"), ("score_margin", "margin"), ("score_mean", "mean_reward")):
        assert ours[name][0] / ours[name][1] == pytest.approx(metrics[theirs], abs=1e-6)


def test_the_metrics_of_pairs():
    said = pairs(7, 8)
    _, theirs = trl_oracle.dpo(said, "sigmoid")
    ours = method("dpo").function(said.outputs, said.batch).metrics
    names = {"rewards/accuracies": "accuracy", "rewards/margins": "reward_margin", "rewards/chosen": "reward_chosen"}
    for name, own in {
        **names,
        "rewards/rejected": "reward_rejected",
        "logps/chosen": "logp_chosen",
        "logps/rejected": "logp_rejected",
    }.items():
        assert ours[own][0] / ours[own][1] == pytest.approx(theirs[name], abs=1e-6)


def test_nll_is_the_sft_term():
    said = pairs(7, 9)
    expected, _ = trl_oracle.dpo(said, "sft")
    tokens = sum(said.batch.segments[row].role == "chosen" for row in said.outputs.row.tolist())
    assert_parity(said, method("nll"), expected, tokens)
