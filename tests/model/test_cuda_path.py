"""What can be shown of the CUDA path without a GPU: shapes and arguments on tensors without data, and that no layer reads a number back."""

from dataclasses import replace

import pytest
import torch
from tiny_models import make_model
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.model import attention
from tunesmith.model.layout import Layout


class Plain(torch.nn.Module):
    training = False


def attend_on_cuda(heads: int, keys: int, window: int = 0, lengths=(40, 20, 4), trees=None) -> torch.Tensor:
    """Attention in bf16 on tensors that say they are on a GPU and hold nothing; reading one of their numbers raises."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        layout = Layout(lengths, torch.device("cpu"), trees)
        runs = layout.runs
        there = {name: getattr(runs, name) for name in ("ends", "key_ends", "keys")}
        layout.runs = replace(runs, **{name: t if t is None else torch.empty_like(t, device=device) for name, t in there.items()})
        layout.total = layout.real
        q, k, v = (torch.empty(1, n, layout.total, 32, dtype=torch.bfloat16, device=device) for n in (heads, keys, keys))
        with attention.packed_masks():
            marker = attention._mask(config=make_model.__class__, local_size=window or None)
        out, _ = attention.attend(Plain(), q, k, v, marker, tunesmith_layout=layout)
        return out


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (4, 2), (9, 3)])
@pytest.mark.parametrize("window", [0, 8])
def test_variable_length_attention_takes_the_layout_and_reads_nothing_back(heads, keys, window):
    out = attend_on_cuda(heads, keys, window)
    assert (out.shape, out.dtype, out.device.type) == ((1, 64, heads, 32), torch.bfloat16, "cuda")


@pytest.mark.parametrize("grouped", [True, False])
def test_key_heads_are_repeated_only_for_kernels_that_cannot_group(grouped, monkeypatch):
    if grouped and not attention._grouped():
        pytest.skip("this torch has no grouped kernel")
    monkeypatch.setattr(attention, "_grouped", lambda: grouped)
    asked = []
    real = torch.Tensor.repeat_interleave
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda self, *a, **k: asked.append(1) or real(self, *a, **k))
    assert attend_on_cuda(4, 2).shape == (1, 64, 4, 32)
    assert len(asked) == (0 if grouped else 2)


def test_the_window_marker_stays_on_the_host():
    with torch.device("meta"), attention.packed_masks():
        marker = attention._mask(config=object(), local_size=7)
    assert marker.device.type == "cpu"
    assert attention.window_of(marker, 7, Layout([8], torch.device("cpu"))) == 7
    assert attention.window_of(marker, 7, Layout([7], torch.device("cpu"))) == 0


def test_a_tail_comes_with_the_keys_of_its_front():
    runs = Layout([10, 4], torch.device("cpu"), {0: (3, (5, 8))}).runs
    assert runs.ends.tolist() == [0, 5, 8, 10, 14]
    assert runs.key_ends.tolist() == [0, 5, 11, 16, 20]
    assert runs.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 0, 1, 2, 8, 9, 10, 11, 12, 13]
    assert (runs.longest, runs.longest_keys) == (5, 6)
    assert attend_on_cuda(4, 2, lengths=(50, 14), trees={0: (20, (30,))}).shape == (1, 64, 4, 32)
