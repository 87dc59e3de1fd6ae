"""The one setting tree: what a run is, as data.

Every section forbids unknown keys. A named thing (objective, adapter, optimizer) brings its own settings; they are checked
against the signature of the function that the name stands for, where that table lives.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tunesmith.core import adapters, optimizers
from tunesmith.core.adapters import UNFUSED, Adapter, Lora
from tunesmith.core.optimizers import AdamW, Optim
from tunesmith.core.section import Section, demand_name
from tunesmith.core.types import content_hash


class Fast(Section):
    """Switches of the fast paths; each has a plain twin that gives the same numbers, `float8` and `int8` coarser ones."""

    packed: bool = Field(True, description="lay documents end to end with attention per document; off: pad")
    head: bool = Field(True, description="log-probabilities without a logits tensor, trained positions only; off: the model's own logits")
    lora: bool = Field(True, description="LoRA layers in one fused function; off: PEFT's forward (and no `layer` on top of it)")
    layer: bool = Field(True, description="decoder layers as one function each (Llama family, CPU); off: transformers' forward")
    front: bool = Field(True, description="rows of a pair share the prompt that they begin with; off: each goes through the model whole")
    compile: bool = Field(False, description="decoder layers through torch.compile, in place of `layer`; costs seconds to minutes at start")
    float8: bool = Field(False, description="products with the frozen base in float8 (Hopper GPUs, LoRA in bf16); changes the numbers")
    int8: bool = Field(
        False, description="products with the frozen base in 8 bits (CPUs with VNNI, fused layers, LoRA in bf16); changes the numbers"
    )

    @property
    def coarse(self) -> str | None:
        """Which of the switches that change the numbers is on."""
        return "int8" if self.int8 else "float8" if self.float8 else None


class Lisa(Section):
    """Few layers at a time are trained, drawn anew every so often; embeddings, norms and head always are (Pan 2024, arXiv:2403.17919)."""

    layers: int = Field(2, ge=1, description="decoder layers trained at a time")
    every: int = Field(20, ge=1, description="steps until others are drawn; the moments of those that rest are dropped")


class Model(Section):
    """Which weights are trained, from which base, in which precision."""

    base: str = Field(description="hub id, folder, run folder, '@stage' for an earlier stage's result, or 'pocket'")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of the products; auto: bf16 on a GPU that has it, else fp32. Trained weights stay fp32"
    )
    template: str = Field(
        "auto", description="auto: the tokenizer's own; a named template; a Jinja file; none: plain prompt and completion"
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="variables handed to the chat template, e.g. {enable_thinking: false}"
    )
    adapter: Adapter | None = Field(None, description="null trains all weights")
    quant: Literal["int8", "nf4"] | None = Field(
        None,
        description="the frozen base in 8 bits (arXiv:2208.07339) or 4 (QLoRA, arXiv:2305.14314); needs an adapter",
    )
    double_quant: bool = Field(True, description="nf4: quantise the scales too")
    stream: bool = Field(
        False, description="keep the frozen base in host memory and bring its layers to the GPU one at a time; activations are recomputed"
    )
    freeze: list[str] = Field(
        default_factory=list, description="modules held fixed where all weights are trained, by name or path, e.g. [embed_tokens, layers.0]"
    )
    lisa: Lisa | None = Field(None, description="train few layers at a time where all weights are trained")
    init: Literal["weights", "random"] = Field("weights", description="random: keep the architecture, draw new weights (pre-training)")
    fast: Fast = Fast()

    @field_validator("adapter", mode="before")
    @classmethod
    def _known_adapter(cls, value: Any) -> Any:
        return demand_name("adapter", adapters.KINDS, value)

    @model_validator(mode="after")
    def _an_adapter_freezes_by_itself(self) -> Model:
        if self.adapter is not None and (self.freeze or self.lisa):
            raise ValueError("freeze and lisa are for training all weights: leave them out, or set adapter: null")
        return self

    @model_validator(mode="after")
    def _a_quantised_base_is_frozen(self) -> Model:
        if self.quant and self.adapter is None:
            raise ValueError(f"quant: {self.quant} holds a frozen base: add an adapter, e.g. {{name: lora}}, or leave quant out")
        if self.quant and (self.fast.coarse or self.init == "random"):
            raise ValueError("quant goes with none of fast.float8, fast.int8, init: random")
        return self

    @model_validator(mode="after")
    def _a_streamed_base_is_frozen(self) -> Model:
        if self.stream and self.adapter is None:
            raise ValueError("stream is for a frozen base: add an adapter, or leave it out")
        if self.stream and (self.fast.compile or self.fast.coarse):
            raise ValueError("stream goes with none of fast.compile, fast.float8, fast.int8")
        return self

    @model_validator(mode="after")
    def _8_bits_are_for_a_frozen_base(self) -> Model:
        name, fast = self.fast.coarse, self.fast
        if name and self.adapter is None:
            raise ValueError(f"fast.{name} is for a frozen base: add an adapter, or switch it off")
        if name and self.dtype == "fp32":
            raise ValueError(f"fast.{name} goes with bf16: set dtype: bf16, or switch it off")
        if fast.int8 and self.dtype == "auto":
            raise ValueError("fast.int8 is for a CPU, where dtype: auto is fp32: set dtype: bf16, or switch it off")
        if fast.int8 and (fast.float8 or fast.compile or not (fast.layer and fast.lora and fast.packed)):
            raise ValueError(
                "fast.int8 is for fused layers: leave fast.layer, lora and packed on, compile and float8 off, or switch it off"
            )
        if fast.int8 and getattr(self.adapter, "dropout", None):
            raise ValueError("fast.int8 is for fused layers, and dropout in an adapter has its layers go PEFT's way: leave one of both out")
        if fast.int8 and self.adapter is not None and self.adapter.name in UNFUSED:
            raise ValueError(f"fast.int8 is for fused layers, which {self.adapter.name} does not have: use lora, or switch it off")
        if fast.int8 and isinstance(self.adapter, Lora) and any(rank % 2 for rank in (self.adapter.rank, *self.adapter.ranks.values())):
            raise ValueError("fast.int8 is for LoRA of an even rank: raise adapter.rank and ranks to even numbers, or switch it off")
        return self


class Source(Section):
    """One file, folder or hub data set."""

    path: str = Field(description="file, folder or hub id")
    format: str = Field(
        "auto",
        description="auto, messages, sharegpt, alpaca, prompt_completion, text, preference, openai_preference, ranked, labelled, steps",
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our column name -> the name in the file")
    weight: float = Field(1.0, gt=0, description="how many times a row is seen in one epoch, on average")
    split: str = Field("train", description="split of a hub data set")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    streaming: bool = Field(False, description="read a hub data set without downloading it whole; needs limit")
    limit: int | None = Field(None, ge=1, description="read at most this many rows")


class Fraction(Section):
    """Rows held out of the training data, chosen by the hash of their content, so that copies stay together.

    Judged answers (pairs, labels, steps) go by their prompt, so that all answers to one prompt stay together.
    """

    fraction: float = Field(gt=0, lt=1)


class Data(Section):
    """Where the rows come from and what happens to bad ones."""

    train: list[Source]
    validation: list[Source] | Fraction | None = None
    on_bad: Literal["refuse", "drop"] = Field("refuse", description="refuse: do not start while a row is bad; drop: note it in the ledger")
    turns: Literal["all", "last"] = Field("all", description="assistant turns that are trained; of a pair, turns of its answers")
    ranked: Literal["best_worst", "adjacent", "all"] = Field(
        "best_worst",
        description="pairs that a ranked list gives: the best over the worst; each over the next one down; or each over every lower one; "
        "answers ranked alike give no pair and are noted",
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_source_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"path": value}]
        if isinstance(value, dict) and "fraction" not in value:
            return [value]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("train")
    @classmethod
    def _some_source(cls, value: list[Source]) -> list[Source]:
        if not value:
            raise ValueError("no training data is named")
        return value


class Reference(Section):
    """The fixed model that preference objectives hold the trained one against."""

    model: str = Field(
        "start", description="start: the model as this run begins; base: the base with its adapter off; or a hub id or folder of its own"
    )
    cache: bool = Field(True, description="keep its log-probabilities on disk by content hash")


class TokenLimits(Section):
    """How long a row may be, and what happens to a longer one."""

    max_length: int = Field(2048, ge=8, description="tokens of one row, at most; the default gives way to a base with a shorter context")
    overlong: Literal["drop", "cut_prompt", "split", "error"] = Field(
        "drop",
        description="drop: leave the row out; cut_prompt: cut context from the left, never the answer; split: text in pieces, "
        "dialogs at turns; error: refuse to start",
    )
    cache: bool = Field(True, description="keep token ids on disk by content hash")


class StepBatch(Section):
    """The size of one optimizer step, over all ranks."""

    examples: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1, description="at most this many; rows are fitted in over a shuffled window")

    @model_validator(mode="after")
    def _one_of_two(self) -> StepBatch:
        if (self.examples is None) == (self.tokens is None):
            raise ValueError("give either examples or tokens")
        return self


class Run(Section):
    """How long, how large, how often, and where to."""

    epochs: float | None = Field(None, gt=0, description="passes over the data; default 1 when steps is not given")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    batch: StepBatch = StepBatch(examples=16)
    micro_tokens: Literal["auto"] | int = Field(
        "auto", description="tokens of one forward pass; results do not depend on it; auto: what suits the device and fits in its memory"
    )
    save_every: int = Field(100, ge=0, description="steps between checkpoints; 0: at the end only")
    eval_every: int = Field(100, ge=0, description="steps between validations; 0: at the end only")
    keep: int = Field(2, ge=1, description="checkpoints kept, the best one apart")
    patience: int = Field(0, ge=0, description="stop after this many validations without a better loss; 0: never")
    use_best: bool = Field(True, description="final/ holds the best validated checkpoint, not the last one")
    neftune_alpha: float = Field(0.0, ge=0, description="noise on the embeddings in training (Jain 2023, arXiv:2310.05914); 0: none")
    checkpointing: Literal["auto", "on", "off"] | int = Field(
        "auto",
        description="layers that recompute their activations in the backward pass; auto: as few as memory asks for; on: all; off: none",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    seed: int = Field(0, ge=0)
    out: str = "runs/run"
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    samples: int = Field(4, ge=0, description="validation prompts answered before and after, for the report")

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _on_is_a_word(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare on or off as true or false.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("micro_tokens")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("checkpointing")
    @classmethod
    def _no_negative_count(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be at least 0")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Run:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        return self


class Named(BaseModel):
    """A row of a table and its settings, e.g. {name: nll}; the settings are checked against the row's signature."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    weight: float = 1.0

    @field_validator("weight", mode="before")
    @classmethod
    def _adds_to_the_loss(cls, value: Any) -> Any:
        # A loss times 0 or less teaches nothing, or the opposite; NaN would be found at the first step only.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError("the weight of an objective is a number above 0; to switch an objective off, leave it out")
        return value

    def settings(self) -> dict[str, Any]:
        """The settings that belong to the named row."""
        return dict(self.model_extra or {})


class Recipe(Section):
    """One training run, whole."""

    model: Model
    data: Data
    objective: list[Named] = Field(default_factory=lambda: [Named(name="nll")], min_length=1)
    reference: Reference = Reference()
    tokens: TokenLimits = TokenLimits()
    optim: Optim = AdamW()
    run: Run = Run()

    @field_validator("optim", mode="before")
    @classmethod
    def _known_optimizer(cls, value: Any) -> Any:
        return demand_name("optimizer", optimizers.KINDS, value)

    @field_validator("objective", mode="before")
    @classmethod
    def _one_objective_alone(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _layers_that_rest_have_no_moments(self) -> Recipe:
        if self.model.lisa is not None and self.optim.name in ("galore", "schedule_free"):
            raise ValueError(f"model.lisa drops what {self.optim.name} has to keep of a layer: use adamw, or leave lisa out")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values; `Recipe(**recipe.as_dict())` is the same recipe."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """What the result depends on: everything but where it is written, how it is watched, and how it is cut into pieces."""
        tree = self.as_dict()
        for name in ("out", "trackers", "micro_tokens", "checkpointing", "save_every", "keep", "samples", "device"):
            del tree["run"][name]
        del tree["tokens"]["cache"], tree["data"]["on_bad"], tree["reference"]["cache"], tree["model"]["stream"]
        return tree

    def hash(self) -> str:
        """SHA-256 of the identity."""
        return content_hash(self.identity())


Stages = Annotated[list[dict[str, Any]], Field(min_length=1)]
