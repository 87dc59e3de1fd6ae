"""Sampling: prompts as token ids in, completions with their log-probabilities out."""
