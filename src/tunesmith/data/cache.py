"""Token sets on disk by the hash of everything they were made from; a damaged one is found out and made again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.files import atomic_folder, cache_folder, file_hash, read_json, write_json
from tunesmith.core.log import logger
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Message, Prompt, ToolCall, Wanted, content_hash
from tunesmith.data.dataset import TokenSet, load_set
from tunesmith.data.ledger import Ledger
from tunesmith.data.sources import fingerprint
from tunesmith.data.tokenizer import tokenizer_hash

# Raise when the same rows would give other tokens: a change in readers, formats, rendering, spans or over-length policy.
VERSION = 3


@dataclass(frozen=True)
class Stored:
    """What one cache folder holds."""

    train: TokenSet
    validation: TokenSet | None
    ledger: Ledger
    prompts: list[Prompt]


def root() -> Path:
    """$TUNESMITH_CACHE/tokens, or ~/.cache/tunesmith/tokens."""
    return cache_folder() / "tokens"


def cache_key(recipe: Recipe, tokenizer: Any, template: str, prompts: int, wanted: Wanted | None = None) -> str:
    """SHA-256 over the rows, their settings, what is wanted of them, tokenizer, template (its hash and options), version of this code."""
    validation = recipe.data.validation
    sources = recipe.data.train + (validation if isinstance(validation, list) else [])
    return content_hash(
        {
            "version": VERSION,
            "files": [fingerprint(source) for source in sources],
            "data": recipe.data.model_dump(mode="json", exclude={"on_bad"}),
            "tokens": recipe.tokens.model_dump(mode="json", exclude={"cache"}),
            "tokenizer": tokenizer_hash(tokenizer),
            "template": template,
            "prompts": prompts,
            "wanted": asdict(wanted or Wanted()),
        }
    )


def store(folder: Path, stored: Stored) -> None:
    """Write the folder whole or not at all. Raises CapacityError when the disk is full."""
    with atomic_folder(folder) as aside:
        stored.train.save(aside / "train")
        if stored.validation is not None:
            stored.validation.save(aside / "validation")
        write_json(aside / "ledger.json", stored.ledger.as_dict())
        write_json(aside / "prompts.json", [asdict(prompt) for prompt in stored.prompts])
        texts = {name: file_hash(aside / name) for name in ("ledger.json", "prompts.json")}
        sets = {"train": stored.train.hash, "validation": stored.validation.hash if stored.validation is not None else None}
        write_json(aside / "seal.json", {"version": VERSION, **texts, **sets})


def fetch(folder: Path) -> Stored | None:
    """What was stored there; None when nothing was, or when a byte of it has changed since (said in the log)."""
    if not folder.is_dir():
        return None
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("the token cache %s is damaged (%s); tokenising again", folder, error)
        return None


def _read(folder: Path) -> Stored:
    seal = read_json(folder / "seal.json")
    for name in ("ledger.json", "prompts.json"):
        if file_hash(folder / name) != seal[name]:
            raise ValueError(f"{name} has changed")
    sets: dict[str, TokenSet] = {}
    for name in ("train", "validation"):
        if seal[name] is not None:
            sets[name] = load_set(folder / name)
            if sets[name].hash != seal[name]:
                raise ValueError(f"{name} has changed")
    ledger = Ledger.from_dict(read_json(folder / "ledger.json"))
    return Stored(sets["train"], sets.get("validation"), ledger, [_prompt(item) for item in read_json(folder / "prompts.json")])


def _prompt(value: dict[str, Any]) -> Prompt:
    return Prompt(tuple(_message(item) for item in value["messages"]), value["truth"], value["key"], tuple(value["tools"]))


def _message(value: dict[str, Any]) -> Message:
    return Message(**{**value, "tool_calls": tuple(ToolCall(**call) for call in value["tool_calls"])})
