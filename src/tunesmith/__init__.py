"""tunesmith: a language model from raw rows to a served and proven model.

>>> import tunesmith
>>> result = tunesmith.train({"model": {"base": "pocket", "adapter": {"name": "lora"}}, "data": {"train": "rows.jsonl"}})
>>> report = tunesmith.evaluate(result["run"], ["perplexity"], "held-out.jsonl")

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import (
        FORMATS,
        GRADERS,
        OBJECTIVES,
        TEMPLATES,
        Completion,
        Dialog,
        Engine,
        Grade,
        Message,
        Opened,
        Prompt,
        Recipe,
        RemoteSampler,
        SampleSettings,
        Score,
        Text,
        Tokens,
        chat_sampler,
        choose_template,
        evaluate,
        generate,
        load,
        load_tokenizer,
        render,
        run_align,
        run_demo,
        score,
        train,
        write_rows,
    )

__version__ = "0.1.0"

# The names of tunesmith.api, written out: asking api for them would load torch for any attribute that is looked up here.
__all__ = [
    "FORMATS",
    "GRADERS",
    "OBJECTIVES",
    "TEMPLATES",
    "Completion",
    "Dialog",
    "Engine",
    "Grade",
    "Message",
    "Opened",
    "Prompt",
    "Recipe",
    "RemoteSampler",
    "SampleSettings",
    "Score",
    "Text",
    "Tokens",
    "chat_sampler",
    "choose_template",
    "evaluate",
    "generate",
    "load",
    "load_tokenizer",
    "render",
    "run_align",
    "run_demo",
    "score",
    "train",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    from tunesmith import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
