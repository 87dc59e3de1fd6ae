"""Every verb, in the order of `tunesmith --help`."""

from tunesmith.cli import check, demo, evaluate, generate, schema, score, show, train, verify

__all__ = ["check", "demo", "evaluate", "generate", "schema", "score", "show", "train", "verify"]
