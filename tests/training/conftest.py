"""A two-layer model made in memory, and rows to train it on."""

import json
from pathlib import Path

import pytest
import torch
from judged import objective, write
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tunesmith import pocket
from tunesmith.core.load import build
from tunesmith.core.recipe import Named
from tunesmith.data.prepare import prepare
from tunesmith.model.build import build_policy
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import methods, wanted
from tunesmith.training.run import train
from tunesmith.training.sinks import JsonLines


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(pocket.folder())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """Rows of unlike lengths, some with two turns, some with an untrained turn."""
    rows = []
    for n in range(start, start + count):
        messages = [{"role": "user", "content": f"What is {n} plus {n % 7}?" + " Please." * (n % 5)}]
        messages.append({"role": "assistant", "content": f"It is {n + n % 7}." + " Really so." * (n % 4), "weight": int(n % 6 != 5)})
        if n % 3 == 0 or n % 6 == 5:
            messages += [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"Then {n + 1}."}]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 40)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "valid.jsonl", 6, start=100)


# The fast paths as they are by default, without fused layers, and none of them at all.
WAYS = {"fast": {}, "layers off": {"layer": False}, "plain": {"packed": False, "head": False, "lora": False, "layer": False}}
ADAPTERS = {"full": None, "lora": {"name": "lora", "rank": 4, "dropout": 0.0}}


@pytest.fixture
def tree(base, data, held_out, tmp_path):
    """A recipe for the tiny model: tree(adapter, **run settings), with the fast paths of `way` and products in `dtype`."""

    def make(kind: str, out: str = "run", *, dtype: str = "fp32", way: str = "fast", **run):
        settings = {"batch": {"examples": 4}, "steps": 10, "save_every": 3, "eval_every": 5, "samples": 0, "device": "cpu", **run}
        return {
            "model": {"base": str(base), "dtype": dtype, "adapter": ADAPTERS[kind], "fast": WAYS[way]},
            "data": {"train": str(data), "validation": str(held_out)},
            "tokens": {"max_length": 256, "cache": False},
            "optim": {"lr": 5e-3, "warmup": 2},
            "run": {**settings, "out": str(tmp_path / out)},
        }

    return make


@pytest.fixture
def parts(tree):
    """parts(kind, ...): recipe, prepared rows and a policy in training mode whose every trained weight has a gradient."""

    def make(kind: str, **more):
        recipe = build(tree(kind, **more)).recipe
        prepared = prepare(recipe, load_tokenizer(recipe.model.base))
        policy = build_policy(recipe.model, "cpu", seed=0)
        plain = more.get("way", "fast") != "fast"
        assert policy.layers == ("plain" if plain else "fused"), policy.notes
        policy.train_mode(True)
        if kind == "lora":
            # A fresh adapter has B = 0, and then A has no gradient; the laws should see both.
            with torch.no_grad():
                for number, parameter in enumerate(policy.parameters_by_name().values()):
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
        return recipe, prepared, policy

    return make


@pytest.fixture
def wish(tree, tmp_path):
    """wish(objective, adapter, ...): a recipe of that objective over rows of the kind that it asks for."""

    def make(name: str, adapter: str, out: str = "run", **more):
        terms = methods([Named(**objective(name))])
        kind = wanted(terms).kind
        made = tree(adapter, out, **more)
        made["objective"] = [objective(name)]
        made["data"] = {
            "train": str(write(tmp_path / f"{kind}.jsonl", kind, 24)),
            "validation": str(write(tmp_path / f"{kind}.valid.jsonl", kind, 6, 100)),
        }
        if "reference" in terms[0].needs:
            made["reference"] = {"cache": False}
        return made

    return make


@pytest.fixture
def lose_at_five(monkeypatch):
    """Trains a recipe on a machine that is gone behind its fifth step."""

    def run(made):
        write = JsonLines.write

        def fail(self, step, values):
            write(self, step, values)
            if step == 5:
                raise ConnectionError("the machine is gone")

        with monkeypatch.context() as patch:
            patch.setattr(JsonLines, "write", fail)
            with pytest.raises(ConnectionError):
                train(made)

    return run
