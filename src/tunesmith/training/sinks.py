"""Where the numbers of a run go: metrics.jsonl always, a progress bar or lines, and trackers by name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.core.errors import RecipeError
from tunesmith.core.files import write_jsonl
from tunesmith.core.log import logger
from tunesmith.core.ports import Sink


class JsonLines:
    """metrics.jsonl: one object per step, cut back to the resumed step so that no step stands twice."""

    def __init__(self, path: Path, done: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= done]
        write_jsonl(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a killed process left half-written is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


SHOWN = ("accuracy", "reward_margin", "score_margin", "kl")  # of an objective's own metrics, on the terminal


def said(values: Mapping[str, float]) -> str:
    """The validation among a step's values, in words."""
    others = [f"{name} {values[f'eval/{name}']:.3f}" for name in ("perplexity", *SHOWN) if f"eval/{name}" in values]
    return f"validation loss {values['eval/loss']:.4f}" + (f" ({', '.join(others)})" if others else "")


class Lines:
    """One plain line per event, about twenty in a run, for logs and pipes."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._every = max(1, total // 20)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Say the step when it is the first, the last, a validation, or one of the twenty."""
        evaluated = "eval/loss" in values
        if step in (1, self._total) or step % self._every == 0 or evaluated:
            words = [f"step {step}/{self._total}", f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
            words += [f"grad {values['grad_norm']:.3f}", f"{values['tokens_per_s']:.0f} tok/s", f"mfu {values['mfu']:.2f}"]
            words.append(f"{values['memory_gb']:.2f} GB")
            words += [f"{name} {values[name]:.3f}" for name in SHOWN if name in values]
            if evaluated:
                words.append(said(values))
            logger.info("  ".join(words))

    def close(self) -> None:
        """Nothing to end."""


class Bar:
    """A progress bar on a terminal: loss, validation loss, tokens per second, memory, time left."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, said="")
        self._eval = ""
        self._bar.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar."""
        if "eval/loss" in values:
            right = f" accuracy {values['eval/accuracy']:.2f}" if "eval/accuracy" in values else ""
            self._eval = f" [cyan]valid {values['eval/loss']:.4f}{right}[/]"
        said = f"loss [green]{values['loss']:.4f}[/]{self._eval} "
        said += f"{values['tokens_per_s']:.0f} tok/s mfu {values['mfu']:.2f} {values['memory_gb']:.1f} GB"
        self._bar.update(self._task, completed=step, said=said)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


# Tracker -> the package that must be there.
PACKAGES = {name: name for name in ("tensorboard", "wandb", "mlflow", "trackio")}


def missing_package(package: str) -> RecipeError:
    """The error for a tracker whose package is not installed."""
    return RecipeError(
        f"the tracker needs the package '{package}', which is not installed",
        where="run.trackers",
        remedy=f"pip install {package}, or take it out of run.trackers",
        code="missing_package",
    )


def _import(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_package(package) from error


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, recipe: dict[str, Any]) -> None:
        self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))
        self._writer.add_text("recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self._writer.close()


class Tracker:
    """Weights & Biases, MLflow or Trackio: each has init, log and finish under its own names."""

    def __init__(self, name: str, run: Path, recipe: dict[str, Any]) -> None:
        self._name = name
        self._module = _import(name, name)
        if name == "mlflow":
            self._module.set_experiment("tunesmith")
            self._module.start_run(run_name=run.name)
            self._module.log_params({"recipe": json.dumps(recipe)[:6000]})
        else:
            self._module.init(project="tunesmith", name=run.name, config=recipe)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record for the step."""
        if self._name == "mlflow":
            self._module.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)
        else:
            self._module.log(dict(values), step=step)

    def close(self) -> None:
        """End the run at the tracker."""
        if self._name == "mlflow":
            self._module.end_run()
        else:
            self._module.finish()


class Sinks:
    """All sinks of a run as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the step to every sink."""
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(run: Path, trackers: Sequence[str], recipe: dict[str, Any], *, total: int, done: int) -> Sinks:
    """The sinks of a run. Raises RecipeError (missing_package) when a tracker is not installed."""
    named: list[Sink] = [TensorBoard(run, recipe) if name == "tensorboard" else Tracker(name, run, recipe) for name in trackers]
    shown: Sink = Bar(total, done) if sys.stderr.isatty() else Lines(total)
    return Sinks([JsonLines(run / "metrics.jsonl", done), *named, shown])
