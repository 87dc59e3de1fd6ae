"""The bundled base model of about three million parameters, and the data of the demo that fine-tunes it."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def folder() -> Path:
    """The folder of the bundled model: configuration, tokenizer, chat template and, once pre-trained, the weights."""
    return _HERE / "base"


def general_text() -> Path:
    """Held-out general text, JSON lines of {"text": str}: what the base must not forget when it is fine-tuned."""
    return _HERE / "general.jsonl"


def replay_text() -> Path:
    """Other general text, of the same form, to mix into fine-tuning so that less is forgotten; it shares no document with the former."""
    return _HERE / "replay.jsonl"
