"""Where a model lives, and its tokenizer; no torch here, so that `show` and `check` start quickly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # of an adapter


def resolve(base: str) -> str:
    """The folder or hub id that `base` stands for: 'pocket', a run folder (its final/), a model folder, or a hub id.

    Raises ModelError `no_model` when a path does not exist or holds no model.
    """
    if base == "pocket":
        from tunesmith import pocket

        return str(pocket.folder())
    path = Path(base).expanduser()
    if path.is_dir():
        for folder in (path, path / "final"):
            if (folder / CONFIG).is_file() or (folder / ADAPTER).is_file():
                return str(folder)
        raise ModelError(
            f"the folder holds neither {CONFIG} nor {ADAPTER}, and no finished run",
            where=base,
            remedy="name a model folder, or a run folder with a final/ inside",
            code="no_model",
        )
    if path.is_file() or base.startswith((".", "/", "~")) or base.count("/") > 1 or not base.strip():
        raise no_model(base)
    return base


def no_model(base: str, reason: str = "there is no such folder") -> ModelError:
    """The error for a model that cannot be found, with the nearest folder that exists."""
    path = Path(base).expanduser()
    if path.is_dir():
        return ModelError(
            f"the model cannot be loaded: {reason}",
            where=base,
            remedy="name a folder that plain transformers can load: config.json, weights and tokenizer",
            code="bad_model",
        )
    if path.is_file():
        reason = "this is a file, not a folder"
    beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return ModelError(
        f"no model '{base}': {reason}{did_you_mean(base, [*beside, 'pocket'])}",
        where="model.base",
        remedy="give a folder, a run folder, a hub id such as Qwen/Qwen3-0.6B, or 'pocket'",
        code="no_model",
    )


def demand_reachable(place: str) -> None:
    """Raises ModelError `no_model` at once when `place` is a hub id that is neither cached nor reachable.

    Without this a misspelt folder would be looked for on the hub, with retries, for the better part of a minute.
    """
    if Path(place).is_dir():
        return
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if any(isinstance(try_to_load_from_cache(place, name), str) for name in (CONFIG, ADAPTER)):
            return
        if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
            return  # transformers answers at once; behind a proxy this machine may resolve no names itself
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except HFValidationError as error:
        raise no_model(place, "this is neither a folder nor a hub id") from error
    except OSError as error:
        raise no_model(place, "there is no such folder, it is not in the cache, and the hub cannot be reached") from error


def adapter_base(folder: str) -> str | None:
    """The base that an adapter folder names, or None when the folder holds a whole model."""
    path = Path(folder) / ADAPTER
    if not path.is_file():
        return None
    base = _adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ModelError("the adapter does not name its base", where=str(path), remedy="write base_model_name_or_path", code="bad_adapter")
    return base


def _adapter_config(folder: str) -> dict[str, Any]:
    from tunesmith.core.files import read_json

    try:
        tree = read_json(Path(folder) / ADAPTER)
        if not isinstance(tree, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        said = f"{ADAPTER} cannot be read: {error}"
        raise ModelError(said, where=folder, remedy="save or fetch the adapter again", code="bad_adapter") from error
    return tree


def demand_adapter_files(folder: str) -> None:
    """Raises ModelError `bad_adapter` for a folder that lacks an adapter's configuration or its weights, or whose configuration is broken.

    PEFT would look for them on the hub.
    """
    if not (Path(folder) / ADAPTER).is_file():
        raise ModelError("this is no adapter folder", where=folder, remedy=f"name a folder with {ADAPTER}", code="bad_adapter")
    _adapter_config(folder)
    if not any((Path(folder) / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"the adapter has no weights: there is neither {' nor '.join(WEIGHTS)}",
            where=folder,
            remedy="save or fetch the adapter again",
            code="bad_adapter",
        )


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model, with its own chat template.

    An adapter folder without a tokenizer takes its base's. Raises ModelError `no_model` when there is none, and
    `slow_tokenizer` when it is not a fast one (character offsets are needed to find the trained words).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = resolve(base)
    below = adapter_base(place)
    if below is not None and not (Path(place) / "tokenizer_config.json").is_file():
        return load_tokenizer(below, revision)
    demand_reachable(place)
    if Path(place).is_dir() and not any((Path(place) / name).is_file() for name in TOKENIZERS):
        # transformers would build an empty tokenizer from config.json alone, and every text would become no token at all.
        raise ModelError(
            "the folder holds no tokenizer",
            where=place,
            remedy=f"save the tokenizer beside the model ({', '.join(TOKENIZERS)})",
            code="no_tokenizer",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise no_model(base, f"its tokenizer cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer of '{base}' is a slow one ({type(tokenizer).__name__})",
            where=place,
            remedy="save a tokenizer.json with the model (tokenizers library)",
            code="slow_tokenizer",
        )
    return tokenizer


def demand_same_tokens(base: str, revision: str | None, other: str, *, where: str) -> None:
    """Raises ModelError `tokenizer_differs` unless the ids of `base`'s tokenizer mean the same to the model `other`.

    Compared are the vocabulary and which of its tokens are special; which special token ends or pads a text is not, because rows are made
    by the tokenizer of `base` alone. Where `other` has no tokenizer, its vocabulary must be as large as that of `base`.
    """
    try:
        theirs = load_tokenizer(other)
    except ModelError as error:
        if error.code != "no_tokenizer":
            raise
        sizes = _vocabulary_size(base, revision), _vocabulary_size(other, None)
        if sizes[0] != sizes[1]:
            raise _other_tokens(
                f"it has no tokenizer, and a vocabulary of {sizes[1]} where the base has {sizes[0]}", other, where
            ) from error
        return
    ours = load_tokenizer(base, revision)
    mine, others = ours.get_vocab(), theirs.get_vocab()
    if mine != others:
        odd = [token for token in sorted(mine.keys() | others.keys()) if mine.get(token) != others.get(token)]
        token = odd[0]
        ids = f"{mine.get(token, 'none')} in the base, {others.get(token, 'none')} in '{other}'"
        raise _other_tokens(f"{len(odd)} tokens differ between the vocabularies, e.g. {token!r}: id {ids}", other, where)
    special = [{number for number, token in one.added_tokens_decoder.items() if token.special} for one in (ours, theirs)]
    if special[0] != special[1]:
        odd_one = min(special[0] ^ special[1])
        raise _other_tokens(f"{ours.convert_ids_to_tokens(odd_one)!r} is a special token in one of them alone", other, where)


def _vocabulary_size(base: str, revision: str | None) -> int:
    from transformers import AutoConfig

    place = resolve(base)
    below = adapter_base(place)
    if below is not None:
        return _vocabulary_size(below, None)
    try:
        return int(AutoConfig.from_pretrained(place, revision=revision).get_text_config().vocab_size)
    except (OSError, ValueError, KeyError) as error:
        raise no_model(base, " ".join(str(error).split())[:300]) from error


def _other_tokens(what: str, other: str, where: str) -> ModelError:
    return ModelError(
        f"'{other}' does not read the ids of the base's tokenizer: {what}",
        where=where,
        remedy="name a model with the tokenizer of model.base (its tokenizer files beside it), or leave the setting out",
        code="tokenizer_differs",
    )
