"""What the notes of rendering mean, in a sentence each, and which of them ask for a second look before training."""

from __future__ import annotations

from collections.abc import Mapping

NOTES: Mapping[str, str] = {
    "boundary_retokenised": "a token would straddle prompt and answer, so the answer is tokenised apart, as inference will see it",
    "prompt_tail_differs": "the generation prompt is not what the template writes before such an answer",
    "history_rewritten": "the template shows earlier turns otherwise than it asks for them, so they are trained in views of their own",
    "thinking_dropped": "the template leaves out the thinking part of a turn",
    "answer_rewritten": "the template rewrites the words of an answer",
    "header_trained": "a part of what the template writes before an answer is trained with it",
    "stop_appended": "the template ends an answer without a stop token; the tokenizer's EOS was added",
    "stop_is_text": "the end mark is no token of its own, so generation will not stop at it by itself",
    "control_token_in_prompt": "a control token stands in the words of a prompt",
    "control_token_in_answer": "a control token stands in the words of an answer and is trained",
    "tools_dropped": "the template does not show the tools of the row",
    "end_mark_is_eos": "the template's end mark is no token of this tokenizer; its EOS is used instead",
    "marks_are_text": "marks of the template are no tokens of this tokenizer and are learned as plain text",
    "margin": "the row says by how much the one answer is preferred (its margin, or the difference of its scores)",
    "several_templates": "the tokenizer has several templates; the one called default is used",
    "depends_on_date": "the template writes today's date: the same rows give other tokens tomorrow",
}


def explain(note: str) -> str:
    """The sentence for a note such as "stop_is_text" or "end_mark_is_eos:<|end|>"."""
    code, _, detail = note.partition(":")
    if code.endswith("_text_changed"):
        return f"the template changes the words of a {code.removesuffix('_text_changed')} turn"
    sentence = NOTES.get(code, code.replace("_", " "))
    return f"{sentence} ({detail})" if detail else sentence
