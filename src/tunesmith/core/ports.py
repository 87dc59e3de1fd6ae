"""The seams: what one floor asks of another, without naming it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunesmith.core.types import Completion, Grade


@dataclass(frozen=True)
class SampleSettings:
    """How to draw a completion: greedy when temperature is 0; top_k 0 and top_p 1 switch those off."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0


class Sampler(Protocol):
    """Continues prompts given as token ids."""

    def sample(self, prompts: Sequence[Sequence[int]], settings: SampleSettings) -> list[list[Completion]]:
        """For every prompt, `settings.n` completions."""
        ...


class Grader(Protocol):
    """Judges an answer: the same function is a reward in training and a score in evaluation."""

    def __call__(self, prompt: str, answer: str, truth: str) -> Grade:
        """The grade of one answer."""
        ...


class Sink(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's values."""
        ...

    def close(self) -> None:
        """No more steps follow."""
        ...
