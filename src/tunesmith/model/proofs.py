"""What the proof at load has shown, kept for the next load of the very same model on the same machine.

The proof (probe.py) takes some twenty passes, seconds for a large model on a CPU, and finds the same each time. Its outcome is kept under
the hash of everything that it can depend on; anything else than a whole, matching note means that it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import cache_folder, read_json, write_json
from tunesmith.core.log import logger
from tunesmith.core.recipe import Fast
from tunesmith.model import attention, lora, native, native_library
from tunesmith.model.head import HeadForm
from tunesmith.model.policy import Policy

SAMPLES = 1_024  # numbers of a tensor that tell it from another
WAYS = {"layout": ("packed", "padded"), "head": ("fast", "plain"), "lora": ("fused", "plain"), "layers": ("fused", "plain")}


def recall(policy: Policy, place: Path) -> bool:
    """Set the ways that were proven for this policy before; whether there was a note of them."""
    if not place.is_file():
        return False
    try:
        found = read_json(place)
        chosen = {name: found[name] for name, ways in WAYS.items() if found[name] in ways}
        form, notes = HeadForm(float(found["scale"]), None if found["cap"] is None else float(found["cap"])), list(map(str, found["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if len(chosen) < len(WAYS):
        return False
    attention.register()
    policy.use_attention(attention.NAME if chosen["layout"] == "packed" else policy.own_attention)
    for name, way in chosen.items():
        setattr(policy, name, way)
    policy.head_form = form
    if chosen["lora"] == "fused":
        lora.fuse(policy.model)
    if chosen["layers"] == "fused":
        policy.fuse_layers()
    for text in notes:
        policy.note(text)
    logger.info("the model's fast ways were proven before on this machine (%s)", place)
    return True


def remember(policy: Policy, place: Path) -> None:
    """Keep what was just proven; where nothing can be written it is proven again next time."""
    form = policy.head_form
    ways = {name: getattr(policy, name) for name in WAYS}
    try:
        write_json(place, {**ways, "scale": form.scale, "cap": form.cap, "notes": policy.notes})
    except (OSError, TunesmithError) as error:
        logger.info("what was proven about the model is not kept: %s", " ".join(str(error).split())[:200])


def place_of(policy: Policy, fast: Fast) -> Path | None:
    """The note's file, named by the hash of all that the proof can depend on; None where nothing is kept (TUNESMITH_PROOFS=0).

    A model whose code is not transformers' own has no note, and neither have virtual tokens: theirs is a check that raises.
    """
    own = type(policy.causal).__module__.startswith(("transformers.", "tunesmith."))
    tensors = [*policy.model.named_parameters(), *policy.model.named_buffers()]
    if os.environ.get("TUNESMITH_PROOFS") == "0" or not own or policy.virtual is not None or any(t.is_meta for _, t in tensors):
        return None
    device = policy.device
    adapters = {name: config.to_dict() for name, config in getattr(policy.model, "peft_config", {}).items()}
    known: dict[str, Any] = {
        "code": _code(), "versions": _versions(), "fast": fast.model_dump(), "dtype": policy.dtype, "scalar": policy.scalar,
        "autocast": policy.autocast, "class": type(policy.causal).__name__, "config": policy.causal.config.to_dict(), "adapters": adapters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else native_library.processor().decode(errors="replace"),
        "threads": torch.get_num_threads(), "native": device.type == "cpu" and native.kernels(policy.dtype) is not None,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=_plain).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        # The proof puts numbers of its own into a LoRA's factors, which differ from run to run.
        if ".lora_" not in name and tensor.numel():
            flat = tensor.detach().reshape(-1)
            digest.update(flat[:: max(1, len(flat) // SAMPLES)].double().cpu().numpy().tobytes())
    try:
        return cache_folder() / "proofs" / f"{digest.hexdigest()[:32]}.json"
    except RuntimeError:  # nobody knows a home folder
        return None


def _plain(value: Any) -> Any:
    """What JSON does not know, in words that are the same in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


@cache
def _code() -> str:
    """The hash of the code that computes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
