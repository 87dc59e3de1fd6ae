"""Settings of the adapters: small trained parts beside, inside or in front of a frozen base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from tunesmith.core.section import Section, by_name

Targets = Literal["all-linear"] | list[str]
UNFUSED = ("dora", "vera", "ia3", "bottleneck", "prefix")  # with these no decoder layer runs as one function
ALL_LINEAR = "module names to adapt, e.g. [q_proj, v_proj]; all-linear leaves the head out"


class _Adapter(Section):
    modules_to_save: list[str] = Field(default_factory=list, description="further modules trained whole and kept with the adapter")


class _OnLayers(_Adapter):
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input, in training only")
    targets: Targets = Field("all-linear", description=ALL_LINEAR)


class _LowRank(_OnLayers):
    rank: int = Field(16, ge=1, description="inner width r of the two factors")
    alpha: float | None = Field(None, gt=0, description="scale of the update is alpha / rank; default 2 x rank")
    ranks: dict[str, int] = Field(default_factory=dict, description="ranks of their own, by module name or layer path, e.g. {q_proj: 4}")
    rank_stabilised: bool = Field(False, description="scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)")
    lr_ratio: float = Field(1.0, gt=0, description="learning rate of the second factor over that of the first (LoRA+, arXiv:2402.12354)")

    def scale_of(self) -> float:
        """alpha, with its default."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class Lora(_LowRank):
    """Low-rank factors beside frozen linear layers (Hu 2021, arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    init: Literal["zero", "pissa", "olora", "loftq"] = Field(
        "zero",
        description="zero: second factor 0; pissa: principal singular vectors (arXiv:2404.02948); olora: orthonormal (arXiv:2406.01775); "
        "loftq: what quantising the base lost (arXiv:2310.08659)",
    )
    freeze_a: bool = Field(False, description="train the second factor alone (LoRA-FA, arXiv:2308.03303)")


class Dora(_LowRank):
    """LoRA on the direction of each weight, with its magnitude trained apart (Liu 2024, arXiv:2402.09353)."""

    name: Literal["dora"] = "dora"


class Vera(_OnLayers):
    """Two trained vectors a layer around one frozen random pair of factors that all layers share (Kopiczko 2023, arXiv:2310.11454)."""

    name: Literal["vera"] = "vera"
    rank: int = Field(256, ge=1, description="inner width of the shared factors")
    d_initial: float = Field(0.1, description="start of the inner vector")


class Ia3(_Adapter):
    """Trained scales on keys, values and the inside of the feed-forward layers (Liu 2022, arXiv:2205.05638)."""

    name: Literal["ia3"] = "ia3"
    targets: Literal["auto"] | list[str] = Field("auto", description="auto: keys, values and the last feed-forward layer")
    feedforward: Literal["auto"] | list[str] = Field("auto", description="those of the targets whose input is scaled, not the output")


class Prefix(Section):
    """Trained keys and values that every layer sees in front of each row (Li 2021, arXiv:2101.00190)."""

    name: Literal["prefix"] = "prefix"
    tokens: int = Field(20, ge=1, description="length of the prefix")
    projection: bool = Field(False, description="make the prefix by a small network of its own (the paper's reparametrisation)")
    width: int | None = Field(None, ge=1, description="hidden width of that network; default the model's")


class Prompt(Section):
    """Trained embeddings in front of each row (Lester 2021, arXiv:2104.08691)."""

    name: Literal["prompt"] = "prompt"
    tokens: int = Field(20, ge=1, description="number of embeddings")
    text: str | None = Field(None, description="words whose embeddings are the start; default random rows of the embedding")


class PTuning(Section):
    """Trained embeddings in front of each row, made by a small network (Liu 2021, arXiv:2103.10385)."""

    name: Literal["p_tuning"] = "p_tuning"
    tokens: int = Field(20, ge=1, description="number of embeddings")
    width: int | None = Field(None, ge=1, description="hidden width of the network; default the model's")
    encoder: Literal["mlp", "lstm"] = "mlp"


class Bottleneck(_Adapter):
    """Small two-layer networks inside each decoder layer, added to its stream."""

    name: Literal["bottleneck"] = "bottleneck"
    width: int = Field(64, ge=1, description="inner width")
    position: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer",
        description="houlsby: behind attention and feed-forward (arXiv:1902.00751); pfeiffer: feed-forward alone (arXiv:2005.00247)",
    )
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the inner units, in training only")


KINDS: dict[str, type[Section]] = {
    "lora": Lora, "dora": Dora, "vera": Vera, "ia3": Ia3, "prefix": Prefix, "prompt": Prompt, "p_tuning": PTuning, "bottleneck": Bottleneck,
}  # fmt: skip

Adapter = Annotated[
    Annotated[Lora, Tag("Lora")]
    | Annotated[Dora, Tag("Dora")]
    | Annotated[Vera, Tag("Vera")]
    | Annotated[Ia3, Tag("Ia3")]
    | Annotated[Prefix, Tag("Prefix")]
    | Annotated[Prompt, Tag("Prompt")]
    | Annotated[PTuning, Tag("PTuning")]
    | Annotated[Bottleneck, Tag("Bottleneck")],
    Discriminator(by_name(KINDS, "lora")),
]
