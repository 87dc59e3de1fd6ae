"""One process or several: what is summed over ranks, and who writes.

Every rank holds the whole model, takes its share of the step's micro-batches, and the gradients are summed once at the end of the
step, so ranks may hold unequal numbers of micro-batches. Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in double precision."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=self._device())
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: T) -> list[T]:
        """What every rank has, in the order of the ranks; small objects on the CPU only."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def sum_array(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """An array summed over all ranks."""
        if self.world == 1:
            return values
        total = torch.from_numpy(values).to(self._device())
        dist.all_reduce(total)
        return total.cpu().numpy()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum .grad over all ranks in place; a parameter without gradient on this rank counts as zero."""
        if self.world == 1:
            return
        trainable = [p for p in parameters if p.requires_grad]
        for parameter in trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in sorted({p.dtype for p in trainable}, key=str):
            grads = [p.grad for p in trainable if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for grad, piece in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                grad.copy_(piece.view_as(grad))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.sum([float(flag)])[0] > 0

    def _device(self) -> torch.device:
        return torch.device("cuda", self.local) if dist.get_backend() == "nccl" else torch.device("cpu")


def join(device: str) -> Ranks:
    """This process's place; joins the process group when torchrun started several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        cuda = torch.cuda.is_available() and device != "cpu"
        if cuda:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), local)


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
