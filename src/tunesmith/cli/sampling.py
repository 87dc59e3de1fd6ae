"""The options that say how a token is drawn, once for every verb that samples."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokens = Annotated[int, typer.Option(min=1, help="the longest answer")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")]
TopP = Annotated[float, typer.Option(max=1.0, help="above 0; 1: off")]
TopK = Annotated[int, typer.Option(min=0, help="0: off")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="0: off")]
RepetitionPenalty = Annotated[float, typer.Option(help="1: off")]
FrequencyPenalty = Annotated[float, typer.Option(min=-2.0, max=2.0, help="0: off")]
PresencePenalty = Annotated[float, typer.Option(min=-2.0, max=2.0, help="0: off")]
Stop = Annotated[list[str] | None, typer.Option(help="a text that ends an answer, again for more")]
StopId = Annotated[list[int] | None, typer.Option(help="the id of a token that ends an answer, again for more")]
LogitBias = Annotated[list[str] | None, typer.Option(help="ID=NUMBER, added to the token's logit, again for more")]
Seed = Annotated[int, typer.Option(help="the same seed draws the same answer")]
Lora = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FOLDER, again for more: LoRA adapters that rows choose from; the first is the default"),
]
Int8 = Annotated[bool, typer.Option("--int8", help="products in 8 bits: faster on a CPU, coarser")]


def named_folders(given: list[str] | None) -> dict[str, str]:
    """NAME=FOLDER by name. Raises RecipeError `usage` for anything else."""
    from tunesmith.core.errors import RecipeError

    out = {}
    for text in given or ():
        name, sign, folder = text.partition("=")
        if not (name and sign and folder) or name in out:
            raise RecipeError(
                f"'{text}' is not NAME=FOLDER with a name of its own", where="--lora", remedy="e.g. --lora a=runs/a", code="usage"
            )
        out[name] = folder
    return out


def biases(given: list[str] | None) -> dict[int, float]:
    """ID=NUMBER by id. Raises RecipeError `usage` for anything else."""
    from tunesmith.core.errors import RecipeError

    out: dict[int, float] = {}
    for text in given or ():
        token, _, bias = text.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            number, value = -1, 0.0
        if number < 0 or number in out:
            raise RecipeError(
                f"'{text}' is not ID=NUMBER with an id of its own", where="--logit-bias", remedy="e.g. --logit-bias 42=-100", code="usage"
            )
        out[number] = value
    return out
