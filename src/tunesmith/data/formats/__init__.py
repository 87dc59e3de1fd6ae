"""The shapes a row may have, one file each; every one turns a row into an Example or says why it cannot.

`detect` decides which shape a source has by looking at its rows.
"""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.core.table import Entry, Table
from tunesmith.core.types import Example, Row
from tunesmith.data.formats import alpaca, messages, prompt_completion, sharegpt, text

ToExample = Callable[[Row, str], Example]

FORMATS: Table[ToExample] = Table(
    "data format",
    {
        "messages": Entry(messages.to_example, source="OpenAI chat: messages of role and content"),
        "sharegpt": Entry(sharegpt.to_example, source="ShareGPT: conversations of from and value"),
        "alpaca": Entry(alpaca.to_example, source="Stanford Alpaca: instruction, input, output"),
        "prompt_completion": Entry(prompt_completion.to_example, source="prompt and completion, as text or as messages"),
        "text": Entry(text.to_example, source="running text"),
    },
)

# The columns each shape reads; any other is noted in the ledger as unused.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": messages.COLUMNS,
    "sharegpt": sharegpt.COLUMNS,
    "alpaca": alpaca.COLUMNS,
    "prompt_completion": prompt_completion.COLUMNS,
    "text": text.COLUMNS,
}

# Does a row have this shape? Looks at names and kinds only, not at whether the content is sound.
LOOKS_LIKE: dict[str, Callable[[Row], bool]] = {
    "messages": messages.looks_like,
    "sharegpt": sharegpt.looks_like,
    "alpaca": alpaca.looks_like,
    "prompt_completion": prompt_completion.looks_like,
    "text": text.looks_like,
}
