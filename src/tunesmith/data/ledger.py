"""The account of the data: what was read, refused, dropped, cut and split, and which tokens are trained, with every reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tunesmith.core.errors import BugError
from tunesmith.data.problem import Problem

_COUNTERS = ("labels", "trained", "untrained", "unused_columns")
KEYS = 1000  # keys kept of one reason; the count is always whole
Fate = Literal["refused", "dropped", "cut", "split", "note"]


@dataclass
class Reason:
    """Why rows were refused, dropped, cut or split, or what was noted of them: count, the first keys, the first message."""

    fate: Fate
    code: str
    message: str
    remedy: str = ""
    count: int = 0
    keys: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        """One more row."""
        self.count += 1
        if len(self.keys) < KEYS:
            self.keys.append(key)


@dataclass
class Part:
    """The account of one source in one split.

    read = used + refused + dropped, in rows of the file. `rows` is what they became (a row may give several), `longest` the most
    tokens a row had before any cut. `trained` and `untrained` count the tokens of used rows by the role that speaks, before a cut:
    tokens = trained + untrained - cut_tokens + repeated_tokens, where a cut takes context only, and a split repeats some. The role
    "mismatched" counts whole rows: prompts with the answers of other rows. `labels` counts used rows by their label; of these `unpaired`
    have a prompt that is answered with one label alone.
    """

    source: str
    split: Literal["train", "validation"]
    format: str = ""
    read: int = 0
    used: int = 0
    refused: int = 0
    dropped: int = 0
    cut: int = 0
    split_up: int = 0
    duplicates: int = 0
    rows: int = 0
    tokens: int = 0
    cut_tokens: int = 0
    repeated_tokens: int = 0
    longest: int = 0
    unpaired: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    untrained: Counter[str] = field(default_factory=Counter)
    unused_columns: Counter[str] = field(default_factory=Counter)
    reasons: list[Reason] = field(default_factory=list)

    def note(self, fate: Fate, problem: Problem) -> None:
        """Count a row under its reason; `refused` and `dropped` rows are counted as such too."""
        for reason in self.reasons:
            if reason.fate == fate and reason.code == problem.code:
                break
        else:
            reason = Reason(fate, problem.code, problem.message, problem.remedy)
            self.reasons.append(reason)
        reason.add(problem.key)
        if fate == "refused":
            self.refused += 1
        elif fate == "dropped":
            self.dropped += 1
        elif fate == "cut":
            self.cut += 1
        elif fate == "split":
            self.split_up += 1

    def balance(self) -> None:
        """Raise BugError unless every row and every token is accounted for."""
        if self.read != self.used + self.refused + self.dropped:
            raise BugError(
                f"the ledger lost a row: {self.read} read, {self.used + self.refused + self.dropped} accounted for", where=self.source
            )
        counted = sum(self.trained.values()) + sum(self.untrained.values()) - self.cut_tokens + self.repeated_tokens
        if self.tokens != counted:
            raise BugError(f"the ledger lost a token: {self.tokens} in the rows, {counted} accounted for", where=self.source)
        for fate, count in (("refused", self.refused), ("dropped", self.dropped)):
            if count != sum(reason.count for reason in self.reasons if reason.fate == fate):
                raise BugError(f"a {fate} row has no reason", where=self.source)


@dataclass
class Ledger:
    """The parts of all sources, and how many validation rows are also trained on."""

    parts: list[Part] = field(default_factory=list)
    overlap: int = 0

    def balance(self) -> None:
        """Raise BugError unless every part balances."""
        for part in self.parts:
            part.balance()

    @property
    def refused(self) -> int:
        """Rows refused in all parts."""
        return sum(part.refused for part in self.parts)

    def reasons(self, *fates: Fate) -> list[tuple[Part, Reason]]:
        """Every reason of these fates, most frequent first."""
        found = [(part, reason) for part in self.parts for reason in part.reasons if reason.fate in fates]
        return sorted(found, key=lambda pair: -pair[1].count)

    def as_dict(self) -> dict[str, Any]:
        """What ledger.json holds; `Ledger.from_dict` reads it back."""
        names = ("read", "used", "refused", "dropped", "cut", "split_up", "rows", "tokens")
        trained, untrained = self._by_role("trained"), self._by_role("untrained")
        totals = {name: sum(getattr(part, name) for part in self.parts) for name in names}
        return {
            "totals": {**totals, "trained": dict(trained), "untrained": dict(untrained)},
            "overlap": self.overlap,
            "parts": [_plain(part) for part in self.parts],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Ledger:
        """The ledger that `as_dict` wrote."""
        parts = [
            Part(
                **{
                    **part,
                    **{name: Counter(part.get(name, {})) for name in _COUNTERS},
                    "reasons": [Reason(**reason) for reason in part["reasons"]],
                }
            )
            for part in value["parts"]
        ]
        return cls(parts, value["overlap"])

    def _by_role(self, name: Literal["trained", "untrained"]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts.update(part.trained if name == "trained" else part.untrained)
        return counts

    def summary(self) -> str:
        """A short table for people: a line a source, then the reasons."""
        lines = ["split       read    used refused dropped    rows     tokens    trained  source (format)"]
        lines += [
            f"{part.split:<10} {part.read:>5} {part.used:>7} {part.refused:>7} {part.dropped:>7} {part.rows:>7} {part.tokens:>10} "
            f"{sum(part.trained.values()):>10}  {part.source} ({part.format})"
            for part in self.parts
        ]
        roles = sorted({*self._by_role("trained"), *self._by_role("untrained")})
        if roles:
            both = ((role, self._by_role("trained")[role], self._by_role("untrained")[role]) for role in roles)
            lines.append("tokens by role, trained/context: " + ", ".join(f"{role} {yes}/{no}" for role, yes, no in both))
        for part in self.parts:
            if total := sum(part.labels.values()):
                counts = ", ".join(f"{count} {label}" for label, count in part.labels.items())
                share = f"{part.unpaired} of {total} ({part.unpaired / total:.0%}) have a prompt with one label alone"
                lines.append(f"{part.split} answers: {counts}; {share}")
        for _part, reason in self.reasons("refused", "dropped", "cut", "split", "note"):
            lines.append(f"{reason.fate} {reason.count} x {reason.code}: {reason.message} ({_some(reason.keys, reason.count)})")
        if self.overlap:
            lines.append(f"warning: {self.overlap} validation rows are also trained on")
        return "\n".join(lines)


def _plain(part: Part) -> dict[str, Any]:
    # asdict hands a Counter its pairs as if they were things to count.
    counters = {name: dict(getattr(part, name)) for name in _COUNTERS}
    bare: dict[str, Any] = {name: Counter() for name in _COUNTERS}
    return {**asdict(replace(part, **bare)), **counters}


def _some(keys: Iterable[str], count: int) -> str:
    shown = list(keys)[:3]
    return ", ".join(shown) + (", ..." if count > len(shown) else "")
