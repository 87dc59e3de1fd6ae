"""The shapes a row may have, one file each; every one turns a row into an Example or says why it cannot.

`detect` decides which shape a source has by looking at its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from tunesmith.core.table import Entry, Table
from tunesmith.core.types import Example, Kind, Row
from tunesmith.data.formats import (
    alpaca,
    labelled,
    messages,
    openai_preference,
    preference,
    prompt_completion,
    ranked,
    sharegpt,
    steps,
    text,
)

ToExample = Callable[[Row, str], Example]

FORMATS: Table[ToExample] = Table(
    "data format",
    {
        "messages": Entry(messages.to_example, source="OpenAI chat: messages of role and content"),
        "sharegpt": Entry(sharegpt.to_example, source="ShareGPT: conversations of from and value"),
        "alpaca": Entry(alpaca.to_example, source="Stanford Alpaca: instruction, input, output"),
        "prompt_completion": Entry(prompt_completion.to_example, source="prompt and completion, as text or as messages"),
        "text": Entry(text.to_example, source="running text"),
        "preference": Entry(preference.to_example, source="prompt, chosen and rejected; whole conversations; Human/Assistant transcripts"),
        "openai_preference": Entry(openai_preference.to_example, source="OpenAI: input, preferred_output, non_preferred_output"),
        "ranked": Entry(ranked.to_example, source="prompt, answers and scores or ranks; UltraFeedback"),
        "labelled": Entry(labelled.to_example, source="prompt, completion and label; messages and label (KTO)"),
        "steps": Entry(steps.to_example, source="prompt, completions and labels, a step each; Math-Shepherd"),
    },
)

_MODULES: dict[str, ModuleType] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": text,
    "preference": preference,
    "openai_preference": openai_preference,
    "ranked": ranked,
    "labelled": labelled,
    "steps": steps,
}

# The columns each shape reads; any other is noted in the ledger as unused.
COLUMNS: dict[str, tuple[str, ...]] = {name: module.COLUMNS for name, module in _MODULES.items()}

# Does a row have this shape? Looks at names and kinds only, not at whether the content is sound.
LOOKS_LIKE: dict[str, Callable[[Row], bool]] = {name: module.looks_like for name, module in _MODULES.items()}

# What an objective can learn from rows of each shape.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt_completion", "text"), "dialogs"),
    **dict.fromkeys(("preference", "openai_preference", "ranked"), "pairs"),
    "labelled": "labels",
    "steps": "steps",
}
