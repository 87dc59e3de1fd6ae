"""What benchmarks/generate.py runs, each in a process of its own: write model, prompts and adapters, sample with ours, sample with peers.

Prompts are random ids and no token ends an answer, so that every side writes the same number of tokens.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import ALPHA, RANK, SHAPE, Result, Setting, answer, now, peak_memory, write_model

LENGTHS = (80, 120)  # tokens of a prompt, drawn between
ADAPTERS = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM_UP = 4  # new tokens of the call that is not timed
POSITIONS = 2_048
# Freshly drawn weights say the same token over and over. Wider layers and a louder last norm make the context matter and the tokens differ.
WIDER, LOUDER = 1.5, 4.0
B_STD = 0.02  # of the adapters' second factors: about an eighth of what the base's own products give
LLAMA_8B = {"vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "max_position_embeddings": 8_192}
Ids = list[list[int]]


@dataclass(frozen=True)
class Case:
    """What is sampled: the first `rows` prompts of the work folder, `new` tokens each, row i through adapter i modulo those in use."""

    name: str
    work: str
    rows: int
    new: int

    @property
    def model(self) -> str:
        return f"{self.work}/model"

    @property
    def prompts(self) -> Ids:
        every: Ids = json.loads(Path(self.work, "prompts.json").read_text(encoding="utf-8"))
        return every[: self.rows]

    def adapter(self, number: int) -> str:
        """The folder of an adapter."""
        return f"{self.work}/adapters/a{number}"


def build(work: Path, _data: str, quick: bool) -> Result:
    """Write the model with a tokenizer, the prompts, and the adapters as PEFT folders; all from fixed seeds."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tunesmith.pocket.tickets import training_rows

    texts = (message["content"] for row in training_rows(300, 0) for message in row["messages"])
    model, tokenizer = write_model(work / "model", texts, 2 if quick else None)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = None
    model.config.max_position_embeddings = POSITIONS
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight.mul_(WIDER)
        model.model.norm.weight.mul_(LOUDER)
    model.save_pretrained(work / "model")
    draw = random.Random(0)
    prompts = [[draw.randrange(SHAPE["vocab_size"]) for _ in range(draw.randint(*LENGTHS))] for _ in range(64)]
    (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    adapted = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"), autocast_adapter_dtype=False
    )
    adapted.peft_config["default"].base_model_name_or_path = str(work / "model")
    for number in range(ADAPTERS):
        torch.manual_seed(1 + number)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_A" in name:
                    weight.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
                elif "lora_B" in name:
                    weight.normal_(std=B_STD)
        adapted.save_pretrained(work / "adapters" / f"a{number}")
    return {
        "cuda": torch.cuda.is_available(), "threads": torch.get_num_threads(), "vocabulary": SHAPE["vocab_size"],
        "words_of_the_tokenizer": len(tokenizer), "prompt_tokens": [len(prompt) for prompt in prompts],
    }  # fmt: skip


def device() -> str:
    """Where everything runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def found(case: Case, tokens: Ids, seconds: float, **others: Any) -> Result:
    """What a measurement hands back; ends the process when a row has not as many new tokens as it should."""
    import torch

    lengths = [len(row) for row in tokens]
    if lengths != [case.new] * case.rows:
        raise SystemExit(f"{case.rows} rows of {case.new} new tokens were asked for, these came: {lengths}")
    return {
        "tokens": tokens, "new_tokens": sum(lengths), "seconds": seconds, "memory_gb": peak_memory(), "threads": torch.get_num_threads(),
        **others,
    }  # fmt: skip


def ours(case: Case, setting: Setting) -> Result:
    """Our engine; `adapters` loads so many and gives each row its own, in turn."""
    from tunesmith.core.ports import SampleSettings
    from tunesmith.infer.engine import Engine
    from tunesmith.model.build import load_policy
    from tunesmith.model.tokenizer import load_tokenizer

    engine = Engine(
        load_policy(case.model, dtype="bf16", device=device()), load_tokenizer(case.model), stop_ids=(), max_rows=64, int8=setting["int8"]
    )
    names = [f"a{number}" for number in range(setting.get("adapters", 0))]
    for number, name in enumerate(names):
        engine.adapters.load(name, case.adapter(number))
    prompts = case.prompts

    def settings(new: int) -> Any:
        heat = setting["temperature"]
        if not names:
            return SampleSettings(max_new_tokens=new, temperature=heat, adapter=None)
        own = [SampleSettings(max_new_tokens=new, temperature=heat, adapter=name) for name in names]
        return [own[row % len(own)] for row in range(len(prompts))]

    engine.sample(prompts, settings(WARM_UP))
    began = now()
    rows = engine.sample(prompts, settings(case.new))
    seconds = now() - began
    tokens = [list(completion.ids) for (completion,) in rows]
    return found(case, tokens, seconds, logprobs=[list(completion.logprobs) for (completion,) in rows])


def batches(prompts: Ids, size: int) -> list[list[int]]:
    """The numbers of the prompts, sorted by length, so many at a time."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Ids and mask, padded at the left."""
    import torch

    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids.to(device()), "attention_mask": mask.to(device())}


def asked(new: int, setting: Setting, **others: Any) -> Any:
    """A GenerationConfig: greedy, or drawn from the whole vocabulary."""
    from transformers import GenerationConfig

    heat = setting["temperature"]
    drawn = {"do_sample": True, "temperature": heat, "top_k": 0, "top_p": 1.0} if heat else {"do_sample": False}
    return GenerationConfig(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **drawn, **others)


def base_of(case: Case) -> Any:
    """The model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.bfloat16, attn_implementation="sdpa").to(device()).eval()


def peer(case: Case, setting: Setting) -> Result:
    """`generate` of transformers in padded batches, or its continuous batching."""
    return generate(case, setting, base_of(case)) if setting["engine"] == "generate" else continuous(case, setting, base_of(case))


def generate(case: Case, setting: Setting, model: Any) -> Result:
    """Batch after batch; `adapters` sends each row through its own (PEFT's mixed batch), `grouped` one adapter's rows after another's."""
    import torch

    prompts = case.prompts
    own = [f"a{number % setting['adapters']}" for number in range(len(prompts))] if "adapters" in setting else None
    if own is None or not setting.get("grouped"):
        plan = batches(prompts, setting["batch"])
    else:
        plan = [[number for number, one in enumerate(own) if one == name] for name in dict.fromkeys(own)]

    def write(numbers: list[int], new: int) -> Ids:
        config = asked(new, setting, cache_implementation=setting["cache"], disable_compile=True)
        inputs, mixed = padded([prompts[number] for number in numbers]), {}
        if own is not None and setting.get("grouped"):
            model.set_adapter(own[numbers[0]])
        elif own is not None:
            mixed = {"adapter_names": [own[number] for number in numbers]}
        rows: Ids = model.generate(**inputs, generation_config=config, **mixed)[:, inputs["input_ids"].shape[1] :].tolist()
        return rows

    with torch.inference_mode():
        write(plan[0], WARM_UP)
        began = now()
        written = {number: row for numbers in plan for number, row in zip(numbers, write(numbers, case.new), strict=True)}
        seconds = now() - began
    return found(case, [written[number] for number in range(len(prompts))], seconds)


def continuous(case: Case, setting: Setting, model: Any) -> Result:
    """`generate_batch`: paged keys and values, rows let in as others end. Its manager is made by the warm-up and stays.

    Not in inference mode: its thread writes in place to tensors that were made in the caller's. Blocks are not shared, since the prompts of
    the warm-up would be found again. The cache is as large as all rows need; else it would take six tenths of the memory.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    prompts, page = case.prompts, setting["page"]
    # Compiled shapes are filled up; by itself to 64 tokens that look at 16,384.
    steps = {"q_padding_interval_size": 16, "kv_padding_interval_size": 1_024}
    compiled = {"default_compile_level": setting["compile"], **steps} if "compile" in setting else {}
    blocks = setting["batch"] * (-(-(LENGTHS[1] + case.new) // page) + 1)
    config = ContinuousBatchingConfig(
        page_size=page, num_blocks=blocks, max_batch_tokens=setting["tokens"], max_requests_per_batch=setting["batch"],
        allow_block_sharing=False, seed=0, **compiled,
    )  # fmt: skip

    def write(new: int) -> Ids:
        rows = model.generate_batch(
            prompts, asked(case.new, setting, eos_token_id=-1), config, persistent_manager=True, max_new_tokens=new
        )  # fmt: skip
        if errors := [row.error for row in rows.values() if row.error]:
            raise SystemExit(f"continuous batching: {errors[0]}")
        return [list(row.generated_tokens) for row in rows.values()]

    write(WARM_UP)
    began = now()
    tokens = write(case.new)
    seconds = now() - began
    model.destroy_cached_continuous_batching_manager()
    return found(case, tokens, seconds)


def peft(case: Case, setting: Setting) -> Result:
    """PEFT with all adapters loaded in bf16; by itself it would keep them in fp32."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_of(case), case.adapter(0), adapter_name="a0", autocast_adapter_dtype=False)
    for number in range(1, setting["adapters"]):
        model.load_adapter(case.adapter(number), adapter_name=f"a{number}", autocast_adapter_dtype=False)
    return generate(case, setting, model.eval())


def score(case: Case, setting: Setting) -> Result:
    """Log-probabilities of given tokens by our forward pass without a cache, in `dtype`, with an adapter or none; `rows` tell which."""
    import numpy as np
    import torch

    from tunesmith.core.types import Batch, Segment
    from tunesmith.model.build import load_policy

    tokens: Ids = json.loads(Path(setting["tokens"]).read_text(encoding="utf-8"))
    adapter = None if setting.get("adapter") is None else case.adapter(setting["adapter"])
    policy = load_policy(case.model, adapter=adapter, dtype=setting["dtype"], device=device())
    values = []
    with torch.no_grad():
        for number in setting["rows"]:
            prompt, ids = case.prompts[number], tokens[number]
            train = np.array([0.0] * len(prompt) + [1.0] * len(ids), np.float32)
            whole = np.array(prompt + ids, np.int32)
            values.append(policy.score(Batch(whole, train, (Segment(0, len(whole), str(number)),))).logp.tolist())
    return {"logprobs": values}


def copy_speed() -> float:
    """Bytes a second that a GPU reads and writes as it copies a gigabyte."""
    import torch

    one = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other, spans = torch.empty_like(one), []
    for _ in range(10):
        began = now()
        other.copy_(one)
        spans.append(now() - began)
    del one, other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float((2 << 30) / min(spans))


def gpu(case: Case, setting: Setting) -> Result:
    """An 8B shape with random weights: seconds of a step at `case.rows` rows, against reading the weights and the cache once.

    With steps recorded as CUDA graphs (`recorded`) or not; `arena` and `recorded` of the result say what the engine really did.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.core.ports import SampleSettings
    from tunesmith.core.recipe import Fast
    from tunesmith.infer.engine import Engine
    from tunesmith.model.policy import Policy
    from tunesmith.model.probe import settle
    from tunesmith.model.tokenizer import load_tokenizer

    os.environ["TUNESMITH_GRAPHS"] = "1" if setting["recorded"] else "0"
    bandwidth = copy_speed()
    shape = LLAMA_8B | ({"num_hidden_layers": 2} if setting.get("quick") else {})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None, bos_token_id=None)).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    policy = Policy(model, torch.bfloat16)
    settle(policy, Fast())
    engine = Engine(policy, load_tokenizer(case.model), stop_ids=(), max_rows=case.rows)
    draw = random.Random(0)
    prompts = [[draw.randrange(shape["vocab_size"]) for _ in range(draw.randint(*LENGTHS))] for _ in range(case.rows)]

    def timed(new: int) -> tuple[float, Ids]:
        began = now()
        rows = engine.sample(prompts, SampleSettings(max_new_tokens=new, temperature=0.0))
        return now() - began, [list(completion.ids) for (completion,) in rows]

    timed(WARM_UP)
    prompt_seconds = min(timed(1)[0] for _ in range(3))
    seconds, tokens = timed(case.new)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name) * 2
    head = shape["hidden_size"] // shape["num_attention_heads"]
    a_position = 2 * shape["num_key_value_heads"] * head * shape["num_hidden_layers"] * 2
    positions = sum(len(prompt) + case.new / 2 for prompt in prompts)
    step = (seconds - prompt_seconds) / (case.new - 1)
    floor = (weights + positions * a_position) / bandwidth
    return found(
        case, tokens, seconds, prompt_seconds=prompt_seconds, step_seconds=step, floor_seconds=floor, share=floor / step,
        decode_tokens_per_s=case.rows / step, bandwidth_gb_s=bandwidth / 1e9, weights_gb=weights / 1e9, device=torch.cuda.get_device_name(),
        arena=policy.spans, recorded=policy.spans and not engine._next._graphs.off,
    )  # fmt: skip


if __name__ == "__main__":
    answer(__doc__, build, Case, {"ours": ours, "peer": peer, "peft": peft, "score": score, "gpu": gpu})
