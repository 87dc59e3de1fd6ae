"""Every optimizer by name through a whole run: it learns, and goes on bit for bit; what cannot run is refused at the door."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tunesmith.core import optimizers as settings
from tunesmith.core.adapters import Ia3, Lora
from tunesmith.core.errors import RecipeError
from tunesmith.core.load import build
from tunesmith.core.types import Wanted
from tunesmith.data.prepare import prepare
from tunesmith.evals.likelihood import row_sums
from tunesmith.model.build import build_policy
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.training import state as states
from tunesmith.training.optim import build_optimizer, demand_device, peak_lr, set_rate
from tunesmith.training.optimizers import bits, galore
from tunesmith.training.optimizers.schedule_free import averaged
from tunesmith.training.optimizers.table import OPTIMIZERS
from tunesmith.training.optimizers.weights import Weights, state_bytes
from tunesmith.training.run import train

GPU_ONLY = {"adamw_8bit": settings.AdamW8bit(), "paged_adamw": settings.PagedAdamW()}
HERE = [name for name in OPTIMIZERS if name not in GPU_ONLY]
# New projections within the few steps of a test, and rates that suit each.
MORE = {"galore": {"refresh": 4, "scale": 1.0}, "apollo": {"refresh": 4}, "lion": {"lr": 2e-3}, "schedule_free": {"betas": [0.9, 0.99]}}
# What the mean loss of the last three of ten steps is of that of the first three, at most.
LEARNED = {"full": 0.94, "lora": 0.99}


def with_optimizer(tree, name, kind):
    """The recipe with this optimizer; dropout and noise draw random numbers in every step."""
    tree["optim"] = {"lr": 1e-2, "warmup": 2, "name": name, **MORE.get(name, {})}
    tree["run"]["neftune_alpha"] = 1.0
    if kind == "lora":
        tree["model"]["adapter"] = {**tree["model"]["adapter"], "dropout": 0.1, "lr_ratio": 4.0}
    return tree


def saved(run, step=10):
    """Everything that a checkpoint decides by, as one flat mapping."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    found = {f"{file.name}/{n}": t for file in folder.glob("*.safetensors") for n, t in safetensors.torch.load_file(file).items()}
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    for number, entry in optimizer["state"].items():
        found |= {f"{number}/{key}": value for key, value in entry.items()}
    for number, group in enumerate(optimizer["param_groups"]):
        found |= {f"group {number}/{key}": value for key, value in group.items()}
    return {**found, "random": torch.load(folder / "random.pt", weights_only=False)["torch"]}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_setting_has_its_row():
    assert list(OPTIMIZERS) == list(settings.KINDS)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", HERE)
def test_a_run_learns_and_a_stopped_one_goes_on_bit_for_bit(tree, kind, name, lose_at_five):
    whole = with_optimizer(tree(kind, "whole"), name, kind)
    result = train(whole)
    cut = with_optimizer(tree(kind, "cut"), name, kind)
    lose_at_five(cut)
    one, two = Path(whole["run"]["out"]), Path(cut["run"]["out"])
    assert states.steps_saved(two) == [3]
    train(cut)
    ours, theirs = saved(one), saved(two)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key
    rows, again = lines(one), lines(two)
    assert [(r["loss"], r["grad_norm"], r.get("eval/loss")) for r in rows] == [
        (r["loss"], r["grad_norm"], r.get("eval/loss")) for r in again
    ]
    losses = [row["loss"] for row in rows]
    assert sum(losses[-3:]) < LEARNED[kind] * sum(losses[:3]), losses
    assert result["metrics"]["eval/loss"] < result["start"]["eval/loss"]


def test_the_result_of_schedule_free_is_the_average(tree):
    """final/ and weights.safetensors hold x, which is what was validated; training goes on from y."""
    recipe = with_optimizer(tree("full", dtype="fp32", use_best=False, eval_every=10), "schedule_free", "full")
    result = train(recipe)
    folder = Path(result["run"]) / "checkpoints/step-000010"
    [file] = Path(result["final"]).glob("*.safetensors")
    final, x, y = (safetensors.torch.load_file(f) for f in (file, folder / "weights.safetensors", folder / states.MOVING))
    assert all(torch.equal(final[n], x[n]) for n in final)
    assert all(not torch.equal(x[n], y[n]) for n in x)
    held = build(recipe).recipe
    policy = build_policy(held.model, "cpu", seed=0)
    policy.load_state(x)
    sums, weights = row_sums(policy, list(prepare(held, load_tokenizer(held.model.base)).validation))
    assert abs(float(sums.sum() / weights.sum())) == pytest.approx(result["metrics"]["eval/loss"], abs=1e-5)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_what_needs_a_gpu_is_refused_on_a_cpu(name, tree):
    with pytest.raises(RecipeError, match="runs on a GPU") as caught:
        demand_device(GPU_ONLY[name], torch.device("cpu"))
    assert caught.value.code == "no_gpu"
    assert "adafactor" in caught.value.remedy
    with pytest.raises(RecipeError) as caught:
        train(with_optimizer(tree("lora"), name, "lora"))
    assert caught.value.code == "no_gpu"


def test_without_bitsandbytes_the_remedy_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="needs the package bitsandbytes") as caught:
        demand_device(settings.AdamW8bit(), torch.device("cuda"))
    assert caught.value.code == "no_bitsandbytes"
    for name in HERE:
        demand_device(settings.KINDS[name](), torch.device("cuda"))


class FakeLibrary:
    """bitsandbytes as far as we call it, so that at least the calls are seen here; its optimizers are torch's AdamW."""

    def __init__(self):
        self.made, self.overrides, self.optim = [], [], self
        self.GlobalOptimManager = self

    def get_instance(self):
        return self

    def register_module_override(self, module, name, config):
        self.overrides.append((type(module).__name__, name, config))

    def __getattr__(self, name):
        def make(groups, **more):
            self.made.append(name)
            return torch.optim.AdamW(groups, **more)

        return make


@pytest.mark.parametrize(
    ("optim", "made", "overrides"),
    [
        (settings.AdamW8bit(), "AdamW8bit", 1),
        (settings.AdamW8bit(paged=True), "PagedAdamW8bit", 1),
        (settings.PagedAdamW(), "PagedAdamW32bit", 0),
    ],
)
def test_bitsandbytes_is_called_by_its_names(parts, monkeypatch, optim, made, overrides):
    library = FakeLibrary()
    monkeypatch.setattr(bits, "demand", lambda *_: None)
    _, _, policy = parts("full")
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    optimizer = build_optimizer(optim, 1e-3, policy.parameters_by_name(), policy.model)
    assert library.made == [made]
    assert library.overrides == [("Embedding", "weight", {"optim_bits": 32})] * overrides
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}


def test_no_matrix_to_work_on_is_an_error(parts):
    _, _, policy = parts("lora")
    weights = policy.parameters_by_name()
    for optim in (settings.GaLore(rank=8), settings.Apollo(rank=4)):
        with pytest.raises(RecipeError, match="both sides above the rank") as caught:
            build_optimizer(optim, 1e-3, weights, policy.model)
        assert caught.value.code == "no_matrices"
    vectors = {n: p for n, p in parts("full")[2].parameters_by_name().items() if p.ndim == 1}
    with pytest.raises(RecipeError, match="muon moves matrices"):
        build_optimizer(settings.Muon(), 1e-3, vectors, parts("full")[2].model)


def test_the_second_factors_of_lora_move_at_their_own_rate(parts):
    """LoRA+, arXiv:2402.12354: eta_B = ratio x eta_A, with the schedule on both."""
    _, _, policy = parts("lora")
    weights = policy.parameters_by_name()
    for name in HERE:
        optimizer = build_optimizer(settings.KINDS[name](), 1e-3, weights, policy.model, lr_ratio=16.0)
        set_rate(optimizer, 5e-4)
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {n: rate[id(p)] for n, p in weights.items()} == {n: 8e-3 if ".lora_B." in n else 5e-4 for n in weights}


def test_lions_rate_is_a_fifth():
    wanted = Wanted(kind="dialogs")
    assert peak_lr(settings.Lion(), Lora(), wanted) == pytest.approx(4e-5)
    assert peak_lr(settings.Lion(lr=1e-3), Lora(), wanted) == 1e-3
    assert peak_lr(settings.AdamW(), Lora(), wanted) == 2e-4
    assert peak_lr(settings.AdamW(), Ia3(), wanted) == pytest.approx(4e-3)


def test_the_settings_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="above 0"):
        settings.ScheduleFree(betas=(0.0, 0.9))


@pytest.mark.parametrize(("name", "most"), [("galore", 0.35), ("apollo", 0.26), ("lion", 0.5), ("adafactor", 0.05), ("muon", 0.5)])
def test_state_is_smaller_than_adamws(parts, name, most):
    """On the matrices of the layers, at rank 0.25 where there is one."""
    size = {}
    for kind in ("adamw", name):
        _, _, policy = parts("full")
        weights = policy.parameters_by_name()
        optimizer = build_optimizer(settings.KINDS[kind](), 1e-3, weights, policy.model)
        step_once(optimizer, policy)
        size[kind] = state_bytes(optimizer, Weights(weights, policy.model, 1e-3).matrices())
        size[kind, "all"] = state_bytes(optimizer)
    print(name, size[name] / size["adamw"], size[name, "all"] / size["adamw", "all"])
    assert size[name] <= most * size["adamw"]
    assert size[name, "all"] < size["adamw", "all"]


def step_once(optimizer, policy):
    one_step(optimizer, lambda: sum((p * p).sum() for p in policy.parameters_by_name().values()))


def one_step(optimizer, loss):
    part = galore.of(optimizer)
    if part is None:
        loss().backward()
    else:
        if part.due:
            with part.sketching():
                loss().backward()
            part.settle()
        with part.catching():
            loss().backward()
    optimizer.step()


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 12)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


# Rates within which each name does its best here, and what is left of the loss after 150 steps, at most.
TASK = {
    "adamw": (0.01, 0.02),
    "adafactor": (0.03, 0.02),
    "lion": (0.003, 0.03),
    "muon": (0.01, 0.02),
    "galore": (0.03, 0.05),
    "apollo": (0.01, 0.05),
    "schedule_free": (0.02, 0.02),
}


@pytest.mark.parametrize("name", HERE)
def test_a_small_task_is_learned(name):
    """A small network learns to say what another one of its kind says."""
    torch.manual_seed(0)
    teacher, student = Student().requires_grad_(False), Student()
    inputs = torch.randn(256, 12)
    truth = teacher(inputs)
    rate, most = TASK[name]
    more = {"rank": 4, "refresh": 30, "scale": 1.0} if name in ("galore", "apollo") else {}
    optimizer = build_optimizer(settings.KINDS[name](weight_decay=0.0, **more), rate, dict(student.named_parameters()), student)

    def loss():
        return (student(inputs) - truth).square().mean()

    first = float(loss().detach())
    for step in range(150):
        set_rate(optimizer, rate if name == "schedule_free" else rate * (1 - step / 150))
        one_step(optimizer, loss)
        student.zero_grad()
    with averaged(optimizer), torch.no_grad():
        print(name, float(loss()) / first)
        assert float(loss()) < most * first
