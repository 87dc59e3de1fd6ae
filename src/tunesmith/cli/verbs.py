"""Every verb, in the order of `tunesmith --help`."""

from tunesmith.cli import chat, check, data, demo, evaluate, generate, schema, score, show, train, verify

__all__ = ["chat", "check", "data", "demo", "evaluate", "generate", "schema", "score", "show", "train", "verify"]
