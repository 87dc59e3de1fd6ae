"""tunesmith: a language model from raw rows to a served and proven model.

>>> import tunesmith
>>> result = tunesmith.train({"model": {"base": "pocket", "adapter": {"name": "lora"}}, "data": {"train": "rows.jsonl"}})
>>> report = tunesmith.evaluate(result["run"], ["perplexity"], "held-out.jsonl")

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tunesmith.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    from tunesmith import api

    if name not in api.__all__:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    return getattr(api, name)


def __dir__() -> list[str]:
    from tunesmith import api

    return sorted([*api.__all__, "__version__"])
