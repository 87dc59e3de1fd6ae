"""The rows as `tunesmith show` gives them."""

from __future__ import annotations

import io
import json

from rich.console import Console

from tunesmith.core.recipe import Source
from tunesmith.data.show import painted, show_rows
from tunesmith.data.template import choose_template


def shown(path, tokenizer, **settings):
    return show_rows(Source(path=path), tokenizer, choose_template(tokenizer, "auto", {}), **settings)


def test_pieces_join_to_the_rendered_text_and_trained_ones_are_the_answer(write, tokenizer):
    path = write(
        "a.jsonl", [{"prompt": "hü", "completion": "hello"}, {"prompt": "x", "completion": ""}, {"prompt": "y", "completion": "z"}]
    )
    document = shown(path, tokenizer, n=2)
    assert json.loads(json.dumps(document)) == document
    good, bad = document["rows"]
    assert good["key"] == f"{path}:1"
    assert "".join(good["pieces"]) == "<|im_start|>user\nhü<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert len(good["ids"]) == len(good["trained"]) == len(good["pieces"])
    assert "".join(piece for piece, yes in zip(good["pieces"], good["trained"], strict=True) if yes) == "hello<|im_end|>"
    assert good["dropped"] is None
    assert (bad["ids"], "empty_answer" in bad["dropped"]) == ([], True)
    assert set(document["template"]) == {"source", "hash"}


def test_over_length_is_said(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "x", "completion": "z" * 50}])
    assert "over_length" in shown(path, tokenizer, max_length=20)["rows"][0]["dropped"]


def test_colours_tell_trained_from_context(write, tokenizer):
    path = write("a.jsonl", [{"prompt": "question", "completion": "an[red]swer\nend"}, {"prompt": "x", "completion": ""}])
    console = Console(force_terminal=True, color_system="truecolor", width=100, record=True, file=io.StringIO())
    console.print(painted(shown(path, tokenizer), frozenset(tokenizer.all_special_ids)))
    text = console.export_text(clear=False)
    assert "[red]" in text
    assert "not trained on" in text
    assert "swer⏎" in text
    html = console.export_html()
    assert "background-color: #008000" in html
