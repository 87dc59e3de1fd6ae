"""Graders: an answer and the truth in, a grade with its reason out. The same rows serve evaluation and reward."""

from tunesmith.grade.table import GRADERS, grader

__all__ = ["GRADERS", "grader"]
