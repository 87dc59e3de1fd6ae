"""Decoder layers through torch.compile: one compiled code that all layers of a kind share, for any number of tokens.

Attention stays outside of it (it reads the layout of the batch, which is another one every time), so a layer is two pieces of
compiled code around it. An opt-in, as products in float8 and in 8 bits are: this module tries each and proves it, after what the probe
has settled. Where compiled layers or float8 fail their proof the plain way is taken; 8 bits are refused.
"""

from __future__ import annotations

import functools
import inspect
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.core.errors import ModelError
from tunesmith.core.log import logger
from tunesmith.core.types import Batch, Segment
from tunesmith.model import attention, float8, fuse, lora
from tunesmith.model.forward import passes
from tunesmith.model.load import seeded
from tunesmith.model.policy import Policy, checkpointing_layers
from tunesmith.model.probe import FAILURES, distance, graded, noisy, numbers, probe_batch, tolerance


def compile_layers(model: nn.Module) -> int:
    """Give every decoder layer a compiled forward; returns how many. Nothing is compiled before the first call."""
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))  # type: ignore[no-untyped-call]
    layers = checkpointing_layers(model)
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def uncompile(model: nn.Module) -> None:
    """Give the layers their own forward back."""
    attention.register()
    for layer in checkpointing_layers(model):
        layer.__dict__.pop("forward", None)


@functools.cache
def _compiled(kind: Any) -> Callable[..., Any]:
    """The compiled forward of a class of layers, without transformers' wrapper that recomputes."""
    return torch.compile(inspect.unwrap(kind.forward), dynamic=True)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("tunesmith_layout") is None:  # sampling: other shapes, a cache, and no need
        return type(self).forward(self, hidden_states, *args, **kwargs)
    kind: Any = type(self)
    run = functools.partial(_compiled(kind), self, **kwargs)
    if self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(run, hidden_states, *args)
    return run(hidden_states, *args)


def settle_compiled(policy: Policy) -> None:
    """Compile the layers by scoring a batch with and without; keep the compiled ones when scores and gradients agree."""
    if policy.layout != "packed":
        policy.note("layers are not compiled: the layout is padded")
        return
    rounding = (1.0, 0.1 if policy.dtype == torch.bfloat16 else 1e-3)
    started = time.perf_counter()
    reason, difference = _try(policy, lambda: compile_layers(policy.model), rounding)
    if reason:
        uncompile(policy.model)
        policy.note(f"layers are not compiled: {reason}")
        return
    logger.info("compiled in %.0f s: scores differ by %.1e", time.perf_counter() - started, difference)


def settle_float8(policy: Policy) -> None:
    """Quantise the frozen base and note how far the scores move; back to bf16 when they move further than e4m3 explains."""
    reason, difference = _try(policy, lambda: float8.convert(policy.model), (10.0, 0.3))
    if reason:
        float8.revert(policy.model)
        if policy.lora == "fused":
            lora.fuse(policy.model)
        policy.note(f"products in bf16, not float8: {reason}")
        return
    policy.note(f"float8 products of the frozen base: scores differ by {difference:.1e} on the mean")


def settle_int8(policy: Policy) -> None:
    """Let the fused layers multiply in 8 bits and note how far the scores move.

    Raises ModelError `no_int8` where no layer can, or where scores move further than such rounding explains.
    """
    reason = "layers have to run as one function: models of the Llama family, LoRA of an even rank and without dropout, sides in sixteens"
    if policy.layers == "fused" and fuse.can_round(policy.model):
        reason, difference = _try(policy, lambda: fuse.round_products(policy.model, True), (10.0, 0.3))
        if not reason and difference == 0:
            reason = "scores do not move, so that no layer goes through them"
    if reason:
        fuse.round_products(policy.model, False)
        raise ModelError(
            f"products of training in 8 bits cannot be used: {reason}",
            where="model.fast.int8",
            remedy="set model.fast.int8: false, or use a plain LoRA of an even rank",
            code="no_int8",
        )
    policy.note(f"products with the frozen base in 8 bits: scores differ by {difference:.1e} on the mean")


def _try(policy: Policy, change: Callable[[], int], limits: tuple[float, float]) -> tuple[str, float]:
    """Why the changed layers may not be used (empty when they may), and how far their scores are from those before.

    `limits`: for the scores in units of the probe's tolerance, and for the gradient as a part of its length.
    """
    batch, training = _batch(policy), policy.model.training
    policy.model.eval()
    try:
        with seeded(0, "probe", "opt-in"), noisy(policy):
            plain, gradient = graded(policy, batch)
            if not change():
                return "no layer of a kind that can be", 0.0
            ours, turned = graded(policy, batch)
            # What validation and training take beside: code for each is compiled now and not in the first step.
            with torch.no_grad():
                numbers(policy, batch)
            policy.model.train()
            graded(policy, batch)
    except (*FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", 0.0
    finally:
        policy.model.train(training)
    gap = (ours - plain).abs()
    difference = float(gap.mean() if policy.dtype == torch.bfloat16 else gap.max())
    far = distance(turned, gradient)
    if not difference <= limits[0] * tolerance(policy, plain) or not far <= limits[1]:
        return f"scores differ by {difference:.1e}, gradients by {far:.1e} of their length", difference
    return "", difference


def _batch(policy: Policy) -> Batch:
    """The probe's documents so often that their number of tokens is no size of the model.

    The compiler takes equal sizes for the same one, and would compile again for the first batch of another size.
    """
    one = probe_batch(policy.causal, policy.vocabulary)
    sizes = {size for p in policy.model.parameters() for size in p.shape}
    sizes |= {size // parts for size in sizes for parts in (2, policy.causal.config.get_text_config().num_attention_heads)}
    for copies in range(2, 40):
        starts = np.arange(copies) * len(one.ids)
        segments = tuple(Segment(int(at) + s.start, int(at) + s.stop, s.key) for at in starts for s in one.segments)
        batch = Batch(np.tile(one.ids, copies), np.tile(one.train, copies), segments)
        if passes(batch, policy.device, policy.layout)[0].ids.shape[1] not in sizes:
            return batch
    return one
