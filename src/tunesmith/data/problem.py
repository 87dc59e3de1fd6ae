"""What is wrong with one row: reading goes on, and all problems are reported at once."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.core.errors import TunesmithError


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used: its key (file:line), a stable code, what is wrong, and what to do."""

    key: str
    code: str
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, error: TunesmithError, key: str) -> Problem:
        """The problem that an error about one row stands for."""
        return cls(key, error.code, error.message, error.remedy)

    def as_dict(self) -> dict[str, str]:
        """The same four words as an error has in `--json` output."""
        return {"code": self.code, "where": self.key, "message": self.message, "remedy": self.remedy}
