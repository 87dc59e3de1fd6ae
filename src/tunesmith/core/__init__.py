"""Floor 0: types, recipe, tables, errors, files, log, seeds. Knows no tensor and no text format."""
