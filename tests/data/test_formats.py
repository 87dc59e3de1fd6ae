"""Every shape of row, what becomes of it, and every reason to refuse one."""

from __future__ import annotations

import json

import pytest

from tunesmith.core.errors import DataError, RecipeError
from tunesmith.core.recipe import Source
from tunesmith.core.types import Dialog, Message, Text, ToolCall
from tunesmith.data.detect import LOOK, check_columns, detect, hold, shapes
from tunesmith.data.formats import COLUMNS, FORMATS, LOOKS_LIKE

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": WEATHER}


def example(name, row):
    return FORMATS[name].function(row, "f:1")


def code_of(name, row):
    with pytest.raises(DataError) as caught:
        example(name, row)
    assert caught.value.where == "f:1"
    assert caught.value.remedy
    return caught.value.code


def chat(*turns, **more):
    return {"messages": list(turns), **more}


def test_tables_name_the_same_formats():
    assert list(FORMATS) == list(COLUMNS) == list(LOOKS_LIKE)


def test_messages_with_weights():
    row = chat(
        {**USER, "loss_weight": 0.0},
        {**ANSWER, "weight": 0},
        USER,
        {**ANSWER, "loss_weight": 1.0},
        USER,
        {**ANSWER, "train": False},
        USER,
        ANSWER,
    )
    dialog = example("messages", row)
    assert [m.weight for m in dialog.messages if m.role == "assistant"] == [0.0, 1.0, 0.0, 1.0]
    assert dialog.key == "f:1"


def test_messages_with_tools_and_calls_in_every_writing():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    result = {"role": "tool", "content": {"sky": "blue"}, "tool_call_id": "c1", "name": "weather"}
    dialog = example(
        "messages", chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, ANSWER, tools=json.dumps([WEATHER]))
    )
    assert dialog.tools == (WRAPPED,)
    assert dialog.messages[1] == Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Rome"}, "c1"),))
    assert dialog.messages[2] == Message("tool", '{"sky": "blue"}', name="weather", tool_call_id="c1")
    plain = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    old = {"name": "weather", "arguments": '{"city": "Rome"}'}
    for turn in ({"tool_calls": [plain]}, {"function_call": old}, {"tool_calls": json.dumps([old])}):
        found = example(
            "messages", chat(USER, {"role": "assistant", "content": None, **turn}, {"role": "function", "content": "x"}, ANSWER)
        )
        assert found.messages[1].tool_calls == (ToolCall("weather", {"city": "Rome"}),)
        assert found.messages[2].role == "tool"
    assert example("messages", chat(USER, ANSWER, functions=[WEATHER])).tools == (WRAPPED,)
    assert example("messages", chat(USER, ANSWER, tools=[WRAPPED])).tools == (WRAPPED,)
    assert example("messages", chat(USER, ANSWER, tools="")).tools == example("messages", chat(USER, ANSWER, tools=[])).tools == ()


def test_messages_with_parts_and_thinking():
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "text": "he"}, "l", {"type": "text", "value": "lo"}]
    called = [{"type": "tool_call", "value": '{"name": "weather", "arguments": {}}'}]
    dialog = example("messages", chat(USER, {"role": "assistant", "content": parts}, USER, {"role": "assistant", "content": called}))
    assert dialog.messages[1] == Message("assistant", "hello", thinking="hm")
    assert dialog.messages[3].tool_calls == (ToolCall("weather", {}),)
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert example("messages", chat(USER, {**ANSWER, name: "hm"})).messages[1].thinking == "hm"


def test_messages_under_another_name_as_json_text_and_with_two_user_turns():
    row = {"conversations": json.dumps([{"role": "developer", "content": "d"}, USER, USER, ANSWER])}
    assert [m.role for m in example("messages", row).messages] == ["developer", "user", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"mesages": [USER, ANSWER]}, "wrong_key"),
        (chat(), "no_messages"),
        (chat({"role": "system", "content": "s"}), "only_system"),
        (chat(USER), "no_assistant"),
        (chat(ANSWER, USER, ANSWER), "assistant_first"),
        (chat({"role": "system", "content": "s"}, ANSWER), "assistant_first"),
        (chat(USER, ANSWER, USER), "last_not_assistant"),
        (chat(USER, {"role": "assistant", "content": " \n"}), "empty_answer"),
        (chat(USER, {"role": "assistant", "content": None}), "empty_answer"),
        (chat(USER, {"role": "assistant"}), "empty_answer"),
        (chat(USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}), "empty_answer"),
        (chat({"role": "user", "content": ""}, ANSWER), "empty_prompt"),
        (chat({"role": "user", "content": None}, ANSWER), "no_content"),
        (chat(USER, {"role": "asistant", "content": "x"}), "unknown_role"),
        (chat(USER, {"role": None, "content": "x"}), "unknown_role"),
        (chat(USER, {"content": "x"}), "wrong_key"),
        (chat(USER, {**ANSWER, "wieght": 0}), "wrong_key"),
        (chat(USER, {**ANSWER, "weight": "no"}), "bad_weight"),
        (chat(USER, {**ANSWER, "weight": -1}), "bad_weight"),
        (chat({**USER, "weight": 1}, ANSWER), "bad_weight"),
        (chat(USER, {**ANSWER, "weight": 1, "loss_weight": 0}), "bad_weight"),
        (chat(USER, {**ANSWER, "weight": 0}), "nothing_trained"),
        (chat({"role": "tool", "content": "x"}, USER, ANSWER), "tool_first"),
        (chat(USER, {"role": "tool", "content": "x"}, ANSWER), "tool_without_call"),
        (chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}), "broken_json"),
        (
            chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
            "bad_tool_call",
        ),
        (chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"arguments": {}}]}), "bad_tool_call"),
        (chat({**USER, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER), "bad_tool_call"),
        (chat(USER, ANSWER, tools="[{"), "broken_json"),
        (chat(USER, ANSWER, tools=[{"description": "x"}]), "bad_tools"),
        (chat(USER, ANSWER, tools={"name": "x"}), "bad_tools"),
        (chat(USER, {"role": "assistant", "content": {"a": 1}}), "not_text"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER), "unsupported_part"),
        (chat(USER, ANSWER, images=["a.png"]), "unsupported_part"),
        (chat(USER, "hello"), "not_an_object"),
        ({"messages": {"role": "user"}}, "not_a_list"),
        (chat(USER, ANSWER, tool=[WEATHER]), "wrong_key"),
        (chat({"role": "system", "content": "s"}, USER, ANSWER, system="other"), "two_systems"),
    ],
)
def test_messages_refused(row, code):
    assert code_of("messages", row) == code


def test_a_system_text_beside_the_turns_and_other_columns():
    dialog = example("messages", chat(USER, {**ANSWER, "tokens": 3}, system="s", conversation_id="7", story="x"))
    assert [message.content for message in dialog.messages] == ["s", "hi", "hello"]
    assert len(example("messages", chat({"role": "system", "content": "s"}, USER, ANSWER, system="s")).messages) == 3


def test_a_weightless_empty_answer_is_context():
    assert len(example("messages", chat(USER, {"role": "assistant", "content": "", "weight": 0}, USER, ANSWER)).messages) == 4


def said(speaker, value, **more):
    return {"from": speaker, "value": value, **more}


def test_sharegpt_with_system_calls_and_observation():
    turns = [
        said("system", "s"),
        said("human", "q"),
        said("gpt", "let me see"),
        said("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        said("observation", "blue"),
        said("gpt", "It is blue."),
    ]
    dialog = example("sharegpt", {"conversations": turns, "tools": json.dumps([WEATHER])})
    assert dialog == Dialog(
        (
            Message("system", "s"),
            Message("user", "q"),
            Message("assistant", "let me see", tool_calls=(ToolCall("weather", {"city": "Rome"}),)),
            Message("tool", "blue"),
            Message("assistant", "It is blue."),
        ),
        "f:1",
        (WRAPPED,),
    )


def test_sharegpt_parallel_calls_thought_and_weights():
    calls = '<think>\nhm\n</think>\n[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]'
    turns = [
        said("human", "q"),
        said("function_call", calls),
        said("observation", "1"),
        said("gpt", "x", weight=0),
        said("human", "q"),
        said("gpt", "y"),
    ]
    dialog = example("sharegpt", {"conversations": turns, "system": "s"})
    assert dialog.messages[0] == Message("system", "s")
    assert dialog.messages[2] == Message("assistant", "", thinking="hm", tool_calls=(ToolCall("a", {}), ToolCall("b", {"x": 1})))
    assert [m.weight for m in dialog.messages if m.role == "assistant"] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ([said("gpt", "x"), said("human", "y")], "assistant_first"),
        ([said("human", "x"), said("gbt", "y")], "unknown_role"),
        ([said("human", "x"), said("gpt", "")], "empty_answer"),
        ([said("human", "x"), said("gpt", None)], "empty_answer"),
        ([said("human", "x"), {"from": "gpt", "vlaue": "y"}], "wrong_key"),
        ([said("human", "x"), {"from": "gpt"}], "wrong_key"),
        ([said("human", "x"), said("gpt", "y"), said("human", "z")], "last_not_assistant"),
        ([said("human", "x"), said("function_call", "call it")], "broken_json"),
        ([said("observation", "x"), said("gpt", "y")], "tool_first"),
        ([], "no_messages"),
        ("words", "broken_json"),
    ],
)
def test_sharegpt_refused(turns, code):
    assert code_of("sharegpt", {"conversations": turns}) == code


def test_alpaca():
    row = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "s", "history": [["q", "a"]], "id": 7}
    assert len(example("alpaca", {"instruction": "Hi", "output": "x", "story": "not a misspelt history"}).messages) == 2
    assert example("alpaca", row).messages == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "Add.\n1+1"),
        Message("assistant", "2"),
    )
    assert example("alpaca", {"instruction": "Hi", "input": "", "output": 4}).messages == (Message("user", "Hi"), Message("assistant", "4"))
    assert example("alpaca", {"instruction": "Hi", "input": None, "output": "x"}).messages[0] == Message("user", "Hi")
    assert example("alpaca", {"instruction": "", "input": "Hi", "output": "x"}).messages[0] == Message("user", "Hi")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"instruction": "a", "input": "", "output": ""}, "empty_answer"),
        ({"instruction": "a", "input": "", "output": None}, "empty_answer"),
        ({"instruction": "", "input": "", "output": "x"}, "empty_prompt"),
        ({"instruction": "a", "imput": "b", "output": "x"}, "wrong_key"),
        ({"instruction": "a", "outputs": "x"}, "wrong_key"),
        ({"instruction": "a", "input": ["b"], "output": "x"}, "not_text"),
        ({"instruction": "a", "output": "x", "history": [["q"]]}, "bad_history"),
        ({"instruction": "a", "output": "x", "history": [["q", ""]]}, "empty_answer"),
        ({"instruction": "a", "output": "x", "images": ["b.png"]}, "unsupported_part"),
    ],
)
def test_alpaca_refused(row, code):
    assert code_of("alpaca", row) == code


def test_prompt_completion_as_text_and_as_messages():
    assert example("prompt_completion", {"prompt": "p", "completion": " c"}).messages == (Message("user", "p"), Message("assistant", " c"))
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "s", "tools": [WEATHER]}
    dialog = example("prompt_completion", row)
    assert [m.weight for m in dialog.messages if m.role == "assistant"] == [0.0, 1.0]
    assert dialog.messages[0] == Message("system", "s")
    assert dialog.tools == (WRAPPED,)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "p", "completion": ""}, "empty_answer"),
        ({"prompt": "p", "completion": None}, "empty_answer"),
        ({"prompt": "", "completion": "c"}, "empty_prompt"),
        ({"prompt": "p", "complation": "c"}, "wrong_key"),
        ({"prompt": "p", "completion": []}, "no_assistant"),
        ({"prompt": [USER], "completion": [USER]}, "no_assistant"),
        ({"prompt": True, "completion": "c"}, "not_text"),
    ],
)
def test_prompt_completion_refused(row, code):
    assert code_of("prompt_completion", row) == code


def test_text():
    assert example("text", {"text": "a\n"}) == Text("a\n", "f:1")
    assert code_of("text", {"text": " "}) == "empty_text"
    assert code_of("text", {"txet": "a"}) == "wrong_key"
    assert code_of("text", {"text": ["a"]}) == "not_text"


SHAPED = {
    "messages": chat(USER, ANSWER),
    "sharegpt": {"conversations": [said("human", "x"), said("gpt", "y")]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", SHAPED)
def test_each_shape_is_known(name):
    assert shapes(SHAPED[name]) == (name,)
    assert detect([("f:1", {"id": 3}), ("f:2", SHAPED[name])], Source(path="f")) == name


def test_openai_turns_under_conversations_are_messages():
    assert shapes({"conversations": [USER, ANSWER]}) == ("messages",)
    assert shapes({"prompt": "x", "messages": [USER, ANSWER], "prompt_id": "1"}) == ("messages",)


def test_a_mixture_names_one_row_of_each_kind():
    rows = [("f:1", SHAPED["alpaca"]), ("f:2", SHAPED["alpaca"]), ("f:3", SHAPED["text"])]
    with pytest.raises(DataError, match=r"alpaca at f:1, text at f:3") as caught:
        detect(rows, Source(path="f"))
    assert caught.value.code == "mixed_formats"
    with pytest.raises(DataError, match=r"alpaca at f:1, text at f:2000"):
        hold("alpaca", "f:1", "f:2000", SHAPED["text"], Source(path="f"))
    hold("alpaca", "f:1", "f:2000", {"wrong": 1}, Source(path="f"))
    assert LOOK >= 1000


def test_a_row_that_could_be_two_things_is_asked_about():
    with pytest.raises(DataError, match="messages, text") as caught:
        detect([("f:1", {**SHAPED["messages"], "text": "a"})], Source(path="f"))
    assert (caught.value.code, "format: messages" in caught.value.remedy) == ("ambiguous_format", True)
    assert detect([("f:1", {**SHAPED["messages"], "text": "a"})], Source(path="f", format="messages")) == "messages"


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"mesages": []}, "did you mean 'messages'"),
        ({"input_ids": [1], "labels": [1]}, "token ids"),
        ({"question": "a", "answer": "b"}, "question, answer"),
    ],
)
def test_rows_of_no_known_shape(row, word):
    with pytest.raises(DataError, match=word) as caught:
        detect([("f:1", row)], Source(path="f"))
    assert caught.value.code == "unknown_format"
    assert "columns" in caught.value.remedy


def test_columns_and_format_names_are_checked():
    check_columns(Source(path="f", columns={"prompt": "q", "completion": "a"}))
    with pytest.raises(RecipeError, match="did you mean 'prompt'"):
        check_columns(Source(path="f", columns={"promt": "q"}))
    with pytest.raises(RecipeError, match="'text'"):
        check_columns(Source(path="f", format="alpaca", columns={"text": "q"}))
    with pytest.raises(RecipeError, match="did you mean 'alpaca'"):
        check_columns(Source(path="f", format="alpacca"))
