"""Which chat template is used, and applying it.

The tokenizer's own template is the truth. For bare models there are named templates (Jinja files beside this module) that
write the well-known formats; a path to any Jinja file is taken too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from tunesmith.core.errors import TemplateError, did_you_mean
from tunesmith.core.types import Message, content_hash
from tunesmith.data.tokenizer import Tokenizer, vocabulary

# name -> the end mark that its file sets in a line of its own; None: the file ends turns with the tokenizer's own eos_token
NAMED: Mapping[str, str | None] = {
    "chatml": "<|im_end|>",
    "llama2": None,
    "llama3": "<|eot_id|>",
    "mistral": None,
    "zephyr": None,
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "vicuna": None,
    "alpaca": None,
    "alpaca_short": None,
    "simple": None,
}

_VERDICTS = 10_000  # remembered of one template

# What a template may do wrong is anything that Python can: it concatenates None, indexes a missing message, divides.
_JINJA_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with everything its result depends on apart from the tokenizer.

    `source` is "tokenizer", "named:NAME", "file:NAME" or "none"; `text` the Jinja source (None for "none"); `hash` SHA-256 of
    text and options; `notes` stable codes of what was changed or is worth a warning: "end_mark_is_eos:MARK",
    "marks_are_text", "several_templates", "depends_on_date".
    """

    source: str
    text: str | None
    hash: str
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose_template(tokenizer: Tokenizer, name: str, options: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The chat template called `name`: auto, none, a named template, or the path of a Jinja file.

    Raises TemplateError: "no_template" (auto, and the tokenizer has none), "unknown_template", "no_stop" (no end mark and no EOS).
    """
    options = dict(options or {})
    if name == "none":
        return _made("none", None, options, [])
    if name == "auto":
        text, notes = _own(tokenizer)
        return _made("tokenizer", text, options, notes)
    if name in NAMED:
        text, notes = _named(tokenizer, name)
        return _made(f"named:{name}", text, options, notes)
    path = Path(name).expanduser()
    if not path.is_file():
        looks_like_path = path.suffix in (".jinja", ".j2", ".txt") or "/" in name
        raise TemplateError(
            f"there is no template file '{name}'" if looks_like_path else f"unknown template '{name}'{did_you_mean(name, _names())}",
            where="model.template",
            remedy=f"use one of {', '.join(_names())}, or the path of a Jinja file",
            code="unknown_template",
        )
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the template is not valid Jinja: {error.message}",
            where=f"{path}:{error.lineno}",
            remedy="mend the template",
            code="template_syntax",
        ) from error
    except UnicodeDecodeError as error:
        raise TemplateError(
            "the template file is not UTF-8 text", where=str(path), remedy="save it as UTF-8", code="unknown_template"
        ) from error
    except _JINJA_ERRORS:
        pass  # It may well want a chat of another shape: that is for the rows to show.
    return _made(f"file:{path.name}", text, options, [])


def _names() -> list[str]:
    return ["auto", "none", *NAMED]


def _made(source: str, text: str | None, options: dict[str, Any], notes: list[str]) -> ChatTemplate:
    # `strftime_now` writes today's date into the prompt: the same rows give other ids tomorrow.
    if text is not None and "strftime_now" in text and not {"date_string", "strftime_now"} & options.keys():
        notes = [*notes, "depends_on_date"]
    return ChatTemplate(source, text, content_hash({"text": text, "options": options}), options, tuple(notes))


def _own(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" in own:
            return str(own["default"]), ["several_templates"]
        own = None
    if not own:
        raise TemplateError(
            "the tokenizer has no chat template",
            where="model.template",
            remedy=f"name one ({', '.join(NAMED)}), give a Jinja file, or use 'none' for plain prompt and completion",
            code="no_template",
        )
    return str(own), []


@cache
def _source(name: str) -> str:
    return (resources.files("tunesmith.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _named(tokenizer: Tokenizer, name: str) -> tuple[str, list[str]]:
    text, mark, known = _source(name), NAMED[name], vocabulary(tokenizer)
    notes = []
    if mark is not None and mark not in known.added:
        if known.eos is None:
            _no_stop(name, mark)
        text = text.replace(f"'{mark}'", "eos_token")
        notes.append(f"end_mark_is_eos:{mark}")
    elif mark is None and known.eos is None:
        _no_stop(name, "eos_token")
    if not known.leading:
        # A model whose tokenizer puts no BOS before plain text has never seen one at the start (gpt2, SmolLM2).
        text = text.replace("bos_token", "''")
    starts = re.findall(r"<\|?[a-z_]+\|?>", text)
    if any(word not in known.added for word in starts):
        notes.append("marks_are_text")
    return text, notes


def _no_stop(name: str, mark: str) -> NoReturn:
    raise TemplateError(
        f"template '{name}' ends turns with {mark}, which is no token of this tokenizer, and it has no EOS token either",
        where="model.template",
        remedy="give the tokenizer an eos_token, or choose a template whose marks it knows",
        code="no_stop",
    )


def apply(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    """The text that the template makes of `messages`.

    Raises TemplateError "template_failed" with the template's own words when it refuses or fails.
    """
    return apply_rows(template, tokenizer, as_rows(template, messages), tools, generation_prompt=generation_prompt)


def as_rows(template: ChatTemplate, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as dicts, with the thinking part where this template looks for it.

    A template reads `reasoning_content`, or `thinking`, or takes a <think> part out of the content; one that knows none of them
    is given `reasoning_content`, which it drops (and `render` says so).
    """
    rows = [message.as_dict() for message in messages]
    way = _thinking_way(template.text or "")
    if way != "reasoning_content":
        for row in rows:
            thinking = row.pop("reasoning_content", None)
            if thinking is not None and way == "thinking":
                row["thinking"] = thinking
            elif thinking:
                row["content"] = f"<think>\n{thinking}\n</think>\n\n{row['content']}"
    return rows


@cache
def _thinking_way(text: str) -> str:
    if "reasoning_content" in text:
        return "reasoning_content"
    if re.search(r"\w\.thinking\b|\[['\"]thinking['\"]\]", text):
        return "thinking"
    return "content" if "</think>" in text else "reasoning_content"


def apply_rows(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    """`apply` for messages that are already dicts."""
    if template.text is None:
        raise TemplateError("there is no chat template to apply", where="model.template", remedy="name a template", code="no_template")
    try:
        _remember_verdicts(template.text)
        text = tokenizer.apply_chat_template(
            rows,
            tools=[dict(tool) for tool in tools] or None,
            chat_template=template.text,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **template.options,
        )
    except _JINJA_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        roles = " ".join(str(row["role"]) for row in rows[:12])
        raise TemplateError(
            f"the chat template refused or failed: {said} (roles: {roles})",
            where=template.source,
            remedy="change the row as the template asks (e.g. alternate user and assistant, no system turn), or choose another template",
            code="template_failed",
        ) from error
    return str(text)


@cache
def _remember_verdicts(text: str) -> None:
    """Let the sandbox that this template runs in ask once, and not at every access, whether a kind of value may be asked for a name.

    The question takes half of the time of a rendering, and its answer depends on the type and the name alone.
    """
    from transformers.utils import chat_template_utils

    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled is None:
        return  # another version of transformers: slower, and the same
    sandbox = compiled(text).environment
    ask = sandbox.is_safe_attribute
    known: dict[tuple[type[object], str], bool] = {}

    def is_safe_attribute(value: object, name: str, found: object) -> bool:
        verdict = known.get((type(value), name))
        if verdict is None:
            if len(known) > _VERDICTS:
                known.clear()  # names may come from rows
            verdict = known[type(value), name] = bool(ask(value, name, found))
        return verdict

    sandbox.is_safe_attribute = is_safe_attribute
