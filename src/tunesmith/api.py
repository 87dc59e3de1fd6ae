"""What `import tunesmith` offers: the verbs of the command line as functions, and the tables."""

from __future__ import annotations

from tunesmith.core.files import write_jsonl as write_rows
from tunesmith.core.ports import SampleSettings
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Completion, Dialog, Grade, Message, Prompt, Score, Text, Tokens
from tunesmith.data.formats import FORMATS
from tunesmith.data.render import render
from tunesmith.data.template import NAMED as TEMPLATES
from tunesmith.data.template import choose_template
from tunesmith.demo import align as run_align
from tunesmith.demo import demo as run_demo
from tunesmith.evals.opening import Opened
from tunesmith.evals.opening import open_model as load
from tunesmith.evals.run import evaluate
from tunesmith.evals.score import score
from tunesmith.grade import GRADERS
from tunesmith.infer.engine import Engine
from tunesmith.infer.generate import chat_sampler, generate
from tunesmith.infer.remote import RemoteSampler
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.objective import OBJECTIVES
from tunesmith.training.run import train

__all__ = [
    "FORMATS",
    "GRADERS",
    "OBJECTIVES",
    "TEMPLATES",
    "Completion",
    "Dialog",
    "Engine",
    "Grade",
    "Message",
    "Opened",
    "Prompt",
    "Recipe",
    "RemoteSampler",
    "SampleSettings",
    "Score",
    "Text",
    "Tokens",
    "chat_sampler",
    "choose_template",
    "evaluate",
    "generate",
    "load",
    "load_tokenizer",
    "render",
    "run_align",
    "run_demo",
    "score",
    "train",
    "write_rows",
]
