"""Losses over preference pairs: each takes Pairs and gives one loss [n] a pair.

w is the chosen answer and l the rejected one; h_w = log pi(w) - log reference(w) is the log-ratio of an answer, r_w = beta h_w its implicit
reward, h = h_w - h_l; sigma is the logistic function and e the label smoothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.objective.rows import Pairs

NEAR_ONE = -1e-7  # the log of a probability that float32 cannot tell from 1


def dpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimisation: -log sigma(beta h).

    Rafailov 2023, arXiv:2305.18290, equation 7.
    """
    return -F.logsigmoid(beta * pairs.difference)


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO, for labels that are wrong with probability e: -(1 - e) log sigma(beta h) - e log sigma(-beta h).

    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    return _smoothed(beta * pairs.difference, label_smoothing)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """The unbiased form of DPO under labels flipped with probability e: (-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2e).

    Chowdhury 2024, arXiv:2403.00409, equation 12. Unlike cdpo it falls below zero.
    """
    logits = beta * pairs.difference
    return (label_smoothing * F.logsigmoid(-logits) - (1 - label_smoothing) * F.logsigmoid(logits)) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation: (h - 1 / (2 beta))^2, h from log-probabilities a token.

    Azar 2023, arXiv:2310.12036, equation 17 (beta for their tau). The paper writes sums over tokens (lengths: sum); the mean is what
    its authors ran and what TRL does, and makes the target mean the same for short and long answers.
    """
    return (pairs.difference - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Hinge on the reward difference: max(0, 1 - beta h).

    The calibration loss of SLiC-HF, Zhao 2023, arXiv:2305.10425, equation 1, held against a reference as peers' `hinge` is.
    """
    return torch.relu(1 - beta * pairs.difference)


def rso(pairs: Pairs, *, beta: float = 0.05) -> Tensor:
    """The hinge-norm loss of RSO, for pairs drawn by rejection sampling: max(0, 1 - beta h), with the paper's temper.

    Liu 2023, arXiv:2309.06657, section 3.3 (beta for their gamma, 0.05 in the paper). As a formula it is `hinge`.
    """
    return hinge(pairs, beta=beta)


def exo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """Exact optimisation: the KL divergence of (sigma(beta h), sigma(-beta h)) from (1 - e, e).

    Ji 2024, arXiv:2402.00856, equation 16; e must be above 0.
    """
    logits = beta * pairs.difference
    up, down = F.logsigmoid(logits), F.logsigmoid(-logits)
    return up.exp() * (up - math.log1p(-label_smoothing)) + down.exp() * (down - math.log(label_smoothing))


def nca(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Noise contrastive alignment: -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l).

    Chen 2024, arXiv:2402.05369, the loss for pairs.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Self-play preference optimisation with hard labels: (h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2.

    Wu 2024, arXiv:2405.00675, equation 4.7 with probabilities 1 and 0, 1/beta for their eta. Theirs is 1000 with a small learning
    rate; the default is TRL's.
    """
    return (pairs.chosen_ratio - 0.5 / beta).square() + (pairs.rejected_ratio + 0.5 / beta).square()


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Anchored, for chosen answers better than the model's own: (1 - sigma(r_w)) + sigma(r_l).

    D'Oosterlinck 2024, arXiv:2408.06266, equation 7.
    """
    return torch.sigmoid(-beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Anchored, for chosen answers worse than the model's own: sigma(r_w) + (1 - sigma(r_w - r_l)).

    D'Oosterlinck 2024, arXiv:2408.06266, equation 8.
    """
    return torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(-beta * pairs.difference)


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport: the policy's margins (log pi(w) - log pi(l)) against the reference's, both sorted over the step.

    The j-th difference d of the sorted margins gives -(1 - e) log sigma(beta d) - e log sigma(-beta d); it belongs to a quantile and
    no longer to a pair. Melnyk 2024, arXiv:2406.05882, the paired variant (TRL's `aot`).
    """
    margins, reference = pairs.chosen - pairs.rejected, pairs.chosen_reference - pairs.rejected_reference
    return _smoothed(beta * (margins.sort().values - reference.sort().values), label_smoothing)


def aot_pair(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport: the log-ratios of the chosen answers against those of the rejected, each sorted over the step.

    Melnyk 2024, arXiv:2406.05882, the unpaired variant: which answer met which does not matter. TRL called it `aot_pair` and now
    `aot_unpaired`.
    """
    return _smoothed(beta * (pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values), label_smoothing)


def bco_pair(pairs: Pairs, *, beta: float = 0.1, shift: float | None = None) -> Tensor:
    """Binary classifier optimisation on both answers: -log sigma(r_w - d) - log sigma(-(r_l - d)).

    Jung 2024, arXiv:2404.04656, with the reward shift d: the mean of all rewards of the step, without gradient, unless `shift` fixes it.
    The paper and older TRL keep a running mean over steps; here a step depends on its own rows only. TRL 1.16 has no shift (shift: 0).
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    middle = torch.cat([chosen, rejected]).detach().mean() if shift is None else shift
    return -F.logsigmoid(chosen - middle) - F.logsigmoid(middle - rejected)


def discopop(pairs: Pairs, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """Log-ratio modulated loss: (1 - m) (-log sigma(beta h)) + m exp(-beta h), m = sigma(beta h / tau).

    Lu 2024, arXiv:2406.08414, equation 5, with the paper's beta and tau.
    """
    logits = beta * pairs.difference
    # m exp(-x) = exp(log m - x), finite where exp(-x) alone is not.
    return -F.logsigmoid(logits) * torch.sigmoid(-logits / tau) + torch.exp(F.logsigmoid(logits / tau) - logits)


def simpo(pairs: Pairs, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimisation: -log sigma(beta log pi(w) - beta log pi(l) - gamma), log-probabilities a token, no reference.

    Meng 2024, arXiv:2405.14734, equation 6. gamma is the paper's margin, not its ratio to beta (as TRL's `simpo_gamma`).
    """
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected) - gamma)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation: -log pi(w) - beta log sigma(log odds(w) - log odds(l)), log-probabilities a token, no reference.

    odds = p / (1 - p). Hong 2024, arXiv:2403.07691, equations 4 to 7, beta for their lambda. The likelihood is a pair's own mean over
    the tokens of its answer; TRL takes it over prompt and answer, and over all tokens of the batch at once.
    """
    return -pairs.chosen - beta * F.logsigmoid(_log_odds(pairs.chosen) - _log_odds(pairs.rejected))


def _log_odds(logp: Tensor) -> Tensor:
    return logp - torch.log(-torch.expm1(logp.clamp_max(NEAR_ONE)))


def cpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0) -> Tensor:
    """Contrastive preference optimisation: -log sigma(beta log pi(w) - beta log pi(l)) - nll_weight log pi(w) / tokens(w), no reference.

    Xu 2024, arXiv:2401.08417, equations 3 to 5. The likelihood is a pair's own mean over tokens; for one over all tokens of the step,
    which is TRL's (`cpo_alpha`), set nll_weight: 0 and add the objective nll.
    """
    likelihood = pairs.chosen / pairs.chosen_weight.clamp_min(torch.finfo(torch.float64).tiny)
    return _smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing) - nll_weight * likelihood


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
