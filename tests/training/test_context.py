"""Rows are never longer than what the base can take: a wish for it is an error, the default gives way."""

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig, MambaConfig

from tunesmith.core.errors import RecipeError
from tunesmith.core.load import build, load_tree
from tunesmith.core.recipe import Model
from tunesmith.model.context import context_of, longest_of
from tunesmith.training.door import at_the_door
from tunesmith.training.inspect import inspect_stages
from tunesmith.training.run import train


def test_a_length_over_the_base_s_context_is_refused(tree):
    made = tree("lora")
    made["tokens"]["max_length"] = 513
    with pytest.raises(RecipeError, match="rows of 513 tokens are asked for, and the base takes 512 at most") as caught:
        at_the_door(build(made).recipe)
    assert (caught.value.code, caught.value.where) == ("over_context", "tokens.max_length")
    assert [problem["code"] for problem in inspect_stages([build(made)])[0]["problems"]] == ["over_context"]
    with pytest.raises(RecipeError, match="the base takes 512 at most"):
        train(made)


@pytest.mark.parametrize("whole", [False, True])
def test_the_default_gives_way_and_is_told(tree, tmp_path, caplog, whole):
    made = tree("lora", steps=1, eval_every=0)
    del made["tokens"]["max_length"]
    (report,) = inspect_stages([build(made)])
    assert report["problems"] == []
    assert (report["recipe"]["tokens"]["max_length"], report["origin"]["tokens.max_length"]) == (512, "derived")
    with caplog.at_level("INFO"):
        train(build(made).recipe if whole else made)
    assert "tokens.max_length is 512: the base takes no longer rows (default 2048)" in caplog.text
    written = (tmp_path / "run/recipe.yaml").read_text()
    assert "max_length: 512  # from: derived" in written
    # What was written out is a recipe like any other.
    again = build(yaml.safe_load(written)).recipe
    at_the_door(again)
    assert again.tokens.max_length == 512


def test_a_stage_yet_to_come_has_the_context_of_the_base_before_it(tree):
    made = tree("lora")
    del made["tokens"]["max_length"]
    stages = load_tree({**made, "stages": [{"name": "one"}, {"name": "two", "model": {"base": "@one"}}]})
    assert [report["recipe"]["tokens"]["max_length"] for report in inspect_stages(stages)] == [512, 512]


def test_virtual_tokens_take_their_share(base):
    assert context_of(Model(base=str(base), adapter={"name": "prompt", "tokens": 20})) == 492
    assert context_of(Model(base="no/such/place/here")) is None


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 16_384),
        (
            LlamaConfig(
                max_position_embeddings=131_072,
                rope_parameters={
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "rope_theta": 5e5,
                },
            ),
            131_072,
        ),
        (
            LlamaConfig(
                max_position_embeddings=32_768,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768, "rope_theta": 1e6},
            ),
            131_072,
        ),
        (GPT2Config(n_positions=1024), 1024),
        (MambaConfig(), None),
    ],
)  # fmt: skip
def test_scaled_rotary_embeddings_reach_further_and_some_bases_name_no_limit(config, longest):
    assert longest_of(config) == longest
