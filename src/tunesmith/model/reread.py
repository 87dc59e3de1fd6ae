"""A saved model as the outside sees it: loaded with plain transformers or PEFT, none of our fast paths, its own logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.model.load import old_names, without_bars


def load_plain(folder: Path, dtype: str, device: str) -> Any:
    """The model in `folder` (a full model or a PEFT adapter), in evaluation mode."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    with without_bars(folder), old_names():
        model = kind.from_pretrained(str(folder), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    return model.to(device).eval()


@torch.no_grad()
def plain_logprobs(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every answer id after its prompt, one row at a time, from the full logits in fp32."""
    out = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        picked = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        out.append([float(value) for value in picked.tolist()])
    return out
