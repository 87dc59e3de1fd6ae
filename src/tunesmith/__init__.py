"""tunesmith: a language model from raw rows to a served and proven model."""
__version__ = "0.1.0"
