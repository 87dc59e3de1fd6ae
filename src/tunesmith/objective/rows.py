"""What a loss over whole answers needs of a batch: sums over each row's trained tokens, and the pairs that rows form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.core.types import Batch, Outputs

Lengths = Literal["sum", "mean", "desensitised"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
LARGEST = 80.0  # exponents above are cut, so that one hopeless answer does not make a loss infinite


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """S rows: logp [S] fp64, the weighted sum of their trained tokens' log-probabilities (differentiable), reference [S] the same of the
    reference model (zeros without one), weight [S] the sum of the weights; the rows' roles and groups.
    """

    logp: Tensor
    reference: Tensor
    weight: Tensor
    roles: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.roles)

    def detach(self, device: str | torch.device) -> Rows:
        """The numbers alone, on `device`."""
        return replace(self, **{name: getattr(self, name).detach().to(device) for name in ("logp", "reference", "weight")})

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one after the other."""
        logp, reference, weight = (torch.cat([getattr(part, name) for part in parts]) for name in ("logp", "reference", "weight"))
        roles, groups = (tuple(word for part in parts for word in getattr(part, name)) for name in ("roles", "groups"))
        return Rows(logp, reference, weight, roles, groups)

    def of(self, role: str) -> Rows:
        """The rows of one role."""
        places = [place for place, own in enumerate(self.roles) if own == role]
        return self._take(places)

    def _take(self, places: Sequence[int]) -> Rows:
        index = torch.tensor(places, dtype=torch.long, device=self.logp.device)
        numbers = (self.logp[index], self.reference[index], self.weight[index])
        return Rows(*numbers, tuple(self.roles[p] for p in places), tuple(self.groups[p] for p in places))

    def pairs(self, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> Pairs:
        """Chosen and rejected rows matched by group. Raises BugError when a group has not one of each."""
        sides: dict[str, dict[str, int]] = {"chosen": {}, "rejected": {}}
        for place, (role, group) in enumerate(zip(self.roles, self.groups, strict=True)):
            if role not in sides or group in sides[role]:
                raise BugError(f"a row of role '{role}' stands where pairs are needed", where=group)
            sides[role][group] = place
        if sides["chosen"].keys() != sides["rejected"].keys():
            odd = sorted(sides["chosen"].keys() ^ sides["rejected"].keys())
            raise BugError("a pair was torn apart", where=odd[0])
        order = list(sides["chosen"])
        chosen, rejected = (self._take([sides[role][group] for group in order]) for role in ("chosen", "rejected"))
        sides_of = (chosen.logp, rejected.logp, chosen.reference, rejected.reference, chosen.weight, rejected.weight)
        return Pairs(*sides_of, divergence, alpha)


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """n pairs: log-probabilities [n] of the chosen and rejected answers, those of the reference, and the sums of token weights."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_weight: Tensor
    rejected_weight: Tensor
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(chosen) - log reference(chosen)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(rejected) - log reference(rejected)."""
        return self.rejected - self.reference_rejected

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """f'(pi / reference) of both answers, the implicit rewards over beta under an f-divergence (Wang 2023, arXiv:2309.16240, eq. 10).

        reverse KL: log t; forward KL: 1 - 1/t; Jensen-Shannon: log 2t/(t+1); alpha: (t^(alpha-1) - 1)/(alpha-1), for t the ratio.
        """
        return self._slope(self.chosen_ratio), self._slope(self.rejected_ratio)

    @property
    def difference(self) -> Tensor:
        """The scores' difference [n], chosen less rejected."""
        chosen, rejected = self.scores
        return chosen - rejected

    def _slope(self, ratio: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -torch.expm1((-ratio).clamp_max(LARGEST))
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(ratio)
        if self.divergence == "alpha" and abs(self.alpha - 1) > 1e-6:
            return torch.expm1(((self.alpha - 1) * ratio).clamp_max(LARGEST)) / (self.alpha - 1)
        return ratio


def collect(outputs: Outputs, batch: Batch, *, lengths: Lengths = "sum", ld_alpha: float = 0.5) -> Rows:
    """The rows of a batch.

    `lengths`: "sum" of log-probabilities; "mean" a token; "desensitised": tokens beyond the shorter answer of the pair count `ld_alpha`
    times (LD-DPO, Liu 2024, arXiv:2409.06411, equation 11).
    """
    weights = outputs.train.double()
    if lengths == "desensitised":
        weights = weights * _tail_weights(outputs, batch, ld_alpha)
    size = len(batch.segments)
    zeros = torch.zeros(size, dtype=torch.float64, device=weights.device)
    logp = zeros.index_add(0, outputs.row, outputs.logp.double() * weights)
    weight = zeros.index_add(0, outputs.row, weights)
    reference = zeros
    if "reference" in batch.streams:
        values = torch.from_numpy(batch.streams["reference"]).to(weights.device)[outputs.index].double()
        reference = zeros.index_add(0, outputs.row, values * weights)
    if lengths == "mean":
        count = weight.clamp_min(torch.finfo(torch.float64).tiny)
        logp, reference = logp / count, reference / count
    roles, groups = zip(*((segment.role, segment.group) for segment in batch.segments), strict=True)
    return Rows(logp, reference, weight, roles, groups)


def _tail_weights(outputs: Outputs, batch: Batch, alpha: float) -> Tensor:
    """1 for the trained tokens of each row up to the length of the shortest row of its group, `alpha` for those behind."""
    sizes = torch.bincount(outputs.row, minlength=len(batch.segments)).tolist()
    shortest: dict[str, int] = {}
    for segment, size in zip(batch.segments, sizes, strict=True):
        shortest[segment.group] = min(size, shortest.get(segment.group, size))
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1].to(outputs.row.device)
    limit = torch.tensor([shortest[segment.group] for segment in batch.segments], device=outputs.row.device)
    place = torch.arange(len(outputs.row), device=outputs.row.device) - starts[outputs.row]
    return torch.where(place < limit[outputs.row], 1.0, alpha).double()
