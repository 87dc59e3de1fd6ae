"""The watch: what must stop a run or be said aloud."""

import pytest
import torch

from tunesmith.core.errors import ModelError
from tunesmith.training import watch


def with_gradient(values, gradient):
    weight = torch.tensor(values)
    weight.grad = torch.tensor(gradient)
    return weight


def test_a_first_step_that_moves_nothing_is_an_error():
    weights = {"a": with_gradient([1.0, 1.0, 1.0], [0.1, -0.3, 0.2]), "b": with_gradient([[0.0, 0.0]], [[0.0, 1e-9]])}
    before = watch.steepest(weights)
    with pytest.raises(ModelError, match="changed none of the 2"):
        watch.after_first_step(weights, before, 1e-3)
    weights["b"][0, 1] = 1e-6
    watch.after_first_step(weights, before, 1e-3)


def test_the_steepest_place_is_where_the_gradient_is_largest_whatever_its_sign():
    assert watch.steepest({"a": with_gradient([1.0, 5.0, 2.0], [0.1, -0.3, 0.2])}) == {"a": (1, 5.0)}


def test_a_step_without_any_gradient_is_an_error():
    weights = {"a": torch.ones(3)}
    with pytest.raises(ModelError, match="changed none of the 1"):
        watch.after_first_step(weights, watch.steepest(weights), 1e-3)


def test_tensors_without_gradient_are_named(said):
    weights = {"a": with_gradient([1.0], [1.0]), "layers.0.gate": torch.ones(2)}
    before = watch.steepest(weights)
    weights["a"][0] = 2.0
    watch.after_first_step(weights, before, 1e-3)
    assert any("layers.0.gate" in line for line in said)


def test_a_spike_stands_out_of_the_noise():
    calm = [2.0 + 0.01 * (n % 3) for n in range(20)]
    assert not watch.is_spike(calm, 2.05)
    assert watch.is_spike(calm, 4.0)
    assert not watch.is_spike([2.0] * 5, 9.0)


def test_one_undecided_token_is_rounding_in_bf16_and_nothing_else_is():
    from tunesmith.training.receipt import by_rounding

    live = [[-0.01] * 30, [-1.2] * 20]
    one = [[-0.01] * 30, [-1.2] * 19 + [-0.9]]
    many = [[-0.01] * 30, [-0.9] * 20]
    assert by_rounding(one, live, "bf16")
    assert not by_rounding(one, live, "fp32")
    assert not by_rounding(many, live, "bf16")
    assert not by_rounding([[-0.01] * 30, [-1.2] * 19 + [-2.3]], live, "bf16")
    assert not by_rounding([[float("nan")] * 30, [-1.2] * 20], live, "bf16")
    assert by_rounding([[-0.01] * 30, [-1.0] * 20], live, "bf16")


def test_scores_may_move_with_their_size_and_no_further():
    from tunesmith.training.receipt import by_rounding, measure_of, tolerance_of

    live = [[7.4], [-7.1], [3.2], [-6.0]]
    moved = [[7.4], [-6.8], [3.2], [-6.0]]  # as a reward model of the bundled base was read back once
    assert not by_rounding(moved, live, "bf16")
    assert by_rounding(moved, live, "bf16", scalar=True)
    assert not by_rounding([[7.4], [-5.0], [3.9], [-6.0]], live, "bf16", scalar=True)
    assert not by_rounding(moved, live, "fp32", scalar=True)
    assert tolerance_of("bf16", [[1.0]], scalar=True) == tolerance_of("bf16", [[1.0]])
    assert measure_of([{"ids": [1], "places": [0], "scores": [1.0]}]) == "scores"
    assert measure_of([{"ids": [1, 2], "logprobs": [-1.0]}]) == "log-probabilities"
