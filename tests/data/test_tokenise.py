"""Rows tokenised together, one by one, and by workers: the same outcomes, errors and order."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from transformers import AutoTokenizer

from tunesmith import pocket
from tunesmith.core.errors import TemplateError, TunesmithError
from tunesmith.core.recipe import Recipe, TokenLimits
from tunesmith.core.types import Dialog, Message
from tunesmith.data.crew import Crew
from tunesmith.data.prepare import prepare
from tunesmith.data.problem import Problem
from tunesmith.data.render import render
from tunesmith.data.template import ChatTemplate, choose_template
from tunesmith.data.tokenise import Refused, Tokeniser
from tunesmith.data.tokenizer import encode, encode_many


def turns(*contents, **last):
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return {"messages": [*messages[:-1], {**messages[-1], **last}]}


ROWS = [
    turns("a", "b"),
    turns("c", "d", "e", "f"),
    turns("c", "  white  ", "e", "\nf\n"),
    turns("q", ""),
    turns("forbidden", "x"),
    turns("q", "stop <|im_end|> here"),
    turns("q", "a" * 400),
    turns("same", "same", "same", "same"),
    turns("x", "y", "z", "w", weight=0),
    turns("x", "<think>hm</think>y", "z", "漢字🙂é"),
    {"messages": [{"role": "system", "content": "kind"}, *turns("g", "h", "i", "j")["messages"]]},
    {"massages": []},
    turns("a", "b"),
    turns("q" * 300, "short"),
]
FOUND = [(f"f:{place}", row) for place, row in enumerate(ROWS)] + [("f:99", Problem("f:99", "broken_json", "no"))]


def tokeniser(tokenizer, overlong="drop", template="auto"):
    return Tokeniser("all", TokenLimits(max_length=256, overlong=overlong), choose_template(tokenizer, template), tokenizer)


def plain(outcomes):
    out = []
    for outcome in outcomes:
        if isinstance(outcome, Refused):
            out.append(outcome)
        else:
            rows = [(row.key, row.ids.tolist(), row.train.tolist()) for row in outcome.tokens]
            out.append((rows, outcome.content, outcome.before, outcome.longest, outcome.by_role, outcome.notes, outcome.fate, outcome.lost))
    return out


@pytest.mark.parametrize("template", ["auto", "llama2", "none"])
@pytest.mark.parametrize("overlong", ["drop", "cut_prompt", "split", "error"])
def test_together_is_one_by_one(tokenizer, overlong, template):
    together = tokeniser(tokenizer, overlong, template).rows("messages", FOUND)
    assert [isinstance(outcome, Refused) for outcome in together].count(True) >= 4
    # A copy of the tokenizer remembers nothing of the rows before.
    alone = [tokeniser(copy.deepcopy(tokenizer), overlong, template).rows("messages", [one])[0] for one in FOUND]
    assert plain(together) == plain(alone)
    again = tokeniser(tokenizer, overlong, template).rows("messages", FOUND[::-1])[::-1]
    assert plain(again) == plain(alone)


def test_encoding_together_and_through_the_tokenizer_are_the_same(tokenizer):
    texts = ["", "a b", "<|im_start|>user\nx<|im_end|>", "漢字🙂é", " x " * 50]
    for text, found in zip(texts, encode_many(tokenizer, texts), strict=True):
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found == encode(tokenizer, text)
        assert (found.ids, list(zip(found.starts, found.ends, strict=True))) == (out["input_ids"], out["offset_mapping"])
    left_on = copy.deepcopy(tokenizer)
    left_on.backend_tokenizer.enable_truncation(2)
    left_on.backend_tokenizer.enable_padding()
    assert encode_many(left_on, texts) == encode_many(tokenizer, texts)


def dialog(*contents):
    roles = ("user", "assistant")
    return Dialog(tuple(Message(roles[place % 2], content) for place, content in enumerate(contents)), "f:1")  # type: ignore[arg-type]


def moody(rule):
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    tail = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    text = f"{head}{rule}{tail}"
    return ChatTemplate("file:test", text, text)


@pytest.mark.parametrize(
    "rule",
    [
        "{{ m.content }}{% if m.content == 'odd' %} {{ m.content }}{% endif %}",
        "{% if m.content == 'odd' %}so: {% endif %}{{ m.content }}",
        "{{ m.content }}{% if m.content == 'odd' %}<|im_end|> or not{% endif %}",
        "{{ m.content if m.content != 'odd' else '' }}",
        "{{ m.content }}{% if messages[-1].content == 'odd' and loop.last %}{{ messages[0].content }}{% endif %}",
        "{% if m.content == 'odd' %}{{ raise_exception('odd') }}{% endif %}{{ m.content }}",
    ],
)
@pytest.mark.parametrize("asked", [("q",), ("q", "fine", "q")])
def test_a_template_that_treats_one_answer_otherwise_is_found_out_after_rows_that_were_fine(tokenizer, rule, asked):
    def outcome(known):
        try:
            (one,) = render(dialog(*asked, "odd"), moody(rule), known)
        except TunesmithError as error:
            return error.code
        return one.notes, one.text, one.tokens.ids.tolist(), one.tokens.train.tolist()

    experienced = copy.deepcopy(tokenizer)
    for _ in range(2):
        (fine,) = render(dialog(*asked, "fine"), moody(rule), experienced)
        assert fine.notes == ()
    found = outcome(experienced)
    assert found == outcome(copy.deepcopy(tokenizer))
    assert isinstance(found, str) or found[0]


@pytest.mark.parametrize("rule", ["{{ m.content.__class__.a }}", "{{ messages.append(1) }}", "{{ m.content.strip.__self__.a }}"])
def test_the_sandbox_of_templates_still_refuses_what_it_refused(tokenizer, rule):
    for _ in range(2):
        with pytest.raises(TemplateError, match="safe"):
            render(dialog("a", "b"), moody("{{ m.content.strip() }}{{ m.role }}" + rule), tokenizer)


@dataclass(frozen=True)
class Chunk:
    found: list
    format: str = "messages"


def chunks(count):
    return [Chunk([(f"{n}{key}", row) for key, row in FOUND]) for n in range(count)]


def test_workers_give_what_this_process_gives_in_the_same_order(tokenizer):
    mine, work = tokeniser(tokenizer, "split"), chunks(30)
    wanted = [plain(mine.rows(chunk.format, chunk.found)) for chunk in work]
    with Crew(mine, 2) as crew:
        crew.start()
        assert crew.wait() == 2
        got = list(crew._shared(iter(work)))
        assert all(worker._open == type(worker._open)() for worker in crew._workers)
        # A worker that dies loses nothing: its chunks are done here.
        rest = []
        for place, (chunk, outcomes) in enumerate(crew._shared(iter(work))):
            rest.append((chunk, outcomes))
            if place == 3:
                crew._workers[0]._process.kill()
    assert [chunk for chunk, _ in got] == work == [chunk for chunk, _ in rest]
    assert [plain(outcomes) for _, outcomes in got] == wanted == [plain(outcomes) for _, outcomes in rest]
    assert all(worker._process.returncode is not None for worker in crew._workers)


def test_a_tokenizer_that_cannot_travel_is_used_here(tokenizer):
    fixed = copy.deepcopy(tokenizer)
    fixed.note = lambda: None
    with Crew(tokeniser(fixed), 1) as crew:
        crew.start()
        assert crew.wait() == 0
        assert [len(outcomes) for _, outcomes in crew._shared(iter(chunks(3)))] == [len(FOUND)] * 3


SCRIPT = """
import sys
from transformers import AutoTokenizer
from tunesmith import pocket
from tunesmith.core.recipe import Recipe
from tunesmith.data import crew
from tunesmith.data.prepare import prepare
crew.PATIENCE = 0.0
recipe = Recipe(model={"base": "x"}, data={"train": sys.argv[1]}, tokens={"cache": False})
tokenizer = AutoTokenizer.from_pretrained(pocket.folder())
done = prepare(recipe, tokenizer, workers=int(sys.argv[2]), progress=lambda _: print("row", flush=True))
print(done.train.hash)
"""  # on purpose without `if __name__ == "__main__"`


def script(path, workers, **settings):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path, str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


def test_a_script_without_a_main_guard_gets_the_same_set_with_workers(write):
    path = write("a.jsonl", [turns(f"question {n}", f"answer {n} " + "word " * (n % 50)) for n in range(6_000)])
    said, _ = script(path, 2).communicate()
    settings = Recipe(model={"base": "x"}, data={"train": path}, tokens={"cache": False})
    alone = prepare(settings, AutoTokenizer.from_pretrained(pocket.folder()), workers=0)
    assert said.splitlines()[-1] == alone.train.hash


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs signals")
def test_an_interrupt_ends_it_at_once_and_leaves_no_process(write):
    path = write("a.jsonl", [turns(f"question {n}", "word " * 200) for n in range(20_000)])
    with script(path, 2, start_new_session=True) as process:
        assert process.stdout.readline() == "row\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert process.returncode != 0
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "data/worker.py" not in said
