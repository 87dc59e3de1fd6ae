"""What the documentation says exists: recipes load, the table of settings is the code's, links and command lines are real."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from tunesmith.cli import verbs  # noqa: F401  registers the verbs
from tunesmith.cli.main import app
from tunesmith.core.load import load_recipe
from tunesmith.objective import methods

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    for stage in load_recipe(path):
        assert methods(stage.recipe.objective)


def test_the_recipes_are_there() -> None:
    assert {"sft-lora", "sft-full", "sft-mixed", "two-stages", "pretrain-pocket"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_what_the_demo_writes(path: Path, tmp_path: Path) -> None:
    from tunesmith.demo.quickstart import write_data

    write_data(tmp_path / "demo" / "data", 0)
    for stage in load_recipe(path):
        validation = stage.recipe.data.validation
        sources = [*stage.recipe.data.train, *(validation if isinstance(validation, list) else [])]
        named = [source.path for source in sources if not source.path.startswith("runs/")]
        assert all((tmp_path / name).is_file() for name in named)


def test_the_table_of_settings_is_the_codes() -> None:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "scripts" / "settings_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == script.page(), "run python scripts/settings_table.py"


def outside_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_point_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", outside_code(page.read_text(encoding="utf-8")))
    relative = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


def commands(text: str) -> list[list[str]]:
    """The words after `tunesmith` on every command line: in inline code, in indented and in fenced code."""
    places = re.findall(r"`(tunesmith [^`\n]+)`", text)
    # Prose may begin a line with the name; code is indented or fenced.
    fenced = re.findall(r"```.*?```", text, re.DOTALL)
    code = [*re.findall(r"^    .*$", text, re.MULTILINE), *(line for part in fenced for line in part.splitlines())]
    places += [line for line in code if re.match(r" *(?:\$ )?(?:[A-Z_]+=\S+ )*tunesmith [a-z]", line)]
    return [shlex.split(place.partition("tunesmith ")[2], comments=True) for place in places]


def fault(words: list[str]) -> str | None:
    """What is wrong with a command line: an unknown verb or option, or nothing."""
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verb = words[0]
    if not re.fullmatch(r"[a-z]+", verb):
        return None  # VERB, --help
    if verb not in known:
        return f"unknown verb {verb}"
    command = known[verb]
    for word in words[1:]:
        command = getattr(command, "commands", {}).get(word, command)
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]} | {"--help", "-h"}
    unknown = [word for word in words[1:] if word.startswith("-") and word.partition("=")[0] not in options]
    return f"{verb} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_name_verbs_and_options_that_exist(page: Path) -> None:
    found = commands(page.read_text(encoding="utf-8"))
    assert [bad for words in found if (bad := fault(words))] == []


def test_command_lines_are_found_and_held_against_the_program() -> None:
    said = "Run `tunesmith shw rows.jsonl`.\n\n    tunesmith train a.yaml --frsh   # anew\n\n```\n$ tunesmith show a.jsonl -n 2\n```\n"
    assert [fault(words) for words in commands(said)] == ["unknown verb shw", "train has no --frsh", None]
