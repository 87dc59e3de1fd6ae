"""Many adapters in one batch: each row as PEFT's own model alone would say it; loading, evicting and replacing while the engine runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, VeraConfig, get_peft_model
from tiny_models import make_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "infer"))

from engines import TOKENIZER, frozen, greedy_by_transformers, ids, lively, prompts_of, save_lora, stir, with_lora

from tunesmith.core.errors import ModelError, RecipeError
from tunesmith.core.ports import SampleSettings
from tunesmith.infer.engine import Engine
from tunesmith.model.many_adapters import ManyAdapters

GREEDY = SampleSettings(20, 0.0)
DRAWN = SampleSettings(10, 1.0, seed=2)
PROMPTS = prompts_of((5, 17, 1, 30, 9, 22, 3, 12))
GPT2 = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "_own_names": True, "tie_word_embeddings": False}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
CASES = {"llama fused": ("llama", {}), "llama plain": ("llama", {"layer": False}), "gpt2": ("gpt2", {})}
QV = ["q_proj", "v_proj"]
LLAMA = {
    "wide": {"r": 12, "lora_alpha": 20},
    "thin": {"r": 1, "lora_alpha": 2, "target_modules": QV},
    "mlp": {"r": 5, "target_modules": ["down_proj", "gate_proj"]},
    "stable": {"r": 6, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"]},
    "patterns": {"r": 3, "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 11, "layers.0": 3}},
    "one layer": {"r": 4, "layers_to_transform": [1], "target_modules": ["o_proj"]},
}
CONV = {"fan_in_fan_out": True}
OWN = {
    "wide": {"r": 12, "lora_alpha": 20, "target_modules": ["c_attn", "c_proj", "c_fc"], **CONV},
    "thin": {"r": 1, "target_modules": ["c_attn"], **CONV},
    "mlp": {"r": 5, "target_modules": ["c_fc", "mlp.c_proj"], **CONV},
    "stable": {"r": 6, "use_rslora": True, "target_modules": ["c_attn"], **CONV},
    "patterns": {"r": 3, "rank_pattern": {"c_attn": 7}, "alpha_pattern": {"c_fc": 11}, "target_modules": ["c_attn", "c_fc"], **CONV},
}


def base_of(family: str, **changes):
    return lively(family, **(GPT2 if family == "gpt2" else {}), **changes)


def saved(root: Path, family: str) -> dict[str, str]:
    kinds = OWN if family == "gpt2" else LLAMA
    return {
        name: save_lora(root / name.replace(" ", "-"), base=base_of(family), seed=number, **config)
        for number, (name, config) in enumerate(kinds.items())
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


def truth(folder: str | None, family: str, prompts: list[list[int]], count: int) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """PEFT's own model with one adapter, transformers' own greedy generate, and the log-probabilities of a whole forward pass."""
    model = base_of(family)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    out = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, greedy_by_transformers(model, prompts, count), strict=True):
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
            logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
            out.append((answer, logp))
    return out


def engine_of(family: str = "llama", adapters: dict[str, str] | None = None, *, options: dict | None = None, **fast: bool) -> Engine:
    policy = frozen() if family == "llama" and fast.get("layer", True) else make_policy(base_of(family), **fast)
    engine = Engine(policy, TOKENIZER, **(options or {}))
    for name, folder in (adapters or {}).items():
        engine.adapters.load(name, folder)
    return engine


def check(rows, names: list[str | None], folders: dict[str, str], family: str, prompts=PROMPTS, count: int = 20) -> None:
    for name in dict.fromkeys(names):
        mine = [place for place, other in enumerate(names) if other == name]
        want = truth(None if name is None else folders[name], family, [prompts[place] for place in mine], count)
        for place, (answer, logp) in zip(mine, want, strict=True):
            assert rows[place][0].ids == answer, name
            torch.testing.assert_close(torch.tensor(rows[place][0].logprobs), logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_is_each_adapter_alone(case: str, tmp_path: Path) -> None:
    family, fast = CASES[case]
    folders = saved(tmp_path, family)
    engine = engine_of(family, folders, **fast)
    assert (engine.policy.layers == "fused") == (case == "llama fused")
    names = [None, *folders, *[None, "wide"][: len(PROMPTS) - len(folders) - 1]][: len(PROMPTS)]
    names += ["thin"] * (len(PROMPTS) - len(names))
    rows = engine.sample(PROMPTS, [replace(GREEDY, adapter=name) for name in names])
    check(rows, names, folders, family)
    base = engine.sample(PROMPTS, GREEDY)
    assert all(row[0].ids != other[0].ids for row, other, name in zip(rows, base, names, strict=True) if name), "the adapters can be heard"
    alone = [engine.sample([p], replace(GREEDY, adapter=name))[0][0].ids for p, name in zip(PROMPTS, names, strict=True)]
    assert [row[0].ids for row in rows] == alone


@pytest.mark.parametrize("layer", [True, False])
def test_more_rows_than_are_grouped_at_once(folders: dict[str, str], layer: bool) -> None:
    """Long prompts of several adapters go through their groups one by one, and one adapter alone without groups."""
    prompts = prompts_of((120, 100, 90, 60))
    engine = engine_of(adapters=folders, layer=layer)
    names = ["wide", "thin", None, "stable"]
    check(engine.sample(prompts, [replace(GREEDY, adapter=name) for name in names]), names, folders, "llama", prompts)
    names = ["mlp"] * 4
    check(engine.sample(prompts, replace(GREEDY, adapter="mlp")), names, folders, "llama", prompts)


@pytest.mark.parametrize("layer", [True, False])
def test_more_adapters_than_places(folders: dict[str, str], layer: bool) -> None:
    engine = engine_of(layer=layer)
    engine.adapters = ManyAdapters(engine.policy, engine._wanted, most_active=2)
    for name, folder in folders.items():
        engine.adapters.load(name, folder)
    names = [*folders, None, "wide"]
    settings = [replace(GREEDY, adapter=name) for name in names]
    rows = engine.sample(PROMPTS, settings)
    check(rows, names, folders, "llama")
    assert len(engine.adapters._places) == 2
    back = engine.sample(PROMPTS[::-1], settings[::-1])[::-1]
    assert ids(back) == ids(rows)


def test_loading_evicting_and_replacing_while_rows_run(folders: dict[str, str]) -> None:
    engine = engine_of()
    many = engine.adapters
    assert many.names == []
    many.load("thin", folders["thin"])

    def ask(name: str | None):
        return engine.submit(PROMPTS[1], replace(GREEDY, adapter=name))

    def finish(*requests) -> list[tuple[int, ...]]:
        while engine.step():
            pass
        return [request.completions[0].ids for request in requests]

    want = {name: truth(folder, "llama", [PROMPTS[1]], 20)[0][0] for name, folder in {**folders, None: None}.items()}
    first, base = ask("thin"), ask(None)
    for _ in range(4):
        engine.step()
    many.load("wide", folders["wide"])  # more rank, more layers, in the middle of the others
    second = ask("wide")
    for _ in range(3):
        engine.step()
    for change in (lambda: many.load("thin", folders["mlp"]), lambda: many.evict("thin"), lambda: many.evict("wide")):
        with pytest.raises(RecipeError) as caught:
            change()
        assert caught.value.code == "adapter_in_use"
    assert finish(first, base, second) == [want["thin"], want[None], want["wide"]]
    many.load("thin", folders["stable"])
    assert many.names == ["thin", "wide"]
    assert finish(ask("thin"), ask("wide"), ask(None)) == [want["stable"], want["wide"], want[None]]
    many.evict("wide")
    assert many.names == ["thin"]
    for use in (lambda: ask("wide"), lambda: many.evict("wide"), lambda: many.demand("wide")):
        with pytest.raises(RecipeError) as caught:
            use()
        assert caught.value.code == "unknown_adapter"
    many.load("wide", folders["patterns"])
    assert finish(ask("thin"), ask("wide"), ask(None)) == [want["stable"], want["patterns"], want[None]]


def test_an_adapter_that_waiting_rows_want_stays(folders: dict[str, str]) -> None:
    engine = engine_of(adapters={"thin": folders["thin"]}, options={"max_rows": 1})
    running, waiting = engine.submit(PROMPTS[0], GREEDY), engine.submit(PROMPTS[1], replace(GREEDY, adapter="thin"))
    engine.step()
    with pytest.raises(RecipeError) as caught:
        engine.adapters.evict("thin")
    assert caught.value.code == "adapter_in_use"
    engine.cancel(waiting)
    engine.adapters.evict("thin")
    assert not running.done


def test_evicting_forgets_everything(folders: dict[str, str]) -> None:
    engine = engine_of()
    engine.adapters = ManyAdapters(engine.policy, engine._wanted, most_active=1)
    for turn in range(6):
        for name, folder in list(folders.items())[:3]:
            engine.adapters.load(f"{name} {turn}", folder)
            engine.sample(PROMPTS[:1], replace(DRAWN, adapter=f"{name} {turn}"))
        for name in engine.adapters.names:
            engine.adapters.evict(name)
    assert engine.adapters.names == []
    assert not engine.adapters._used, "names of evicted adapters are kept for ever"


@pytest.mark.parametrize("layer", [True, False])
def test_two_engines_on_one_policy_do_not_hear_each_other(folders: dict[str, str], layer: bool) -> None:
    first = engine_of(adapters={"one": folders["wide"]}, layer=layer)
    second = Engine(first.policy, TOKENIZER)
    second.adapters.load("one", folders["stable"])
    for engine, name in ((first, "wide"), (second, "stable"), (first, "wide")):
        rows = engine.sample(PROMPTS[:3], replace(GREEDY, adapter="one"))
        check(rows, [name] * 3, folders, "llama", PROMPTS[:3])
    assert ids(second.sample(PROMPTS[:3], GREEDY)) == [[answer] for answer, _ in truth(None, "llama", PROMPTS[:3], 20)]


def refusal(engine: Engine, name: str, folder: str) -> bool:
    """Whether the folder is refused, as it should be if it cannot be heard as it is."""
    try:
        engine.adapters.load(name, folder)
    except (RecipeError, ModelError) as error:
        return error.code in ("adapter_kind", "bad_adapter")
    return False


@pytest.mark.parametrize("layer", [True, False])
def test_an_adapter_on_the_output_layer_is_heard_or_refused(tmp_path: Path, layer: bool) -> None:
    folder = save_lora(tmp_path / "head", target_modules=["q_proj", "lm_head"], size=0.5)
    engine = engine_of(layer=layer)
    if refusal(engine, "head", folder):
        return
    rows = engine.sample(PROMPTS[:3], replace(GREEDY, adapter="head"))
    check(rows, ["head"] * 3, {"head": folder}, "llama", PROMPTS[:3])


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_moved_the_base_is_as_peft_reads_it_or_refused(tmp_path: Path, start: str) -> None:
    """PEFT takes the start out of the base again when it reads such a folder; its factors alone on the base are another model."""
    folder = save_lora(tmp_path / start, init_lora_weights=start, size=0.05)
    engine = engine_of()
    if refusal(engine, "moved", folder):
        return
    rows = engine.sample(PROMPTS[:3], replace(GREEDY, adapter="moved"))
    check(rows, ["moved"] * 3, {"moved": folder}, "llama", PROMPTS[:3])


def test_training_and_scoring_go_through_the_base_beside_loaded_adapters(folders: dict[str, str]) -> None:
    engine = engine_of(adapters=folders, layer=False)
    plain = make_policy(base_of("llama"))
    engine.sample(PROMPTS[:2], replace(DRAWN, adapter="wide"))
    from engines import scored

    torch.testing.assert_close(scored(engine.policy, PROMPTS[3], [5, 6, 7]), scored(plain, PROMPTS[3], [5, 6, 7]), atol=1e-5, rtol=0)


# Refused.


def other_kind(folder: Path, config) -> str:
    model = get_peft_model(lively(), config)
    stir(model, 1)
    model.peft_config["default"].base_model_name_or_path = ""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


REFUSED = {
    "dora": ("adapter_kind", lambda f: save_lora(f, use_dora=True)),
    "modules beside it": ("adapter_kind", lambda f: save_lora(f, modules_to_save=["lm_head"], target_modules=QV)),
    "biases": ("adapter_kind", lambda f: save_lora(f, bias="lora_only", base=lively(attention_bias=True))),
    "a bias in B": ("adapter_kind", lambda f: save_lora(f, lora_bias=True)),
    "ia3": (
        "adapter_kind",
        lambda f: other_kind(
            f, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
        ),
    ),
    "vera": ("adapter_kind", lambda f: other_kind(f, VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))),
    "another width": ("bad_adapter", lambda f: save_lora(f, base=lively(hidden_size=64))),
    "more layers": ("bad_adapter", lambda f: save_lora(f, base=lively(num_hidden_layers=3))),
    "another family": ("bad_adapter", lambda f: save_lora(f, base=base_of("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)),
    "not a number": ("bad_adapter", lambda f: save_lora(f, size=float("nan"))),
    "infinite": ("bad_adapter", lambda f: save_lora(f, size=float("inf"))),
    "embedding": ("bad_adapter", lambda f: save_lora(f, target_modules=["embed_tokens", "q_proj"])),
    "head": ("bad_adapter", lambda f: save_lora(f, target_modules=["lm_head", "q_proj"], base=lively(tie_word_embeddings=False))),
}
SAID = {
    "another width": "does not fit this base",
    "not a number": "NaN or infinity",
    "infinite": "NaN or infinity",
    "embedding": "changes the embedding (model.embed_tokens)",
    "head": "changes the head (lm_head)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_mixed_is_refused(name: str, tmp_path: Path, folders: dict[str, str]) -> None:
    code, make = REFUSED[name]
    folder = make(tmp_path / "odd")
    engine = engine_of(adapters={"good": folders["thin"]})
    for key in ("bad", "good"):
        with pytest.raises((RecipeError, ModelError)) as caught:
            engine.adapters.load(key, folder)
        assert caught.value.code == code, str(caught.value)
        assert SAID.get(name, "") in caught.value.message
        assert caught.value.remedy
        assert caught.value.where
    assert engine.adapters.names == ["good"]
    check(engine.sample(PROMPTS[:1], replace(GREEDY, adapter="good")), ["good"], {"good": folders["thin"]}, "llama", PROMPTS[:1])


def test_folders_that_are_no_adapter_are_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    engine = engine_of()
    lively().save_pretrained(tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    for folder, code in ((tmp_path / "whole", "bad_adapter"), (tmp_path / "empty", "no_model"), (tmp_path / "nowhere", "no_model")):
        with pytest.raises(ModelError) as caught:
            engine.adapters.load("odd", folder)
        assert caught.value.code == code
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(folders["thin"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 200 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelError) as caught:
        engine.adapters.load("odd", broken)
    assert caught.value.code == "bad_adapter"
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        engine.adapters.load("odd", broken)
    assert (caught.value.code, "has no weights" in caught.value.message) == ("bad_adapter", True), "PEFT would ask the hub"
    for content in ('{"r": ', "[]"):
        (broken / "adapter_config.json").write_text(content)
        with pytest.raises(ModelError) as caught:
            engine.adapters.load("odd", broken)
        assert (caught.value.code, "adapter_config.json cannot be read" in caught.value.message) == ("bad_adapter", True)
    assert engine.adapters.names == []


def test_a_folder_of_which_a_half_is_missing_is_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    for number, part in enumerate(("lora_A", "lora_B")):
        half = tmp_path / part
        half.mkdir()
        (half / "adapter_config.json").write_bytes((Path(folders["thin"]) / "adapter_config.json").read_bytes())
        stored = load_file(Path(folders["thin"]) / "adapter_model.safetensors")
        dropped = next(key for key in sorted(stored) if part in key)
        save_file({key: value for key, value in stored.items() if key != dropped}, half / "adapter_model.safetensors")
        engine = engine_of()
        with pytest.raises(ModelError) as caught:
            engine.adapters.load(str(number), half)
        assert caught.value.code == "bad_adapter"


def test_a_policy_with_an_adapter_of_its_own_takes_no_others(folders: dict[str, str]) -> None:
    engine = Engine(make_policy(with_lora(lively())), TOKENIZER)
    with pytest.raises(RecipeError) as caught:
        engine.adapters.load("thin", folders["thin"])
    assert caught.value.code == "adapter_on_adapter"
