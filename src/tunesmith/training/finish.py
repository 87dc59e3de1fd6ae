"""The end of a run: final folder, receipt, report; each written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from tunesmith.core.card import Card, write_card
from tunesmith.core.errors import ModelError
from tunesmith.core.files import atomic_folder, read_json, write_json
from tunesmith.core.load import Loaded, dump_yaml
from tunesmith.core.log import logger
from tunesmith.core.ports import SampleSettings
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Prompt, Tokens, content_hash
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import stop_ids
from tunesmith.data.template import ChatTemplate
from tunesmith.evals.likelihood import row_sums
from tunesmith.evals.report import environment, write_report
from tunesmith.evals.result import Result, sample_row
from tunesmith.evals.rows import as_text
from tunesmith.evals.run import perplexity_result, share_result
from tunesmith.infer.generate import generate
from tunesmith.model import reward
from tunesmith.model.policy import Policy
from tunesmith.model.quant import parameter_count
from tunesmith.model.readme import write_readme
from tunesmith.model.tokenizer import ADAPTER
from tunesmith.objective import Method
from tunesmith.training import receipt as receipts
from tunesmith.training import state as states
from tunesmith.training.loop import Job, likelihood_alone
from tunesmith.training.optimizers.weights import state_bytes
from tunesmith.training.sinks import read_metrics
from tunesmith.training.speed import summary
from tunesmith.training.state import Identity
from tunesmith.training.step import Budget, grades

SAMPLE = SampleSettings(max_new_tokens=96, temperature=0.0)


def finished(run: Path, identity: Identity) -> dict[str, Any] | None:
    """The result of a finished run of the same identity, or None."""
    if not (run / "result.json").exists() or not (run / "final").is_dir():
        return None
    stored = read_json(run / "receipt.json")
    result: dict[str, Any] = read_json(run / "result.json")
    return result if stored["identity"] == content_hash(asdict(identity)) else None


def remember_before(
    run: Path, policy: Policy, tokenizer: Any, prepared: Prepared, methods: Sequence[Method], budget: Budget, *, fresh: bool
) -> None:
    """Write before.json: what the untrained model answers to the report's prompts, and says of the probes and the validation rows."""
    if not fresh and (run / "before.json").exists():
        return
    probes = receipts.probe_rows(prepared.validation or prepared.train, scalar=policy.scalar)
    policy.train_mode(False)
    before = {
        "answers": answers(policy, tokenizer, prepared.template, prepared.prompts),
        "probe_logprobs": receipts.live_numbers(policy, probes),
        "validation": _validation(policy, list(prepared.validation), methods, budget) if prepared.validation else None,
    }
    write_json(run / "before.json", before)


def answers(policy: Policy, tokenizer: Any, template: ChatTemplate, prompts: Sequence[Prompt]) -> list[str]:
    """Greedy answers to prompts; none from a reward model."""
    if policy.scalar:
        return [""] * len(prompts)
    if not prompts:
        return []
    rows = generate(policy, tokenizer, template, prompts, SAMPLE)
    return [row["completions"][0]["text"] for row in rows]


def finish(loaded: Loaded, job: Job, prepared: Prepared, tokenizer: Any, seconds: float) -> dict[str, Any]:
    """Write final/, receipt.json, report and result.json, and return the result.

    Raises ModelError (nothing_learned) when the trained model says exactly what the base says, and (reread_differs) when the
    saved files, read with plain transformers or PEFT, say something else than the model in memory.
    """
    recipe, run, policy, progress = job.recipe, job.run, job.policy, job.progress
    _take_best(job)
    policy.train_mode(False)
    probes = receipts.probe_rows(prepared.validation or prepared.train, scalar=policy.scalar)
    live = receipts.live_numbers(policy, probes)
    before = read_json(run / "before.json")
    after = answers(policy, tokenizer, prepared.template, prepared.prompts)
    scores = _scores(job, before["validation"])
    final = run / "final"
    save_final(final, policy, tokenizer, prepared, recipe)
    device = str(policy.device)
    if device.startswith("cuda"):
        policy.model.to("cpu")  # room for the copy that is read back
    proof = receipts.reread(final, probes, live, receipts.precision(policy), device)
    change = receipts.largest_difference(live, before["probe_logprobs"])
    env = environment(device)
    receipt = {
        "identity": content_hash(asdict(job.identity)),
        "hashes": {
            "base": job.identity.base,
            "data": job.identity.data,
            "template": job.identity.template,
            "recipe": recipe.hash(),
            "code": receipts.code_hash(),
            "final": receipts.final_hash(final),
        },
        "steps": progress.step,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        **proof,
        "max_abs_logprob_change_from_base": change,
        "fast_paths": policy.ways(),
        "optimizer": {
            "name": recipe.optim.name,
            "state_bytes": state_bytes(job.optimizer),
            "trained_share": sum(p.numel() for p in policy.parameters_by_name().values()) / parameter_count(policy.model),
        },
        "speed": {**job.gauge.as_dict(), **summary(read_metrics(run / "metrics.jsonl"))},
        "environment": env,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(run / "receipt.json", receipt)
    rows = [
        sample_row(prompt.key, as_text(prompt.messages), prompt.truth, new, {}, base=old)
        for prompt, old, new in zip(prepared.prompts, before["answers"], after, strict=True)
        if not policy.scalar
    ]
    result = _result(job, receipt, seconds)
    write_report(
        run,
        title=run.name,
        subtitle=f"{recipe.model.base}, {recipe.model.adapter.name if recipe.model.adapter else 'all weights'}",
        facts=_facts(job, result),
        recipe_yaml=dump_yaml(loaded),
        metrics=_curve(job),
        scores=scores,
        samples=rows,
        ledger=prepared.ledger.as_dict(),
        receipt=receipt,
        environment=env,
    )
    write_json(run / "result.json", result)
    _demand_proof(run, receipt, probes=len(probes))
    return result


def _take_best(job: Job) -> None:
    best = job.progress.best_step
    if job.recipe.run.use_best and best is not None and best != job.progress.step:
        logger.info("final/ takes the best validated step %d (the last was %d)", best, job.progress.step)
        job.policy.load_state(safetensors.torch.load_file(states.folder_of(job.run, best) / "weights.safetensors"))


def _validation(policy: Policy, rows: Sequence[Tokens], methods: Sequence[Method], budget: Budget) -> dict[str, Any]:
    """What the report compares before and after: the rows' likelihoods, or how right the objective finds each pair, label or solution."""
    if likelihood_alone(methods):
        sums, weights = row_sums(policy, rows)
        return {"perplexity": {"sums": sums.tolist(), "weights": weights.tolist()}}
    return {"accuracy": grades(policy, rows, methods, budget)}


def _scores(job: Job, before: dict[str, Any] | None) -> list[Result]:
    """The validation rows after training beside before, with intervals and their difference."""
    if not job.validation or before is None:
        return []
    seed = job.recipe.run.seed
    after = _validation(job.policy, job.validation, job.methods, job.budget)
    if "perplexity" in after:
        now, then = after["perplexity"], before["perplexity"]
        numbers = (np.asarray(values) for values in (now["sums"], now["weights"], then["sums"]))
        return [perplexity_result(*numbers, task="validation", seed=seed)]
    return (
        [share_result(after["accuracy"], before["accuracy"], task="validation", metric="accuracy", seed=seed)] if after["accuracy"] else []
    )


def save_final(final: Path, policy: Policy, tokenizer: Any, prepared: Prepared, recipe: Recipe) -> None:
    """Write the model, its tokenizer and the template that it was trained with, loadable without tunesmith."""
    template = prepared.template
    if template.text is not None:
        tokenizer.chat_template = template.text
    stops = stop_ids(template, tokenizer)
    if policy.scalar:
        ends = {int(row.ids[-1]) for row in prepared.train}
        pad = reward.choose_pad(policy.causal.config, tokenizer, ends)
    else:
        # What plain `generate` stops at; an adapter folder has no generation configuration of its own.
        policy.causal.generation_config.eos_token_id = list(stops)
        pad = None
    with atomic_folder(final) as folder:
        policy.save(folder)
        tokenizer.save_pretrained(str(folder))
        card = Card(
            recipe.model.base,
            recipe.model.revision,
            receipts.precision(policy),
            recipe.model.adapter is not None,
            template.source,
            template.hash,
            dict(template.options),
            stops,
            recipe.hash(),
        )
        write_card(folder, card)
        if (folder / ADAPTER).is_file():
            write_readme(folder, scalar=policy.scalar, pad=pad)
        if policy.scalar:
            position: reward.Position = "steps" if any(term.name == "prm" for term in recipe.objective) else "last"
            reward.write_card(folder, reward.RewardCard(position, template.hash, template.source, pad))


def _curve(job: Job) -> list[dict[str, Any]]:
    rows = read_metrics(job.run / "metrics.jsonl")
    if job.progress.start is not None:
        rows.insert(0, {"step": 0, **job.progress.start})
    return rows


def _result(job: Job, receipt: dict[str, Any], seconds: float) -> dict[str, Any]:
    rows = read_metrics(job.run / "metrics.jsonl")
    evaluated = [row for row in rows if "eval/loss" in row]
    last = {**(rows[-1] if rows else {}), **({k: v for k, v in evaluated[-1].items() if k.startswith("eval/")} if evaluated else {})}
    progress = job.progress
    best = None if progress.best_step is None else {"step": progress.best_step, "eval/loss": progress.best_loss}
    return {
        "run": str(job.run),
        "steps": progress.step,
        "final": str(job.run / "final"),
        "metrics": last,
        "start": progress.start,
        "best": best,
        "seconds": seconds,
        "tokens_per_s": progress.tokens / max(progress.seconds, 1e-9),
        "speed": receipt["speed"],
        "receipt": {
            "path": str(job.run / "receipt.json"),
            "measure": receipts.measure_of(receipt["probes"]),
            **{k: receipt[k] for k in ("max_abs_logprob_diff", "tolerance", "passed", "max_abs_logprob_change_from_base")},
        },
        "report": str(job.run / "report.html"),
    }


def _facts(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    trained = sum(parameter.numel() for parameter in job.policy.parameters_by_name().values())
    speed = result["speed"]
    return {
        "steps": result["steps"],
        "tokens": f"{job.progress.tokens:,}",
        "trained tokens": f"{job.progress.trained_tokens:,}",
        "trained parameters": f"{trained:,} of {parameter_count(job.policy.model):,}",
        "optimizer": f"{job.recipe.optim.name}, {state_bytes(job.optimizer) / 1e6:,.1f} MB of state",
        "tokens per second": f"{result['tokens_per_s']:,.0f}",
        "model FLOPs utilisation": f"{speed['mfu']:.2f}" if "mfu" in speed else None,
        "of a GEMM": f"{speed['gemm']}, {speed['gemm_tflops']:.3g} TFLOP/s",
        "seconds": f"{result['seconds']:.0f}",
    }


def _demand_proof(run: Path, receipt: dict[str, Any], probes: int) -> None:
    what = receipts.measure_of(receipt["probes"])
    if not receipt["passed"]:
        raise ModelError(
            f"the saved model differs from the trained one: {what} by up to {receipt['max_abs_logprob_diff']:.3g}, "
            f"tolerance {receipt['tolerance']:.3g}",
            where=str(run / "final"),
            remedy="the checkpoint is intact; please report this with receipt.json",
            code="reread_differs",
        )
    if probes and receipt["max_abs_logprob_change_from_base"] == 0.0:
        raise ModelError(
            f"nothing was learned: the trained model gives exactly the {what} of its start",
            where=str(run / "final"),
            remedy="raise optim.lr or train longer; see metrics.jsonl",
            code="nothing_learned",
        )
