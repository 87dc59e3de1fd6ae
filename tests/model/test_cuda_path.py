"""What can be shown of the CUDA path without a GPU: shapes and arguments on tensors without data, and that no layer reads a number back."""

import pytest
import torch
from tiny_models import make_model
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.model import attention
from tunesmith.model.layout import Layout


class Plain(torch.nn.Module):
    training = False


def attend_on_cuda(heads: int, keys: int, window: int = 0, lengths=(40, 20, 4)) -> torch.Tensor:
    """Attention in bf16 on tensors that say they are on a GPU and hold nothing; reading one of their numbers raises."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        layout = Layout(lengths, torch.device("cpu"))
        layout._cumulative = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
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
    assert attention.window_of(marker, 7) == 7
