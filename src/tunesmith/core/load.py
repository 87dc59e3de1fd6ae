"""From a file, `--set` words or a dict to a checked Recipe that knows where each value came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tunesmith.core.errors import RecipeError, did_you_mean
from tunesmith.core.recipe import Recipe

Origin = dict[str, str]

# Where settings of transformers, PEFT, TRL and other trainers stand here.
ELSEWHERE = {
    "model_name_or_path": "model.base", "base_model": "model.base", "load_in_4bit": "model.quant", "load_in_8bit": "model.quant",
    "torch_dtype": "model.dtype", "bf16": "model.dtype", "chat_template": "model.template",
    "peft_type": "model.adapter.name", "r": "model.adapter.rank", "lora_r": "model.adapter.rank",
    "lora_rank": "model.adapter.rank", "lora_alpha": "model.adapter.alpha", "lora_dropout": "model.adapter.dropout",
    "target_modules": "model.adapter.targets", "lora_target": "model.adapter.targets", "use_rslora": "model.adapter.rank_stabilised",
    "max_seq_length": "tokens.max_length", "sequence_len": "tokens.max_length", "cutoff_len": "tokens.max_length",
    "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule", "lr_scheduler": "optim.schedule", "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup", "max_grad_norm": "optim.clip", "optimizer": "optim.name",
    "num_train_epochs": "run.epochs", "num_epochs": "run.epochs", "max_steps": "run.steps", "output_dir": "run.out",
    "per_device_train_batch_size": "run.batch", "gradient_accumulation_steps": "run.batch", "micro_batch_size": "run.micro_tokens",
    "eval_steps": "run.eval_every", "save_steps": "run.save_every", "dataset": "data.train", "datasets": "data.train",
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A recipe, and for every leaf 'file', 'set', 'default' or 'derived'; of a stage the sections that stand in the shared part alone."""

    recipe: Recipe
    origin: Origin
    name: str = ""
    inherited: frozenset[str] = frozenset()


def read_tree(path: Path) -> dict[str, Any]:
    """The raw tree of a YAML or JSON recipe file. Raises RecipeError when it is missing or not a mapping."""
    if not path.is_file():
        raise RecipeError("the recipe file does not exist", where=str(path), remedy="check the path", code="no_recipe")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Strict)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe cannot be parsed: {' '.join(str(error).split())}", where=str(path), remedy="mend the file", code="bad_recipe_file"
        ) from error
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of sections", where=str(path), remedy="begin with 'model:'", code="bad_recipe_file")
    return tree


class _Strict(yaml.SafeLoader):
    """YAML whose repeated keys are an error and whose 2e-4 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def set_values(tree: dict[str, Any], words: Iterable[str]) -> tuple[dict[str, Any], set[str]]:
    """The tree with each `a.b=value` of `words` put in (values in YAML), and the dotted paths that were set."""
    out, paths = deepcopy(tree), set()
    for word in words:
        path, sign, text = word.partition("=")
        if not sign or not path:
            raise RecipeError(
                f"'{word}' is not of the form a.b=value", where="--set", remedy="write e.g. --set optim.lr=1e-4", code="bad_set"
            )
        value = _value(word, text)
        parts = path.strip().split(".")
        node: Any = out
        for place, part in enumerate(parts[:-1]):
            step = _step(node, part, word)
            if not isinstance(node[step], dict | list):
                node[step] = _opened(node[step], parts[: place + 1], word)
            if parts[place + 1].isdigit() and ".".join(parts[: place + 1]) in _WORD_FOR and isinstance(node[step], dict):
                node[step] = [node[step]]
            node = node[step]
        node[_step(node, parts[-1], word)] = value
        paths.add(path.strip())
    return out, paths


# A list of these may be written as one entry, or as one word that stands for this key of it.
_WORD_FOR = {"data.train": "path", "data.validation": "path", "objective": "name"}


def _value(word: str, text: str) -> Any:
    try:
        return number(yaml.safe_load(text)) if text else None
    except yaml.YAMLError as error:
        raise RecipeError(
            f"the value cannot be parsed: {' '.join(str(error).split())}",
            where=f"--set {word}",
            remedy="values are YAML; put quotes around text with brackets or colons",
            code="bad_set",
        ) from error


def _opened(value: Any, parts: list[str], word: str) -> Any:
    """The mapping that a word in the way of a longer path stands for; nothing that was given is lost."""
    if value is None:
        return {}
    key = _WORD_FOR.get(".".join(parts)) or _WORD_FOR.get(".".join(parts[:-1]))
    if key is None or not isinstance(value, str):
        raise RecipeError(
            f"'{'.'.join(parts)}' is {json.dumps(value)} and has no settings below it",
            where=f"--set {word}",
            remedy="see 'tunesmith schema' for every setting",
            code="bad_set",
        )
    return {key: value}


def _step(node: Any, part: str, word: str) -> str | int:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise RecipeError(
                f"'{part}' is not a place in a list of {len(node)}", where=f"--set {word}", remedy="use 0, 1, ...", code="bad_set"
            )
        return int(part)
    node.setdefault(part, None)
    return part


def number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as a word; users mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.lower().strip("+-0123456789.e") == "" else value
        except ValueError:
            return value
    if isinstance(value, dict):
        return {k: number(v) for k, v in value.items()}
    return [number(item) for item in value] if isinstance(value, list) else value


def build(tree: Mapping[str, Any], *, where: str = "", set_paths: Iterable[str] = (), name: str = "") -> Loaded:
    """A checked recipe from a raw tree. Raises RecipeError listing every unknown, missing and impossible value at once."""
    try:
        recipe = Recipe(**number(dict(tree)))
    except ValidationError as error:
        problems = list(_problems(error))
        first = problems[0]
        message = "\n".join([first[1], *(f"{path}: {text}" for path, text in problems[1:])])
        spot = first[0]
        raise RecipeError(
            message, where=f"{where}: {spot}" if where else spot, remedy="see 'tunesmith schema' for every setting", code="bad_setting"
        ) from error
    return Loaded(recipe, _origin(recipe.as_dict(), dict(tree), set(set_paths)), name)


def load_recipe(path: str | Path, words: Iterable[str] = ()) -> list[Loaded]:
    """The stages of a recipe file (one without `stages`), with `--set` words put in."""
    path = Path(path)
    tree, paths = set_values(read_tree(path), words)
    return load_tree(tree, where=str(path), set_paths=paths)


def load_tree(tree: Mapping[str, Any], *, where: str = "", set_paths: Iterable[str] = ()) -> list[Loaded]:
    """The stages of a raw tree: each is laid over the shared part, runs in its own folder, and may start from '@name'."""
    shared = dict(tree)
    stages = shared.pop("stages", None)
    if stages is None:
        return [build(shared, where=where, set_paths=set_paths)]
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in stages):
        raise RecipeError(
            "stages is a list of recipes, each with a name", where=f"{where}: stages", remedy="write - {name: sft, ...}", code="bad_stages"
        )
    loaded: list[Loaded] = []
    outs: dict[str, str] = {}
    for number_, stage in enumerate(stages):
        name = stage["name"]
        if name in outs:
            raise RecipeError(
                f"two stages are called '{name}'", where=f"{where}: stages.{number_}.name", remedy="rename one", code="bad_stages"
            )
        whole = merge(shared, {k: v for k, v in stage.items() if k != "name"})
        out = str(Path(((shared.get("run") or {}).get("out")) or "runs/run") / name)
        whole = merge(whole, {"run": {"out": (stage.get("run") or {}).get("out", out)}})
        base = (whole.get("model") or {}).get("base")
        if isinstance(base, str) and base.startswith("@"):
            if base[1:] not in outs:
                raise RecipeError(
                    f"'{base}' names no earlier stage{did_you_mean(base[1:], outs)}",
                    where=f"{where}: stages.{number_}.model.base",
                    remedy=f"earlier stages: {', '.join(outs) or 'none'}",
                    code="bad_stages",
                )
            whole = merge(whole, {"model": {"base": str(Path(outs[base[1:]]) / "final")}})
        built = build(whole, where=f"{where}: stage {name}", set_paths=set_paths, name=name)
        loaded.append(replace(built, inherited=frozenset(shared) - frozenset(stage)))
        outs[name] = loaded[-1].recipe.run.out
    return loaded


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with `over` laid on top: mappings merge, anything else replaces."""
    out = dict(under)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with its dotted path."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and tree and any(isinstance(item, dict | list) for item in tree):
        for place, value in enumerate(tree):
            yield from flatten(value, f"{path}.{place}")
    else:
        yield path, tree


def _origin(resolved: dict[str, Any], given: dict[str, Any], set_paths: set[str]) -> Origin:
    from_file = {path for path, _ in flatten(given)}

    def source(path: str) -> str:
        parts = path.split(".")
        # data.train alone may be a word in the file and a list in the tree: any prefix that was given counts.
        heads = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if heads & set_paths:
            return "set"
        return "file" if heads & from_file or any(f.startswith(path + ".") for f in from_file) else "default"

    return {path: source(path) for path, _ in flatten(resolved)}


def _problems(error: ValidationError) -> Iterator[tuple[str, str]]:
    for item in error.errors():
        tags = [part for part in item["loc"] if isinstance(part, str) and _is_type_tag(part)]
        place = [part for part in item["loc"] if part not in tags]
        path = ".".join(str(part) for part in place)
        if item["type"] == "extra_forbidden":
            known = _known_keys(list(item["loc"])[:-1])
            here = ELSEWHERE.get(str(place[-1]))
            yield path, f"unknown setting '{place[-1]}'{f'; here it is {here}' if here else did_you_mean(str(place[-1]), known)}"
        elif item["type"] == "missing":
            yield path, "this setting is required"
        else:
            shown = f" (got {item['input']!r})" if not isinstance(item["input"], dict) else ""
            yield path, item["msg"].removeprefix("Value error, ") + shown


def _is_type_tag(part: str) -> bool:
    return part[:1].isupper() or part.startswith(("list[", "literal[", "function-", "constrained-", "nullable"))


def _known_keys(place: list[Any]) -> list[str]:
    models: list[type[BaseModel]] = [Recipe]
    for part in place:
        if isinstance(part, int):
            continue
        if _is_type_tag(part):
            models = [model for model in models if model.__name__ == part] or models
            continue
        found: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
        models = found
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def dump_yaml(loaded: Loaded) -> str:
    """The resolved recipe as YAML with `# from:` the origin of every value."""
    lines: list[str] = []
    _write_yaml(loaded.recipe.as_dict(), "", 0, loaded.origin, lines)
    return "\n".join(lines) + "\n"


def _write_yaml(tree: dict[str, Any], path: str, depth: int, origin: Origin, lines: list[str]) -> None:
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            lines.append(f"{'  ' * depth}{key}:")
            _write_yaml(value, here, depth + 1, origin, lines)
        else:
            sources = {source for leaf, source in origin.items() if leaf == here or leaf.startswith(here + ".")}
            text = json.dumps(value, ensure_ascii=False)
            lines.append(f"{'  ' * depth}{key}: {text}  # from: {', '.join(sorted(sources)) or 'derived'}")
