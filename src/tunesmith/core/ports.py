"""The seams: what one floor asks of another, without naming it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tunesmith.core.types import Completion, Grade


@dataclass(frozen=True)
class SampleSettings:
    """How to draw a completion: greedy when temperature is 0; top_k 0, top_p 1, min_p 0 and neutral penalties switch those off.

    In this order: logit_bias is added; repetition_penalty r divides positive logits of tokens seen in prompt or answer by r and
    multiplies negative ones (Keskar 2019, arXiv:1909.05858); frequency_penalty times a token's count in the answer, and
    presence_penalty once if it is there, are subtracted; temperature; top_k; top_p (Holtzman 2020, arXiv:1904.09751); min_p times the
    likeliest token's probability (Nguyen 2024, arXiv:2407.01082). `stop` texts (or one text) end an answer and are left out of it,
    `stop_ids` are added to the sampler's own. top_logprobs: so many of the likeliest tokens are reported at every place. `adapter`: one
    of those that the engine has loaded.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    adapter: str | None = None

    def __post_init__(self) -> None:
        """One stop may be given as a text, and a bias with ids as JSON has them."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.logit_bias, Mapping) and any(isinstance(token, str) for token in self.logit_bias):
            ids = {int(token) if isinstance(token, str) and token.isdecimal() else token: bias for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", ids)


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
