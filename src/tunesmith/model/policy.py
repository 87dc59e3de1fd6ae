"""The policy: a transformers model (with a PEFT adapter or whole) that scores batches, and how it is built, saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.core.errors import BugError, ModelError, RecipeError
from tunesmith.core.files import read_json, write_json
from tunesmith.core.log import logger
from tunesmith.core.types import Batch, Outputs
from tunesmith.model import attention, fuse, gradients, memory, quant, reward
from tunesmith.model.copies import Copies
from tunesmith.model.forward import Pass, Sharing, passes
from tunesmith.model.head import HeadForm, plain_logprobs, reads, token_logprobs
from tunesmith.model.layer_ops import own_products
from tunesmith.model.layout import OWN_TAIL, TAIL, send
from tunesmith.model.load import without_bars
from tunesmith.model.lora_start import has_twin, save_joined
from tunesmith.model.positions import alone_from
from tunesmith.model.tokenizer import CONFIG
from tunesmith.model.virtual import Virtual, front_of


class Policy:
    """A causal language model that gives log-probabilities of chosen tokens.

    `model` is the transformers or PEFT model, `causal` the transformers model inside it, `dtype` the precision of products
    and of what `save` writes. `layout`, `head`, `lora` and `layers` say which way is in use; `notes` say why a plain one is.
    `sharing` says when rows of a group share their front. `scalar`: a reward model, whose head gives one number a position.
    The auxiliary balancing loss of mixtures of experts is not part of any score.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.layout: Literal["packed", "padded"] = "padded"
        self.head: Literal["fast", "plain"] = "plain"
        self.lora: Literal["fused", "plain"] = "plain"
        self.layers: Literal["fused", "plain"] = "plain"
        self.sharing: Sharing | None = None
        self.scalar = reward.is_scalar(self.causal)
        self.side: Literal["left", "right"] = "right"
        self.notes: list[str] = []
        self.resting: frozenset[int] = frozenset()  # weights that are trained at other steps (ids)
        self.head_form = HeadForm()
        self.own_attention: str = self.causal.config._attn_implementation
        self._neftune = 0.0
        self._lengths: Tensor | None = None
        self._named: tuple[tuple[str, nn.Parameter], ...] | None = None
        self.alone_from = alone_from(self.causal.config)
        self.autocast = (
            dtype != torch.float32
            and any(p.requires_grad and p.dtype == torch.float32 for p in self.causal.parameters())
            and not self.adapted
        )
        embedding = self.causal.get_input_embeddings()
        self.vocabulary: int = embedding.weight.shape[0]
        embedding.register_forward_hook(self._add_noise)
        gradients.attach(embedding)
        self.virtual = Virtual(model, self.causal, self.vocabulary) if front_of(model) else None
        self.copies = Copies()
        self.cached: str | None = None  # why its rows cannot be cached while sampling; "" where they can, None before that was tried
        self.spans = False  # whether their keys and values lie in an arena

    @property
    def adapted(self) -> bool:
        """Whether the trained weights are an adapter's."""
        return self.model is not self.causal

    @property
    def front(self) -> list[int]:
        """The ids that stand for virtual tokens in front of every row; none without them, or while they are switched off."""
        virtual = self.virtual
        return list(range(self.vocabulary, self.vocabulary + virtual.count)) if virtual is not None and virtual.at_work else []

    def score(self, batch: Batch) -> Outputs:
        """Log-probabilities of exactly the tokens whose `train` is not 0, in batch order.

        logp [K] fp32, differentiable in the trained weights; index [K] int64 positions in the batch; train [K] fp32.
        The result does not depend on the layout. Raises BugError for a trained first token or an id outside the vocabulary.
        """
        if self.scalar:
            raise reward.no_language_head()
        values, index, train, row = self._read(batch, "before", self._logprobs)
        return Outputs(values, index, train, row)

    def rate(self, batch: Batch) -> Outputs:
        """What the score head reads at exactly the positions whose `train` is not 0, in batch order: score [K] fp32, differentiable.

        The result does not depend on the layout. Raises ModelError `no_score_head` for a language model.
        """
        if not self.scalar:
            raise reward.no_score_head()
        values, index, train, row = self._read(batch, "at", lambda one, _batch: self._scores(one))
        return Outputs(values[:0], index, train, row, values)

    def _read(
        self, batch: Batch, at: Literal["before", "at"], values_of: Callable[[Pass, Batch], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One value a trained token, in batch order, with the tokens' places, weights and rows."""
        self._check(batch)
        index = np.flatnonzero(batch.train)
        train = send(batch.train[index].astype(np.float32), self.device)
        starts = np.array([segment.start for segment in batch.segments])
        row = send(np.searchsorted(starts, index, side="right") - 1, self.device)
        where = send(index, self.device)
        if not len(index):
            # Nothing to score, and yet a graph to call backward on: zero times any trained weight.
            zero = sum((p.sum() * 0 for p in list(self.parameters_by_name().values())[:1]), torch.zeros((), device=self.device))
            return torch.zeros(0, device=self.device) + zero, where, train, row
        virtual = self.virtual if self.virtual is not None and self.virtual.at_work else None
        whole = batch if virtual is None else virtual.lengthen(batch)
        parts, order = [], []
        own = self.layers == "fused" and own_products(self.dtype) is not None
        for one in passes(
            whole, self.device, self.layout, side=self.side, alone_from=self.alone_from, at=at, sharing=self.sharing,
            multiple=OWN_TAIL if own else TAIL,
        ):  # fmt: skip
            if virtual is not None:
                virtual.mark(one.layout)
            parts.append(values_of(one, whole))
            order.append(one.index)
        places = np.concatenate(order)
        values = torch.cat(parts)
        if not bool((np.diff(places) > 0).all()):
            values = values[send(np.argsort(places, kind="stable"), self.device)]
        return values, where, train, row

    def _logprobs(self, one: Pass, batch: Batch) -> Tensor:
        targets = send(batch.ids[one.index].astype(np.int64), self.device)
        states = self.run(one, whole=False)
        rows = states.reshape(-1, states.shape[-1]).index_select(0, one.rows)
        if self.head == "plain":
            return plain_logprobs(rows, targets)
        output = self.causal.get_output_embeddings()
        dtype = self.dtype if self.autocast or self.layers == "fused" else rows.dtype
        narrow = None if reads(output.weight, dtype) is not None else self.copies.of(output.weight, dtype)
        return token_logprobs(rows, output.weight, output.bias, targets, self.head_form, dtype, narrow)

    def _scores(self, one: Pass) -> Tensor:
        states = self.run(one, whole=False)
        rows = states.reshape(-1, states.shape[-1]).index_select(0, one.rows)
        head = self.causal.score
        with torch.autocast(self.device.type, enabled=False):
            scores: Tensor = head(rows.to(torch.promote_types(rows.dtype, torch.float32)))[:, 0]
        return scores

    def run(self, one: Pass, *, whole: bool = True) -> Tensor:
        """Hidden states [B, L, E] for the fast head, logits [B, L, V] for the plain one; not `whole`: those of `one.rows` are enough."""
        if not whole and one.layout is not None and self.device.type == "cpu":  # where layers read it; a GPU would have to be waited for
            one.layout.only(one.rows)
        self._lengths = one.lengths
        masks = attention.packed_masks() if one.layout is not None else contextlib.nullcontext()
        try:
            with masks, torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                if self.head == "fast" or self.scalar:
                    out: Tensor = self.decoder()(input_ids=one.ids, use_cache=False, **one.arguments).last_hidden_state
                else:
                    out = self.causal(input_ids=one.ids, use_cache=False, **one.arguments).logits
        finally:
            self._lengths = None
        return out

    def decoder(self) -> Any:
        """The part below the head; some classes answer `get_decoder` with themselves."""
        found = self.causal.get_decoder()
        return self.causal.model if found is self.causal else found

    def _check(self, batch: Batch) -> None:
        if len(batch.ids) and (int(batch.ids.min()) < 0 or int(batch.ids.max()) >= self.vocabulary):
            raise BugError(f"a token id lies outside the vocabulary of {self.vocabulary}", where=batch.segments[0].key)
        for segment in batch.segments:
            if batch.train[segment.start]:
                raise BugError("the first token of a row cannot be trained: nothing predicts it", where=segment.key)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The trained weights in a stable order; a tied weight stands once."""
        named = self.model.named_parameters() if self._named is None else self._named
        return {name: p for name, p in named if p.requires_grad or id(p) in self.resting}

    def settle(self) -> None:
        """From here on no parameter is exchanged for another: their names are looked for once and not several times a step."""
        self._named = tuple(self.model.named_parameters())

    def rest(self, parameters: Sequence[nn.Parameter]) -> None:
        """From now on these of the trained weights rest: they have no gradients and are still saved, restored and counted as trained."""
        resting = frozenset(map(id, parameters))
        if resting == self.resting:
            return
        for parameter in self.parameters_by_name().values():
            parameter.requires_grad_(id(parameter) not in resting)
        self.resting = resting
        self.copies.drop()

    def train_mode(self, on: bool) -> None:
        """Dropout, noise and checkpointing on or off."""
        self.model.train(on)

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Scores of the base while open. Raises ModelError `no_adapter` when all weights are trained."""
        if not self.adapted:
            raise ModelError("there is no adapter to switch off", remedy="load the base for its scores", code="no_adapter")
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        try:
            # A reward model's rows do not go through PEFT's forward, which it would try to exchange.
            off = self.virtual.switched_off() if self.virtual is not None and self.scalar else self.model.disable_adapter()
            fuse.forget_ready(self.model)
            with off:
                yield
        finally:
            fuse.forget_ready(self.model)
            for parameter in frozen:  # PEFT would train all of an adapter that it switches on again
                parameter.requires_grad_(False)

    def fuse_layers(self) -> int:
        """Let the decoder layers run fused where they can; returns how many do."""
        return fuse.fuse(self.model, self.dtype, self.copies)

    def steady(self) -> contextlib.AbstractContextManager[None]:
        """A promise that no weight moves while it is open; copies of weights in the dtype of the products are then kept."""
        return self.copies.holding()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        """The model with its own attention, in eval mode, for `generate`; what was set before comes back afterwards.

        Raises ModelError `no_language_head` for a reward model.
        """
        if self.scalar:
            raise reward.no_language_head()
        was_training = self.model.training
        self.use_attention(self.own_attention)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.use_attention(attention.NAME if self.layout == "packed" else self.own_attention)
            self.model.train(was_training)

    def use_attention(self, name: str) -> None:
        """Switch the model to the attention called `name`."""
        self.causal.set_attn_implementation(name)

    def set_neftune(self, alpha: float) -> None:
        """Noise on the embeddings in training: uniform in +-alpha / sqrt(L d), L the document's length, d the width.

        Jain 2023, arXiv:2310.05914, equation 1. Drawn from torch's global generator, so that a restored one repeats it.
        """
        self._neftune = alpha

    def _add_noise(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if not self._neftune or not module.training or self._lengths is None:
            return None
        size = self._neftune / (self._lengths * output.shape[-1]).sqrt()
        return output + (torch.rand_like(output) * 2 - 1) * size[..., None].to(output.dtype)

    def set_checkpointing(self, count: int | bool) -> None:
        """Let the first `count` layers (True: all) work out their activations once more in the backward pass; the rest keep them.

        A model whose layers cannot do so one by one recomputes all of them for any count but 0.
        Raises ModelError `no_checkpointing` when the model cannot, RecipeError `too_many_layers` when it has fewer layers.
        """
        layers = checkpointing_layers(self.causal)
        fused = len(fuse.fused_layers(self.model))
        most = fused or len(layers) or memory.depth(self.causal.config)
        count = most if count is True else int(count)
        if count > most:
            raise RecipeError(
                f"{count} layers are to recompute, the model has {most}",
                where="run.checkpointing",
                remedy=f"set it to auto, on, off, or at most {most}",
                code="too_many_layers",
            )
        fuse.recompute(self.model, count)
        # A fused layer goes through transformers' own forward while its adapter has dropout at work, so both get the count.
        self._switch_checkpointing(count > 0, optional=fused > 0)
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i < count

    def _switch_checkpointing(self, on: bool, *, optional: bool) -> None:
        # Renamed in transformers 5.2x; the old names warn there.
        renamed = hasattr(self.causal, "activation_checkpointing_enable")
        if not on:
            (self.causal.activation_checkpointing_disable if renamed else self.causal.gradient_checkpointing_disable)()
            return
        if not self.causal.supports_gradient_checkpointing:
            if optional:
                return
            raise ModelError(
                f"{type(self.causal).__name__} cannot recompute activations",
                where="run.checkpointing",
                remedy="set it to off",
                code="no_checkpointing",
            )
        keywords = {"use_reentrant": False}
        if renamed:
            self.causal.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords)
        else:
            self.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)

    def estimate(self, tokens: int, longest: int) -> memory.Estimate:
        """What a micro-batch of `tokens` tokens takes, in documents of at most `longest`."""
        way: memory.Way = "lora" if self.lora == "fused" or self.dtype == torch.float32 else "peft"
        if self.autocast:
            way = "autocast"
        if self.layers == "fused" and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules()):
            way = "fused"
        return memory.estimate(self.causal.config, tokens, longest, self.dtype, self.device, way=way, plain_head=self.head == "plain")

    def fits(self, tokens: int, longest: int, room: int) -> bool:
        """Whether such a micro-batch needs no recomputation in `room` bytes, which hold the weights too."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters()) + self.copies.bytes()
        return self.estimate(tokens, longest).peak(0) <= self._budget(room - weights)

    def layers_to_recompute(self, tokens: int, longest: int, *, share: int = 1) -> int:
        """The smallest number of layers that must recompute for such a micro-batch to fit into what is free now.

        `share` processes take from the same memory.
        """
        if self.layers != "fused" and not self.causal.supports_gradient_checkpointing:
            return 0
        return self.estimate(tokens, longest).count(self._budget(memory.free_bytes(self.device) // share))

    def _budget(self, room: int) -> int:
        """What activations may take of `room` bytes that gradients and optimizer share."""
        trained = sum(p.numel() for p in self.parameters_by_name().values())
        return int(memory.BUDGET * (room - memory.trained_bytes(trained, self.dtype)))

    def save(self, folder: Path) -> None:
        """Write weights and configuration: PEFT adapter files in fp32, or the whole model in `dtype`; no tokenizer.

        A model trained in bf16 is rounded from its fp32 weights here.
        """
        if self.adapted:
            if has_twin(self.model):
                save_joined(self.model, folder)
            else:
                self.model.save_pretrained(folder, save_embedding_layers=False)
            quant.remember(folder, self.causal)
            return
        with without_bars(folder):
            self.causal.save_pretrained(folder, state_dict=None if self.dtype == torch.float32 else self._rounded())
        if self.dtype == torch.float32:
            return
        # transformers writes the precision the live model has; readers that load in "auto" must find that of the files.
        written = read_json(folder / CONFIG)
        write_json(folder / CONFIG, {**written, "dtype": str(self.dtype).removeprefix("torch.")})

    def _rounded(self) -> dict[str, Tensor]:
        """The state in `dtype`; tied weights stay one tensor, or both copies would be written."""
        once: dict[int, Tensor] = {}
        return {
            name: once.setdefault(value.data_ptr(), value.to(self.dtype)) if value.is_floating_point() else value
            for name, value in self.causal.state_dict().items()
        }

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained weights in their full precision, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters_by_name().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put `state` back. Raises BugError when names, shapes or precisions differ."""
        ours = self.parameters_by_name()
        if set(ours) != set(state):
            odd = sorted(set(ours) ^ set(state))
            raise BugError(f"the saved weights are those of another model: {len(odd)} names differ, e.g. {odd[0]}")
        for name, parameter in ours.items():
            if parameter.shape != state[name].shape or parameter.dtype != state[name].dtype:
                raise BugError(
                    f"saved as {tuple(state[name].shape)} {state[name].dtype}, here {tuple(parameter.shape)} {parameter.dtype}", where=name
                )
            with torch.no_grad():
                parameter.copy_(state[name])

    def ways(self) -> dict[str, Any]:
        """Which ways are in use, and the notes on those that are not."""
        names = ("layout", "head", "lora", "layers")
        return {**{name: vars(self)[name] for name in names}, "front": "shared" if self.sharing else "own", "notes": list(self.notes)}

    def note(self, text: str) -> None:
        """Say, once and in the log, that something goes the plain way."""
        self.notes.append(text)
        logger.warning("model: %s", text)


def checkpointing_layers(model: nn.Module) -> list[Any]:
    """The layers that can recompute one by one, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
