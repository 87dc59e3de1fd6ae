"""The receipt of a run: what went in (hashes), and proof that what was written is what was trained (probes)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError

from tunesmith.core.errors import CheckpointError, ModelError
from tunesmith.core.files import file_hash, folder_hash, read_json
from tunesmith.core.recipe import Recipe
from tunesmith.core.types import Tokens
from tunesmith.data.dataset import TokenSet
from tunesmith.data.pack import pack
from tunesmith.data.prepare import Prepared
from tunesmith.evals.report import environment
from tunesmith.model import fuse
from tunesmith.model.load import choose_device
from tunesmith.model.policy import Policy
from tunesmith.model.reread import load_plain, plain_logprobs, plain_scores
from tunesmith.model.reward import head_of
from tunesmith.model.tokenizer import resolve
from tunesmith.training.state import Identity

PROBES = 4
PROBE_ANSWER = 32
PROBE_PROMPT = 480
PROBE_PASS = 1024  # tokens
# Adding floats in another order moves a log-probability by about this much; bf16 keeps 8 bits of mantissa. Larger numbers move by more.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
USUAL = 10.0  # the size up to which these hold
USUAL_SCORE = 4.0  # the same of scores: no softmax takes out what is common to all


def precision(policy: Policy) -> str:
    """fp32 or bf16: what the model's products are computed in and what is saved."""
    return "bf16" if policy.dtype == torch.bfloat16 else "fp32"


def probe_rows(rows: TokenSet, *, scalar: bool = False) -> list[Tokens]:
    """Short pieces of the first rows: a prompt of at most 480 ids and up to 32 trained ids that follow it.

    For a reward model (`scalar`) rows of at most 512 ids, whole, with the places at which it is read.
    """
    probes = []
    for place in range(len(rows)):
        row = rows[place]
        trained = np.flatnonzero(row.train)
        if not len(trained):
            continue
        if scalar:
            if len(row) <= PROBE_PROMPT + PROBE_ANSWER:
                probes.append(Tokens(row.ids, (row.train != 0).astype(np.float32), row.key))
            if len(probes) == PROBES:
                break
            continue
        start = int(trained[0])
        stop = start + 1
        while stop < len(row) and row.train[stop] and stop - start < PROBE_ANSWER:
            stop += 1
        if start > PROBE_PROMPT:
            continue
        train = np.zeros(stop, np.float32)
        train[start:stop] = 1
        probes.append(Tokens(row.ids[:stop], train, row.key))
        if len(probes) == PROBES:
            break
    return probes


@torch.no_grad()
def live_numbers(policy: Policy, probes: Sequence[Tokens]) -> list[list[float]]:
    """What the model in memory gives for the probes, log-probabilities or scores, in as few passes as training would take."""
    out: list[list[float]] = [[] for _ in probes]
    for batch in pack([replace(probe, key=str(place)) for place, probe in enumerate(probes)], PROBE_PASS) if probes else []:
        with fuse.exact(policy.model):  # what is saved is read by others in full precision
            outputs = policy.rate(batch) if policy.scalar else policy.score(batch)
        values = outputs.logp if outputs.score is None else outputs.score
        for owner, value in zip(outputs.row.tolist(), values.float().tolist(), strict=True):
            out[int(batch.segments[owner].key)].append(value)
    return out


def measure_of(probes: Sequence[Mapping[str, Any]]) -> str:
    """What the probes of a receipt compare, in words."""
    return "scores" if _scalar(probes) else "log-probabilities"


def _scalar(probes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the probes of a receipt are those of a reward model."""
    return any("places" in probe for probe in probes)


def split_probe(probe: Tokens) -> tuple[list[int], list[int]]:
    """Prompt ids and answer ids of a probe."""
    start = int(np.flatnonzero(probe.train)[0])
    return probe.ids[:start].tolist(), probe.ids[start:].tolist()


def largest_difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """The largest absolute difference of two lists of log-probabilities; NaN counts as infinite."""
    pairs = [(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)]
    return max((abs(a - b) if a == a and b == b else float("inf") for a, b in pairs), default=0.0)


def tolerance_of(dtype: str, values: Sequence[Sequence[float]], *, scalar: bool = False) -> float:
    """How far two readings of these log-probabilities, or scores (`scalar`), may lie apart by rounding alone."""
    size = max((abs(value) for row in values for value in row), default=0.0)
    return TOLERANCE[dtype] * max(1.0, size / (USUAL_SCORE if scalar else USUAL))


def by_rounding(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]], dtype: str, *, scalar: bool = False) -> bool:
    """Whether two readings differ by rounding alone: everywhere within the tolerance.

    In bf16 a token that the model is undecided about may fall further to one side (up to four times) where the mean is within a tenth.
    """
    largest, tolerance = largest_difference(left, right), tolerance_of(dtype, right, scalar=scalar)
    if largest <= tolerance or dtype != "bf16" or not largest <= 4 * tolerance:
        return largest <= tolerance
    gaps = [abs(a - b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)]
    return sum(gaps) / len(gaps) <= tolerance / 10


def reread(final: Path, probes: Sequence[Tokens], live: Sequence[Sequence[float]], dtype: str, device: str) -> dict[str, Any]:
    """Load `final` with plain transformers or PEFT and compare its log-probabilities, or scores, with those of the model in memory."""
    model = load_plain(final, dtype, device)
    scalar = head_of(str(final)) == "score"
    rows = [_row(probe, scalar=scalar) for probe in probes]
    said = _said(model, rows)
    difference = largest_difference(said, live)
    tolerance = tolerance_of(dtype, live, scalar=scalar)
    rows = [{**row, "scores" if "places" in row else "logprobs": values} for row, values in zip(rows, said, strict=True)]
    return {
        "probes": rows,
        "dtype": dtype,
        "max_abs_logprob_diff": difference,
        "tolerance": tolerance,
        "passed": by_rounding(said, live, dtype, scalar=scalar),
    }


def _row(probe: Tokens, *, scalar: bool) -> dict[str, Any]:
    """A probe as the receipt keeps it: prompt and answer ids, or all ids and the places at which a reward model is read."""
    if scalar:
        return {"key": probe.key, "ids": probe.ids.tolist(), "places": np.flatnonzero(probe.train).tolist()}
    prompt, answer = split_probe(probe)
    return {"key": probe.key, "prompt_ids": prompt, "ids": answer}


def _said(model: Any, rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """What a plainly loaded model gives for the receipt's probes."""
    if rows and "places" in rows[0]:
        return plain_scores(model, [row["ids"] for row in rows], [row["places"] for row in rows])
    return plain_logprobs(model, [row["prompt_ids"] for row in rows], [row["ids"] for row in rows])


def model_hash(folder: str, revision: str | None) -> str:
    """SHA-256 of a model folder's weights and configuration; of the cached snapshot for a hub id."""
    path = Path(folder)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(folder, revision=revision, local_files_only=True))
    return folder_hash(path, (".safetensors", ".bin", "config.json"))


def identify(recipe: Recipe, prepared: Prepared, base_hash: str) -> Identity:
    """What a run is made of: recipe, rows, template and base weights (their `model_hash`), a named reference model's too."""
    data = prepared.train.hash + (prepared.validation.hash if prepared.validation else "")
    if recipe.reference.model not in ("start", "base"):
        base_hash += model_hash(resolve(recipe.reference.model), None)
    return Identity(recipe.identity(), data, prepared.template.hash, base_hash)


def code_hash() -> str:
    """SHA-256 of the installed package's source."""
    return folder_hash(Path(__file__).parents[1], (".py", ".jinja"))


def final_hash(final: Path) -> dict[str, str]:
    """SHA-256 of every file of the final folder."""
    return {path.relative_to(final).as_posix(): file_hash(path) for path in sorted(final.rglob("*")) if path.is_file()}


def verify(run: Path, device: str) -> dict[str, Any]:
    """Compare a finished run with its receipt: hashes of final/, and the log-probabilities of the probes read anew.

    Raises CheckpointError when there is no finished run, and ModelError (final_unreadable) when what is there cannot be loaded.
    """
    if not (run / "receipt.json").exists():
        raise CheckpointError("there is no receipt", where=str(run), remedy="name the folder of a finished run", code="no_receipt")
    stored = read_json(run / "receipt.json")
    now = final_hash(run / "final")
    then = stored["hashes"]["final"]
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    probes = stored["probes"]
    place = str(choose_device(device))
    try:
        if not (run / "final").is_dir():
            raise FileNotFoundError("the folder is gone")
        model = load_plain(run / "final", stored["dtype"], place)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"final/ cannot be read ({' '.join(str(error).split())[:200]}); changed since training: {', '.join(changed) or 'nothing'}",
            where=str(run / "final"),
            remedy="put the old files back, or remove the folder and run the training command again",
            code="final_unreadable",
        ) from error
    said, kept = _said(model, probes), [p["scores"] if "places" in p else p["logprobs"] for p in probes]
    difference = largest_difference(said, kept)
    return {
        "run": str(run),
        "changed_files": changed,
        "probes": len(probes),
        "max_abs_logprob_diff": difference,
        "tolerance": stored["tolerance"],
        "measure": measure_of(probes),
        "passed": not changed and by_rounding(said, kept, stored["dtype"], scalar=_scalar(probes)),
    }


def machine() -> dict[str, Any]:
    """What this machine offers."""
    found = environment("cuda:0" if torch.cuda.is_available() else "cpu")
    found |= {
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "free_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "bf16": bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)),
    }
    for name in ("tensorboard", "wandb", "mlflow", "trackio", "trl"):
        found[name] = "installed" if importlib.util.find_spec(name) else "not installed"
    return found
