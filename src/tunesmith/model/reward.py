"""Reward models: a head that gives one number a position, on any base, and the card that says where and how it is read."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tunesmith.core.errors import ModelError
from tunesmith.core.files import read_json, write_json
from tunesmith.core.log import logger
from tunesmith.core.seed import seed_of
from tunesmith.model.tokenizer import ADAPTER, demand_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Head = Literal["language", "score"]
Position = Literal["last", "steps"]
NAME = "reward.json"
SCALAR = "ForSequenceClassification"
RULES: dict[Position, str] = {
    "last": "the last token of the conversation as the chat template renders it, without a generation prompt",
    "steps": "the token that holds the last character of each step",
}


@dataclass(frozen=True)
class RewardCard:
    """What a reward model must be read with: `template` is the hash of the chat template that it learned from.

    `pad` is the id that may fill up rows for transformers' own pooling (None: there is none, score row by row); `mean` the mean score of
    the rows it was held against, where it was measured.
    """

    position: Position
    template: str
    template_source: str
    pad: int | None = None
    mean: float | None = None


def write_card(folder: Path, card: RewardCard) -> None:
    """Write reward.json into a model folder, the rule of the position in words beside it."""
    write_json(folder / NAME, {**asdict(card), "rule": RULES[card.position]})


def read_card(folder: str | Path) -> RewardCard | None:
    """The card of a model folder, or None for a reward model that is not ours."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    tree = read_json(path)
    return RewardCard(**{name: value for name, value in tree.items() if name != "rule"})


def demand_template(card: RewardCard, source: str, found: str, where: str, *, named: bool) -> None:
    """Raises ModelError "template_differs" when rows of the template of hash `found` are for a model that learned from another one.

    A template that was `named` is a wish: then a line of the log says so.
    """
    if (differs := template_differs(card, source, found, where)) is None:
        return
    if not named:
        raise differs
    logger.warning("%s", differs.message)


def template_differs(card: RewardCard, source: str, found: str, where: str) -> ModelError | None:
    """The error when rows rendered with the template of hash `found` would be read by a model that learned from another."""
    if card.template == found:
        return None
    return ModelError(
        f"the rows would be rendered with template {source} ({found[:12]}), the reward model learned from "
        f"{card.template_source} ({card.template[:12]})",
        where=where,
        remedy="use the model's own template (leave --template out, keep its tokenizer as it was saved), or name one with --template",
        code="template_differs",
    )


def head_of(place: str, revision: str | None = None) -> Head:
    """Which head a model folder, adapter folder or hub id holds; "language" also where it cannot be read, which loading will say.

    Raises ModelError `no_model` for a hub id that is out of reach, `not_a_reward_model` for a classifier of several classes.
    """
    demand_reachable(place)
    adapter = Path(place) / ADAPTER
    if adapter.is_file():
        return "score" if read_json(adapter).get("task_type") == "SEQ_CLS" else "language"
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, revision=revision)
    except (OSError, ValueError, KeyError):
        return "language"
    if not any(name.endswith(SCALAR) for name in config.architectures or ()):
        return "language"
    if config.num_labels != 1:
        raise ModelError(
            f"this is a classifier of {config.num_labels} classes; a reward model gives one number",
            where=place,
            remedy="name a reward model (num_labels 1) or a language model",
            code="not_a_reward_model",
        )
    return "score"


def demand_head(place: str, head: Head, revision: str | None = None) -> None:
    """Raises ModelError `no_language_head` when a language model is asked for and the files hold a reward model."""
    if head == "language" and head_of(place, revision) == "score":
        raise no_language_head(place)


def no_language_head(where: str = "") -> ModelError:
    """The error for a reward model that is asked for words."""
    return ModelError(
        "this is a reward model: it scores answers and gives no log-probabilities and no text",
        where=where,
        remedy="name a language model; 'tunesmith score' is for reward models",
        code="no_language_head",
    )


def no_score_head(where: str = "") -> ModelError:
    """The error for a language model that is asked for scores."""
    return ModelError(
        "this is a language model: it has no head that scores answers",
        where=where,
        remedy="name a reward model, or train one with objective: reward",
        code="no_score_head",
    )


def is_scalar(model: Any) -> bool:
    """Whether a transformers model gives one number a position."""
    return type(model).__name__.endswith(SCALAR)


def reward_class(config: Any) -> Any:
    """The class of reward models for an architecture: transformers' own, or one made of its mixin where it has none.

    Raises ModelError `no_reward_class` when neither is possible.
    """
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    own = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if own is not None:
        return own
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    parent = next((kind for kind in getattr(causal, "__mro__", ()) if kind.__name__.endswith("PreTrainedModel")), None)
    if causal is None or parent is None:
        raise _no_class(type(config).__name__)
    name = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + SCALAR
    return type(
        name, (GenericForSequenceClassification, parent), {"__module__": causal.__module__, "base_model_prefix": parent.base_model_prefix}
    )


def with_head(model: Any, seed: int) -> Any:
    """The reward model made of a language model's base and a fresh head `score` [E -> 1] in fp32; the output layer is let go.

    The head is drawn from N(0, 1 / (E + 1)) (Stiennon 2020, arXiv:2009.01325, appendix), from a stream of its own.
    Raises ModelError `no_reward_class` when the architecture cannot have such a head.
    """
    config = model.config
    kind = reward_class(config)
    config.num_labels, config.problem_type = 1, "regression"
    prefix = kind.base_model_prefix
    with torch.device("meta"):
        whole = kind(config)
    score = getattr(whole, "score", None)
    if not isinstance(score, nn.Linear) or type(getattr(whole, prefix, None)) is not type(model.base_model):
        raise _no_class(type(model).__name__)
    setattr(whole, prefix, model.base_model)
    whole.score = _drawn(score.in_features, seed)
    if any(tensor.is_meta for tensor in [*whole.parameters(), *whole.buffers()]):
        raise _no_class(type(model).__name__)
    return settled(whole.eval())


def settled(model: Any) -> Any:
    """The reward model with its head in fp32, nothing to generate with, and no row of its embedding untrained for being named a pad."""
    model.score.float()
    model.generation_config = None
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
    return model


def _drawn(width: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, 1, bias=False, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed_of(seed, "model", "score"))
    with torch.no_grad():
        head.weight.normal_(0.0, 1 / math.sqrt(width + 1), generator=generator)
    return head


def choose_pad(config: Any, tokenizer: PreTrainedTokenizerFast, ends: Collection[int]) -> int | None:
    """Give the configuration and the tokenizer a pad token that no conversation ends with, and return its id; None: there is none.

    Plain transformers reads the score at the last token that is not the pad token, so a pad token that closes conversations as well
    (often the end-of-text token) would move it. Our own reading goes by lengths. `ends` are the ids that may come last.
    """
    control = sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    ordered = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *control]
    never = {*ends, tokenizer.eos_token_id}
    pad = next((one for one in ordered if one is not None and one not in never), None)
    config.get_text_config().pad_token_id = config.pad_token_id = pad
    if pad is not None and tokenizer.pad_token_id != pad:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(pad))
    return pad


def _no_class(name: str) -> ModelError:
    return ModelError(
        f"{name} cannot carry a head that gives one number a position",
        where="model.base",
        remedy="choose a base whose architecture transformers knows as ...ForSequenceClassification",
        code="no_reward_class",
    )
