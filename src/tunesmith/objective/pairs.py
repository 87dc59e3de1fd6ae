"""Losses over preference pairs: each takes Pairs and gives one loss [n] a pair.

h is the difference of the implicit rewards over beta: (log pi(w) - log ref(w)) - (log pi(l) - log ref(l)) for the chosen answer w and the
rejected l, or its form under another f-divergence. sigma is the logistic function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.objective.rows import Pairs


def dpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimisation: -log sigma(beta h). Rafailov 2023, arXiv:2305.18290, equation 7."""
    return -F.logsigmoid(beta * pairs.difference)


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO for labels that are wrong with probability e: -(1 - e) log sigma(beta h) - e log sigma(-beta h).

    Mitchell 2023, "A note on DPO with noisy preferences", equation 3.
    """
    logits = beta * pairs.difference
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """The unbiased form of DPO under labels flipped with probability e. Chowdhury 2024, arXiv:2403.00409, equation 12.

    ((1 - e) (-log sigma(beta h)) - e (-log sigma(-beta h))) / (1 - 2 e).
    """
    logits = beta * pairs.difference
    return (label_smoothing * F.logsigmoid(-logits) - (1 - label_smoothing) * F.logsigmoid(logits)) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation: (h - 1 / (2 beta))^2, h from log-probabilities a token. Azar 2023, arXiv:2310.12036, equation 17.

    The paper sums over tokens; its authors confirmed the mean, which makes beta mean the same for short and long answers.
    """
    chosen, rejected = pairs.scores
    return (chosen / pairs.chosen_weight - rejected / pairs.rejected_weight - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Hinge on the reward difference: max(0, 1 - beta h). SLiC, Zhao 2023, arXiv:2305.10425, with a reference as in arXiv:2309.06657."""
    return torch.relu(1 - beta * pairs.difference)


def rso(pairs: Pairs, *, gamma: float = 0.05) -> Tensor:
    """The hinge-norm loss of RSO, for pairs drawn by rejection sampling: max(0, 1 - gamma h). Liu 2023, arXiv:2309.06657, equation 9."""
    return torch.relu(1 - gamma * pairs.difference)


def exo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """Exact optimisation: KL(p || q) of p = (sigma(beta h), sigma(-beta h)) from q = (1 - e, e). Ji 2024, arXiv:2402.00856, equation 16."""
    logits = beta * pairs.difference
    up, down = F.logsigmoid(logits), F.logsigmoid(-logits)
    return up.exp() * (up - math.log1p(-label_smoothing)) + down.exp() * (down - math.log(label_smoothing))


def nca(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Noise contrastive alignment: -log sigma(r_w) - 0.5 log sigma(-r_w) - 0.5 log sigma(-r_l). Chen 2024, arXiv:2402.05369, eq. 11."""
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo(pairs: Pairs, *, beta: float = 1e-3) -> Tensor:
    """Self-play preference optimisation with hard labels: (ratio_w - 1/(2 beta))^2 + (ratio_l + 1/(2 beta))^2.

    Wu 2024, arXiv:2405.00675, equation 4.7 with probabilities 1 and 0.
    """
    return (pairs.chosen_ratio - 0.5 / beta).square() + (pairs.rejected_ratio + 0.5 / beta).square()


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """For answers better than the model's: 1 - sigma(r_w) + sigma(r_l). D'Oosterlinck 2024, arXiv:2408.06266, equation 7."""
    return torch.sigmoid(-beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """For answers worse than the model's: sigma(r_w) + 1 - sigma(r_w - r_l). D'Oosterlinck 2024, arXiv:2408.06266, equation 8."""
    return torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(-beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport, unpaired: sorted ratios of the chosen against sorted ratios of the rejected, over the whole step.

    Melnyk 2024, arXiv:2406.05882, equation 8. The j-th loss belongs to the j-th quantile and no longer to a pair.
    """
    return _smoothed(beta * (pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values), label_smoothing)


def aot_pair(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport, paired: sorted margins of the policy against sorted margins of the reference, over the whole step.

    Melnyk 2024, arXiv:2406.05882, equation 7.
    """
    margins, reference = pairs.chosen - pairs.rejected, pairs.reference_chosen - pairs.reference_rejected
    return _smoothed(beta * (margins.sort().values - reference.sort().values), label_smoothing)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def bco_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Binary classifier optimisation on both answers: -log sigma(r_w) - log sigma(-r_l). Jung 2024, arXiv:2404.04656, equation 9.

    Without the paper's reward shift, which cancels between the two answers of a pair to first order; the row `bco` has it.
    """
    return -F.logsigmoid(beta * pairs.chosen_ratio) - F.logsigmoid(-beta * pairs.rejected_ratio)


def discopop(pairs: Pairs, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """Log-ratio modulated loss: (1 - m) (-log sigma(beta h)) + m exp(-beta h), m = sigma(beta h / tau).

    Lu 2024, arXiv:2406.08414, equation 5.
    """
    logits = beta * pairs.difference
    mixed = torch.sigmoid(logits / tau)
    # m exp(-x) = exp(-x + log m): finite where exp(-x) alone is not.
    return -F.logsigmoid(logits) * (1 - mixed) + torch.exp(F.logsigmoid(logits / tau) - logits)


def simpo(pairs: Pairs, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """Simple preference optimisation: -log sigma(beta (mean_w - mean_l) - gamma), log-probabilities a token, no reference.

    Meng 2024, arXiv:2405.14734, equation 6; `gamma` is the margin itself, not its ratio to beta.
    """
    return _smoothed(beta * (pairs.chosen / pairs.chosen_weight - pairs.rejected / pairs.rejected_weight) - gamma, label_smoothing)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation: -mean_w - beta log sigma(log odds(w) - log odds(l)), no reference.

    odds = p / (1 - p) of p = exp(mean log-probability a token). Hong 2024, arXiv:2403.07691, equations 4 to 7, beta for their lambda.
    """
    chosen, rejected = pairs.chosen / pairs.chosen_weight, pairs.rejected / pairs.rejected_weight
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p), finite also for p that rounds to 1."""
    return logp - torch.log(-torch.expm1(logp.clamp_max(-1e-12)))


def cpo(pairs: Pairs, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """Contrastive preference optimisation: -log sigma(beta (log pi(w) - log pi(l))) - alpha mean_w, no reference.

    Xu 2024, arXiv:2401.08417, equations 3 to 5; the likelihood of the chosen answer is a mean over its tokens.
    """
    return _smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing) - alpha * pairs.chosen / pairs.chosen_weight
