"""Position rules that depend on the longest document in sight, and must not see its neighbours."""

from __future__ import annotations

from typing import Any

_BY_LENGTH = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


def alone_from(config: Any) -> int | None:
    """The length above which a document must pass alone, or None: rotary angles of `dynamic` and `longrope` change with it."""
    text = config.get_text_config()
    found = [text.to_dict().get("rope_parameters")]
    limits = []
    while found:
        rope = found.pop()
        if not isinstance(rope, dict):
            continue
        kind = rope.get("rope_type")
        if kind in _BY_LENGTH:
            name = _BY_LENGTH[kind]
            limits.append(rope.get(name) or text.to_dict().get(name) or 0)
        found += [v for v in rope.values() if isinstance(v, dict)]
    return min(limits) if limits else None
