"""The account of labels: how many answers are good, how many have a counterpart, and whether there is anything to learn from them."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.data.ledger import Part
from tunesmith.data.tokenise import Used

_HASH_BYTES = 32


class Labels:
    """The labels of the rows of one split, in their order."""

    def __init__(self) -> None:
        self._prompts = bytearray()  # hashes, end to end
        self._values = array("d")
        self._owners = array("q")  # place of each row's part in the ledger

    def enter(self, used: Used, part: Part, owner: int) -> None:
        """One labelled answer of the ledger's part number `owner`."""
        (tokens,) = used.tokens
        value = float(tokens.streams["value"][-1]) if tokens.streams else float(tokens.role == "desirable")
        part.labels[{1.0: "desirable", 0.0: "undesirable"}.get(value, "scored")] += 1
        self._prompts += bytes.fromhex(used.prompt)
        self._values.append(value)
        self._owners.append(owner)

    def finish(self, parts: list[Part]) -> None:
        """Count the rows whose prompt has not both labels."""
        if not self._values:
            return
        values = np.frombuffer(self._values, dtype=np.float64)
        prompts, which = np.unique(np.frombuffer(self._prompts, dtype=f"S{_HASH_BYTES}"), return_inverse=True)
        both = np.logical_and(*(np.bincount(which[values == label], minlength=len(prompts)) > 0 for label in (0, 1)))
        alone = np.frombuffer(self._owners, dtype=np.int64)[~both[which] & np.isin(values, (0, 1))]
        for part, count in zip(parts, np.bincount(alone, minlength=len(parts)).tolist(), strict=True):
            part.unpaired += count

    def check(self, where: str) -> None:
        """Raise DataError "one_label" when all rows have the same label."""
        if len(set(self._values)) == 1:
            what = f"all {len(self._values)} labelled answers have the label {_word(self._values[0])}"
            raise _one_label(what, where, "add answers with the other label; good answers alone are for objective nll")


class StepLabels:
    """The labels of the steps of one split."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()

    def enter(self, used: Used) -> None:
        """One solution."""
        for tokens in used.tokens:
            self._counts.update(tokens.streams["value"][tokens.train != 0].tolist())

    def check(self, where: str) -> None:
        """Raise DataError "one_label" when all steps have the same label."""
        if len(self._counts) == 1:
            [(value, count)] = self._counts.items()
            raise _one_label(f"all {count} steps have the label {_word(value)}", where, "add solutions with steps of the other label")


def _word(value: float) -> str:
    return {1.0: "true", 0.0: "false"}.get(value, f"{value:g}")


def _one_label(what: str, where: str, remedy: str) -> DataError:
    return DataError(f"{what}, so there is nothing to tell apart", where=where, remedy=remedy, code="one_label")
