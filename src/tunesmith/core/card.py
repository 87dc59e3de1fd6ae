"""tunesmith.json beside a trained model: what it was made from and how it wants to be prompted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.files import read_json, write_json

NAME = "tunesmith.json"


@dataclass(frozen=True)
class Card:
    """What eval, generate and chat need to use a model just as it was trained."""

    base: str
    revision: str | None
    dtype: str
    adapter: bool
    template: str
    template_hash: str
    template_options: dict[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    recipe: str = ""


def write_card(folder: Path, card: Card) -> None:
    """Write the card into a model folder."""
    write_json(folder / NAME, asdict(card))


def read_card(folder: str | Path) -> Card | None:
    """The card of a model folder, or None for a model that is not ours (a hub id, a plain folder)."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    tree = read_json(path)
    return Card(**{**tree, "stop_ids": tuple(tree["stop_ids"])})
