"""Running out of memory, numbers that are not finite, wrong settings: each ends or goes on as it should."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tunesmith.core.errors import CapacityError, ModelError, RecipeError
from tunesmith.model.policy import Policy
from tunesmith.objective import methods
from tunesmith.training.parallel import Ranks
from tunesmith.training.run import train
from tunesmith.training.step import Budget, gradient_step, zero_gradients


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_out_of_memory_makes_micro_batches_smaller_and_changes_no_result(parts, kind, monkeypatch):
    recipe, prepared, policy = parts(kind)
    policy.set_neftune(5.0)
    rows = [prepared.train[n] for n in range(12)]
    score = Policy.score
    asked = []

    def small_memory(self, batch):
        asked.append(len(batch))
        if len(batch) > 200:
            score(self, batch)  # the random numbers are drawn before memory runs out
            raise torch.OutOfMemoryError("out of memory")
        return score(self, batch)

    budget = Budget(200)
    torch.manual_seed(5)
    expected = gradient_step(policy, rows, methods(recipe.objective), budget, Ranks())
    whole = {name: p.grad.clone() for name, p in policy.parameters_by_name().items()}
    zero_gradients(policy)
    monkeypatch.setattr(Policy, "score", small_memory)
    budget = Budget(800)
    torch.manual_seed(5)
    got = gradient_step(policy, rows, methods(recipe.objective), budget, Ranks())
    assert max(asked) > 200
    assert budget.tokens == 200
    assert got == expected
    for name, parameter in policy.parameters_by_name().items():
        assert torch.equal(parameter.grad, whole[name]), name


def test_a_single_row_that_does_not_fit_is_named(parts, monkeypatch):
    recipe, prepared, policy = parts("lora")

    def no_memory(self, batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Policy, "score", no_memory)
    rows = [prepared.train[n] for n in range(3)]
    with pytest.raises(CapacityError, match="out of memory on a single row") as caught:
        gradient_step(policy, rows, methods(recipe.objective), Budget(4000), Ranks())
    assert caught.value.where == max(rows, key=len).key


def test_nan_in_a_loss_stops_the_run_with_the_rows_and_keeps_the_weights(tree, monkeypatch):
    recipe = tree("full", save_every=2)
    score = Policy.score
    calls = []

    def poisoned(self, batch):
        outputs = score(self, batch)
        if self.model.training:
            calls.append(batch)
            if len(calls) == 5:
                return type(outputs)(outputs.logp * float("nan"), outputs.index, outputs.train, outputs.row)
        return outputs

    monkeypatch.setattr(Policy, "score", poisoned)
    recipe["run"]["micro_tokens"] = 10_000
    with pytest.raises(ModelError, match="the loss is nan") as caught:
        train(recipe)
    assert caught.value.where == ", ".join(segment.key for segment in calls[4].segments)
    saved = safetensors.torch.load_file(Path(recipe["run"]["out"]) / "checkpoints/step-000004/weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_nan_in_the_base_is_found_at_the_door(tree, tmp_path, base):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = tree("lora")
    recipe["model"]["base"] = str(broken)
    with pytest.raises(ModelError) as caught:
        train(recipe)
    assert caught.value.code == "nan_weights"
    assert "layers.1.mlp.up_proj" in caught.value.where


def test_a_learning_rate_too_small_to_move_anything_is_an_error(tree):
    recipe = tree("full", steps=2)
    recipe["optim"] = {"lr": 1e-30, "weight_decay": 0.0}
    with pytest.raises(ModelError, match="changed none of the"):
        train(recipe)


@pytest.mark.parametrize(
    ("objective", "said"),
    [([{"name": "nll", "beta": 1}], "no setting 'beta'"), ([{"name": "nlll"}], "did you mean 'nll'")],
)
def test_a_misspelt_objective_is_an_error_before_any_work(tree, objective, said):
    recipe = {**tree("lora"), "objective": objective}
    with pytest.raises(RecipeError, match=said):
        train(recipe)
    assert not Path(recipe["run"]["out"]).exists()


def test_a_missing_base_is_an_error_with_a_remedy(tree):
    recipe = tree("lora")
    recipe["model"]["base"] += "-nowhere"
    with pytest.raises(ModelError) as caught:
        train(recipe)
    assert caught.value.code == "no_model"


def test_early_stop_keeps_the_best(tree):
    recipe = tree("full", steps=40, eval_every=1, save_every=0, patience=3)
    recipe["optim"] = {"lr": 0.3, "warmup": 0, "schedule": "constant"}
    result = train(recipe)
    assert result["steps"] < 40
    assert result["best"]["step"] == result["steps"] - 3
    kept = {int(path.name[5:]) for path in (Path(result["run"]) / "checkpoints").iterdir()}
    assert result["best"]["step"] in kept
    best = safetensors.torch.load_file(Path(result["run"]) / f"checkpoints/step-{result['best']['step']:06d}/weights.safetensors")
    final = safetensors.torch.load_file(Path(result["final"]) / "model.safetensors")
    assert torch.equal(final["model.norm.weight"], best["model.norm.weight"])
