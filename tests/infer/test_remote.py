"""The remote sampler against a real HTTP server that behaves like vLLM, like a plain OpenAI server, or badly."""

from __future__ import annotations

import asyncio
import builtins
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.core.errors import DataError, ModelError, RecipeError, TunesmithError
from tunesmith.core.ports import SampleSettings
from tunesmith.infer.remote import RemoteSampler

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BLANK, FIRST = LETTERS.index("Ġ"), LETTERS.index("a")
PROMPTS = [[40, 41, 42], [50], [40, 41, 42], [60, 61]]
OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "logprobs", "stop", "logit_bias"}
OPENAI |= {"frequency_penalty", "presence_penalty"}
SETTINGS = SampleSettings(max_new_tokens=12)


def drawn(ids: list[int], seed: int, model: str, stop: int) -> list[int]:
    """What the server's model says: a blank, a few letters, the stop token."""
    dice = random.Random(f"{ids}/{seed}/{model}")
    return [BLANK, *(FIRST + dice.randrange(26) for _ in range(dice.randrange(3, 7))), stop]


def logp(token: int, place: int) -> float:
    return -(token % 7 + place + 1) / 8


class Server(ThreadingHTTPServer):
    """`mode` is vllm, plain or sglang; `script` holds what goes wrong with the next completions."""

    daemon_threads = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self.mode, self.window, self.key, self.runtime = "vllm", 64, "", True
        self.refuses: set[str] = set()
        self.pydantic = False
        self.script: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.adapters: dict[str, str] = {}
        self.answer: dict[str, Any] = {}
        self.lock, self.released = threading.Lock(), threading.Event()
        self.barrier: threading.Barrier | None = None
        self.open = self.most_open = self.hung_up = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the game."""

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        unknown = sorted((set(body) - OPENAI if self.mode == "plain" else set()) | (set(body) & self.refuses))
        if unknown and self.pydantic:
            return 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", unknown[0]], "msg": "Extra inputs are not permitted"}]}
        if unknown:
            return error(400, f"Unrecognized request arguments supplied: {', '.join(unknown)}")
        if body["model"] not in {"base", *self.adapters}:
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        (ids,) = body["prompt"]
        if len(ids) + body["max_tokens"] > self.window and self.mode == "plain":
            return error(400, f"This model's maximum context length is {self.window} tokens. However, you requested more.")
        if body["temperature"] > 2:
            return error(400, "temperature must be in [0, 2], got 3.0.", param="temperature")
        answer = drawn(ids, body["seed"], body["model"], self.eos)
        ends = [*body.get("stop_token_ids", [])] + ([] if body.get("ignore_eos") else [self.eos])
        kept: list[int] = []
        reason, shown = "length", True
        for token in answer[: body["max_tokens"]]:
            kept.append(token)
            if token in ends or any(text in self.tokenizer.decode(kept) for text in body.get("stop", [])):
                reason, shown = "stop", token not in ends
                break
        choice = self.choice(ids, kept, reason, shown, body)
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice | self.answer]}

    def choice(self, ids: list[int], kept: list[int], reason: str, shown: bool, body: dict[str, Any]) -> dict[str, Any]:
        def name(token: int) -> str:
            return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.tokenizer.decode([token])

        reported = kept if self.mode != "plain" or shown else kept[:-1]
        logs = {"tokens": [name(t) for t in reported], "token_logprobs": [logp(t, k) for k, t in enumerate(reported)]}
        near = [{name(t): logp(t, k), name(t + 1): -9.0, name(t + 2): -0.01} for k, t in enumerate(reported)]
        out = {"index": 0, "finish_reason": reason, "logprobs": {**logs, "top_logprobs": near}}
        out["text"] = self.tokenizer.decode(kept if shown or body.get("include_stop_str_in_output") else kept[:-1])
        return out | ({"token_ids": kept, "prompt_token_ids": ids} if body.get("return_token_ids") else {})

    def change(self, verb: str, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if not self.runtime:
            return 404, {"detail": "Not Found"}
        if verb == "unload":
            found = self.adapters.pop(name, None)
            return (200, "Success") if found else error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded. If you want to, set 'load_inplace' to True.")
        if not Path(body["lora_path"]).is_dir():
            return error(404, f"Loading lora {name} failed: No adapter found for {body['lora_path']}", "NotFoundError")
        if not (Path(body["lora_path"]) / "adapter_model.safetensors").exists():
            return error(500, "no tensors in there", "InternalServerError")
        self.adapters[name] = body["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully."


def error(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(self, status: int, content: Any, **headers: str) -> None:
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, str):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def refused(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.send(*error(401, "Unauthorized"))
            return True
        return False

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path != "/v1/models" or self.server.mode == "plain":
            self.send(404, {"detail": "Not Found"})
            return
        base = {"id": "base", "owned_by": self.server.mode, "max_model_len": self.server.window}
        self.send(200, {"data": [base, *({"id": name, "parent": "base"} for name in self.server.adapters)]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if self.path == "/v1/completions":
            self.completions(body)
        elif self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            self.send(*self.server.change(self.path.split("/")[-1].partition("_")[0], body))
        else:
            self.send(404, {"detail": "Not Found"})

    def completions(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            trouble = server.script.pop(0) if server.script else ""
        try:
            if server.barrier is not None:
                server.barrier.wait(timeout=5)
                time.sleep(0.001 * (body["seed"] % 5))  # answers come in another order than they were asked for
            if trouble == "echo":
                self.send(*error(400, f"bad input: {body}"))
            elif trouble:
                self.trouble(trouble)
            else:
                status, content = server.complete(body)
                with server.lock:
                    server.open -= 1  # before the answer goes out, or the next request could come first
                self.send(status, content)
                return
        finally:
            if trouble:
                with server.lock:
                    server.open -= 1

    def trouble(self, kind: str) -> None:
        if kind in ("429", "500", "503"):
            self.send(*error(int(kind), f"sorry: {kind}"), Retry_After="0.01")
        elif kind == "half":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif kind == "page":
            self.send(200, "<html>welcome</html>")
        elif kind == "interrupt":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            self.connection.settimeout(5)
            self.server.hung_up += self.connection.recv(1) == b""
            self.close_connection = True
        else:
            self.server.released.wait(5)
            self.close_connection = True


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(LETTERS)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.fixture
def server(tokenizer: PreTrainedTokenizerFast) -> Iterator[Server]:
    made = Server(tokenizer)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.released.set()
    made.shutdown()
    thread.join()
    made.server_close()


def remote(server: Server, **changes: Any) -> RemoteSampler:
    settings = {"stop_ids": [server.eos], "lead": " ", "retries": 0, "api_key": "k", **changes}
    return RemoteSampler(server.url, "base", server.tokenizer, **settings)


def refused(work: Any, kind: type[TunesmithError], code: str) -> TunesmithError:
    with pytest.raises(kind) as caught:
        work()
    assert caught.value.code == code
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def test_order_ids_text_and_log_probabilities_under_concurrency(server: Server) -> None:
    server.barrier = threading.Barrier(4)
    settings = SampleSettings(max_new_tokens=12, n=3, seed=5)
    rows = remote(server, parallel=4).sample(PROMPTS, settings)
    assert [len(row) for row in rows] == [3, 3, 3, 3]
    assert server.most_open == 4, "four at once, never more"
    seeds: dict[tuple[int, ...], set[int]] = {}
    for body in server.bodies:
        seeds.setdefault(tuple(body["prompt"][0]), set()).add(body["seed"])
    assert {ids: len(own) for ids, own in seeds.items()} == {(40, 41, 42): 6, (50,): 3, (60, 61): 3}, "equal prompts draw anew"
    for prompt, row in zip(PROMPTS, rows, strict=True):
        possible = {tuple(drawn(prompt, seed, "base", server.eos)) for seed in seeds[tuple(prompt)]}
        for one in row:
            assert one.ids in possible
            assert one.ids[-1] == server.eos
            assert one.text == server.tokenizer.decode(one.ids[1:-1]), "without the lead and the stop token"
            assert one.logprobs == tuple(logp(token, place) for place, token in enumerate(one.ids))
            assert (one.stop_reason, one.top_logprobs) == ("stop", ())
    server.barrier = None
    assert remote(server, parallel=1).sample(PROMPTS, settings) == rows, "the same seeds, in the same places"
    assert remote(server).sample(PROMPTS[::-1], settings)[::2] == [rows[3], rows[1]]
    assert remote(server).sample(PROMPTS, SampleSettings(max_new_tokens=12, n=3, seed=6)) != rows


def test_what_is_asked_of_vllm(server: Server) -> None:
    bent = {"min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3, "top_k": 40, "top_p": 0.9}
    given = SampleSettings(max_new_tokens=9, temperature=0.7, logit_bias={5: -100.0}, stop=("zz",), stop_ids=(7,), top_logprobs=3, **bent)
    remote(server).sample([[50]], given)
    seed = server.bodies[0].pop("seed")
    assert 0 <= seed < 2**31
    asked = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
    asked |= {"model": "base", "prompt": [[50]], "max_tokens": 9, "n": 1, "temperature": 0.7, "logit_bias": {"5": -100.0}, "stop": ["zz"]}
    asked |= {"stop_token_ids": [server.eos, 7], "logprobs": 3, "include_stop_str_in_output": True}
    assert server.bodies[0] == bent | asked
    remote(server).sample([[50]], SETTINGS)
    off = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 1}
    assert off.items() <= server.bodies[1].items(), "what is off is said, against the model's generation_config"
    assert not {"stop", "logit_bias", "frequency_penalty", "presence_penalty"} & set(server.bodies[1])
    assert RemoteSampler(server.url, "base", None, stop_ids=[]).sample([], SETTINGS) == []


def test_stop_texts_lengths_and_top_log_probabilities(server: Server) -> None:
    sampler = remote(server)
    whole = sampler.sample([[50]], SETTINGS)[0][0]
    cut = sampler.sample([[50]], SampleSettings(max_new_tokens=12, stop=(whole.text[1:3],)))[0][0]
    assert (cut.text, cut.ids, cut.stop_reason) == (whole.text[:1], whole.ids[:4], "stop"), "ids keep what completed the stop text"
    short = sampler.sample([[50]], SampleSettings(max_new_tokens=3, top_logprobs=2))[0][0]
    assert (short.ids, short.text, short.stop_reason) == (whole.ids[:3], whole.text[:2], "length")
    assert [len(row) for row in short.top_logprobs] == [2, 2, 2]
    assert short.top_logprobs[1] == ((short.ids[1] + 2, -0.01), (short.ids[1], short.logprobs[1])), "the likeliest first, no third"
    inner = sampler.sample([[50]], SampleSettings(max_new_tokens=12, stop_ids=(whole.ids[2],)))[0][0]
    assert (inner.ids, inner.text, inner.stop_reason) == (whole.ids[:3], whole.text[:1], "stop")


def test_near_the_end_of_the_context_there_is_less_room(server: Server) -> None:
    server.window = 6
    (one,), (other,) = remote(server).sample([[50, 51, 52, 53], [50, 51]], SETTINGS)
    assert (len(one.ids), one.stop_reason) == (2, "length")
    assert [body["max_tokens"] for body in sorted(server.bodies, key=lambda body: -len(body["prompt"][0]))] == [2, 4]
    assert len(other.ids) <= 4
    long = refused(lambda: remote(server).sample([[50], [50] * 6], SETTINGS), DataError, "prompt_too_long")
    assert long.where == "prompt 1"
    server.mode = "plain"  # it does not say how long its context is
    long = refused(
        lambda: remote(server, parallel=1).sample([[50], [50] * 6], SampleSettings(max_new_tokens=4)), DataError, "prompt_too_long"
    )
    assert long.where == "prompt 1"
    assert "maximum context length is 6" in long.message
    empty = refused(lambda: remote(server).sample([[50], []], SETTINGS), DataError, "empty_prompt")
    assert empty.where == "prompt 1"


def test_a_plain_server_gets_what_it_knows_and_its_text_is_encoded_again(server: Server, said: list[str]) -> None:
    reference = remote(server).sample(PROMPTS, SETTINGS)
    server.mode = "plain"
    server.bodies.clear()
    sampler = remote(server)
    rows = sampler.sample(PROMPTS, SETTINGS) and sampler.sample(PROMPTS, SETTINGS)
    assert set(server.bodies[-1]) <= OPENAI
    assert sum(set(body) <= OPENAI for body in server.bodies) == 8
    assert sum("encoded again" in line for line in said) == 1
    for (ours,), (one,) in zip(reference, rows, strict=True):
        assert (one.text, one.stop_reason) == (ours.text, "stop")
        assert (one.ids, one.logprobs) == (ours.ids[:-1], ours.logprobs[:-1]), "such a server does not report its end token"


def test_ids_from_names_and_an_end_token_that_only_the_log_probabilities_show(server: Server) -> None:
    reference = remote(server).sample(PROMPTS, SETTINGS)
    server.refuses = {"return_token_ids"}
    assert remote(server).sample(PROMPTS, SETTINGS) == reference, "token_id:N"
    server.refuses = {"return_token_ids", "return_tokens_as_token_ids"}
    assert remote(server).sample(PROMPTS, SETTINGS) == reference, "the text holds the end token"
    server.refuses |= {"include_stop_str_in_output"}
    assert remote(server).sample(PROMPTS, SETTINGS) == reference, "tokens end with it"
    server.answer = {"text": "another length altogether"}
    bad = refused(lambda: remote(server).sample([[50]], SETTINGS), ModelError, "bad_answer")
    assert "prompt 0" in bad.where


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"prompt_token_ids": [1, 50]}, "another prompt"),
        ({"logprobs": None}, "0 log-probabilities"),
        ({"logprobs": {"tokens": ["a"], "token_logprobs": [None]}, "token_ids": [64]}, "log-prob"),
        ({"finish_reason": "abort", "token_ids": [64], "logprobs": {"token_logprobs": [-1.0]}}, "'abort'"),
    ],
)
def test_an_answer_that_cannot_be_used_is_an_error(server: Server, answer: dict[str, Any], said: str) -> None:
    server.answer = answer
    assert said in refused(lambda: remote(server).sample([[50]], SETTINGS), ModelError, "bad_answer").message


def test_a_server_that_ignores_stop_ids_is_cut_at_them(server: Server) -> None:
    server.answer = {
        "token_ids": [64, 65, server.eos, 66],
        "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0, -4.0]},
        "finish_reason": "length",
    }
    ((one,),) = remote(server).sample([[50]], SETTINGS)
    assert (one.ids, one.logprobs, one.stop_reason) == ((64, 65, server.eos), (-1.0, -2.0, -3.0), "stop")


def test_sglang_keeps_its_own_end(server: Server) -> None:
    server.mode = "sglang"
    remote(server).sample([[50]], SETTINGS)
    assert "ignore_eos" not in server.bodies[0]
    assert server.bodies[0]["stop_token_ids"] == [server.eos]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"top_k": 40}, "top_k"), ({"min_p": 0.1}, "min_p"), ({"stop_ids": (7,)}, "stop_ids"), ({"top_logprobs": 2}, "top_logprobs")],
)
def test_a_setting_that_the_server_does_not_know_is_named(server: Server, changes: dict[str, Any], setting: str) -> None:
    server.mode = "plain"
    bad = refused(lambda: remote(server).sample([[50]], SampleSettings(max_new_tokens=4, **changes)), RecipeError, "setting_refused")
    assert bad.where == setting
    assert "Unrecognized request argument" in bad.message


def test_a_server_that_names_one_unknown_field_at_a_time(server: Server) -> None:
    reference = remote(server).sample([[50]], SETTINGS)
    server.refuses, server.pydantic = {"return_token_ids", "skip_special_tokens", "top_k"}, True
    sampler = remote(server)
    assert sampler.sample([[50]], SETTINGS) == reference
    bad = refused(lambda: sampler.sample([[50]], SampleSettings(top_k=40)), RecipeError, "setting_refused")
    assert bad.where == "top_k", "once it matters it is not left out"


def test_a_refusal_that_repeats_the_whole_request_blames_no_setting(server: Server) -> None:
    server.script = ["echo"]
    assert "'seed'" in refused(lambda: remote(server).sample([[50]], SETTINGS), ModelError, "request_refused").message


def test_settings_out_of_range_are_named(server: Server) -> None:
    bad = refused(lambda: remote(server).sample([[50]], SampleSettings(temperature=3.0)), RecipeError, "setting_refused")
    assert (bad.where, "in [0, 2]" in bad.message) == ("temperature", True)
    assert refused(lambda: remote(server).sample([[50]], SampleSettings(n=0)), RecipeError, "bad_setting").where == "n"
    wild = SampleSettings(logit_bias={3: 200.0})
    assert refused(lambda: remote(server).sample([[50]], wild), RecipeError, "bad_setting").where == "logit_bias"
    assert refused(lambda: remote(server, parallel=0), RecipeError, "bad_setting").where == "parallel"
    assert len(server.bodies) == 1


def test_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "right"
    bad = refused(lambda: remote(server, api_key="wrong").sample([[50]], SETTINGS), RecipeError, "bad_key")
    assert "wrong" not in str(bad)
    refused(lambda: remote(server, api_key="wrong").load_adapter("a", "/x"), RecipeError, "bad_key")
    assert remote(server, api_key="right").sample([[50]], SETTINGS)
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert remote(server, api_key=None).sample([[50]], SETTINGS)


def test_a_model_or_an_address_that_is_not_there(server: Server) -> None:
    wrong = RemoteSampler(server.url, "bass", server.tokenizer, stop_ids=[server.eos], retries=0)
    bad = refused(lambda: wrong.sample([[50]], SETTINGS), ModelError, "no_such_model")
    assert (bad.where, "did you mean 'base'" in bad.remedy) == ("bass", True)
    nowhere = RemoteSampler(server.url.removesuffix("/v1"), "base", server.tokenizer, stop_ids=[server.eos], retries=0)
    assert "/v1" in refused(lambda: nowhere.sample([[50]], SETTINGS), ModelError, "wrong_url").remedy
    server.script = ["page"]
    refused(lambda: remote(server).sample([[50]], SETTINGS), ModelError, "wrong_url")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = RemoteSampler(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "base", server.tokenizer, stop_ids=[], retries=0)
        refused(lambda: closed.sample([[50]], SETTINGS), ModelError, "server_unreachable")


def test_what_passes_is_tried_again_and_what_stays_is_said(server: Server) -> None:
    reference = remote(server).sample([[50]], SETTINGS)
    server.bodies.clear()
    server.script = ["429", "500", "503"]
    start = time.monotonic()
    assert remote(server, retries=3).sample([[50]], SETTINGS) == reference
    assert (len(server.bodies), time.monotonic() - start < 2) == (4, True), "as soon as Retry-After allows; else it is 2.6 s"
    server.script = ["500", "500"]
    assert "sorry: 500" in refused(lambda: remote(server, retries=1).sample([[50]], SETTINGS), ModelError, "server_failed").message
    server.script = ["429"]
    assert "sorry: 429" in refused(lambda: remote(server).sample([[50]], SETTINGS), ModelError, "server_failed").message


def test_a_dropped_connection_and_a_silent_server(server: Server) -> None:
    reference = remote(server).sample([[50]], SETTINGS)
    server.script = ["half"]
    assert remote(server, retries=1).sample([[50]], SETTINGS) == reference
    server.script = ["half"]
    refused(lambda: remote(server).sample([[50]], SETTINGS), ModelError, "server_unreachable")
    server.script = ["silent"]
    assert "0.1 s" in refused(lambda: remote(server, timeout=0.1).sample([[50]], SETTINGS), ModelError, "server_silent").message


def test_one_failure_ends_the_others(server: Server) -> None:
    server.script = ["silent", "silent", "500"]
    start = time.monotonic()
    refused(lambda: remote(server).sample(PROMPTS, SETTINGS), ModelError, "server_failed")
    assert time.monotonic() - start < 4, "nobody waits for the silent ones"


def test_interrupting_closes_what_is_open(server: Server) -> None:
    server.script = ["interrupt"]
    with pytest.raises(KeyboardInterrupt):
        remote(server, parallel=1).sample(PROMPTS, SETTINGS)
    until = time.monotonic() + 2
    while not server.hung_up and time.monotonic() < until:
        time.sleep(0.005)
    assert (server.hung_up, len(server.bodies)) == (1, 1), "the request in flight was hung up, no other was sent"


def test_it_works_inside_a_running_loop(server: Server) -> None:
    async def notebook() -> Any:
        return remote(server).sample([[50]], SETTINGS)

    assert asyncio.run(notebook()) == remote(server).sample([[50]], SETTINGS)


def test_without_the_package(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    bad = refused(lambda: remote(server).sample([[50]], SETTINGS), RecipeError, "missing_package")
    assert bad.remedy == "pip install 'tunesmith[remote]'"


def adapter(folder: Path, weights: bytes = b"one") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_adapters_are_loaded_selected_and_forgotten(server: Server, tmp_path: Path) -> None:
    sampler = remote(server)
    sampler.load_adapter("tickets", adapter(tmp_path / "1"))
    assert server.adapters == {"tickets": str(tmp_path / "1")}
    ((base,),) = sampler.sample([[50]], SETTINGS)
    ((tuned,),) = sampler.sample([[50]], SampleSettings(max_new_tokens=12, adapter="tickets"))
    assert [body["model"] for body in server.bodies] == ["base", "tickets"]
    assert tuned.ids == tuple(drawn([50], server.bodies[1]["seed"], "tickets", server.eos)) != base.ids
    sampler.unload_adapter("tickets")
    gone = SampleSettings(max_new_tokens=12, adapter="tickets")
    assert "load_adapter" in refused(lambda: sampler.sample([[50]], gone), ModelError, "no_such_model").remedy


def test_adapters_that_cannot_be_loaded(server: Server, tmp_path: Path) -> None:
    sampler = remote(server)
    first = adapter(tmp_path / "1")
    sampler.load_adapter("a", first)
    assert "unload_adapter('a')" in refused(lambda: sampler.load_adapter("a", first), RecipeError, "adapter_loaded").remedy
    refused(lambda: sampler.load_adapter("a", adapter(tmp_path / "2")), RecipeError, "adapter_loaded")
    adapter(first, b"two")
    assert "new folder" in refused(lambda: sampler.load_adapter("a", first), RecipeError, "adapter_changed").remedy
    sampler.unload_adapter("a")
    refused(lambda: sampler.load_adapter("a", first), RecipeError, "adapter_changed")
    sampler.load_adapter("a", tmp_path / "2")
    assert "/nowhere" in refused(lambda: sampler.load_adapter("b", "/nowhere"), RecipeError, "adapter_missing").message
    (tmp_path / "3").mkdir()
    assert "no tensors" in refused(lambda: sampler.load_adapter("b", tmp_path / "3"), RecipeError, "adapter_refused").message
    refused(lambda: sampler.unload_adapter("b"), RecipeError, "adapter_unknown")
    server.runtime = False
    fixed = refused(lambda: sampler.load_adapter("c", first), RecipeError, "adapters_fixed")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in fixed.remedy
    refused(lambda: sampler.unload_adapter("a"), RecipeError, "adapters_fixed")
