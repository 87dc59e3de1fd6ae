"""Sampling from a server that speaks OpenAI's completions protocol, vLLM first."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.core.errors import DataError, ModelError, RecipeError, TunesmithError, did_you_mean
from tunesmith.core.files import folder_hash
from tunesmith.core.log import logger
from tunesmith.core.ports import SampleSettings
from tunesmith.core.seed import seed_of
from tunesmith.core.types import Completion, content_hash
from tunesmith.infer.draw import check_settings
from tunesmith.infer.request import room_for
from tunesmith.infer.text import continuation

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
NAMED = "token_id:"  # how vLLM writes a token among the log-probabilities when it is asked for ids
LONG = re.compile(r"context.{0,3}(length|window)|prompt is too long", re.IGNORECASE)
# Fields of a request that are called otherwise among our settings.
SETTINGS = {"max_tokens": "max_new_tokens", "stop_token_ids": "stop_ids", "logprobs": "top_logprobs"}
SETTINGS["return_tokens_as_token_ids"] = "top_logprobs"  # without it nobody knows which tokens are meant
V1 = "give the address that ends in /v1 (vLLM: http://host:8000/v1)"


@dataclass(frozen=True)
class _Request:
    """One completion to ask for: the number of its prompt, the prompt, its seed, and how many tokens it may take."""

    prompt: int
    ids: tuple[int, ...]
    seed: int
    room: int


class RemoteSampler:
    """Continues prompts on an OpenAI-compatible server, many requests at a time.

    `url` ends where /completions begins (http://host:8000/v1), `model` is the server's name for the base, `tokenizer` the model's own.
    `parallel` requests are open at once. Each waits `timeout` seconds, and is sent again up to `retries` times, after growing pauses or
    the server's Retry-After, when the server is busy (429), fails (5xx), is silent or drops the connection.

    Every completion is a request of its own, with a seed named by the settings' seed, the prompt's ids, its count among equal prompts and
    its number of n. How far the seed decides the draw is the server's affair, and so is the order in which top_k, top_p and min_p narrow
    it. A completion reads as a local one: ids with the stop token, text without it, a stop text and `lead`. A server without token ids
    (not vLLM) is served too: its text is encoded again, which a log line says once; an end token that it does not show is then missing,
    and log-probabilities that do not line up are a ModelError. Logprobs are as the server reports them: vLLM's are the model's own, unless
    it runs with --logprobs-mode processed_logprobs. `settings.adapter` is the name of an adapter that the server has loaded.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        lead: str = "",
        api_key: str | None = None,
        parallel: int = 32,
        timeout: float = 600.0,
        retries: int = 4,
    ) -> None:
        if parallel < 1:
            raise RecipeError(f"parallel is {parallel}", where="parallel", remedy="use at least 1", code="bad_setting")
        self.url, self.model, self.tokenizer, self.lead = url.rstrip("/"), model, tokenizer, lead
        self.stop_ids = tuple(dict.fromkeys(int(token) for token in stop_ids))
        self.parallel, self.timeout, self.retries = parallel, timeout, retries
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._models: dict[str, dict[str, Any]] | None = None  # what the server lists, by name; None before it was asked
        self._refused: set[str] = set()  # fields that the server does not know and that it can do without
        self._held: dict[tuple[str, str], str] = {}  # (adapter, folder) -> what the folder held when it was first loaded
        self._told = False

    def sample(self, prompts: Sequence[Sequence[int]], settings: SampleSettings) -> list[list[Completion]]:
        """For every prompt (token ids, not empty), `settings.n` completions, in the order given.

        Where the server says how long its context is (vLLM, SGLang), a completion near the end of it gets the room that is left.
        Ctrl-C closes what is open. Raises DataError for an empty prompt or one that does not fit; RecipeError for impossible settings,
        those that the server refuses and a wrong key; ModelError for a server that is not there, silent, broken, or lacks the model.
        """
        check_settings(settings)
        if any(abs(bias) > 100 for bias in settings.logit_bias.values()):  # vLLM would cut it there without a word
            raise RecipeError("no server takes so large a bias", where="logit_bias", remedy="use -100 to 100", code="bad_setting")
        _requests(prompts, settings, None)  # what is wrong with a prompt is said before the server is asked
        done = _finish(self._sample(prompts, settings)) if prompts else []
        return [done[start : start + settings.n] for start in range(0, len(done), settings.n)]

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Have a vLLM server load the adapter in `folder`, a path as the server sees it, for `SampleSettings(adapter=name)`.

        Write every version of an adapter into a folder of its own: vLLM keeps what it has computed for a prompt by the adapter's name and
        folder (older releases: by name alone, so give a new name too), also across unloading, and would go on with an older version's
        numbers. A folder that has changed since this sampler loaded it under the name is refused, where it can be seen from here.
        Raises RecipeError when the folder changed, the name is taken, or the server lacks the folder, cannot load it, or may load none.
        """
        path = Path(folder)
        where = str(path.resolve() if path.is_dir() else path)
        holds = folder_hash(path, (".json", ".safetensors", ".bin")) if path.is_dir() else ""
        if self._held.get((name, where), holds) != holds:
            said = f"{where} has changed since it was loaded as '{name}', and the server would mix the two versions"
            raise RecipeError(said, where=name, remedy="write every version into a new folder and load that", code="adapter_changed")
        _finish(self._change("load", name, {"lora_path": where}))
        self._held[name, where] = holds

    def unload_adapter(self, name: str) -> None:
        """Have a vLLM server forget the adapter of this name. Raises RecipeError when it has none or may not unload any."""
        _finish(self._change("unload", name, {}))

    async def _change(self, verb: str, name: str, more: dict[str, str]) -> None:
        async with self._client() as client:
            # Never sent twice: a load whose answer got lost would come back as one that is there already.
            status, content = await self._ask(client.with_options(max_retries=0), f"/{verb}_lora_adapter", {"lora_name": name, **more})
        if status >= 400:
            raise self._refusal(status, content, model=name, verb=verb)

    async def _sample(self, prompts: Sequence[Sequence[int]], settings: SampleSettings) -> list[Completion]:
        async with self._client() as client:
            if self._models is None:
                self._models = await self._look(client)
            own = self._models.get(self.model, {})  # an adapter has the context of its base
            limit = own.get("max_model_len") or self._models.get(str(own.get("parent")), {}).get("max_model_len")
            requests = _requests(prompts, settings, limit)
            gate = asyncio.Semaphore(self.parallel)
            tasks = [asyncio.create_task(self._complete(client, gate, request, settings)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _client(self) -> AsyncOpenAI:
        try:
            import openai
        except ImportError as error:
            said, remedy = "a remote server needs the package 'openai', which is not installed", "pip install 'tunesmith[remote]'"
            raise RecipeError(said, where="RemoteSampler", remedy=remedy, code="missing_package") from error
        patience = openai.Timeout(self.timeout, connect=min(self.timeout, 10.0))
        return openai.AsyncOpenAI(base_url=self.url, api_key=self._api_key, timeout=patience, max_retries=self.retries)

    async def _ask(self, client: AsyncOpenAI, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and content of the answer, a refusal too; ModelError where none comes."""
        import openai

        try:
            sent = client.get(path, cast_to=object) if body is None else client.post(path, cast_to=object, body=body)
            return 200, await sent
        except openai.APIStatusError as error:
            return error.status_code, error.body or str(error)
        except openai.APITimeoutError as error:
            said = f"the server did not answer within {self.timeout:g} s, asked {client.max_retries + 1} times"
            remedy = "see what its log says; give it more time (timeout), or less to do at once (parallel)"
            raise ModelError(said, where=self.url, remedy=remedy, code="server_silent") from error
        except openai.APIConnectionError as error:
            said = f"the server is not there, or drops the connection ({error.__cause__ or error})"
            remedy = f"see whether it runs, and {V1}"
            raise ModelError(said, where=self.url, remedy=remedy, code="server_unreachable") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise ModelError(f"no answer of OpenAI's kind: {error}", where=self.url, remedy=V1, code="wrong_url") from error

    async def _look(self, client: AsyncOpenAI) -> dict[str, dict[str, Any]]:
        """The models that the server lists; none where it has no list."""
        status, listed = await self._ask(client, "/models")
        if status >= 400 and status not in (403, 404, 405, 501):
            raise self._refusal(status, listed)
        cards = (listed.get("data") or []) if isinstance(listed, dict) else []
        if any(card.get("owned_by") == "sglang" for card in cards):
            self._refused.add("ignore_eos")  # there it switches stop_token_ids off too, and every answer would take its full length
        return {str(card.get("id")): card for card in cards}

    async def _complete(self, client: AsyncOpenAI, gate: asyncio.Semaphore, request: _Request, settings: SampleSettings) -> Completion:
        async with gate:
            while True:
                body, spare = self._body(request, settings)
                status, content = await self._ask(client, "/completions", body)
                named = _named(content, body) if status in (400, 422) else set()
                if not named or named - spare:
                    break
                if named - self._refused:
                    logger.info("%s does not know %s: going on without", self.url, ", ".join(sorted(named)))
                self._refused |= named
        if status >= 400:
            raise self._refusal(status, content, prompt=f"prompt {request.prompt}", model=str(body["model"]), fields=named - spare)
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ModelError("it did not answer with one completion", where=self.url, remedy=V1, code="wrong_url")
        return self._completion(choices[0], request, settings)

    def _body(self, request: _Request, settings: SampleSettings) -> tuple[dict[str, Any], set[str]]:
        """A request's fields, and the names of those that a server may refuse: they say what is off, or ask to be told more."""
        body = {"model": settings.adapter or self.model, "prompt": [list(request.ids)], "logprobs": max(1, settings.top_logprobs)}
        body |= {"max_tokens": request.room, "temperature": settings.temperature, "top_p": settings.top_p, "n": 1, "seed": request.seed}
        body |= {name: value for name in ("frequency_penalty", "presence_penalty", "stop") if (value := vars(settings)[name])}
        body |= {"logit_bias": dict(settings.logit_bias)} if settings.logit_bias else {}
        # Name -> value and whether it can be left out. What is off is said too, or vLLM takes the model's generation_config.
        vllm: dict[str, tuple[Any, bool]] = {
            "top_k": (settings.top_k or -1, not settings.top_k),
            "min_p": (settings.min_p, not settings.min_p),
            "repetition_penalty": (settings.repetition_penalty, settings.repetition_penalty == 1),
            "stop_token_ids": (list(dict.fromkeys([*self.stop_ids, *settings.stop_ids])), not settings.stop_ids),
            "ignore_eos": (True, True),  # only our stop_ids end an answer
            "return_token_ids": (True, True),
            "return_tokens_as_token_ids": (True, not settings.top_logprobs),
            "skip_special_tokens": (False, True),
            "include_stop_str_in_output": (True, True),  # for a text that has to be encoded again with what ended it
        }
        body |= {name: value for name, (value, spare) in vllm.items() if not (spare and name in self._refused)}
        return body, {name for name, (_, spare) in vllm.items() if spare}

    def _completion(self, choice: dict[str, Any], request: _Request, settings: SampleSettings) -> Completion:
        logs = choice.get("logprobs") or {}
        tokens, values = logs.get("tokens") or [], logs.get("token_logprobs") or []
        stops, text = {*self.stop_ids, *settings.stop_ids}, None
        ids = choice.get("token_ids")
        if ids is None and tokens and all(token.startswith(NAMED) for token in tokens):
            ids = [int(token.removeprefix(NAMED)) for token in tokens]
        if ids is None:
            text = str(choice.get("text") or "")
            ids = self._encode(text, tokens, stops)
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        reason = "stop" if end is not None else choice.get("finish_reason")
        wrong = ""
        if (choice.get("prompt_token_ids") or list(request.ids)) != list(request.ids):
            wrong = "it was asked with another prompt than ours"
        elif len(ids) != len(values) or None in values:
            wrong = f"there are {len(values)} log-probabilities for {len(ids)} tokens"
        elif reason not in ("stop", "length"):
            wrong = f"it ended with '{reason}'"
        if wrong:
            said, remedy = f"the server's answer cannot be used: {wrong}", "see its log; vLLM gives ids and log-probabilities of each token"
            raise ModelError(said, where=f"{self.url}, prompt {request.prompt}", remedy=remedy, code="bad_answer")
        kept = ids if end is None else ids[: end + 1]
        if text is None:
            text = continuation(self.tokenizer, request.ids, kept if end is None else kept[:-1])
        elif end is not None:
            text = text.partition(continuation(self.tokenizer, (), kept[-1:]))[0]
        text = text[: min([len(text), *(place for stop in settings.stop if (place := text.find(stop)) >= 0)])]
        top = _likeliest(logs.get("top_logprobs") or [], settings.top_logprobs, len(ids))[: len(kept)]
        logprobs = tuple(float(value) for value in values[: len(kept)])
        return Completion(text.removeprefix(self.lead), tuple(kept), logprobs, "stop" if reason == "stop" else "length", top)

    def _encode(self, text: str, tokens: list[str], stops: set[int]) -> list[int]:
        if not self._told:
            self._told = True
            logger.info("%s gives no token ids: its texts are encoded again, and log-probabilities may not line up", self.url)
        ids = [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        # Some servers leave the token that ended the answer out of the text, and yet report it among the log-probabilities.
        last = [token for token in sorted(stops) if len(tokens) == len(ids) + 1 and continuation(self.tokenizer, (), [token]) == tokens[-1]]
        return ids + last[:1]

    def _refusal(
        self, status: int, content: Any, *, prompt: str = "", model: str = "", fields: Iterable[str] = (), verb: str = ""
    ) -> TunesmithError:
        said, speaks = _said(content)
        names = ", ".join(sorted({SETTINGS.get(field, field) for field in fields}))
        listed = f"it lists {', '.join(self._models or ()) or 'nothing'}{did_you_mean(model, self._models or ())}; load_adapter adds one"
        runtime = "start vLLM with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
        taken, lacking = f"call unload_adapter('{model}') first, or choose another name", "see which ones it lists (GET /models)"
        kinds = "see its log; vLLM takes LoRA without DoRA and modules_to_save, up to its --max-lora-rank"
        busy = f"see its log, or lower parallel (sent {self.retries + 1} times)"
        rows: tuple[tuple[Any, type[TunesmithError], str, str, str], ...] = (
            (status in (401, 403), RecipeError, "bad_key", self.url, "give api_key, or set OPENAI_API_KEY, to a key that it knows"),
            (verb and status in (404, 405) and not speaks, RecipeError, "adapters_fixed", model, runtime),
            (verb and status == 400 and "already" in said, RecipeError, "adapter_loaded", model, taken),
            (verb == "load" and status == 404, RecipeError, "adapter_missing", model, "give a folder as the server sees it"),
            (verb == "unload" and status == 404, RecipeError, "adapter_unknown", model, lacking),
            (verb, RecipeError, "adapter_refused", model, kinds),
            (status == 404 and not speaks, ModelError, "wrong_url", self.url, V1),
            (status == 404, ModelError, "no_such_model", model, listed),
            (status == 429 or status >= 500, ModelError, "server_failed", self.url, busy),
            (prompt and LONG.search(said), DataError, "prompt_too_long", prompt, "shorten the prompt, or lower max_new_tokens"),
            (names, RecipeError, "setting_refused", names, "leave it at its default, or use a server that can do it, such as vLLM"),
            (True, ModelError, "request_refused", self.url, "see what it asks for"),
        )
        kind, code, where, remedy = next(row[1:] for row in rows if row[0])
        return kind(f"the server {self.url} answers {status}: {said[:500]}", where=where, remedy=remedy, code=code)


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, run in a thread of its own: a notebook's thread has a loop already, and Ctrl-C reaches only the first."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    try:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(loop.run_until_complete, task)
            try:
                return done.result()
            except BaseException:
                loop.call_soon_threadsafe(task.cancel)
                raise
    finally:
        loop.close()


def _requests(prompts: Sequence[Sequence[int]], settings: SampleSettings, limit: int | None) -> list[_Request]:
    out: list[_Request] = []
    seen: Counter[tuple[int, ...]] = Counter()
    for number, prompt in enumerate(prompts):
        ids = tuple(int(token) for token in prompt)
        room = room_for(ids, settings.max_new_tokens, limit, f"prompt {number}")
        name = content_hash(ids)
        # 31 bits, which every server takes: several keep a seed in 32.
        seeds = (seed_of(settings.seed, "sample", name, seen[ids], index) >> 32 for index in range(settings.n))
        out.extend(_Request(number, ids, seed, room) for seed in seeds)
        seen[ids] += 1
    return out


def _likeliest(rows: list[dict[str, float]], count: int, length: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The `count` likeliest tokens of every place; a server lists the drawn token too when it is not one of them."""
    if not count:
        return ()
    if len(rows) != length or not all(name.startswith(NAMED) for row in rows for name in row):
        said, remedy = "the server does not say which ids its likeliest tokens have", "use top_logprobs: 0, or vLLM"
        raise RecipeError(said, where="top_logprobs", remedy=remedy, code="setting_refused")
    pairs = ([(int(name.removeprefix(NAMED)), float(value)) for name, value in row.items()] for row in rows)
    return tuple(tuple(sorted(row, key=lambda pair: -pair[1])[:count]) for row in pairs)


def _said(content: Any) -> tuple[str, bool]:
    """What a refusal says, and whether it is the API's own; a web server that lacks the whole path says so in another shape."""
    words = content.get("message") or content.get("detail") or content if isinstance(content, dict) else content
    return str(words), isinstance(content, dict) and "message" in content


def _named(content: Any, body: dict[str, Any]) -> set[str]:
    """The fields of `body` that a refusal names; none where it repeats the whole request."""
    fields = set(body) - {"model", "prompt", "n"}
    if isinstance(content, dict) and content.get("param") in fields:
        return {content["param"]}
    named = {name for name in fields if re.search(rf"(?<!\w){name}(?!\w)", _said(content)[0])}
    return set() if {"temperature", "seed"} <= named else named
