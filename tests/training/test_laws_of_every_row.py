"""Resume after SIGKILL and two ranks, for every row of the objective table, all weights and LoRA."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from judged import THROUGHOUT, only_steps

from tunesmith.objective import OBJECTIVES
from tunesmith.training import loop
from tunesmith.training import state as states
from tunesmith.training.run import train
from tunesmith.training.sinks import JsonLines

KINDS = ["full", "lora"]
ROWS = [*OBJECTIVES, *THROUGHOUT]
STEPS = 5
# Where a process is killed: with the gradients of its fourth step, behind that step, and half-way through its checkpoint.
MOMENTS = ["gradients", "step", "saving"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Steps alone, and one thread: a process that is forked has none of its parent's others."""
    only_steps(monkeypatch.setattr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checkpoint(run, step=STEPS):
    folder = Path(run) / f"checkpoints/step-{step:06d}"
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    random = torch.load(folder / "random.pt", weights_only=False)["torch"]
    return safetensors.torch.load_file(folder / "weights.safetensors"), state, random


def metrics(run):
    """The lines of metrics.jsonl without what the clock says."""
    clock = ("seconds", "tokens_per_s", "memory_gb", "first_step_seconds", "mfu", "tflops")
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(moment):
    """Have this process end by SIGKILL in its fourth step."""
    step, write, save = loop.gradient_step, JsonLines.write, torch.save
    taken = []

    def gradient_step(*arguments):
        result = step(*arguments)
        taken.append(result)
        if moment == "gradients" and len(taken) == 4:
            die()
        return result

    def written(self, number, values):
        write(self, number, values)
        if moment == "step" and number == 4:
            die()

    def saved(value, path, *rest, **more):
        if moment == "saving" and "step-000004" in str(path):
            die()
        save(value, path, *rest, **more)

    loop.gradient_step, JsonLines.write, torch.save = gradient_step, written, saved


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("name", ROWS)
def test_a_killed_run_goes_on_bit_for_bit(wish, name, adapter):
    """A process of its own is killed by SIGKILL, and another one ends the run: weights, optimizer, random state and every metric."""
    moment = MOMENTS[(ROWS.index(name) + KINDS.index(adapter)) % len(MOMENTS)]
    whole, cut = (wish(name, adapter, out, steps=STEPS, save_every=2, eval_every=3, neftune_alpha=3.0) for out in ("whole", "cut"))
    left, right = (Path(one["run"]["out"]) for one in (whole, cut))
    train(whole)
    child = os.fork()
    if not child:
        try:
            killed_at(moment)
            train(cut)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert states.steps_saved(right) == [2, 3]
    train(cut)
    (weights, optimizer, random), (others, other, chance) = checkpoint(left), checkpoint(right)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert optimizer.keys() == other.keys() != set()
    for number, entry in optimizer.items():
        assert all(torch.equal(value, other[number][key]) for key, value in entry.items())
    assert torch.equal(random, chance)
    assert metrics(left) == metrics(right)
    assert len(metrics(left)) == STEPS


@pytest.mark.parametrize("adapter", KINDS)
def test_two_ranks_are_one(wish, adapter, tmp_path):
    """Micro-batches so small that both ranks have some; the weights, and the loss and the metrics of training and validation rows."""
    settings = {"steps": STEPS, "save_every": 0, "eval_every": 3}
    ones = {name: wish(name, adapter, f"{name} one", **settings) for name in ROWS}
    twos = {name: wish(name, adapter, f"{name} two", micro_tokens=64, **settings) for name in ROWS}
    recipes = tmp_path / "recipes.json"
    recipes.write_text(json.dumps(list(twos.values())))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two_ranks.py", str(recipes)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ROWS:
        train(ones[name])
        one, two = ones[name]["run"]["out"], twos[name]["run"]["out"]
        left, right = checkpoint(one)[0], checkpoint(two)[0]
        assert any(not torch.equal(left[n], right[n]) for n in left), name  # else the second rank had nothing to do
        for tensor, value in left.items():
            torch.testing.assert_close(right[tensor], value, atol=5e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        for before, after in zip(metrics(one), metrics(two), strict=True):
            assert after == pytest.approx(before, abs=1e-4, rel=1e-5), name
