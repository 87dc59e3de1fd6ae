"""What turns say as one text, and the same text without the differences that do not matter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from tunesmith.core.types import Message

Digest = bytes


def plain(messages: Sequence[Message]) -> str:
    """Everything that the turns say: thinking, words and calls, a blank line between turns."""
    return "\n\n".join("\n".join(_parts(message)) for message in messages)


def folded(text: str) -> str:
    """The text in one case and with single spaces."""
    return " ".join(text.split()).casefold()


def digest(text: str) -> Digest:
    """Sixteen bytes that stand for the folded text."""
    return hashlib.blake2b(folded(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def prompt_digest(prompt: Sequence[Message]) -> Digest:
    """Sixteen bytes that stand for a prompt: its turns, with their roles, folded."""
    # A line break cannot stand in folded text, so it parts the turns without doubt.
    turns = "\n".join(f"{message.role}: {folded(plain([message]))}" for message in prompt)
    return hashlib.blake2b(turns.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _parts(message: Message) -> list[str]:
    calls = [f"{call.name}({json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)})" for call in message.tool_calls]
    return [part for part in (message.thinking or "", message.content, *calls) if part]
