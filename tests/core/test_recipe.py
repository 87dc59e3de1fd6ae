"""The recipe: round trip, suggestions, origins, stages."""

import pytest
import yaml

from tunesmith.core.errors import RecipeError
from tunesmith.core.load import ELSEWHERE, _known_keys, build, dump_yaml, load_recipe, load_tree, set_values
from tunesmith.core.recipe import Recipe

SMALL = {"model": {"base": "pocket", "adapter": {"rank": 8}}, "data": {"train": "rows.jsonl"}}


def test_recipe_to_json_to_recipe_is_the_same():
    recipe = build({**SMALL, "data": {"train": ["a.jsonl", {"path": "b.csv", "weight": 0.5}], "validation": {"fraction": 0.1}}}).recipe
    assert Recipe(**recipe.as_dict()) == recipe
    assert Recipe(**recipe.as_dict()).hash() == recipe.hash()


def test_the_written_yaml_reads_back_as_the_same_recipe():
    loaded = build({**SMALL, "run": {"batch": {"tokens": 4096}}, "model": {"base": "x: #y", "template_options": {"a": {"b": 1}}}})
    assert Recipe(**yaml.safe_load(dump_yaml(loaded))) == loaded.recipe


def test_all_mistakes_are_named_at_once_with_suggestions():
    with pytest.raises(RecipeError) as caught:
        build({"model": {"bse": "x", "adapter": {"rnk": 4}}, "data": {"trian": "a"}, "optim": {"lr": -1}, "rnu": {}})
    text = str(caught.value)
    for part in ("'bse'; did you mean 'base'", "'rnk'; did you mean 'rank'", "'trian'; did you mean 'train'", "'rnu'; did you mean 'run'"):
        assert part in text
    assert "greater than 0 (got -1)" in text


def test_settings_of_other_trainers_are_told_where_they_stand_here():
    with pytest.raises(RecipeError) as caught:
        build({"model": {"base": "x", "adapter": {"r": 8, "lora_alpha": 16}}, "data": {"train": "a"}, "learning_rate": 1e-4})
    text = str(caught.value)
    for part in (
        "'r'; here it is model.adapter.rank",
        "'lora_alpha'; here it is model.adapter.alpha",
        "'learning_rate'; here it is optim.lr",
    ):
        assert part in text
    for name, path in ELSEWHERE.items():
        *place, last = path.split(".")
        assert last in _known_keys(list(place)), (name, path)


@pytest.mark.parametrize(
    "tree",
    [
        {"run": {"batch": {"examples": 2, "tokens": 3}}},
        {"run": {"epochs": 1, "steps": 2}},
        {"run": {"micro_tokens": 0}},
        {"data": {"train": []}},
        {"tokens": {"overlong": "truncate"}},
        {"objective": []},
    ],
)
def test_impossible_values_are_refused(tree):
    with pytest.raises(RecipeError):
        build({**SMALL, **tree})


def test_set_words_win_and_their_origin_is_kept():
    tree, paths = set_values(SMALL, ["optim.lr=1e-4", "run.epochs=3"])
    loaded = build(tree, set_paths=paths)
    assert loaded.recipe.optim.lr == 1e-4
    assert loaded.origin["optim.lr"] == "set"
    assert loaded.origin["run.epochs"] == "set"
    assert loaded.origin["model.base"] == "file"
    assert loaded.origin["model.adapter.rank"] == "file"
    assert loaded.origin["data.train.0.path"] == "file"
    assert loaded.origin["optim.eps"] == "default"


@pytest.mark.parametrize("word", ["optim.lr", "=3", "data.train.x=1"])
def test_malformed_set_words_are_refused(word):
    with pytest.raises(RecipeError):
        set_values({"data": {"train": [{"path": "a"}]}}, [word])


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {base: pocket}\ndata: {train: a.jsonl}\noptim: {lr: 2e-4}\n")
    assert load_recipe(file)[0].recipe.optim.lr == 2e-4


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {base: pocket}\ndata: {train: a.jsonl}\nmodel: {base: other}\n")
    with pytest.raises(RecipeError, match="stands twice"):
        load_recipe(file)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "b.yaml"
    broken.write_text("model: {base: [")
    with pytest.raises(RecipeError, match="cannot be parsed"):
        load_recipe(broken)


def test_stages_lie_over_the_shared_part_and_follow_each_other():
    tree = {
        **SMALL,
        "run": {"out": "runs/x", "seed": 7},
        "stages": [{"name": "one", "run": {"epochs": 2}}, {"name": "two", "model": {"base": "@one"}, "data": {"train": "c.jsonl"}}],
    }
    one, two = load_tree(tree)
    assert (one.recipe.run.out, one.recipe.run.epochs, one.recipe.run.seed) == ("runs/x/one", 2, 7)
    assert two.recipe.model.base == "runs/x/one/final"
    assert two.recipe.model.adapter is not None
    assert two.recipe.data.train[0].path == "c.jsonl"
    with pytest.raises(RecipeError, match="names no earlier stage; did you mean 'one'"):
        load_tree({**tree, "stages": [{"name": "one"}, {"name": "b", "model": {"base": "@onne"}}]})


def test_identity_ignores_what_cannot_change_the_result():
    plain = build(SMALL).recipe
    elsewhere = build({**SMALL, "run": {"out": "runs/other", "micro_tokens": 77, "trackers": ["tensorboard"]}}).recipe
    other = build({**SMALL, "run": {"seed": 1}}).recipe
    assert plain.hash() == elsewhere.hash() != other.hash()
