"""Proof at load: the fast ways must give what the plain ones give on this very model, or they are not used.

Random short documents of unequal length; the model's own attention, logits and PEFT forward, one document at a time, are
the truth. Separation is also proven exactly: the gradient of one position's output with respect to every embedding outside
its own past must be zero, whatever the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import ModelError
from tunesmith.core.recipe import Fast
from tunesmith.core.types import Batch, Segment
from tunesmith.model import attention, bottleneck, fuse, lora, proofs
from tunesmith.model.adapter import lora_layers
from tunesmith.model.flops import attention_widths
from tunesmith.model.forward import Sharing, passes
from tunesmith.model.head import HeadForm
from tunesmith.model.load import seeded
from tunesmith.model.policy import Policy
from tunesmith.model.virtual import refuse_padded

LENGTHS = (9, 3, 21, 14)
FAILURES = (attention.LayoutError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError)


def settle(policy: Policy, fast: Fast) -> None:
    """Choose layout, head and LoRA forward for this policy by trying them, and note what goes the plain way and why.

    What was tried on this very model before is not tried again (see proofs.py).
    """
    known = proofs.place_of(policy, fast)
    if known is not None and proofs.recall(policy, known):
        return
    batch = probe_batch(policy.causal, policy.vocabulary)
    training = policy.model.training
    policy.model.eval()
    # Virtual tokens are proven at the end, against PEFT's own forward; the layouts are those of the base.
    base = policy.adapter_disabled() if policy.virtual is not None else contextlib.nullcontext()
    with seeded(0, "probe"), base:
        _check_causal(policy, batch)
        truth = _one_by_one(policy, batch)
        if fast.packed:
            _settle_layout(policy, batch, truth)
        if policy.scalar:
            policy.head = "fast"  # no logits are ever made
        elif fast.head:
            _settle_head(policy, batch, truth)
        if fast.lora and policy.adapted and lora_layers(policy.model):
            _settle_lora(policy, batch)
    if policy.virtual is not None:
        _prove_virtual(policy, batch)
    with seeded(0, "probe"):
        if fast.layer and (fast.lora or not policy.adapted) and policy.layout == "packed":
            _settle_layers(policy, batch)
    policy.model.train(training)
    if known is not None:
        proofs.remember(policy, known)


@torch.no_grad()
def _prove_virtual(policy: Policy, batch: Batch) -> None:
    """Raises ModelError `virtual_tokens` when a row behind its virtual tokens is not what PEFT makes of it."""
    refuse_padded(policy.layout, policy.virtual)
    if policy.scalar:
        return  # PEFT reads the score elsewhere; the states are those of the language model's way
    alone = _alone(batch, batch.segments[-1])
    ids = torch.from_numpy(alone.ids.astype(np.int64)).to(policy.device)[None]
    with policy.sampling() as model:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] : -1].float()
    truth = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    difference = _differs(policy, alone, truth)
    if not difference <= tolerance(policy, truth):
        raise ModelError(
            f"rows behind their virtual tokens differ from PEFT's forward by {difference:.1e}",
            where="model.adapter",
            remedy="take another adapter for this model",
            code="virtual_tokens",
        )


def probe_batch(causal: Any, vocabulary: int) -> Batch:
    """A few short documents of random ordinary ids (none that the configuration names as special), all trained but the first."""
    named = {v for k, v in causal.config.get_text_config().to_dict().items() if k.endswith("token_id") and isinstance(v, int)}
    ordinary = np.array([i for i in range(vocabulary // 8, max(vocabulary // 2, vocabulary // 8 + 2)) if i not in named], np.int32)
    ids = np.random.default_rng(0).choice(ordinary, sum(LENGTHS)).astype(np.int32)
    stops = np.cumsum(LENGTHS)
    train = np.ones(len(ids), np.float32)
    train[[0, *stops[:-1]]] = 0
    segments = tuple(Segment(int(b) - n, int(b), f"probe:{i}") for i, (b, n) in enumerate(zip(stops, LENGTHS, strict=True)))
    return Batch(ids, train, segments)


def _one_by_one(policy: Policy, batch: Batch) -> Tensor:
    with torch.no_grad():
        return torch.cat([numbers(policy, _alone(batch, s)) for s in batch.segments])


def _alone(batch: Batch, segment: Segment) -> Batch:
    a, b = segment.start, segment.stop
    return Batch(batch.ids[a:b], batch.train[a:b], (Segment(0, b - a, segment.key),))


def tolerance(policy: Policy, truth: Tensor) -> float:
    """The difference that rounding explains, given how large the log-probabilities are: largest in fp32, mean in bf16."""
    size = float(truth.abs().max())
    return 1e-4 * max(1.0, size / 10) if policy.dtype != torch.bfloat16 else 0.005 * max(4.0, size)


def _differs(policy: Policy, batch: Batch, truth: Tensor) -> float:
    """How far the policy's scores are from `truth`.

    In bf16 the mean: a router on the edge between two experts may fall either way by rounding and move single tokens far.
    """
    with torch.no_grad():
        gaps = (numbers(policy, batch) - truth).abs()
    return float(gaps.mean() if policy.dtype == torch.bfloat16 else gaps.max())


def _check_causal(policy: Policy, batch: Batch) -> None:
    if _proof(policy, _alone(batch, batch.segments[-1])) == "leaks":
        raise ModelError(
            f"{type(policy.causal).__name__} looks ahead: a position depends on a later token",
            where="model.base",
            remedy="use a causal language model",
            code="not_causal",
        )


def _proof(policy: Policy, batch: Batch) -> Literal["separate", "leaks", "unknown"]:
    """Whether one output depends on embeddings outside its own document up to itself: a gradient that must be exactly zero.

    The output stands in the middle of the second document (of the first, if there is one only), with neighbours on both sides.
    """
    one = passes(batch, policy.device, policy.layout)[0]
    number = 1 if one.layout is not None and len(one.layout.lengths) > 1 else 0
    start, stop = one.layout.spans[number] if one.layout is not None else (0, one.ids.shape[1])
    middle = (start + stop) // 2
    caught: list[Tensor] = []

    def catch(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1].clone()  # some models scale the embeddings in place

    handle = policy.causal.get_input_embeddings().register_forward_hook(catch)
    try:
        with torch.enable_grad():
            state = policy.run(one)[0, middle].float()
            (gradient,) = torch.autograd.grad((state * torch.randn_like(state)).sum(), caught[0], allow_unused=True)
    finally:
        handle.remove()
    if gradient is None or gradient.shape[:2] != one.ids.shape or not bool(gradient[0, middle].any()):
        return "unknown"
    gradient[0, start : middle + 1] = 0
    return "leaks" if bool(gradient.any()) else "separate"


def _settle_layout(policy: Policy, batch: Batch, truth: Tensor) -> None:
    attention.register()
    policy.layout = "packed"
    reason = "its attention does not go through transformers' AttentionInterface"
    try:
        if policy.causal._can_set_attn_implementation():
            policy.use_attention(attention.NAME)
            difference = _differs(policy, batch, truth)
            reason = f"packed and separate log-probabilities differ by {difference:.1e}"
            if difference <= tolerance(policy, truth):
                proof = _proof(policy, batch)
                if proof == "separate":
                    return
                reason = "state crosses from one packed document into another" if proof == "leaks" else "separation cannot be proven"
    except FAILURES as error:
        reason = f"packed attention fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    policy.layout = "padded"
    policy.use_attention(policy.own_attention)
    policy.note(f"padded layout: {reason}")


def head_forms(config: Any) -> list[HeadForm]:
    """What the configuration says the head may do after its matrix product; which of them is true is tried out."""
    values = config.get_text_config().to_dict()
    cap = values.get("final_logit_softcapping") or values.get("logits_soft_cap")
    scales = [values.get("logit_scale"), values.get("lm_head_multiplier"), values.get("logits_scaling")]
    known = [float(s) for s in scales if isinstance(s, int | float) and s]
    if values.get("logits_scaling"):
        known.append(1.0 / float(values["logits_scaling"]))
    return [HeadForm(scale, cap) for scale in [*known, 1.0]]


def _settle_head(policy: Policy, batch: Batch, truth: Tensor) -> None:
    output = policy.causal.get_output_embeddings()
    reason = f"its output layer is a {type(output).__name__}"
    if type(output) is torch.nn.Linear:
        plain = truth if policy.dtype != torch.bfloat16 else policy.score(batch).logp.detach()
        policy.head = "fast"
        for form in head_forms(policy.causal.config):
            policy.head_form = form
            try:
                difference = _differs(policy, batch, plain)
                if difference <= tolerance(policy, truth):
                    return
                reason = f"the fast one differs by {difference:.1e}"
            except FAILURES as error:
                reason = f"the fast one fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    policy.head, policy.head_form = "plain", HeadForm()
    policy.note(f"plain head: {reason}")


def _settle_lora(policy: Policy, batch: Batch) -> None:
    with noisy(policy):
        with torch.no_grad():
            plain = numbers(policy, batch)
        fused = lora.fuse(policy.model)
        difference = _differs(policy, batch, plain)
    if not fused or not difference <= tolerance(policy, plain):
        lora.unfuse(policy.model)
        policy.note("plain LoRA: " + (f"the fused one differs by {difference:.1e}" if fused else "no layer of a kind that can be fused"))
        return
    policy.lora = "fused"


def _settle_layers(policy: Policy, batch: Batch) -> None:
    """The whole layer has a backward pass of its own: gradients are compared too."""
    if not policy.fuse_layers():
        return
    policy.layers = "fused"
    with noisy(policy):
        try:
            fused, fused_gradient = graded(policy, batch)
        except FAILURES as error:
            policy.note(f"plain decoder layers: the fused ones fail ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            return
        finally:
            fuse.unfuse(policy.model)
            policy.layers = "plain"
        plain, gradient = graded(policy, batch)
    difference = float((fused - plain).abs().mean() if policy.dtype == torch.bfloat16 else (fused - plain).abs().max())
    turned = distance(fused_gradient, gradient)
    # Written so that NaN is refused.
    if not (difference <= tolerance(policy, plain) and turned <= (0.1 if policy.dtype == torch.bfloat16 else 1e-3)):
        policy.note(f"plain decoder layers: the fused ones differ by {difference:.1e}, their gradient by {turned:.1e} of its length")
        return
    policy.fuse_layers()
    policy.layers = "fused"


def settle_front(policy: Policy) -> None:
    """Let rows of a group share the front that they begin with, once that gives what each row gives on its own."""
    if policy.layout != "packed":
        policy.note("rows of a pair go through the model one by one: its layout is padded")
        return
    config = policy.causal.config.get_text_config()
    windows = [window for _, window in attention_widths(policy.causal) if window]
    batch = grouped_batch(policy.causal, policy.vocabulary)
    training = policy.model.training
    policy.model.eval()
    with seeded(0, "probe"), torch.no_grad():
        truth = numbers(policy, batch)
        policy.sharing = Sharing(min(windows, default=0), 1 << 40)
        try:
            gaps = (numbers(policy, batch) - truth).abs()
            difference = float(gaps.mean() if policy.dtype == torch.bfloat16 else gaps.max())
            reason = "" if difference <= tolerance(policy, truth) else f"the shared prompt changes the results by {difference:.1e}"
        except FAILURES as error:
            reason = f"sharing the prompt fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    policy.model.train(training)
    policy.sharing = None if reason else Sharing(min(windows, default=0), int(config.hidden_size))
    if reason:
        policy.note(f"rows of a pair go through the model one by one: {reason}")


def grouped_batch(causal: Any, vocabulary: int) -> Batch:
    """Two groups of rows with fronts of 9 and 5 ids, each row trained behind the front."""
    ids = probe_batch(causal, vocabulary).ids
    first, second, rest = ids[:9], ids[9:14], ids[14:]
    cuts = ((first, 0, 7, "a"), (first, 7, 12, "a"), (second, 12, 16, "b"), (second, 16, 25, "b"), (second, 25, 28, "b"))
    joined, train, start = [], [], 0
    segments: list[Segment] = []
    for front, begin, end, group in cuts:
        tail = rest[begin:end]
        joined += [front, tail]
        train += [0.0] * len(front) + [1.0] * len(tail)
        segments.append(Segment(start, start + len(front) + len(tail), f"probe:{len(segments)}", group))
        start = segments[-1].stop
    return Batch(np.concatenate(joined), np.array(train, np.float32), tuple(segments))


def numbers(policy: Policy, batch: Batch) -> Tensor:
    """What the policy gives for each trained token: log-probabilities, or a reward model's scores."""
    outputs = policy.rate(batch) if policy.scalar else policy.score(batch)
    return outputs.logp if outputs.score is None else outputs.score


def graded(policy: Policy, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
    """Log-probabilities or scores, and the gradient of a sum of them with fixed weights in every trained weight but embeddings and head."""
    ends = {id(end.weight) for end in (policy.causal.get_input_embeddings(), policy.causal.get_output_embeddings()) if end is not None}
    weights = [p for p in policy.parameters_by_name().values() if id(p) not in ends]
    with torch.enable_grad():
        values = numbers(policy, batch)
        if not weights:
            return values.detach(), []
        mixed = (values * torch.linspace(-1, 1, len(values), device=values.device)).sum()
        return values.detach(), list(torch.autograd.grad(mixed, weights, allow_unused=True))


def distance(ours: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """|ours - theirs| / |theirs| over all tensors together."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    if any(a is None for a, _ in pairs):
        return float("inf")
    gap = sum(float((a - b).double().square().sum()) for a, b in pairs if a is not None)
    return float((gap / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300)) ** 0.5)


@contextlib.contextmanager
def noisy(policy: Policy) -> Iterator[None]:
    """While open, the adapter's second factors hold noise: at zero they would hide what the first ones do."""
    seconds = [layer.lora_B[name].weight for layer in lora_layers(policy.model) for name in layer.lora_B] if policy.adapted else []
    seconds += [layer.up.weight for layer in bottleneck.layers(policy.model)]
    before = [w.detach().clone() for w in seconds]
    try:
        with torch.no_grad():
            for w in seconds:
                w.copy_(torch.randn_like(w) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for w, old in zip(seconds, before, strict=True):
                w.copy_(old)
