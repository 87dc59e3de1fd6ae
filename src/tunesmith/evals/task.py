"""What can be asked of a model, by name: a likelihood, an answer to be graded, or a choice among options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.core.errors import GradeError, RecipeError, did_you_mean
from tunesmith.core.ports import Grader
from tunesmith.core.types import Grade
from tunesmith.evals.rows import Case, as_text
from tunesmith.grade import GRADERS, grader

Kind = Literal["likelihood", "answer", "options"]
Spec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A task of the table: how it is measured, by which grader, and what its number is called."""

    kind: Kind
    metric: str
    grader: str = ""


TASKS: Mapping[str, Row] = {
    "perplexity": Row("likelihood", "perplexity"),
    "exact_match": Row("answer", "accuracy", "exact"),
    "contains": Row("answer", "accuracy", "contains"),
    "regex": Row("answer", "accuracy", "regex"),
    "numeric": Row("answer", "accuracy", "numeric"),
    "json_valid": Row("answer", "valid", "json_valid"),
    "json_fields": Row("answer", "fields", "json_fields"),
    "choice": Row("options", "accuracy"),
    "choice_answer": Row("answer", "accuracy", "choice"),
}


@dataclass(frozen=True)
class Task:
    """One task with its settings; `label` is its name in the scores."""

    name: str
    label: str
    kind: Kind
    metric: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def grade(self, case: Case, answer: str) -> Grade:
        """The grade of an answer to a case. Raises GradeError with the row's key when the truth cannot be graded against."""
        prompt = case.prompt()
        try:
            return self._grader(case)(as_text(prompt.messages), answer, prompt.truth)
        except GradeError as error:
            raise GradeError(error.message, where=f"{case.key}: {error.where}", remedy=error.remedy, code=error.code) from error

    def _grader(self, case: Case) -> Grader:
        own = {"options": case.options} if TASKS[self.name].grader == "choice" and case.options else {}
        return grader(TASKS[self.name].grader, {**self.settings, **own})


def parse_tasks(specs: Sequence[Spec]) -> list[Task]:
    """The tasks of names, or of mappings {name, label, settings of the grader ...}.

    Raises RecipeError for an unknown name or setting, and for two tasks of one label.
    """
    tasks: list[Task] = []
    for place, spec in enumerate(specs):
        task = _parse(spec, f"tasks.{place}")
        if any(task.label == other.label for other in tasks):
            raise RecipeError(
                f"two tasks are called '{task.label}'", where=f"tasks.{place}", remedy="give one of them a label", code="same_task"
            )
        tasks.append(task)
    if not tasks:
        raise RecipeError("no task is named", where="tasks", remedy=f"name some of: {', '.join(TASKS)}", code="no_task")
    return tasks


def _parse(spec: Spec, where: str) -> Task:
    tree = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(tree.pop("name", ""))
    label = str(tree.pop("label", name))
    if name not in TASKS:
        raise RecipeError(
            f"unknown task '{name}'{did_you_mean(name, TASKS)}",
            where=where,
            remedy=f"use one of: {', '.join(TASKS)}",
            code="unknown_name",
        )
    row = TASKS[name]
    if row.kind == "answer":
        GRADERS.check(row.grader, tree, where=where)
    else:
        known = ["options"] if row.kind == "options" else []
        for key in tree:
            if key not in known:
                raise RecipeError(
                    f"the task '{name}' has no setting '{key}'{did_you_mean(key, known)}",
                    where=f"{where}.{key}",
                    remedy=f"its settings are: {', '.join(known) or 'none'}",
                    code="unknown_setting",
                )
    metric = "accuracy" if tree.get("every") else row.metric
    return Task(name, label, row.kind, metric, tree)
