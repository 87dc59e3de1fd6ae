"""`tunesmith schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from tunesmith.cli.main import app, say

EXAMPLE = """
Print the JSON Schema of recipes, for completion and checks in an editor.

[bold]Example[/]

  tunesmith schema > recipe.schema.json
"""


@app.command(help=EXAMPLE)
def schema() -> None:
    """Write the schema on stdout."""
    from tunesmith.core.recipe import Recipe

    tree: dict[str, Any] = Recipe.model_json_schema()
    tree["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    tree["title"] = "tunesmith recipe"
    tree["properties"]["stages"] = {
        "type": "array",
        "description": "ordered recipes over shared defaults; each has a name; '@name' as a base is an earlier stage's result",
        "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    }
    say(tree)
