"""The nouns that travel between the floors: text on the left, numbers on the right, no tensors kept here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant turn; `arguments` is the parsed JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `thinking` is the reasoning part apart from `content`; `weight` 0 keeps an assistant turn untrained."""

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it (OpenAI keys, parsed arguments, absent keys left out)."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking is not None:
            out["reasoning_content"] = self.thinking
        if self.tool_calls:
            out["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": call.id} if call.id is not None else {}),
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        if self.name is not None:
            out["name"] = self.name
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        return out


@dataclass(frozen=True, slots=True)
class Dialog:
    """A conversation; `tools` are the JSON schemas offered to the model; `key` is file:line."""

    messages: tuple[Message, ...]
    key: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Running text without roles: every token is trained and an end-of-text token closes it."""

    text: str
    key: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that ask for an answer, with the truth a grader compares against."""

    messages: tuple[Message, ...]
    truth: str
    key: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the first preferred; `margin` says by how much where the row does (reward models only)."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    key: str
    tools: tuple[dict[str, Any], ...] = ()
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """One answer with its label: `value` is 1 (good) or 0 (bad) where the row has a yes or no, else its score."""

    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    value: float
    key: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Steps:
    """A solution in steps, each with its value: 1 where the solution is right up to and including it, 0 where it is not."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    values: tuple[float, ...]
    key: str
    separator: str = "\n"
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Ranked:
    """Several answers to one prompt with their scores, higher is better (a ranked list of n gives n, n-1, ..., 1).

    `measured`: the scores are amounts, whose differences are the margins of pairs; otherwise they are mere places.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    scores: tuple[float, ...]
    key: str
    tools: tuple[dict[str, Any], ...] = ()
    measured: bool = True


Example = Dialog | Text | Pair | Labelled | Steps | Ranked
Kind = Literal["dialogs", "pairs", "labels", "steps"]
Position = Literal["answers", "ends", "throughout"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an objective asks of the data.

    `kind` of rows; `at` which positions carry weight: every token of the answers, as targets, or the last token of the rendered
    conversation (the end of every step, for steps), where a reward head reads, or both, where it learns throughout; `mismatched`: each
    labelled answer is accompanied by the answer of another row to the same prompt (role "mismatched"), for KTO's estimate of the KL
    divergence; `shares`: values are learned as probabilities, so that one outside 0..1 makes a bad row.
    """

    kind: Kind = "dialogs"
    at: Position = "answers"
    mismatched: bool = False
    shares: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One row as numbers: position t of every array speaks about ids[t].

    ids [T] int32; train [T] float32, the weight with which ids[t] is learned as a target (0 = context only;
    train[0] is always 0 because nothing predicts the first token); streams: further float32 [T] arrays by name.
    Rows of one pair or rollout share `group` and are told apart by `role`.
    """

    ids: npt.NDArray[np.int32]
    train: npt.NDArray[np.float32]
    key: str
    group: str = ""
    role: str = ""
    streams: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one row stands in a packed batch: positions start..stop-1."""

    start: int
    stop: int
    key: str
    group: str = ""
    role: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows laid end to end: ids [N] int32, train [N] float32, streams [N] float32, one segment a row."""

    ids: npt.NDArray[np.int32]
    train: npt.NDArray[np.float32]
    segments: tuple[Segment, ...]
    streams: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What the model says of the K positions of a batch with train != 0.

    index [K] int64 their positions in the batch, row [K] int64 the number of the segment each stands in, train [K] their weights.
    A language model gives logp [K], the log-probability of the token at each position; a reward model gives score [K], what its
    head reads at each position, and logp is empty.
    """

    logp: Tensor
    index: Tensor
    train: Tensor
    row: Tensor
    score: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """A sum and what it is to be divided by; the division happens once, by the count of the whole optimizer step."""

    sum: Tensor
    count: Literal["tokens", "sequences", "pairs"]
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer: text without what stopped it, ids with it, log-probabilities of ids, why it ended.

    The log-probabilities are the model's own: temperature 1, nothing cut off, nothing added. top_logprobs: (id, log-probability) of the
    likeliest tokens at every place, where asked for. A cancelled answer keeps what it had.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: Literal["stop", "length", "cancelled"]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Grade:
    """A grader's verdict: value (usually 0..1) and the reason in words."""

    value: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """One number of an evaluation with its sample size, seeded 95 % interval, and the base model's value beside it."""

    task: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    seed: int
    base_value: float | None = None


def content_hash(value: object) -> str:
    """SHA-256 of a JSON-able value with sorted keys, as 64 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
