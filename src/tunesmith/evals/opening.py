"""A model by name, ready to be asked: weights, tokenizer, and the template that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from tunesmith.core.card import Card, read_card
from tunesmith.core.errors import ModelError
from tunesmith.data.template import ChatTemplate, choose_template
from tunesmith.model.build import load_policy
from tunesmith.model.policy import Policy
from tunesmith.model.tokenizer import load_tokenizer, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Opened:
    """A loaded model; `card` is None when it is not a result of ours."""

    policy: Policy
    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    folder: str
    card: Card | None


def open_model(name: str, *, adapter: str | None = None, template: str = "auto", dtype: str = "auto", device: str = "auto") -> Opened:
    """Load a hub id, folder, run folder or 'pocket', with an adapter folder on top if one is named.

    With template "auto" a result of ours is prompted with the template and the options that it was trained with.
    Raises ModelError when there is no such model, TemplateError when it has no chat template and none is named.
    """
    try:
        folder = resolve(adapter if adapter is not None else name)
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        if adapter is None or error.code != "no_model":
            raise
        raise ModelError(error.message, where="--adapter", remedy=error.remedy, code=error.code) from error
    card = read_card(folder)
    trained_plain = card is not None and card.template == "none"
    wanted = "none" if template == "auto" and trained_plain else template
    chosen = choose_template(tokenizer, wanted, card.template_options if card is not None and wanted == "auto" else None)
    precision = card.dtype if dtype == "auto" and card is not None else dtype
    policy = load_policy(name, adapter=adapter, dtype=cast(Literal["auto", "fp32", "bf16"], precision), device=device)
    return Opened(policy, tokenizer, chosen, folder, card)
