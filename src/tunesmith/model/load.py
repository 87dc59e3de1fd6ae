"""From a recipe's model section to a checked transformers model: device, precision, and weights that are all there and finite."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as bars

from tunesmith.core import recipe
from tunesmith.core.errors import ModelError, RecipeError, did_you_mean
from tunesmith.core.log import logger
from tunesmith.core.seed import seed_of
from tunesmith.model import bottleneck, quant, reward
from tunesmith.model.allocator import release_freed_memory
from tunesmith.model.tokenizer import adapter_base, demand_reachable, load_tokenizer, no_model, resolve

__all__ = ["check_vocabulary", "choose_device", "choose_dtype", "load_base", "load_tokenizer", "resolve", "seeded"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SCALES = ("scale", "scale_inv", "scales", "qzeros", "qweight", "absmax", "quant_map")


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """PEFT still asks transformers by names that the latter has renamed; nobody who trains can act on that warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


@contextlib.contextmanager
def without_bars(place: str | Path) -> Iterator[None]:
    """No progress bars of transformers while a local folder is read or written; a download keeps its bar."""
    shown = bars.is_progress_bar_enabled() and Path(place).is_dir()
    if not shown:
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:1` stands for. Raises ModelError `no_device` when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(
            f"unknown device '{name}'", where="run.device", remedy="use auto, cpu, cuda or cuda:1", code="no_device"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(
            f"the device '{name}' is not supported", where="run.device", remedy="use auto, cpu, cuda or cuda:1", code="no_device"
        )
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"there is no device '{name}' here", where="run.device", remedy="use auto or cpu", code="no_device")
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 faster than in fp32: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """fp32 or bf16; `auto` is bf16 on a GPU that computes in it, else fp32, also on a CPU (whose users compare numbers first).

    Raises RecipeError `bad_setting` for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and multiplies_bf16(device) else torch.float32
    if name not in DTYPES:
        raise RecipeError(
            f"unknown precision '{name}'{did_you_mean(name, DTYPES)}",
            where="model.dtype",
            remedy="use auto, fp32 or bf16",
            code="bad_setting",
        )
    return DTYPES[name]


def seeded(seed: int, *names: str) -> Any:
    """A context whose torch random numbers come from the named stream, and which leaves the outer random state as it was."""
    return _Seeded(seed_of(seed, *names))


class _Seeded:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        self._fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *what: Any) -> None:
        self._fork.__exit__(*what)


def load_base(settings: recipe.Model, device: torch.device | str, *, training: bool, seed: int = 0, head: reward.Head = "language") -> Any:
    """The transformers model a recipe names, in eval mode on `device`, with every weight present and finite.

    Trained weights are held in fp32 (a base trained whole in bf16 runs under autocast); a frozen base is held in `dtype`, a score
    head in fp32. An adapter folder as base gives its base with the adapter merged in. With `head` "score" a language model gets a fresh
    head drawn from `seed` in place of its output layer, and a reward model keeps its own.
    Raises ModelError: `no_model`, `bad_weights` (unreadable or of another shape), `missing_weights`, `unexpected_weights`,
    `nan_weights` (naming the tensor), `no_language_head` (a reward model asked for words), `no_reward_class`.
    """
    device = choose_device(device) if isinstance(device, str) else device
    dtype = choose_dtype(settings.dtype, device)
    if training and settings.adapter is None:
        dtype = torch.float32
    place = resolve(settings.base)
    demand_reachable(place)
    if settings.init == "random":
        model = _random(place, settings.revision, dtype, seed)
    else:
        reward.demand_head(place, head, settings.revision)
        below = adapter_base(place)
        demand_reachable(below or place)
        held = quant.loading(settings, dtype, device)
        model = _weights(below or place, settings.revision if below is None else None, dtype, held)
        if below is not None:
            if reward.head_of(place) == "score" and not reward.is_scalar(model):
                model = reward.with_head(model, seed)  # the adapter brings a head of its own
            model = _merge(model, place)
        check_finite(model)
    if head == "score":
        model = reward.settled(model) if reward.is_scalar(model) else reward.with_head(model, seed)
    model.config.use_cache = True
    if settings.quant is None:
        return model.to(device).eval()
    return _quantised(model, dtype).eval()


def _quantised(model: Any, dtype: torch.dtype) -> Any:
    """A model whose quantised layers multiply our way; says how many bytes a parameter takes."""
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            # As a view into the mapped file it would keep all pages of the original weights in memory.
            parameter.data = parameter.data.clone()
    release_freed_memory()
    layers = quant.settle(model, dtype)
    own, whole = quant.bytes_per_parameter(model)
    held = quant.held_as(model)["quant"]
    logger.info("the base is held in %s: %.3f bytes a parameter in %d layers, %.3f with what is not quantised", held, own, layers, whole)
    return model


def _random(place: str, revision: str | None, dtype: torch.dtype, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(place, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise no_model(place, _short(error)) from error
    with seeded(seed, "model", "init"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _weights(place: str, revision: str | None, dtype: torch.dtype, held: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        kind: Any = AutoModelForCausalLM
        if reward.head_of(place, revision) == "score":
            kind = reward.reward_class(AutoConfig.from_pretrained(place, revision=revision))
        with without_bars(place):
            model, info = kind.from_pretrained(place, revision=revision, dtype=dtype, output_loading_info=True, **held)
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the weights cannot be loaded: {_short(error)}", where=place, remedy="fetch or save the model again", code="bad_weights"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise no_model(place, _short(error)) from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or info["mismatched_keys"]:
        names = missing or sorted(str(m[0]) for m in info["mismatched_keys"])
        raise ModelError(
            f"{len(names)} weights are not in the files, e.g. {', '.join(names[:3])}; they would have been drawn at random"
            + (f" (in the files but unknown: {', '.join(unexpected[:3])})" if unexpected else ""),
            where=place,
            remedy="check that config.json belongs to these weights, or set model.init: random to draw all of them",
            code="missing_weights",
        )
    if any(name.endswith(_SCALES) for name in unexpected):
        raise ModelError(
            f"the files hold quantised weights that this model does not read, e.g. {', '.join(unexpected[:3])}",
            where=place,
            remedy="use the unquantised model",
            code="unexpected_weights",
        )
    if unexpected:
        logger.warning("%s: %d weights of the files are not used, e.g. %s", place, len(unexpected), ", ".join(unexpected[:3]))
    return model


def _merge(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    logger.info("%s: the adapter is merged into its base before training all weights", adapter)
    if found := quant.remembered(adapter):
        logger.warning("%s was trained on a base in %s and is merged into the unquantised one: not the same model", adapter, found["quant"])
    if bottleneck.is_bottleneck(adapter):
        raise ModelError(
            "bottleneck adapters cannot be merged into their base",
            where=adapter,
            remedy="go on training the adapter (adapter: {name: bottleneck}), or train another base",
            code="cannot_merge",
        )
    with old_names():
        return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def check_finite(model: nn.Module) -> None:
    """Raises ModelError `nan_weights` with the name of the first tensor that holds NaN or infinity."""
    for name, tensor in model.named_parameters():
        if not _finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"the base holds NaN or infinity: {bad} of {tensor.numel()} values",
                where=name,
                remedy="use an intact model",
                code="nan_weights",
            )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()  # passes NaN on and needs no copy
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_vocabulary(model: Any, tokenizer: Any, where: str = "model.base") -> None:
    """Raises ModelError `vocabulary` when the tokenizer has ids that the embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer's highest id is {highest}, the embedding has {rows} rows",
            where=where,
            remedy="use the tokenizer that belongs to this model",
            code="vocabulary",
        )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
