"""TRL's own loss code, driven with stand-ins for trainer and model: the tests' independent truth."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import dpo_trainer

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


class Model(torch.nn.Module):
    """Says prepared things: one answer for each first token id."""

    is_gradient_checkpointing = False

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, input_ids, **_):
        found = self.answers[int(input_ids[0, 0])]
        blank = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=blank, mean_logits=blank, is_top1=blank.bool(), aux_loss=None)


class Torch64:
    """torch, but its float32 is float64: TRL casts some terms down, which would hide what is compared."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def in_double(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self.double())
        patch.setattr(dpo_trainer, "torch", Torch64())
        yield


def padded(said, roles, tag):
    """ids, completion mask, policy and reference log-probabilities [rows, length - 1] of the rows of these roles, in their order."""
    batch, flat = said.batch, torch.zeros(len(said.batch), dtype=torch.float64)
    flat = flat.index_put((said.outputs.index,), said.leaf)
    fixed = torch.from_numpy(batch.streams["reference"]).double() if "reference" in batch.streams else torch.zeros(len(batch))
    chosen = [segment for role in roles for segment in batch.segments if segment.role in role]
    length = max(segment.stop - segment.start for segment in chosen)

    def rows(values, fill):
        return torch.stack([
            torch.cat([values[s.start : s.stop], torch.full((length - (s.stop - s.start),), fill, dtype=values.dtype)]) for s in chosen
        ])  # fmt: skip

    ids = rows(torch.from_numpy(batch.ids).long(), 0)
    ids[:, 0] = tag
    mask = rows(torch.from_numpy((batch.train != 0).astype("int64")), 0)
    return ids, mask, rows(flat, 0.0)[:, 1:], rows(fixed, 0.0)[:, 1:]


def dpo(said, loss_type, *, beta=0.1, label_smoothing=0.0, divergence="reverse_kl", alpha=0.5, ld_alpha=None, tau=0.05):
    """The value of DPOTrainer's loss on pairs, a mean over them."""
    ids, mask, policy, reference = padded(said, [("chosen",), ("rejected",)], 0)
    model = Model({0: policy})
    trainer = SimpleNamespace(
        model=model, ref_model=Model({0: reference}), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=ld_alpha, beta=beta,
        precompute_ref_logps=False, f_divergence_type=divergence, f_alpha_divergence_coef=alpha, label_smoothing=label_smoothing,
        loss_types=[loss_type], loss_weights=[1.0], use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(discopop_tau=tau, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the type of the constants that TRL makes
    try:
        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    finally:
        torch.set_default_dtype(before)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def kto(said, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """The value of KTOTrainer's loss on labelled rows, a mean over them."""
    ids, mask, policy, reference = padded(said, [("desirable", "undesirable")], 0)
    other_ids, other_mask, other_policy, other_reference = padded(said, [("mismatched",)], 1)
    model = Model({0: policy, 1: other_policy})
    trainer = SimpleNamespace(
        model=model, ref_model=Model({0: reference, 1: other_reference}), accelerator=ACCELERATOR, aux_loss_enabled=False, beta=beta,
        precompute_ref_logps=False, calculate_KL=True, loss_type="kto", desirable_weight=desirable_weight, _tp_size=1,
        undesirable_weight=undesirable_weight, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
        "KL_input_ids": other_ids, "KL_attention_mask": torch.ones_like(other_ids), "KL_completion_mask": other_mask,
        "label": torch.tensor([s.role == "desirable" for s in said.batch.segments if s.role != "mismatched"]),
    }  # fmt: skip
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def from_logits(said, cls, **settings):
    """The whole loss of CPOTrainer or ORPOTrainer, through logits that give exactly the log-probabilities of `said`."""
    ids, mask, policy, _ = padded(said, [("chosen",), ("rejected",)], 1)
    ids[:, 1:] = 1  # of two words, the second is the one that was said: its logit is log(p / (1 - p))
    said_logit = policy.where(mask[:, 1:] == 1, torch.tensor(-1.0, dtype=torch.float64))
    said_logit = said_logit - torch.log(-torch.expm1(said_logit))
    logits = torch.stack([torch.zeros_like(said_logit), said_logit], dim=-1)
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
    lengths = torch.tensor([s.stop - s.start for role in ("chosen", "rejected") for s in said.batch.segments if s.role == role])
    present = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = torch.where(mask == 1, ids, -100)
    n = len(ids) // 2
    batch = {}
    for name, values in (("input_ids", ids), ("attention_mask", present), ("labels", labels)):
        batch |= {f"chosen_{name}": values[:n], f"rejected_{name}": values[n:]}
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, aux_loss_enabled=False, is_encoder_decoder=False, pad_token_id=0, padding_value=0,
        concatenated_inputs=cls.concatenated_inputs, get_batch_logps=cls.get_batch_logps, **settings,
    )  # fmt: skip
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, name):
            setattr(trainer, name, partial(getattr(cls, name), trainer))
    loss, metrics = cls.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)
    return loss, metrics


def cpo(said, loss_type="sigmoid", *, beta=0.1, label_smoothing=0.0, cpo_alpha=1.0, simpo_gamma=0.5):
    settings = {"beta": beta, "label_smoothing": label_smoothing, "cpo_alpha": cpo_alpha, "simpo_gamma": simpo_gamma}
    return from_logits(said, CPOTrainer, loss_type=loss_type, alpha=0.0, **settings)


def orpo(said, *, beta=0.1):
    return from_logits(said, ORPOTrainer, beta=beta)


def reward(said, *, centre=None):
    """The value of RewardTrainer's loss on scored pairs, a mean over them."""
    places = {role: [i for i, s in enumerate(said.batch.segments) if s.role == role] for role in ("chosen", "rejected")}
    logits = said.leaf[places["chosen"] + places["rejected"]][:, None]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, args=SimpleNamespace(center_rewards_coefficient=centre),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": None, "attention_mask": torch.ones(1)}
    if "margin" in said.batch.streams:
        inputs["margin"] = torch.tensor([said.batch.streams["margin"][said.batch.segments[i].stop - 1] for i in places["chosen"]])
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}
