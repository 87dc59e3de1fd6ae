"""The engine's plain twin: sampling through transformers' own `generate`, with our draw, our stops and our log-probabilities."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from tunesmith.core.errors import RecipeError
from tunesmith.core.log import logger
from tunesmith.core.ports import SampleSettings
from tunesmith.core.seed import stream
from tunesmith.core.types import Completion, content_hash
from tunesmith.infer.draw import Asked, Drawn, check_settings, draw
from tunesmith.infer.request import not_finite, room_for, token_ids
from tunesmith.infer.text import Growing, continuation
from tunesmith.model.attention import NAME as OUR_ATTENTION
from tunesmith.model.positions import alone_from
from tunesmith.model.virtual import front_of, ids_in_front, is_prefix


@dataclass(frozen=True)
class _Request:
    """One completion to draw: where it goes, its prompt, its uniform numbers, how many tokens it may take, and what errors call it."""

    place: int
    ids: tuple[int, ...]
    uniform: np.ndarray[Any, np.dtype[np.float64]]
    room: int
    where: str


class TransformersSampler:
    """Continues prompts with a transformers causal language model, many at a time; for models that the engine cannot run, and to prove it.

    Prompts are padded on the left and batched by length up to batch_tokens (prompt and answer together). Every completion draws
    from its own random stream, named by the seed, the prompt's ids, its count among equal prompts and its number of n; so it depends
    on neither the order nor the batch it stands in, up to the rounding of the model's own products.
    The model's generation_config is not used: what SampleSettings and stop_ids say is all that happens.
    `lead` is what a template writes between prompt and answer: it is generated and scored, and left out of a completion's text.
    A completion's logprobs are those of the model itself (temperature 1, nothing cut off, float32 log-softmax), also where the
    draw was greedy or narrowed. While it samples the model is in evaluation mode; modes, attention and configuration are
    restored afterwards.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, stop_ids: Sequence[int], lead: str = "", attention: str = "sdpa", batch_tokens: int = 16384
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = tuple(dict.fromkeys(int(token) for token in stop_ids))
        self.lead = lead
        self.attention = attention
        self.batch_tokens = batch_tokens

    def sample(self, prompts: Sequence[Sequence[int]], settings: SampleSettings) -> list[list[Completion]]:
        """For every prompt (token ids, not empty), `settings.n` completions, in the order given.

        Near the model's context limit a completion gets the room that is left, and stops with "length".
        Raises DataError for an empty prompt or one that fills the context; RecipeError for impossible settings; ModelError
        `not_finite` when the model says NaN or infinity.
        """
        return list(self.answers(prompts, settings))

    def answers(
        self, prompts: Sequence[Sequence[int]], settings: SampleSettings, places: Sequence[str] = ()
    ) -> Generator[list[Completion], None, None]:
        """What `sample` gives, a prompt's completions as soon as they and those before them are done. `places`: what errors call them."""
        check_settings(settings, self.model.get_input_embeddings().num_embeddings)
        if settings.adapter is not None:
            raise RecipeError(
                f"the plain sampler cannot change to the adapter '{settings.adapter}'", where="adapter", remedy="open it as the model",
                code="unknown_adapter",
            )  # fmt: skip
        limit = context_limit(self.model)
        limit = None if limit is None else limit - front_of(self.model)
        requests = _requests(prompts, settings, limit, places)
        alone = alone_from(self.model.config)
        done: dict[int, Completion] = {}
        given = 0
        for batch in _batches(requests, self.batch_tokens, alone):
            with generating(self.model, self.attention) as plain:
                done.update(zip((request.place for request in batch), self._run(plain, batch, settings), strict=True))
            while all(given + index in done for index in range(settings.n)):
                yield [done.pop(given + index) for index in range(settings.n)]
                given += settings.n

    def _run(self, model: Any, batch: list[_Request], settings: SampleSettings) -> list[Completion]:
        try:
            return self._generate(model, batch, settings)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        logger.info("out of memory while sampling %d prompts at once: going on with %d", len(batch), half)
        return self._run(model, batch[:half], settings) + self._run(model, batch[half:], settings)

    def _generate(self, model: Any, batch: list[_Request], settings: SampleSettings) -> list[Completion]:
        device = next(model.parameters()).device
        front = ids_in_front(self.model)
        width = len(front) + max(len(request.ids) for request in batch)
        pad = self.stop_ids[0] if self.stop_ids else 0
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, request in enumerate(batch):
            ids[row, width - len(front) - len(request.ids) :] = torch.tensor([*front, *request.ids])
            mask[row, width - len(front) - len(request.ids) :] = 1
        stops = frozenset((*self.stop_ids, *settings.stop_ids))
        draws = _Draw(batch, settings)
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=batch[0].room,
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad,
            use_cache=True,
        )
        made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, logits_processor=[draws])
        return [
            self._completion(request, answer[: request.room], row, [drawn.logprobs[row] for drawn in draws.drawn], draws, stops)
            for row, (request, answer) in enumerate(zip(batch, made[:, width:].tolist(), strict=True))
        ]

    def _completion(
        self, request: _Request, answer: list[int], row: int, logp: list[float], draws: _Draw, stops: frozenset[int]
    ) -> Completion:
        growing = Growing(self.tokenizer, request.ids, stops=draws.settings.stop, lead=self.lead)
        end, cut = None, False
        for place, token in enumerate(answer):
            cut = token not in stops and bool(draws.settings.stop) and growing.add(token)
            if cut or token in stops:
                end = place
                break
        kept = answer if end is None else answer[: end + 1]
        said = kept[:-1] if kept and kept[-1] in stops else kept
        text = growing.text if cut else continuation(self.tokenizer, request.ids, said).removeprefix(self.lead)
        if (odd := next((place for place, value in enumerate(logp[: len(kept)]) if not math.isfinite(value)), None)) is not None:
            raise not_finite(len(request.ids) + odd, None, request.where)
        tops = tuple(drawn.tops[row] for drawn in draws.drawn[: len(kept)]) if draws.settings.top_logprobs else ()
        return Completion(text, tuple(kept), tuple(logp[: len(kept)]), "length" if end is None else "stop", tops)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's next token, keeps what was drawn, and leaves `generate` nothing else to choose."""

    def __init__(self, batch: list[_Request], settings: SampleSettings) -> None:
        self.settings = settings
        self.drawn: list[Drawn] = []
        self._uniform = [request.uniform for request in batch]
        self._asked = [Asked(settings, frozenset(request.ids)) for request in batch]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 (the interface's signature)
        # On a GPU `generate` may look one step past the end before it notices; that step's draw is thrown away.
        step = min(len(self.drawn), len(self._uniform[0]) - 1)
        found = draw(scores.float(), self._asked, [float(uniform[step]) for uniform in self._uniform])
        for asked, one in zip(self._asked, found.tokens, strict=True):
            asked.counts[one] += 1
        self.drawn.append(found)
        token = torch.tensor(found.tokens, device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@contextlib.contextmanager
def generating(model: Any, attention: str = "sdpa") -> Iterator[Any]:
    """The plain transformers model inside `model` (PEFT's around it where a prefix stands in front), ready to generate.

    Everything is put back afterwards.

    Ready means: evaluation mode (no dropout, no noise), key-value cache on, attention that knows padding and caches instead of our
    packed one (`attention`), and a neutral generation configuration. Adapters stay as they are, on or off.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    modes = [(module, module.training) for module in plain.modules()]
    before, use_cache, defaults = plain.config._attn_implementation, plain.config.use_cache, plain.generation_config
    try:
        plain.eval()
        plain.config.use_cache = True
        plain.generation_config = GenerationConfig()
        if before == OUR_ATTENTION:
            plain.set_attn_implementation(attention)
        with torch.no_grad():
            yield model if is_prefix(model) and not model._adapters_disabled else plain
    finally:
        if before == OUR_ATTENTION:
            plain.set_attn_implementation(before)
        plain.generation_config = defaults
        plain.config.use_cache = use_cache
        for module, mode in modes:
            module.training = mode


def context_limit(model: Any) -> int | None:
    """The positions the model was made for, or None when its configuration does not say."""
    config = model.config.get_text_config()
    # Not every architecture has the attribute, and in some it is another name for n_positions, which only attribute access knows.
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def _requests(prompts: Sequence[Sequence[int]], settings: SampleSettings, limit: int | None, places: Sequence[str] = ()) -> list[_Request]:
    out: list[_Request] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for number, prompt in enumerate(prompts):
        where = places[number] if places else f"prompt {number}"
        ids = token_ids(prompt, where)
        room = room_for(ids, settings.max_new_tokens, limit, where)
        name = content_hash(ids)
        for index in range(settings.n):
            numbers = stream(settings.seed, "sample", name, seen[ids], index).random(room)
            out.append(_Request(len(out), ids, numbers, room, where))
        seen[ids] += 1
    return out


def _batches(requests: list[_Request], batch_tokens: int, alone: int | None) -> Iterator[list[_Request]]:
    """Long prompts first, so that memory runs out at once or never; one batch shares one room, so that no row is cut for another.

    A row that may grow longer than `alone` goes alone: beyond that length its positions would follow the longest row.
    """
    batch: list[_Request] = []
    for request in sorted(requests, key=lambda request: (-request.room, -len(request.ids))):
        if batch:
            widest = len(batch[0].ids) + batch[0].room
            full = (len(batch) + 1) * widest > batch_tokens
            if full or request.room != batch[0].room or (alone is not None and widest > alone):
                yield batch
                batch = []
        batch.append(request)
    if batch:
        yield batch
