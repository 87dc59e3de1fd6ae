import pytest
import torch

from tunesmith.model import head
from tunesmith.model.head import HeadForm, token_logprobs


def case(rows=50, vocabulary=37, width=8, bias=True):
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return (
        make(rows, width).requires_grad_(),
        make(vocabulary, width).requires_grad_(),
        make(vocabulary).requires_grad_() if bias else None,
        targets,
    )


def plain(hidden, weight, bias, targets, form):
    z = (hidden @ weight.t() + (0 if bias is None else bias)) * form.scale
    if form.cap is not None:
        z = form.cap * torch.tanh(z / form.cap)
    return torch.log_softmax(z, -1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("form", [HeadForm(), HeadForm(0.3), HeadForm(cap=2.0), HeadForm(0.5, 1.5)])
@pytest.mark.parametrize("bias", [True, False])
def test_head_is_log_softmax_with_exact_gradients(form, bias, monkeypatch):
    monkeypatch.setattr(head, "TILE_BYTES", 16 * 4 * 37)  # 16 rows a tile: several tiles, the last one short
    monkeypatch.setattr(head, "LEAST_ROWS", 16)
    hidden, weight, bias_, targets = case(bias=bias)
    incoming = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = [t for t in (hidden, weight, bias_) if t is not None]
    ours = token_logprobs(hidden, weight, bias_, targets, form, torch.float64)
    theirs = plain(hidden, weight, bias_, targets, form)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * incoming).sum(), wanted), torch.autograd.grad((theirs * incoming).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_frozen_head_gets_no_gradient_and_hidden_does():
    hidden, weight, _, targets = case(bias=False)
    out = token_logprobs(hidden, weight.detach(), None, targets, HeadForm(), torch.float64)
    out.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, 1), 1.0, requires_grad=True)
    weight = torch.tensor([[300.0], [-300.0], [299.0]])
    out = token_logprobs(hidden, weight, None, torch.tensor([1, 0]), HeadForm(), torch.float32)
    torch.testing.assert_close(out.detach(), torch.log_softmax(hidden.detach() @ weight.t(), -1)[[0, 1], [1, 0]])
    out.sum().backward()
    assert bool(torch.isfinite(hidden.grad).all())


def test_bf16_products_keep_fp32_sums():
    hidden, weight, _, targets = case(rows=40, vocabulary=3000, width=32, bias=False)
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    out = token_logprobs(hidden, weight, None, targets, HeadForm(), torch.bfloat16)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.log_softmax((hidden @ weight.t()).float(), -1)[torch.arange(40), targets], rtol=0, atol=2e-5)
