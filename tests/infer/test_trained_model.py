"""Greedy answers of a model that has been trained: its likeliest tokens stand apart, and its texts are long and make sense."""

from __future__ import annotations

import torch
from engines import greedy_by_transformers
from transformers import AutoModelForCausalLM

from tunesmith import pocket
from tunesmith.core.ports import SampleSettings
from tunesmith.evals.opening import open_model
from tunesmith.infer.engine import Engine

TEXTS = (
    "The lighthouse keeper had a small boat",
    "My card was charged twice.",
    "On Tuesday afternoon the children went to the",
    "Q: What does a carpenter use?\nA:",
)


def test_greedy_answers_of_a_trained_model_are_those_of_transformers_generate() -> None:
    opened = open_model("pocket", dtype="fp32", device="cpu")
    prompts = [opened.tokenizer(text)["input_ids"] for text in TEXTS]
    other = AutoModelForCausalLM.from_pretrained(pocket.folder(), dtype=torch.float32, attn_implementation="eager").eval()
    truth = greedy_by_transformers(other, prompts, 150)
    rows = Engine(opened.policy, opened.tokenizer).sample(prompts, SampleSettings(150, 0.0))
    assert [row[0].ids for row in rows] == truth
    assert all(sum(row[0].logprobs) / 150 > -2.0 for row in rows), "a model that has learned something is sure of its words"
    assert len({token for answer in truth for token in answer}) > 40, "answers that repeat themselves prove little"
