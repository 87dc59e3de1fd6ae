"""What the proof at load found is known the next time, for the very same model and nothing else."""

import json

import peft
import pytest
import torch
from tiny_models import gradients, largest_gap, make_batch, make_model, make_policy

from tunesmith.model import probe, proofs
from tunesmith.model.head import HeadForm


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """The folder of notes, empty at first."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.delenv("TUNESMITH_PROOFS")
    return tmp_path / "proofs"


@pytest.fixture
def proven(monkeypatch):
    """How often a model was proven."""
    count, check = [], probe._check_causal
    monkeypatch.setattr(probe, "_check_causal", lambda *words: (count.append(1), check(*words)))
    return count


def adapted(seed: int = 0):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(make_model(), config)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_second_load_goes_the_same_ways_without_a_proof(family, notes, proven):
    changes = {"final_logit_softcapping": 8.0, "head_dim": 8} if family == "gemma2" else {}
    first = make_policy(make_model(family, **changes))
    second = make_policy(make_model(family, **changes))
    assert len(proven) == 1
    assert (second.ways(), second.head_form, second.notes) == (first.ways(), first.head_form, first.notes)
    if family == "gemma2":
        assert second.head_form == HeadForm(1.0, 8.0)
    batch = make_batch()
    one, two = first.score(batch).logp, second.score(batch).logp
    assert torch.equal(one, two)
    assert largest_gap(gradients(first.model, one.sum()), gradients(second.model, two.sum())) == 0


def test_an_adapter_drawn_from_another_seed_is_known(notes, proven):
    first, second = make_policy(adapted()), make_policy(adapted(1))
    assert (len(proven), second.ways()) == (1, first.ways())
    assert second.lora == second.layers == "fused"
    with torch.no_grad():
        for one, two in zip(first.parameters_by_name().values(), second.parameters_by_name().values(), strict=True):
            two.copy_(one.normal_(0, 0.1))
    batch = make_batch()
    assert torch.equal(first.score(batch).logp, second.score(batch).logp)


def test_everything_else_is_proven_anew(notes, proven, monkeypatch):
    make_policy(make_model())
    for number, policy in enumerate((lambda: make_model(seed=1), lambda: make_model(rope_theta=5_000.0), adapted), 2):
        make_policy(policy())
        assert len(proven) == number
    make_policy(make_model(), head=False)
    make_policy(make_model(dtype=torch.bfloat16))
    frozen = make_model()
    frozen.lm_head.requires_grad_(False)
    make_policy(frozen)
    assert len(proven) == 7
    monkeypatch.setattr(proofs, "_code", lambda: "another version")
    make_policy(make_model())
    assert len(proven) == 8
    assert len(list(notes.iterdir())) == 8


def test_a_plain_way_is_said_again(notes, proven, said):
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(probe.fuse, "fuse", lambda *words: 0)
        broken.setattr(probe, "_settle_head", lambda policy, *rest: policy.note("plain head: it was broken"))
        make_policy(make_model())
    again = make_policy(make_model())
    assert (len(proven), again.head, again.layers) == (1, "plain", "plain")
    assert said.count("model: plain head: it was broken") == 2
    assert any("proven before" in line for line in said)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "head", "scale"])
def test_a_damaged_note_is_no_note(damage, notes, proven):
    make_policy(make_model())
    (place,) = notes.iterdir()
    whole = json.loads(place.read_text())
    place.write_text(json.dumps({**whole, damage: "?"}) if damage in whole else damage)
    policy = make_policy(make_model())
    assert (len(proven), policy.head) == (2, "fast")
    assert json.loads(place.read_text()) == whole


def test_nothing_is_kept_where_that_is_switched_off_or_impossible(notes, proven, monkeypatch, said):
    monkeypatch.setenv("TUNESMITH_PROOFS", "0")
    make_policy(make_model())
    assert not notes.exists()
    monkeypatch.delenv("TUNESMITH_PROOFS")
    notes.write_text("a file in the place of the folder")
    make_policy(make_model())
    make_policy(make_model())
    assert len(proven) == 3
    assert any("is not kept" in line for line in said)
