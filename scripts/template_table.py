"""What `render` trains under every chat template of a folder, as a table.

Each template is tried on small chats: plain answers, answers with outer white space, answers with a thinking part. It is rendered with
the first of the given tokenizers that knows its end mark; where none does, the marks that stand in the template are added to the
first tokenizer as special tokens, as the model's own tokenizer has them. Templates with {% generation %} are compared with the mask
that transformers makes.

    python scripts/template_table.py FOLDER --tokenizers DIR... [--markdown FILE]
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import DataError, TemplateError
from tunesmith.core.files import write_text
from tunesmith.core.types import Dialog, Message
from tunesmith.data.render import Rendered, render, stop_ids
from tunesmith.data.stops import find_stops
from tunesmith.data.template import ChatTemplate, as_rows

MARKS = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜]+｜>|</?s>|\[/?[A-Z_]{3,}\]|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<\|[a-z_]+>|<[a-z_]+\|>|\[[a-z]+\]|<sep>|<seed:[a-z]+>|\[\|[a-z]+\|\]"
)

ANSWERS = {
    "plain": ("The first answer.", "The second one: 2 + 2 = 4."),
    "white space": ("\n  The first answer. \n", "  The second one:\n2 + 2 = 4.\n\n"),
    "thinking": ("The first answer.", "The second one: 2 + 2 = 4."),
}
THOUGHTS = ("I should greet.", "Two and two\nis four.")


@dataclass(frozen=True)
class Line:
    """One template: its results by kind of answer, notes, and the comparison with the generation mask."""

    name: str
    tokenizer: str
    stop: str
    results: dict[str, str]
    notes: tuple[str, ...]
    mask: str


def chat(kind: str, turns: int) -> Dialog:
    """A chat of `turns` questions and answers."""
    messages: list[Message] = []
    for turn in range(turns):
        thinking = THOUGHTS[turn] if kind == "thinking" else None
        messages += [Message("user", f"Question number {turn + 1}?"), Message("assistant", ANSWERS[kind][turn], thinking)]
    return Dialog(tuple(messages), f"{kind}:{turns}")


def trained_turns(rendered: list[Rendered]) -> list[str]:
    """The trained text of each turn, in the order of the conversation (a turn is a run of trained tokens)."""
    found: list[tuple[int, str]] = []
    for one in rendered:
        on = np.concatenate([[0], one.tokens.train != 0, [0]]).astype(int)
        edges = np.flatnonzero(np.diff(on))
        found += [(begin, "".join(one.pieces[begin:end])) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    return [text for _, text in sorted(found)]


def judge(kind: str, turn: int, text: str, ends: list[str]) -> str:
    """In which way the trained text of one turn is what was asked for."""
    end = next((e for e in ends if e and text.endswith(e)), None)
    if end is None:
        return "no stop token"
    body, content = text[: -len(end)], ANSWERS[kind][turn]
    if kind == "thinking":
        thought = THOUGHTS[turn]
        if thought in body and content in body[body.index(thought) + len(thought) :]:
            return "thinking and answer"
        return "answer, thinking dropped" if content in body and "uestion" not in body else "WRONG"
    if body == content:
        return "equal"
    if body.strip() == content.strip():
        return "stripped" if content.strip() != content and len(body) < len(content) else "equal, with white space of the template"
    before, found, after = body.partition(content.strip())
    if not found or re.search(r"\w{12}", MARKS.sub("", before + after)) or "uestion" in before + after:
        return "WRONG"
    return "equal, " + " and ".join(
        [f"after inserted {before.strip()!r}"] * bool(before.strip()) + [f"before {after.strip()!r}"] * bool(after.strip())
    )


def try_template(text: str, name: str, tokenizer: Any, spelling: str) -> Line:
    """One line of the table."""
    template = ChatTemplate(f"file:{name}", text, name, {})
    results: dict[str, str] = {}
    notes: list[str] = []
    stop = find_stops(template, tokenizer)
    ends = [*tokenizer.convert_ids_to_tokens(list(stop_ids(template, tokenizer))), stop.mark]
    for kind in ANSWERS:
        try:
            rendered = render(chat(kind, 2), template, tokenizer)
        except (TemplateError, DataError) as error:
            results[kind] = f"refused: {error.code}"
            if error.code == "template_failed":
                results[kind] = f"does not render: {error.message.split(': ', 1)[-1][:70]}"
            continue
        notes += [note for one in rendered for note in one.notes]
        turns = trained_turns(rendered)
        verdicts = dict.fromkeys(judge(kind, k, turn, ends) for k, turn in enumerate(turns))
        results[kind] = " / ".join(verdicts) if len(turns) == 2 else f"WRONG: {len(turns)} turns trained"
    mark = stop.token or stop.mark or f"{tokenizer.eos_token} (added)"
    mask = compare_mask(template, tokenizer) if re.search(r"{%-?\s*generation", text) else ""
    return Line(name, spelling, mark, results, tuple(dict.fromkeys(notes)), mask)


def compare_mask(template: ChatTemplate, tokenizer: Any) -> str:
    """Our trained tokens against the mask of transformers, on every chat whose rendering is one text."""
    said = []
    for kind in ANSWERS:
        for turns in (1, 2):
            dialog = chat(kind, turns)
            try:
                rendered = render(dialog, template, tokenizer)
                out = tokenizer.apply_chat_template(
                    as_rows(template, dialog.messages), chat_template=template.text, return_dict=True, return_assistant_tokens_mask=True
                )
            except TemplateError as error:
                said.append(f"refused: {error.code}")
                continue
            ids, mask = out["input_ids"], out["assistant_masks"]
            ours = rendered[0]
            common = min(len(ids), len(ours.tokens))
            if len(rendered) > 1 or ours.tokens.ids.tolist()[:common] != ids[:common]:
                said.append("own view for earlier turns" if len(rendered) > 1 else "answer tokenised apart from its prompt")
                continue
            mask = [*mask, *[0] * (len(ours.tokens) - len(mask))]
            more: set[str] = set()
            less: set[str] = set()
            for k, (a, b) in enumerate(zip(ours.tokens.train, mask, strict=False)):
                if bool(a) != bool(b):
                    (more if a else less).add(ours.pieces[k] or "(part of a character)")
            if not more and not less:
                said.append("same")
            else:
                said.append(f"ours also {sorted(more)}" * bool(more) + f" theirs also {sorted(less)}" * bool(less))
    return "; ".join(f"{what} x{n}" for what, n in Counter(said).items())


def with_marks(tokenizer: Any, text: str) -> Any:
    """A copy of the tokenizer that has the template's marks as special tokens."""
    marks = [mark for mark in dict.fromkeys(MARKS.findall(text)) if mark not in tokenizer.get_vocab()]
    grown = copy.deepcopy(tokenizer)
    grown.add_special_tokens({"additional_special_tokens": marks})
    return grown


def pick(text: str, tokenizers: dict[str, Any]) -> tuple[str, Any]:
    """The first tokenizer that knows the end mark of the template, or the first one with the template's marks added."""
    template = ChatTemplate("file", text, text, {})
    for name, tokenizer in tokenizers.items():
        stops = find_stops(template, tokenizer)
        if stops.token and not stops.append and stops.token in text:
            return name, tokenizer
    name, tokenizer = list(tokenizers.items())[-1]
    return f"{name} + marks", with_marks(tokenizer, text)


def table(lines: list[Line]) -> str:
    """The lines as a Markdown table, and the totals."""
    out = ["| template | tokenizer | end of turn | plain | white space | thinking | notes | {% generation %} |", "|---" * 8 + "|"]
    for line in lines:
        cells = [line.name, line.tokenizer, f"`{line.stop}`", *(line.results[k] for k in ANSWERS), ", ".join(line.notes), line.mask]
        out.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells) + " |")
    out += ["", "Totals:", ""]
    for kind in ANSWERS:
        counts = Counter(re.sub(r"inserted .*", "an inserted part", re.sub(r"render: .*", "render", line.results[kind])) for line in lines)
        out.append(f"- {kind}: " + "; ".join(f"{what} {n}" for what, n in counts.most_common()))
    masks = [line for line in lines if line.mask]
    same = sum(line.mask.replace("own view for earlier turns", "").strip("; x123456789").split(" x")[0] == "same" for line in masks)
    out.append(f"- templates with {{% generation %}}: {len(masks)}, the same tokens wherever both render one text: {same}")
    return "\n".join(out) + "\n"


def main() -> int:
    """Print the table; exit status 1 when a trained text is wrong."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True)
    parser.add_argument("--markdown", type=Path, help="write the table there as well")
    options = parser.parse_args()
    tokenizers = {path.name: AutoTokenizer.from_pretrained(path) for path in options.tokenizers}
    lines = []
    for path in sorted(options.folder.rglob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        lines.append(try_template(text, path.relative_to(options.folder).as_posix(), *reversed(pick(text, tokenizers))))
    out = table(lines)
    sys.stdout.write(out)
    if options.markdown:
        write_text(options.markdown, f"# What is trained under real chat templates\n\n{(__doc__ or '').strip()}\n\n{out}")
    return int(any("WRONG" in r or "no stop" in r for line in lines for r in line.results.values()))


if __name__ == "__main__":
    sys.exit(main())
