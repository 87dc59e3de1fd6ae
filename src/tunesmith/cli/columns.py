"""The names of columns on the command line, as `columns:` of a data source in a recipe."""

from __future__ import annotations

from tunesmith.core.errors import RecipeError


def read_columns(words: str | None) -> dict[str, str]:
    """{ours: theirs} of "ours=theirs,ours=theirs". Raises RecipeError "usage" for anything else."""
    out: dict[str, str] = {}
    for word in words.split(",") if words else []:
        ours, sign, theirs = (part.strip() for part in word.partition("="))
        if not (ours and sign and theirs) or ours in out:
            raise RecipeError(
                f"'{word}' is not of the form ours=theirs, or stands twice",
                where="--columns",
                remedy="e.g. --columns prompt=question,completion=answer",
                code="usage",
            )
        out[ours] = theirs
    return out
