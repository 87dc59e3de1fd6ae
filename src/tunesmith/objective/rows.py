"""What a loss over whole answers needs of a batch: sums over each row's trained tokens, and the pairs or labels that rows form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.core.errors import BugError
from tunesmith.core.types import Batch, Outputs

NUMBERS = ("logp", "reference", "weight")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """S rows (segments) of a batch or of a whole step, as numbers.

    logp [S] fp64 is the sum over a row's trained tokens of train * log-probability, differentiable; reference [S] fp64 the same of the
    reference model, zeros without one; weight [S] fp64 the sum of train. roles and groups are the segments' own. A loss over rows is a
    function of logp, so its slope in each row is all that a second pass over the batch needs: sum(slope * logp) has the same gradient.
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
        return replace(self, **{name: getattr(self, name).detach().to(device) for name in NUMBERS})

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one after the other; gradients flow to each."""
        logp, reference, weight = (torch.cat([getattr(part, name) for part in parts]) for name in NUMBERS)
        roles, groups = (tuple(word for part in parts for word in getattr(part, name)) for name in ("roles", "groups"))
        return Rows(logp, reference, weight, roles, groups)

    def pairs(self) -> Pairs:
        """Chosen and rejected rows matched by group, in the order of the chosen. Raises BugError when a group has not one of each."""
        chosen, rejected = (torch.tensor(places, device=self.logp.device) for places in match(self.roles, self.groups))
        return Pairs(*(side for name in NUMBERS for side in (getattr(self, name)[chosen], getattr(self, name)[rejected])))

    def labels(self) -> Labels:
        """Labelled rows, and the mismatched ones apart. Raises BugError for a row of another role."""
        for role, group in zip(self.roles, self.groups, strict=True):
            if role not in ("desirable", "undesirable", "mismatched"):
                raise BugError(f"a row of role '{role}' stands where labelled answers are needed", where=group, code="no_label")
        answers = torch.tensor([role != "mismatched" for role in self.roles], device=self.logp.device)
        good = torch.tensor([role == "desirable" for role in self.roles], device=self.logp.device)[answers]
        ratio = self.logp - self.reference
        return Labels(ratio[answers], good, ratio[~answers].detach(), self.logp.detach()[answers])


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """n pairs [n] fp64: log-probabilities of the chosen and the rejected answers, those of the reference, and the weights of their tokens.

    What the log-probabilities are of (all tokens, one token on average, a form under another divergence) is settled before a loss sees
    them, see shape.py; to a loss they are numbers.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_weight: Tensor
    rejected_weight: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(chosen) - log reference(chosen)."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi(rejected) - log reference(rejected)."""
        return self.rejected - self.rejected_reference

    @property
    def difference(self) -> Tensor:
        """The ratios' difference, chosen less rejected."""
        return self.chosen_ratio - self.rejected_ratio


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """n labelled answers: ratio [n] of policy to reference in logs, desirable [n] bool, and without gradient the ratios [m] of mismatched
    answers and the answers' log-probabilities logp [n].
    """

    ratio: Tensor
    desirable: Tensor
    mismatched: Tensor
    logp: Tensor


def collect(outputs: Outputs, batch: Batch, *, excess: float = 1.0, referenced: bool = True) -> Rows:
    """The rows of a batch.

    `excess` is the weight of a token beyond the length of the shortest row of its group (1: like any other). The stream "reference"
    is read where there is one and `referenced` asks for it.
    """
    weights = outputs.train.double()
    summed = weights if excess == 1 else weights * _excess_weights(outputs, batch, excess)
    size = len(batch.segments)
    reference = torch.zeros(size, dtype=torch.float64, device=weights.device)
    if referenced and "reference" in batch.streams:
        reference = sums(values_of("reference", outputs, batch) * summed, outputs.row, size)
    return Rows(
        logp=sums(outputs.logp.double() * summed, outputs.row, size),
        reference=reference,
        weight=sums(weights, outputs.row, size),
        roles=tuple(segment.role for segment in batch.segments),
        groups=tuple(segment.group for segment in batch.segments),
    )


def sums(values: Tensor, row: Tensor, size: int) -> Tensor:
    """Sums [size] of values [K] by their row [K], in the same order every time."""
    zeros = torch.zeros(size, dtype=values.dtype, device=values.device)
    if values.is_cuda:  # index_add adds in any order there, index_put sorts first
        return zeros.index_put((row,), values, accumulate=True)
    return zeros.index_add(0, row, values)


def values_of(name: str, outputs: Outputs, batch: Batch) -> Tensor:
    """A stream of the batch at the K positions that the model spoke of, [K] fp64."""
    return torch.from_numpy(batch.streams[name]).to(outputs.index.device)[outputs.index].double()


def match(roles: Sequence[str], groups: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places of the chosen and of the rejected row of every group. Raises BugError when a group has not one of each."""
    places: dict[str, dict[str, int]] = {"chosen": {}, "rejected": {}}
    for place, (role, group) in enumerate(zip(roles, groups, strict=True)):
        if role not in places or group in places[role]:
            raise BugError(f"a row of role '{role}' stands where one pair is needed", where=group, code="no_pair")
        places[role][group] = place
    if places["chosen"].keys() != places["rejected"].keys():
        odd = min(places["chosen"].keys() ^ places["rejected"].keys())
        raise BugError("only one answer of a pair is in this batch", where=odd, code="no_pair")
    return list(places["chosen"].values()), [places["rejected"][group] for group in places["chosen"]]


def _excess_weights(outputs: Outputs, batch: Batch, excess: float) -> Tensor:
    device = outputs.row.device
    lengths = torch.bincount(outputs.row, minlength=len(batch.segments)).tolist()
    shortest: dict[str, int] = {}
    for segment, length in zip(batch.segments, lengths, strict=True):
        shortest[segment.group] = min(length, shortest.get(segment.group, length))
    limits = torch.tensor([shortest[segment.group] for segment in batch.segments], device=device)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    # Segments stand one behind the other, so the rank of a position less those of earlier segments is its place in its own.
    rank = torch.empty_like(outputs.index)
    rank[outputs.index.argsort()] = torch.arange(len(rank), device=device)
    inside = rank - starts[outputs.row] < limits[outputs.row]
    return torch.full(rank.shape, excess, dtype=torch.float64, device=device).masked_fill(inside, 1.0)
