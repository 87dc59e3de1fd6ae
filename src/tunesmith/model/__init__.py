"""Floor 1: models from transformers, adapters from PEFT, and what we own around them: layout, attention, head, proof."""
