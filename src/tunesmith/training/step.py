"""One optimizer step: rows to micro-batches, sums to gradients, divided once by the count of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.core.errors import CapacityError, ModelError
from tunesmith.core.log import logger
from tunesmith.core.types import Batch, Tokens
from tunesmith.data.pack import pack
from tunesmith.model.gradients import direct
from tunesmith.model.policy import Policy
from tunesmith.objective import Method
from tunesmith.training.parallel import Ranks

LARGE = 32 << 20  # bytes above which a CPU's allocator maps memory anew each time (see model/allocator.py)


@dataclass(frozen=True)
class StepResult:
    """Totals over all ranks: the loss (already divided), further metrics, tokens seen and trained."""

    loss: float
    metrics: dict[str, float]
    tokens: int
    trained_tokens: int


@dataclass
class Budget:
    """How many tokens a micro-batch may hold; it shrinks when memory runs out, which changes no result."""

    tokens: int

    def shrink(self, rows: Sequence[Tokens]) -> None:
        """Halve the budget, or raise CapacityError when micro-batches are single rows already."""
        longest = max(len(row) for row in rows)
        if self.tokens <= longest:
            row = max(rows, key=len)
            raise CapacityError(
                f"out of memory on a single row of {longest} tokens",
                where=row.key,
                remedy="set run.checkpointing: on, lower tokens.max_length, choose a smaller base, or train an adapter",
                code="out_of_memory",
            )
        self.tokens = max(longest, self.tokens // 2)
        logger.warning("out of memory: micro-batches now hold at most %d tokens (results do not depend on it)", self.tokens)


def counts_of(batches: Sequence[Batch], ranks: Ranks) -> dict[str, float]:
    """What sums are divided by, over the whole step and all ranks: trained-token weights, sequences, pairs."""
    local = (
        sum(float(batch.train.sum(dtype="float64")) for batch in batches),
        sum(len(batch.segments) for batch in batches),
        sum(len({segment.group for segment in batch.segments if segment.group}) for batch in batches),
    )
    return dict(zip(("tokens", "sequences", "pairs"), ranks.sum(local), strict=True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def gradient_step(policy: Policy, rows: Sequence[Tokens], methods: Sequence[Method], budget: Budget, ranks: Ranks) -> StepResult:
    """Fill .grad with the gradient of the step's loss over `rows`; no weight is moved.

    When memory runs out the gradients are dropped, the random state is put back, and the same rows are done in smaller micro-batches.
    Raises CapacityError when one row alone does not fit, ModelError (not_finite) naming the rows of the first bad micro-batch.
    """
    random_state = _random_state()
    while True:
        batches = pack(rows, budget.tokens)[ranks.rank :: ranks.world]
        try:
            with policy.steady(), direct():
                result = _accumulate(policy, batches, methods, ranks)
            ranks.sum_gradients(policy.parameters_by_name().values())
            return result
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or ranks.world > 1:
                raise
            zero_gradients(policy)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        budget.shrink(rows)
        _set_random_state(random_state)


def _accumulate(policy: Policy, batches: Sequence[Batch], methods: Sequence[Method], ranks: Ranks) -> StepResult:
    counts = counts_of(batches, ranks)
    losses: list[torch.Tensor] = []
    sums: dict[str, tuple[float, float]] = {}
    for batch in batches:
        if not batch.train.any():
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        outputs = policy.score(batch)
        total = torch.zeros((), dtype=torch.float64, device=outputs.logp.device)
        for method in methods:
            loss = method.function(outputs, batch)
            total = total + loss.sum * (method.weight / max(counts[loss.count], 1.0))
            for name, (value, weight) in loss.metrics.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + value, old[1] + weight)
        total.backward()  # type: ignore[no-untyped-call]
        losses.append(total.detach())
    _demand_finite(batches, losses)
    loss_sum = float(torch.stack([loss.cpu() for loss in losses]).sum()) if losses else 0.0
    names = sorted(sums)
    flat = ranks.sum(
        [loss_sum, sum(len(b) for b in batches), sum(int((b.train != 0).sum()) for b in batches), *(v for n in names for v in sums[n])]
    )
    metrics = {name: flat[3 + 2 * i] / max(flat[4 + 2 * i], 1e-12) for i, name in enumerate(names)}
    return StepResult(flat[0], metrics, int(flat[1]), int(flat[2]))


def _demand_finite(batches: Sequence[Batch], losses: Sequence[torch.Tensor]) -> None:
    for batch, loss in zip(batches, losses, strict=True):
        if not torch.isfinite(loss):
            raise not_finite(f"the loss is {float(loss)}", [segment.key for segment in batch.segments])


def not_finite(what: str, keys: Sequence[str]) -> ModelError:
    """The error for NaN or infinity, with the rows it came from."""
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return ModelError(
        f"{what}; the weights were not moved by this step",
        where=", ".join(keys[:8]) + more,
        remedy="look at these rows with 'tunesmith show'; else lower optim.lr, lengthen optim.warmup or set model.dtype: fp32",
        code="not_finite",
    )


def zero_gradients(policy: Policy) -> None:
    """Drop all gradients; the very large ones of embeddings and heads are filled with zeros instead, room for them is costly to get."""
    for parameter in policy.parameters_by_name().values():
        if parameter.grad is not None and parameter.grad.device.type == "cpu" and parameter.grad.nbytes > LARGE:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@torch.no_grad()
def validation_loss(policy: Policy, rows: Sequence[Tokens], budget: Budget, ranks: Ranks) -> float:
    """Mean negative log-likelihood of the trained tokens of `rows`, over all rows at once and not a mean of means."""
    policy.train_mode(False)
    total = weight = 0.0
    batches = pack(rows, budget.tokens)[ranks.rank :: ranks.world]
    with policy.steady():
        for batch in batches:
            if batch.train.any():
                outputs = policy.score(batch)
                total -= float((outputs.logp.double() * outputs.train.double()).sum())
                weight += float(outputs.train.double().sum())
    policy.train_mode(True)
    total, weight = ranks.sum([total, weight])
    return total / max(weight, 1e-12)
