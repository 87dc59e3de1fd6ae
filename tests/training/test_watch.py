"""The watch: what must stop a run or be said aloud."""

import logging

import pytest
import torch

from tunesmith.core.errors import ModelError
from tunesmith.core.log import logger
from tunesmith.training import watch


def test_a_first_step_that_moves_nothing_is_an_error():
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    before = watch.fingerprint(weights)
    with pytest.raises(ModelError, match="changed none of the 2"):
        watch.after_first_step(weights, before, [], 1e-3)
    weights["b"][1] = 1e-6
    watch.after_first_step(weights, before, [], 1e-3)


def test_a_permutation_changes_the_fingerprint():
    assert watch.fingerprint({"a": torch.tensor([1.0, 2.0])}) != watch.fingerprint({"a": torch.tensor([2.0, 1.0])})


def test_tensors_without_gradient_are_named(monkeypatch, caplog):
    monkeypatch.setattr(logger, "propagate", True)
    weights = {"a": torch.ones(3)}
    before = watch.fingerprint({"a": torch.zeros(3)})
    with caplog.at_level(logging.WARNING):
        watch.after_first_step(weights, before, ["layers.0.gate"], 1e-3)
    assert "layers.0.gate" in caplog.text


def test_a_spike_stands_out_of_the_noise():
    calm = [2.0 + 0.01 * (n % 3) for n in range(20)]
    assert not watch.is_spike(calm, 2.05)
    assert watch.is_spike(calm, 4.0)
    assert not watch.is_spike([2.0] * 5, 9.0)
