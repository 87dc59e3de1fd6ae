"""How fast a run is: tokens per second, its share of what the machine's matrix products reach, and the time to the first step."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.log import logger
from tunesmith.core.types import Tokens
from tunesmith.model.flops import Gemm, Work, count, measure_gemm
from tunesmith.model.forward import Sharing
from tunesmith.model.policy import Policy
from tunesmith.training.parallel import Ranks


@dataclass(frozen=True)
class Gauge:
    """What a step costs and what this machine could do: `ceiling` is the rate of the measured product, summed over all processes."""

    work: Work
    gemm: Gemm
    ceiling: float
    sharing: Sharing | None = None
    scalar: bool = False

    def of(self, rows: Sequence[Tokens], seconds: float) -> dict[str, float]:
        """`tflops` (1e12 operations a second, all processes) and `mfu`, their share of the ceiling."""
        rate = self.work.of(rows, self.sharing, at=int(self.scalar)) / max(seconds, 1e-9)
        return {"tflops": rate / 1e12, "mfu": rate / self.ceiling}

    def as_dict(self) -> dict[str, Any]:
        """For the receipt: the count, in weights, and the product that it is measured against."""
        size = self.gemm.size
        return {
            "formula": self.work.formula,
            "weights": {"frozen": self.work.frozen, "trained": self.work.trained, "head": sum(self.work.head)},
            "not_counted": list(self.work.not_counted),
            "gemm": f"{size}^3 {self.gemm.dtype}",
            "gemm_tflops": self.ceiling / 1e12,
        }


def gauge_of(policy: Policy, ranks: Ranks) -> Gauge:
    """Count the model's work and measure a product of the precision it computes in, on every process at once."""
    work = count(policy.causal)
    if work.not_counted:
        logger.info("not in the count of operations: %s", ", ".join(work.not_counted))
    ranks.barrier()
    gemm = measure_gemm(policy.device, policy.dtype)
    return Gauge(work, gemm, ranks.sum([gemm.flops])[0], policy.sharing, policy.scalar)


def summary(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Over the rows of metrics.jsonl: `median_tokens_per_s` of the steps, and `tflops` and `mfu` weighted by each step's seconds.

    `first_step_seconds`: from the start of the last process to the end of its first step.
    """
    rows = [row for row in metrics if "mfu" in row]
    if not rows:
        return {}
    seconds = sum(row["seconds"] for row in rows)
    means = {name: sum(row[name] * row["seconds"] for row in rows) / max(seconds, 1e-9) for name in ("tflops", "mfu")}
    start = [row["first_step_seconds"] for row in rows if "first_step_seconds" in row][-1:]
    return {
        "median_tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        **means,
        **({"first_step_seconds": start[0]} if start else {}),
    }


def process_start() -> float:
    """When this process was started, on the clock of time.perf_counter; now, where the system does not tell."""
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return time.perf_counter()
    ticks = int(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age
