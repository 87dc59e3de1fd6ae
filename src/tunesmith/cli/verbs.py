"""Every verb, in the order of `tunesmith --help`."""

from tunesmith.cli import check, data, demo, evaluate, generate, schema, score, show, train, verify

__all__ = ["check", "data", "demo", "evaluate", "generate", "schema", "score", "show", "train", "verify"]
