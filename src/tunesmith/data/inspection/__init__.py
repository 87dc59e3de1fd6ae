"""What can be said of rows before anything is trained on them: lengths, copies, contradictions, overlap and suspects.

`inspect` is the entry; the modules beside it take iterables of one noun each and return plain numbers. No tokenizer is needed.
"""

from __future__ import annotations

from tunesmith.data.inspection.report import Inspection, inspect

__all__ = ["Inspection", "inspect"]
