"""Answers to prompts as people write them: messages through the chat template, or raw text."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.core.card import read_card
from tunesmith.core.errors import DataError, RecipeError, TemplateError, did_you_mean
from tunesmith.core.log import logger
from tunesmith.core.ports import SampleSettings
from tunesmith.core.recipe import Source
from tunesmith.core.types import Completion, Message, Prompt, Row
from tunesmith.data import render
from tunesmith.data.formats import turns
from tunesmith.data.formats.messages import read_turns
from tunesmith.data.problem import Problem
from tunesmith.data.readers import half_character
from tunesmith.data.sources import read
from tunesmith.data.template import ChatTemplate, apply
from tunesmith.infer.engine import MAX_ROWS, Engine
from tunesmith.infer.request import Piece
from tunesmith.infer.sampler import TransformersSampler
from tunesmith.model.next_token import unfit
from tunesmith.model.policy import Policy
from tunesmith.model.reward import no_language_head
from tunesmith.model.tokenizer import resolve


@dataclass(frozen=True)
class How:
    """What an engine is made with: rows at a time, products in 8 bits, kept fronts, and LoRA adapters (folder by name).

    `plain`: its plain twin instead, one batch after another, which can do without all of these.
    """

    max_rows: int = MAX_ROWS
    int8: bool = False
    keep_fronts: int = 0
    folders: Mapping[str, str] = field(default_factory=dict)
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a prompts file: what it asks, the adapter that it goes through (None: the base), and its place (file:line)."""

    ask: Ask
    adapter: str | None
    place: str


PLAIN = How()
Ask = str | Prompt | Sequence[Message]


def generate(
    policy: Policy,
    tokenizer: Any,
    template: ChatTemplate,
    prompts: Sequence[Ask],
    settings: SampleSettings,
    *,
    raw: bool = False,
    adapters: Sequence[str | None] = (),
    how: How = PLAIN,
) -> list[dict[str, Any]]:
    """For every prompt the JSON row of `tunesmith generate`: {"prompt", "completions": [{"text", "ids", "logprobs", "stop_reason"}]}.

    A prompt is one user turn (str), a list of messages, or a Prompt (which may offer tools). raw hands the text to the tokenizer as
    it is, without the template, and stops at the end-of-text token only. Logprobs are the model's own, at temperature 1. `adapters`: for
    every prompt the name of one of those that `how` loads. Each completion has "top_logprobs"
    too where they are asked for: [[id, log-probability], ...] at every place.
    Raises DataError for messages in raw mode, and what rendering and sampling raise.
    """
    return list(generate_each(policy, tokenizer, template, prompts, settings, raw=raw, adapters=adapters, how=how))


def generate_each(
    policy: Policy,
    tokenizer: Any,
    template: ChatTemplate,
    prompts: Sequence[Ask],
    settings: SampleSettings,
    *,
    raw: bool = False,
    adapters: Sequence[str | None] = (),
    places: Sequence[str] = (),
    how: How = PLAIN,
) -> Generator[dict[str, Any], None, None]:
    """What `generate` gives, each row as soon as it and those before it are done. `places`: what errors call the prompts."""
    if isinstance(prompts, str):
        raise DataError("the prompts are one text, and not a list", where="prompts", remedy="write [prompt]", code="not_a_list")
    places = places or [_place(prompt, number) for number, prompt in enumerate(prompts)]
    ids = [_row_ids(prompt, place, tokenizer, template, raw) for prompt, place in zip(prompts, places, strict=True)]
    sampler = _sampler(policy, tokenizer, template, raw, how)
    if isinstance(sampler, Engine):
        each = [replace(settings, adapter=name) for name in adapters] if adapters else [settings] * len(ids)
        for own, place in zip(each, places, strict=True):
            _demand_adapter(sampler, own.adapter, place)
        rows = sampler.answers(ids, each, places)
    else:
        # The plain twin goes one way for all rows, and refuses an adapter.
        named = next((name for name in adapters if name is not None), None) if adapters else settings.adapter
        rows = sampler.answers(ids, replace(settings, adapter=named), places)
    try:
        for prompt, row in zip(prompts, rows, strict=True):
            said = prompt if isinstance(prompt, str) else [message.as_dict() for message in as_prompt(prompt).messages]
            yield {"prompt": said, "completions": [_as_json(one) for one in row]}
    finally:
        rows.close()


def stream_text(
    policy: Policy,
    tokenizer: Any,
    template: ChatTemplate,
    prompt: Ask,
    settings: SampleSettings,
    *,
    raw: bool = False,
    place: str = "prompt",
    how: How = PLAIN,
) -> Generator[str, None, None]:
    """The text of one answer to one prompt, in pieces as they come. Raises as `generate`."""
    ids = _row_ids(prompt, place, tokenizer, template, raw)
    pieces = streamed(_sampler(policy, tokenizer, template, raw, how), ids, settings)
    try:
        yield from (piece.text for piece in pieces)
    finally:
        pieces.close()


def _sampler(policy: Policy, tokenizer: Any, template: ChatTemplate, raw: bool, how: How) -> Engine | TransformersSampler:
    return raw_sampler(policy, tokenizer, how) if raw else chat_sampler(policy, tokenizer, template, how)


def streamed(sampler: Engine | TransformersSampler, ids: Sequence[int], settings: SampleSettings) -> Generator[Piece, None, None]:
    """The pieces of one answer as they come; from the plain twin all of it as one piece. Leaving the loop early ends the answer."""
    if isinstance(sampler, Engine):
        yield from sampler.stream(ids, settings)
        return
    [[done]] = sampler.sample([ids], settings)
    yield Piece(0, done.text, done.ids, done.logprobs, done)


def _place(prompt: Ask, number: int) -> str:
    return prompt.key if isinstance(prompt, Prompt) and prompt.key else f"prompt {number}"


def _demand_adapter(engine: Engine, name: str | None, place: str) -> None:
    """Raises RecipeError `unknown_adapter` with the prompt's place, and how adapters are named."""
    if name is None or name in engine.adapters.names:
        return
    raise RecipeError(
        f"there is no adapter '{name}'{did_you_mean(name, engine.adapters.names)}",
        where=place,
        remedy=f"name its folder with --lora {name}=FOLDER; loaded are: {', '.join(engine.adapters.names) or 'none'}",
        code="unknown_adapter",
    )


def _row_ids(prompt: Ask, place: str, tokenizer: Any, template: ChatTemplate, raw: bool) -> list[int]:
    """The ids of one prompt; what its template refuses, or its text, is said with its place."""
    try:
        return raw_ids(prompt, tokenizer) if raw else prompt_ids(prompt, tokenizer, template)
    except (TemplateError, DataError) as error:
        raise type(error)(error.message, where=place, remedy=error.remedy, code=error.code) from error


def _as_json(one: Completion) -> dict[str, Any]:
    out = {"text": one.text, "ids": list(one.ids), "logprobs": list(one.logprobs), "stop_reason": one.stop_reason}
    return {**out, "top_logprobs": [[list(pair) for pair in place] for place in one.top_logprobs]} if one.top_logprobs else out


def chat_sampler(policy: Policy, tokenizer: Any, template: ChatTemplate, how: How = PLAIN) -> Engine | TransformersSampler:
    """A sampler that answers chats: it stops where the template ends a turn.

    Adapters that were trained with another template are told in the log: all rows are prompted with this one.
    """
    for name, folder in how.folders.items():
        card = read_card(resolve(folder))
        if card is not None and card.template_hash != template.hash:
            own = card.template.removeprefix("named:")
            said = "the adapter '%s' was trained with the template %s, and rows are prompted with %s: give --template %s, or open it alone"
            logger.warning(said, name, own, template.source.removeprefix("named:"), own)
    return sampler_for(policy, tokenizer, render.stop_ids(template, tokenizer), lead_of(template, tokenizer), how)


def raw_sampler(policy: Policy, tokenizer: Any, how: How = PLAIN) -> Engine | TransformersSampler:
    """A sampler that continues text: it stops at the end-of-text tokens that the tokenizer and the model's configuration name."""
    named = policy.causal.generation_config.eos_token_id if policy.causal.generation_config is not None else None
    listed = named if isinstance(named, list) else [named]
    stops = [int(token) for token in dict.fromkeys([tokenizer.eos_token_id, *listed]) if token is not None]
    return sampler_for(policy, tokenizer, stops, how=how)


def sampler_for(
    policy: Policy,
    tokenizer: Any,
    stop_ids: Sequence[int],
    lead: str = "",
    how: How = PLAIN,
) -> Engine | TransformersSampler:
    """The engine with its adapters, or its plain twin for a model that the engine cannot run (a line of the log says so).

    Raises ModelError `no_language_head` for a reward model; RecipeError `no_engine` where the twin cannot do what is asked for.
    """
    if policy.scalar:
        raise no_language_head()
    reason = "it was asked for" if how.plain else unfit(policy)
    if policy.alone_from is not None:
        reason = f"beyond {policy.alone_from} tokens its positions depend on the length of the whole text"
    if how.plain and (how.int8 or how.folders):
        raise RecipeError(
            "the plain sampler has neither int8 nor adapters by name", where="plain", remedy="leave plain out", code="no_engine"
        )
    if reason and not (how.int8 or how.folders):
        logger.info("sampling goes the plain way: %s", reason)
        return TransformersSampler(policy.model, tokenizer, stop_ids=stop_ids, lead=lead, attention=policy.own_attention)
    engine = Engine(policy, tokenizer, stop_ids=stop_ids, lead=lead, max_rows=how.max_rows, int8=how.int8, keep_fronts=how.keep_fronts)
    for name, folder in how.folders.items():
        engine.adapters.load(name, folder)
    return engine


def lead_of(template: ChatTemplate, tokenizer: Any) -> str:
    """The white space that the template writes between its prompt and an answer, such as the space after `Assistant:`.

    The model has to produce it, since the prompt ends before it, and yet it is no part of what is said.
    """
    if template.text is None:
        return ""
    asked, answer = Message("user", "qz1questionzq"), Message("assistant", "qz1answerzq")
    try:
        before = apply(template, tokenizer, [asked], generation_prompt=True)
        whole = apply(template, tokenizer, [asked, answer])
    except TemplateError:
        return ""
    lead = whole[len(before) :].partition(answer.content)[0] if whole.startswith(before) else ""
    return lead if lead.isspace() else ""


def read_prompts(path: str | Path, adapter: str | None = None) -> list[Line]:
    """The rows of a file: {"prompt": str} or {"messages": [...]}, with `tools` where there are any, and `adapter` (null: the base).

    Raises DataError naming file and line for a row that is neither, or that cannot be read; `wrong_key` for an adapter that is no name.
    """
    out: list[Line] = []
    for key, row in read(Source(path=str(path))):
        if isinstance(row, Problem):
            raise DataError(row.message, where=row.key, remedy=row.remedy, code=row.code)
        turns.no_near_miss(row, ("prompt", "messages", "tools", "adapter"), key, "prompts")
        if "prompt" in row and "messages" in row:
            turns.fail(key, "messages", "two_prompts", "the row has a prompt and messages", "keep one of them")
        name = row.get("adapter", adapter)
        if name is not None and not isinstance(name, str):
            raise DataError(
                f"adapter is {str(name)[:40]}, not a name",
                where=key,
                remedy='write {"adapter": "name"}, or null for the base',
                code="wrong_key",
            )
        out.append(Line(_ask(row, key), name, key))
    return out


def _ask(row: Row, key: str) -> Ask:
    tools = turns.tools_of(row.get("tools"), key)
    if isinstance(row.get("prompt"), str) and not tools:
        return str(row["prompt"])
    given = row.get("messages", row.get("prompt"))
    if given == []:
        turns.fail(key, "messages", "no_prompt", "there are no turns in it", 'write [{"role": "user", "content": "..."}]')
    if isinstance(given, str):
        return Prompt((Message("user", given),), "", key, tools)
    if isinstance(given, list):
        return Prompt(tuple(read_turns(given, key, "messages" if "messages" in row else "prompt")), "", key, tools)
    name = next((name for name in ("messages", "prompt") if name in row), None)
    raise DataError(
        f"there is no prompt in the row; it has: {', '.join(map(str, row)) or 'nothing'}"
        if name is None
        else f"{name}: expected text or messages, got {str(given)[:80]!r}",
        where=key,
        remedy='write {"prompt": "..."} or {"messages": [...]} on every line',
        code="no_prompt",
    )


def as_prompt(prompt: Ask) -> Prompt:
    """A plain string is one user turn."""
    if isinstance(prompt, Prompt):
        return prompt
    return Prompt((Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt), "", "")


def prompt_ids(prompt: Ask, tokenizer: Any, template: ChatTemplate) -> list[int]:
    """The ids that ask for an answer, through the template. Raises DataError `half_character`, and what rendering raises."""
    whole = as_prompt(prompt)
    for message in whole.messages:
        _demand_whole(message.content)
    return [int(token) for token in render.render_prompt(whole.messages, whole.tools, template, tokenizer)]


def raw_ids(prompt: Ask, tokenizer: Any) -> list[int]:
    """The tokenizer's own ids of a text, with the BOS it puts in front (never a second one) and without an EOS behind."""
    if not isinstance(prompt, str):
        raise DataError(
            "raw mode takes text, not messages", where="prompt", remedy='give {"prompt": ...}, or leave --raw out', code="raw_messages"
        )
    _demand_whole(prompt)
    ids = [int(token) for token in tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"]]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    closed = len(ids) > 1 and ids[-1] == eos and not prompt.endswith(str(tokenizer.eos_token))
    return ids[:-1] if closed else ids


def _demand_whole(text: str) -> None:
    """Raises DataError `half_character`: a terminal's bytes that are not UTF-8 come as halves."""
    if (wrong := half_character(text)) is not None:
        raise DataError(wrong, where="prompt", remedy="write the whole character, in UTF-8", code="half_character")
