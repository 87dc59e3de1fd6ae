"""10 steps = 5 + stop + resume, bit for bit, whatever the moment of the stop."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tunesmith.core.errors import CapacityError, CheckpointError
from tunesmith.training import state as states
from tunesmith.training.run import Interrupted, train
from tunesmith.training.sinks import JsonLines

KINDS = ["full", "lora"]


def final_state(run: Path, step: int = 10):
    folder = run / "checkpoints" / f"step-{step:06d}"
    return safetensors.torch.load_file(folder / "weights.safetensors"), torch.load(folder / "optimizer.pt", weights_only=True)


def losses(run: Path):
    return [(row["step"], row["loss"], row.get("eval/loss")) for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def assert_same_run(one: Path, two: Path):
    (weights, optimizer), (other_weights, other_optimizer) = final_state(one), final_state(two)
    assert weights.keys() == other_weights.keys()
    for name in weights:
        assert torch.equal(weights[name], other_weights[name]), name
    for number, entry in optimizer["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, other_optimizer["state"][number][key])
    assert torch.equal(
        torch.load(one / "checkpoints/step-000010/random.pt", weights_only=False)["torch"],
        torch.load(two / "checkpoints/step-000010/random.pt", weights_only=False)["torch"],
    )
    assert losses(one) == losses(two)


def noisy(tree):
    """Dropout and NEFTune draw random numbers in every step; a resume that loses the random state shows."""
    tree["run"]["neftune_alpha"] = 3.0
    if tree["model"]["adapter"]:
        tree["model"]["adapter"] = {**tree["model"]["adapter"], "dropout": 0.1}
    return tree


def quiet(tree):
    """Nothing random in a step."""
    return tree


EXAMPLES, TOKENS = {"examples": 4}, {"tokens": 300}
STOPPED = [
    *((kind, batch, {}, noisy) for kind in KINDS for batch in (EXAMPLES, TOKENS)),
    # Without dropout the decoder layers of an adapter run fused too.
    *((kind, TOKENS, {"dtype": "bf16"}, quiet) for kind in KINDS),
    ("lora", EXAMPLES, {}, quiet),
    ("full", TOKENS, {"way": "plain"}, noisy),
]


@pytest.mark.parametrize(("kind", "batch", "more", "noise"), STOPPED)
def test_a_run_stopped_between_checkpoints_goes_on_bit_for_bit(tree, kind, batch, more, noise, lose_at_five):
    whole = noise(tree(kind, "whole", batch=batch, **more))
    train(whole)
    cut = noise(tree(kind, "cut", batch=batch, **more))
    lose_at_five(cut)
    assert states.steps_saved(Path(cut["run"]["out"])) == [3]
    train(cut)
    assert_same_run(Path(whole["run"]["out"]), Path(cut["run"]["out"]))


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tree, tmp_path):
    """SIGKILL a real process three times at random moments of its training."""
    whole = noisy(tree("lora", "whole", save_every=1))
    train(whole)
    cut = noisy(tree("lora", "cut", save_every=1))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(cut))
    run, chance = Path(cut["run"]["out"]), random.Random(0)
    command = [sys.executable, "-m", "tunesmith", "train", str(recipe), "--json"]
    kills = 0
    for goal in (2, 5, 8):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and max(states.steps_saved(run), default=0) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 1
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 10
    assert_same_run(Path(whole["run"]["out"]), run)


def test_ctrl_c_saves_says_how_to_go_on_and_the_second_call_finishes(tree, monkeypatch):
    recipe = tree("lora", "cut", save_every=0)
    write = JsonLines.write

    def press(self, step, values):
        write(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(JsonLines, "write", press)
    with pytest.raises(Interrupted, match="stopped after step 4 of 10"):
        train(recipe)
    monkeypatch.undo()
    train(recipe)
    train(tree("lora", "whole", save_every=0))
    run = Path(recipe["run"]["out"])
    assert_same_run(run.with_name("whole"), run)


def test_a_finished_run_is_not_run_again_and_a_changed_one_is_refused(tree):
    recipe = tree("lora")
    first = train(recipe)
    stamp = (Path(first["run"]) / "receipt.json").stat().st_mtime_ns
    assert train(recipe) == first
    assert (Path(first["run"]) / "receipt.json").stat().st_mtime_ns == stamp
    changed = tree("lora")
    changed["optim"]["lr"] = 1e-3
    with pytest.raises(CheckpointError, match=r"optim.lr: was 0.005, now 0.001"):
        train(changed)
    Path(changed["data"]["train"])
    again = train(changed, fresh=True)
    assert again["metrics"]["loss"] != first["metrics"]["loss"]
    assert (Path(first["run"]).with_name("run.1") / "receipt.json").stat().st_mtime_ns == stamp


def test_changed_rows_are_refused(tree, tmp_path):
    recipe = tree("lora", steps=3)
    rows = Path(recipe["data"]["train"]).read_text()
    own = tmp_path / "own.jsonl"
    own.write_text(rows)
    recipe["data"]["train"] = str(own)
    train(recipe)
    own.write_text(rows.replace("Then 1.", "Then 2."))
    with pytest.raises(CheckpointError, match="data: the content changed"):
        train(recipe)


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(tree, monkeypatch):
    recipe = tree("full", save_every=2)
    save = torch.save

    def full(value, path, *rest, **more):
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CapacityError, match="disk is full"):
        train(recipe)
    run = Path(recipe["run"]["out"])
    assert states.steps_saved(run) == [2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    train(recipe)
    train(tree("full", "whole", save_every=2))
    assert_same_run(run.with_name("whole"), run)
